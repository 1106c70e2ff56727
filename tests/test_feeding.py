"""Fed runs: examples and clients' rows off the device, the same bits as with all on it."""

import functools
import re
import shutil
import time
from concurrent import futures
from typing import Any
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjaxprune as fjp
from fedjaxprune import types
from fedjaxprune.data import conversion, mapped, parquet_store, stores
from fedjaxprune.errors import ConfigError, DataError, RunFolderError
from fedjaxprune.experiment.config import resolve
from fedjaxprune.experiment.execution import memory
from fedjaxprune.experiment.execution import placing as placing_lib
from fedjaxprune.experiment.feeding import feed as feed_lib
from fedjaxprune.experiment.feeding import feeder, homes, places, rows, saved_rows
from fedjaxprune.experiment.feeding.homes import Home
from fedjaxprune.experiment.folder import checkpoints, layout, record
from fedjaxprune.experiment.run import build, composing, examples, fed, loop
from fedjaxprune.experiment.run.listener import Listener
from fedjaxprune.federated import cohort, sampling
from fedjaxprune.models import adapters
from fedjaxprune.rounds import feeding, server_work, simulation
from tests import stub

RNG = np.random.default_rng(0)
SIZES = (3, 0, 5, 1)
STORE = stores.of_arrays(
    {"inputs": np.arange(18, dtype=np.float64).reshape(9, 2), "labels": np.arange(9)},
    np.array([8, 7, 6, 0, 1, 2, 3, 4, 5]),
    np.cumsum([0, *SIZES]),
)
ROW = {"residual": np.arange(3, dtype=np.float32), "mask": np.ones((2, 5), bool), "none": ()}


def test_a_store_fetches_clients_one_after_the_other():
    found = STORE.fetch(np.array([2, 0]))
    assert found["labels"].tolist() == [0, 1, 2, 3, 4, 8, 7, 6]
    assert STORE.like["inputs"].dtype == np.float32
    assert STORE.sizes.tolist() == list(SIZES)
    assert stores.of_value(STORE).like == STORE.like
    wrong: Any
    for wrong, sentence in (
        (STORE._replace(sizes=np.array([0.5])), "vector of numbers of examples, got float64"),
        (STORE._replace(sizes=np.zeros(3, int)), "at least one example, got none"),
        (STORE._replace(sizes=np.array([1, 1])), r"arrays of shape \(1, 2\) for 1 clients"),
    ):
        with pytest.raises(DataError, match=sentence):
            stores.of_value(wrong)
    for fetch, sentence in (
        (lambda ids: {"inputs": np.zeros(3)}, "must fetch PyTreeDef"),
        (lambda ids: {"inputs": np.zeros((3, 2)), "labels": np.zeros(3)}, "int32, got float64"),
    ):
        with pytest.raises(DataError, match=sentence):
            stores.fetched(STORE._replace(fetch=fetch), np.array([0]))


@pytest.mark.parametrize(
    ("order", "offsets", "sentence"),
    [
        ([0, -1], [0, 1, 2], r"must hold rows in \[0, 3\), got -1 to 0"),
        ([0, 3], [0, 1, 2], r"must hold rows in \[0, 3\), got 0 to 3"),
        ([0, 1], [0, 1, 3], r"from 0 to the 2 entries of its order, got \[0, 1, 3\]"),
        ([0, 1], [1, 2], r"from 0 to the 2 entries of its order, got \[1, 2\]"),
        ([0, 1], [0, 2, 1, 2], r"must not fall, .* got \[0, 2, 1, 2\]"),
        ([0, 1], [0], r"must not fall, .* got \[0\]"),
    ],
)
def test_a_store_has_rows_that_exist(order, offsets, sentence):
    with pytest.raises(DataError, match=sentence):
        stores.of_arrays({"inputs": np.zeros((3, 2))}, np.array(order), np.array(offsets))


def test_a_population_of_a_cohort_leaves_all_others_out():
    pantry = feeding.stock(STORE, cohort_size=2, reads=(3,))
    assert pantry.capacity == 5 + 3 + 1
    people = feeding.population(pantry, np.array([2, 1, 2, -1, 9]))
    assert people.offsets.tolist() == [0, 0, 0, 5, 6]
    assert people.examples["labels"].tolist() == [0, 1, 2, 3, 4, 5, 0, 0, 0]
    assert people.examples["labels"].dtype == np.int32
    shapes = feeding.shapes(pantry)
    chex.assert_trees_all_equal_shapes_and_dtypes(people, shapes)
    assert float(types.count_examples(people)) == 9
    assert isinstance(people.whole, types.Whole)
    assert not people.whole.is_wide
    nobody = feeding.population(pantry._replace(reads=np.array([], int)), np.array([1]))
    assert not nobody.offsets.any()
    with pytest.raises(ValueError, match="client_id must be less than 4, got 4"):
        feeding.stock(STORE, cohort_size=2, reads=(4,))
    assert feeding.stock(STORE, cohort_size=1, reads="everyone").capacity == 9


def test_clients_are_dealt_on_the_host_as_in_a_round():
    dealt = jax.jit(cohort._deal, static_argnums=(1, 2))
    for _ in range(8):
        sizes = RNG.choice([0, 3, 3, 7, 40], size=11)
        _, slots = dealt(jnp.asarray(sizes, jnp.int32), 3, 4)
        found = cohort.deal(sizes[sizes > 0], num_devices=3, num_slots=4)
        assert found.tolist() == (np.asarray(slots)[sizes > 0] // 4).tolist()
    # Part of a cohort goes where its examples are, however unequal that is.
    sizes, where = jnp.array([5, 0, 9], jnp.int32), jnp.array([2, 2, 2], jnp.int32)
    clients, slots = dealt(sizes, 3, 2, where)
    assert slots.tolist() == [5, 0, 4]
    assert clients.tolist() == [1, 3, 3, 3, 2, 0]


def test_a_population_in_parts_has_each_client_with_its_device():
    pantry = feeding.stock(STORE, cohort_size=4, num_parts=2)
    assert (pantry.capacity, pantry.part_capacity) == (9, 8)  # of two clients of 5 and 3
    whole = feeding.population(pantry, np.arange(4))
    assert whole.offsets.tolist() == [0, 3, 3, 8, 9]
    assert whole.examples["labels"][:5].tolist() == [0, 1, 2, 3, 4]  # the largest client
    assert whole.examples["labels"][8:12].tolist() == [8, 7, 6, 5]
    assert whole.order.tolist() == [8, 9, 10, 0, 1, 2, 3, 4, 11]
    chex.assert_trees_all_equal_shapes_and_dtypes(whole, feeding.shapes(pantry))
    half = feeding.population(pantry, np.arange(4), parts=[1])
    np.testing.assert_array_equal(half.examples["inputs"], whole.examples["inputs"][8:])
    chex.assert_trees_all_equal(half._replace(examples=()), whole._replace(examples=()))
    with pytest.raises(ValueError, match="each client once, and client 2 was drawn 2 times"):
        feeding.population(pantry, np.array([2, 0, 2]))
    everybody = jnp.arange(4)
    members = types.Cohort(everybody, everybody >= 0, ())
    given: Any = (jax.random.key(0), None, {}, (), members, whole)
    with pytest.raises(ValueError, match=r"is in 2 parts, .* but the mesh has 1 devices"):
        cohort.run(*given, chunk_size=1)
    server = feeding.stock(STORE, cohort_size=2, reads=(3,), num_parts=2)
    assert server.whole.num_parts == 1


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_rows_are_those_of_the_start_until_they_are_written(place, tmp_path):
    store = rows.make(ROW, num_clients=6, folder=tmp_path if place == "disk" else None)
    chex.assert_trees_all_equal(store.read(np.array([5])), jax.tree.map(lambda x: x[None], ROW))
    ids = np.array([4, 1])
    written = {
        "residual": RNG.normal(size=(2, 3)).astype(np.float32),
        "mask": RNG.random((2, 2, 5)) < 0.5,
        "none": (),
    }
    store.write(ids, written)
    chex.assert_trees_all_equal(store.read(ids), written)
    assert store.kept.is_written.tolist() == [False, True, False, False, True, False]
    assert [array.shape[1] for array in store.kept.arrays] == [2, 12]  # ten bits, three floats


def test_rows_with_long_names_have_files_of_their_own(tmp_path):
    name = "a" * 240
    row = {"first": {name: np.zeros(2, np.float32)}, "other": {name: np.ones(2, np.float32)}}
    store = rows.make(row, num_clients=2, folder=tmp_path)
    store.write(np.array([1]), jax.tree.map(lambda leaf: leaf[None] + 2, row))
    found = store.read(np.array([1]))
    assert (found["first"][name].tolist(), found["other"][name].tolist()) == ([[2, 2]], [[3, 3]])


def test_what_a_later_round_promised_is_written_last():
    store = rows.make(ROW, num_clients=6)
    here = np.array([2, 3]), np.array([True, False])
    for number in (4, 3):
        row = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), ROW)
        store.promise(number, here, {**row, "residual": np.full((2, 3), np.float32(number))})
    store.settle(3)
    assert store.read(np.array([2]))["residual"][0, 0] == 3
    store.settle(9)
    assert store.read(np.array([2]))["residual"][0, 0] == 4
    assert not store.kept.is_written[3]
    store.promise(10, (here[0], np.array([False, False])), row)  # nobody took part
    store.settle(10)
    assert np.flatnonzero(store.kept.is_written).tolist() == [2]


def test_rows_of_the_round_before_are_found_where_they_are():
    before = np.array([7, 2, 5, 2]), np.array([True, True, False, True])
    found = feed_lib._places(np.array([2, 5, 7, 1]), before)
    assert found.tolist() == [3, -1, 0, -1]  # the last of two, an absent one, one, nobody
    assert feed_lib._places(np.array([2]), None).tolist() == [-1]
    nobody = np.array([7]), np.array([False])
    assert feed_lib._places(np.array([7]), nobody).tolist() == [-1]


def test_snapshots_hold_what_was_written_since_the_last_whole_one(tmp_path):
    store = rows.make(ROW, num_clients=9)

    def write(*ids):
        row = {**ROW, "residual": RNG.normal(size=3).astype(np.float32)}
        many = jax.tree.map(lambda leaf: np.stack([leaf] * len(ids)), row)
        store.write(np.array(ids), many)

    def restored(number):
        fresh = rows.make(ROW, num_clients=9)
        assert saved_rows.is_whole(tmp_path, number, fresh.kept, fingerprint=7)
        saved_rows.restore(tmp_path, number, fresh.kept)
        return fresh

    def size(number):
        return (tmp_path / str(number) / saved_rows.IDS).stat().st_size // 8

    write(0, 1, 2, 3, 4)
    saved_rows.save(tmp_path, 1, store, fingerprint=7)()
    write(1, 7)
    saved_rows.save(tmp_path, 2, store, fingerprint=7)()
    assert (size(1), size(2)) == (5, 2)
    again = restored(2)
    everybody = np.arange(9)
    chex.assert_trees_all_equal(again.read(everybody), store.read(everybody))
    np.testing.assert_array_equal(again.kept.is_changed, store.kept.is_changed)
    write(2, 3)
    saved_rows.save(tmp_path, 3, store, fingerprint=7)()
    assert size(3) == 6  # whole again
    saved_rows.remove(tmp_path, 2, Home(), keep=())
    assert sorted(place.name for place in tmp_path.iterdir()) == ["1", "2"]
    assert not saved_rows.is_whole(tmp_path, 2, store.kept, fingerprint=8)  # of another run
    damaged = tmp_path / "1" / saved_rows.IDS
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    assert not saved_rows.is_whole(tmp_path, 2, store.kept, fingerprint=7)
    assert not saved_rows.is_whole(tmp_path, 8, store.kept, fingerprint=7)


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_a_snapshot_has_no_row_of_a_later_round(place, tmp_path, monkeypatch):
    folder = tmp_path if place == "disk" else None
    store, saved = rows.make(ROW, num_clients=40, folder=folder), tmp_path / "saved"
    everybody = np.arange(40)

    def write(*ids):
        many = jax.tree.map(lambda leaf: np.stack([leaf] * len(ids)), ROW)
        many["residual"] = RNG.normal(size=(len(ids), 3)).astype(np.float32)
        many["mask"] = RNG.random((len(ids), 2, 5)) < 0.5
        store.write(np.array(ids), many)

    def saved_meanwhile(number):
        """Save, and write rows meanwhile: some that are read already, are next, are to be read."""
        wanted = store.read(everybody)
        blocks = saved_rows._blocks

        def blocks_fn(ids, array):
            for at, some in enumerate(blocks(ids, array)):
                if 0 < at < 5:
                    write(at - 1, at, 29 - at, 39)
                yield some

        write_fn = saved_rows.save(saved, number, store, fingerprint=7)
        write(0, 20, 38)
        with monkeypatch.context() as patch:
            patch.setattr(saved_rows, "_blocks", blocks_fn)
            write_fn()
        fresh = rows.make(ROW, num_clients=40)
        saved_rows.restore(saved, number, fresh.kept)
        chex.assert_trees_all_equal(fresh.read(everybody), wanted)

    monkeypatch.setattr(saved_rows, "_AT_ONCE", 1)  # a row in each block
    write(*range(30))
    saved_meanwhile(1)  # rows 38 and 39 are written for the first time
    write(1, 12)
    saved_meanwhile(2)
    about = saved_rows._about(saved / "2")
    assert about is not None
    assert about["base"] == 1
    before = store.read(everybody)
    saved_rows.save(saved, 3, store, fingerprint=7)()
    fresh = rows.make(ROW, num_clients=40)
    saved_rows.restore(saved, 3, fresh.kept)
    chex.assert_trees_all_equal(fresh.read(everybody), before)


def test_rounds_wait_for_a_snapshot_that_would_take_much_memory():
    store = rows.make(ROW, num_clients=40)
    many = jax.tree.map(lambda leaf: np.stack([leaf] * 40), ROW)
    store.write(np.arange(40), many)
    frozen = store.freeze(store.kept.is_written)
    few = jax.tree.map(lambda leaf: leaf[:5], many)
    present = np.ones(5, bool)
    for number in (1, 2):
        store.promise(number, (np.arange(5) + 5 * number, present), few)
    store.settle(1)
    assert frozen.is_full()
    with futures.ThreadPoolExecutor(1) as pool:
        settled = pool.submit(store.settle, 2)
        with pytest.raises(TimeoutError):
            settled.result(timeout=0.1)
        for leaf in range(2):
            frozen.read(leaf, np.arange(20))
        settled.result(timeout=60)
    frozen.end(True)
    assert np.flatnonzero(store.kept.is_changed).tolist() == list(range(5, 15))


def test_what_is_damaged_beside_new_rows_does_no_harm(tmp_path):
    store = rows.make(ROW, num_clients=9)
    many = jax.tree.map(lambda leaf: np.stack([leaf] * 9), ROW)
    store.write(np.arange(9), many)
    saved_rows.save(tmp_path, 1, store, fingerprint=7)()
    (tmp_path / "1" / saved_rows.ABOUT).write_text("{")
    store.write(np.array([4]), jax.tree.map(lambda leaf: leaf[None], ROW))
    saved_rows.save(tmp_path, 2, store, fingerprint=7)()  # whole, as no base can be read
    saved_rows.remove(tmp_path, 2, Home(), keep=(1, 2))
    assert saved_rows.is_whole(tmp_path, 2, store.kept, fingerprint=7)
    about = tmp_path / "2" / saved_rows.ABOUT
    about.write_text(about.read_text().replace('"round": 2', '"round": 3'))
    assert not saved_rows.is_whole(tmp_path, 2, store.kept, fingerprint=7)


def test_rows_are_kept_saved_and_found_again_by_any_number_of_processes(tmp_path):
    def stores_of(number):
        team = [Home(one, number) for one in range(number)]
        return [rows.make(ROW, num_clients=7, home=home) for home in team]

    def write(team, *ids):
        many = jax.tree.map(lambda leaf: np.stack([leaf] * len(ids)), ROW)
        many["residual"] = RNG.normal(size=(len(ids), 3)).astype(np.float32)
        for store in (whole, *team):
            store.write(np.array(ids), many)

    def save(team, number, keep=()):
        for store in reversed(team):  # the first process removes what others saved before
            saved_rows.save(tmp_path, number, store, fingerprint=7)()
            saved_rows.remove(tmp_path, number, store.kept.home, keep=keep)

    def restored(number, processes):
        team = stores_of(processes)
        for store in team:
            assert saved_rows.is_whole(tmp_path, number, store.kept, fingerprint=7)
            saved_rows.restore(tmp_path, number, store.kept)
        found = [store.read(everybody)["residual"] for store in team]
        np.testing.assert_array_equal(sum(found), whole.read(everybody)["residual"])
        masks = [store.read(everybody)["mask"] for store in team]
        assert np.sum(masks, axis=0).max() == 1  # each client at one home
        return team

    everybody, (whole,) = np.arange(7), stores_of(1)
    pair = stores_of(2)
    assert [len(store.kept.is_written) for store in pair] == [4, 3]
    write(pair, 0, 1, 2, 3, 6)
    save(pair, 1)
    write(pair, 2, 5)
    save(pair, 2, keep=(1,))
    three = restored(2, 3)
    write(three, 6)
    save(three, 3, keep=(2,))
    (one,) = restored(3, 1)
    write([one], 1)
    save([one], 4, keep=(3,))
    pair = restored(4, 2)
    save(pair, 5)
    assert {place.name for place in tmp_path.iterdir()} == {"0-of-2", "1-of-2"}
    shutil.rmtree(tmp_path / "1-of-2" / "5")
    assert not saved_rows.is_whole(tmp_path, 5, whole.kept, fingerprint=7)


def test_rows_of_several_homes_come_together_with_all_bits():
    mesh = cohort.make_mesh(devices=jax.devices()[:2])
    given = {
        "float": np.array([[-0.0, np.nan], [1e-42, 3]], np.float32),
        "half": np.array([-0.0, 2], np.float16),
        "whole": np.array([-7, 2], np.int32),
        "is": np.array([[True], [False]]),
    }
    placed = homes.place_rows(given, mesh)
    found = jax.jit(lambda rows: homes.joined(rows, mesh))(placed)
    for name, leaf in given.items():
        assert np.asarray(found[name]).tobytes() == leaf.tobytes(), name


SETTINGS = {
    **stub.settings(),
    "federation.cohort_size": 3,
    "federation.dropout_rate": 0.2,
    "federation.num_rounds": 4,
    "uplink": {"name": "top_k", "fraction": 0.2, "error_feedback": True},
    "checkpoints.every": 1,
    "evaluation.every": 4,
}


class Stopped(Exception):
    pass


def play(folder, *, examples, client_rows, stop_after=None, **changes):
    """Run a small federation; give its last parameters, and its record without times."""
    places = {"execution.examples": examples, "execution.client_rows": client_rows}
    config = resolve.resolve({**SETTINGS, **changes, **places})
    parts = build.build(config)
    folder.mkdir(exist_ok=True)

    def on_round(line):
        if line["round"] == stop_after:
            raise Stopped

    listener = Listener(round=on_round, warn=pytest.fail)
    if stop_after is not None:
        with pytest.raises(Stopped):
            loop.train(parts, folder=folder, listener=listener)
        return None
    state = loop.train(parts, folder=folder, listener=listener)
    lines = [{**line, "time_s": 0} for line in record.read(folder).lines]
    assert not (folder / layout.ROWS / "working").exists()
    return jax.device_get(state), lines


@functools.cache
def resident(folder, **changes):
    return play(folder, examples="device", client_rows="device", **changes)


@pytest.mark.usual("host-disk-1")
@pytest.mark.parametrize(
    ("examples", "client_rows", "devices"),
    [
        ("host", "device", 1),
        ("device", "host", 1),
        ("host", "host", 2),
        ("host", "disk", 1),
    ],
)
def test_a_fed_run_has_the_bits_of_a_resident_one(
    examples, client_rows, devices, tmp_path, tmp_path_factory
):
    shared = tmp_path_factory.getbasetemp() / f"resident-{devices}"
    wanted = resident(shared, **{"execution.devices": devices})
    where = {"examples": examples, "client_rows": client_rows, "execution.devices": devices}
    play(tmp_path / "stopped", stop_after=2, **where)
    chex.assert_trees_all_equal(play(tmp_path / "stopped", **where), wanted)


@pytest.mark.usual("host-host")
@pytest.mark.parametrize(
    ("examples", "client_rows"), [("host", "host"), ("host", "device"), ("device", "disk")]
)
def test_in_parts_a_run_has_the_bits_of_a_resident_one(
    examples, client_rows, tmp_path, tmp_path_factory, monkeypatch
):
    wanted = resident(tmp_path_factory.getbasetemp() / "resident-2", **{"execution.devices": 2})
    monkeypatch.setattr(placing_lib, "is_shared", lambda mesh: mesh is not None)
    where = {"examples": examples, "client_rows": client_rows, "execution.devices": 2}
    chex.assert_trees_all_equal(play(tmp_path / "parts", **where), wanted)


def test_devices_of_one_process_are_fed_parts_where_no_client_is_drawn_twice():
    mesh = cohort.make_mesh(devices=jax.devices()[:2])
    draw = sampling.uniform(num_clients=4, cohort_size=2)
    twice = sampling.with_dropout(lambda key: draw(key), probability=0.1)
    of_model = cohort.make_mesh(devices=jax.devices()[:2], model_devices=2)
    given = ((mesh, draw), (mesh, twice), (of_model, draw), (None, draw))
    assert [fed._num_parts(*one) for one in given] == [2, 1, 1, 1]


def test_a_round_in_parts_gathers_nothing_of_all_clients(monkeypatch):
    monkeypatch.setattr(placing_lib, "is_shared", lambda mesh: mesh is not None)
    number = 37
    config = resolve.resolve(
        {
            **SETTINGS,
            "data.num_clients": number,
            "execution.devices": 2,
            "execution.examples": "host",
            "execution.client_rows": "host",
        }
    )
    parts = build.build(config)
    key = jax.random.key(0)
    now = jax.eval_shape(lambda key: loop.start(key, parts), key)
    now, row = feeder.without_rows(parts.feed, now)
    assert parts.feed is not None
    assert parts.mesh is not None
    given = feed_lib.shapes(parts.feed, 0, now, row, parts.population, parts.mesh)
    everywhere = placing_lib.everywhere(parts.mesh)
    part = placing_lib.in_parts(parts.mesh)
    key, state, own, members, people = placing_lib.shapes((key, *given), everywhere)
    own = own._replace(rows=placing_lib.shapes(own.rows, part))
    people = people._replace(examples=placing_lib.shapes(people.examples, part))
    advance: Any = loop._compiled(parts.advance[0], parts, everywhere)
    compiled = advance.lower(key, state, own, members, people).compile()
    sent = re.findall(r"= (.*) (?:all|collective|reduce)-[a-z-]+\(", compiled.as_text())
    sizes = {int(size) for shapes in sent for size in re.findall(r"(?:\[|,)(\d+)", shapes)}
    assert parts.feed.cohort_sizes[0] in sizes  # rows come from their homes
    assert max(sizes) < number


def test_rows_of_a_checkpoint_that_is_being_written_are_kept(tmp_path, monkeypatch):
    write, remove, kept = checkpoints._write, saved_rows.remove, []

    def write_slowly(*given):
        time.sleep(0.2)
        write(*given)

    def remove_all_but(folder, number, home, *, keep):
        kept.append(sorted({*keep, number}))
        remove(folder, number, home, keep=keep)

    monkeypatch.setattr(checkpoints, "_write", write_slowly)
    monkeypatch.setattr(saved_rows, "remove", remove_all_but)
    play(tmp_path, examples="device", client_rows="host", **{"federation.num_rounds": 3})
    assert kept == [[1], [1, 2], [1, 2, 3]]


def test_a_checkpoint_without_its_rows_is_skipped_for_that_reason(tmp_path):
    where = {"examples": "device", "client_rows": "host"}
    play(tmp_path, stop_after=3, **where)
    (tmp_path / layout.ROWS / "2").rename(tmp_path / "elsewhere")
    said = []
    config = {**SETTINGS, "execution.client_rows": "host", "execution.examples": "device"}
    parts = build.build(resolve.resolve(config))
    loop.train(parts, folder=tmp_path, listener=Listener(warn=said.append))
    assert said == [
        "the checkpoint of round 2 is skipped, as its clients' rows are damaged, another run's, or "
        "not there."
    ]


def test_rows_that_may_fill_the_disk_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: mock.Mock(free=100))
    config = resolve.resolve({**SETTINGS, "execution.client_rows": "disk"})
    with pytest.raises(RunFolderError, match=r"may take 544 bytes of files in .*, where 100 are"):
        loop.train(build.build(config), folder=tmp_path, listener=Listener())


def test_rows_are_not_saved_where_others_would_find_the_disk_full(tmp_path, monkeypatch):
    free = iter([10**6, 10**6, 80])
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: mock.Mock(free=next(free)))
    config = resolve.resolve({**SETTINGS, "execution.client_rows": "disk"})
    with pytest.raises(OSError, match="No space left on device"):
        loop.train(build.build(config), folder=tmp_path, listener=Listener())
    assert sorted(place.name for place in (tmp_path / layout.ROWS).iterdir()) == ["1"]


def test_a_stage_that_does_not_say_whom_it_reads_is_refused_if_they_are_left_out():
    parts = build.build(resolve.resolve({**SETTINGS, "execution.examples": "host"}))
    assert parts.feed is not None
    key = jax.random.key(0)
    now = jax.eval_shape(lambda key: loop.start(key, parts), key)
    given = key, *feed_lib.shapes(parts.feed, 0, now, (), parts.population, None)

    def trace(look, *shapes, reads=()):
        def work(key, state, population):
            look(population)
            return state, server_work.no_loss()

        stage = server_work.server_round("look", work, reads=reads)
        jax.eval_shape(simulation.advance_cohort(stage), *shapes)

    looks = (
        server_work.examples_of(0),
        lambda people: people.offsets[1:] - people.offsets[:-1],
        lambda people: jnp.sum(people.order),
        lambda people: jax.tree.map(lambda leaf: leaf[:3], people.examples),
        lambda people: people.offsets.astype(jnp.float32),
    )
    for look in looks:
        with pytest.raises(ValueError, match=r"^the stage 'look' looks at clients' examples"):
            trace(look, *given)
        trace(look, *given, reads=(0,))
        trace(look, *given[:-1], parts.population)  # all of it on the device
    trace(lambda people: jnp.zeros(people.offsets.shape[0] - 1, people.order.dtype), *given)


GIB = 2**30


@pytest.mark.parametrize(
    ("sizes", "given", "wanted"),
    [
        ((2, 2), {}, ("device", "device")),
        ((8, 1), {}, ("host", "device")),  # of 10 GiB, 6 may be taken, by rows twice
        ((2, 4), {}, ("device", "host")),
        ((8, 4), {}, ("host", "host")),
        ((1, 20), {}, ("device", "disk")),
        ((8, 1), {"execution.examples": "device"}, ("device", "host")),
        ((1, 1), {"execution.client_rows": "disk"}, ("device", "disk")),
        ((2, 1), {"execution.devices": 4}, ("host", "host")),  # each of them has all
    ],
)
def test_what_does_not_fit_is_kept_off_the_device(sizes, given, wanted, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda: 10.0 * GIB)
    monkeypatch.setattr(memory, "free_host_bytes", lambda: 10.0 * GIB)
    config = resolve.resolve({**SETTINGS, **given})
    chosen = places.choose(config, places.Sizes(sizes[0] * GIB, sizes[1] * GIB))
    assert (chosen.examples, chosen.rows) == wanted
    assert bool(chosen.sentence) == (wanted != ("device", "device"))
    if wanted == ("host", "device"):
        assert chosen.sentence == (
            "8.00 GiB of examples stay in host memory or in their files; cohorts are fed to the "
            "device one round ahead, where 10.00 GiB are free."
        )


def test_a_stage_that_is_fed_more_than_there_is_room_for_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda: 100.0)
    with pytest.raises(ConfigError, match=r"a round of the stage 'train' of .* is fed .* bytes of"):
        build.build(resolve.resolve({**SETTINGS, "execution.examples": "host"}))


def test_memory_mapped_arrays_are_not_copied(tmp_path):
    data = stub.data()
    for name, values in (("inputs", data["inputs"]), ("test_inputs", data["inputs"][:9])):
        np.save(tmp_path / name, values)
        data[name] = np.load(tmp_path / f"{name}.npy", mmap_mode="r")
    data["test_labels"] = data["labels"][:9]
    dataset = conversion.as_dataset(data)
    config = resolve.resolve(SETTINGS | {"data.dataset": resolve.as_found("dataset", dataset)})
    found = examples.read(config)
    inputs: Any = found.population.examples["inputs"]
    assert np.shares_memory(inputs, data["inputs"])
    assert mapped._file(inputs) is mapped._file(data["inputs"]) is not None
    assert mapped._file(data["labels"]) is None
    for order in ("any", "forward"):
        mapped.advise(inputs, order=order)


class Hospital:
    """Clients whose examples are made when they are asked for."""

    def __init__(self, sizes):
        self.sizes = sizes
        inputs = np.random.default_rng(5).normal(size=(sum(sizes), 4)).astype(np.float32)
        self.arrays = {"inputs": inputs, "labels": np.argmax(inputs, axis=1)}
        self.offsets = np.cumsum([0, *sizes])
        self.test = inputs[:12], self.arrays["labels"][:12]

    def checksum(self):
        return int(self.arrays["inputs"].sum() * 1000)

    def fetch(self, ids):
        rows = [np.arange(*self.offsets[i : i + 2].tolist()) for i in ids]
        return jax.tree.map(lambda leaf: leaf[np.concatenate(rows)], self.arrays)


def test_a_store_of_ones_own_is_a_data_set(tmp_path):
    people = Hospital([5, 9, 0, 7, 11])
    fixed = {"execution.devices": 1, "execution.chunk_size": 1}
    given = {"model": stub.net, "federation": {"num_rounds": 3, "cohort_size": 2}, **fixed}
    run = fjp.run(given, method=stub.METHOD, data=people, folder=tmp_path / "own", batch_size=4)
    assert run.config["execution"]["examples"] == "host"
    assert run.config["data"]["num_clients"] == 5
    assert np.isfinite(run.record["train.loss"]).tolist() == [True] * 3
    for changes, sentence in (
        ({"num_clients": 4, "method": stub.METHOD}, "data.num_clients must be 5, the clients that"),
        ({"method": "snip"}, "the server needs examples of its own"),
        ({"examples": "device", "method": stub.METHOD}, "execution.examples must be host or auto"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            fjp.run(given, data=people, folder=tmp_path / "no", **changes)
    again: Any = {"method": stub.METHOD, "model": stub.net, "data": people}
    assert len(fjp.resume(tmp_path / "own", **again).record["round"]) == 3
    people.arrays["inputs"][-1] += 1
    with pytest.raises(RunFolderError, match="the data are not those of the run"):
        fjp.resume(tmp_path / "own", **again)
    people.test = people.test[0], ["yes"] * 12
    with pytest.raises(DataError, match="test labels of a client store must be numbers, got <U3"):
        fjp.run(given, data=people)
    del people.test
    with pytest.raises(DataError, match="needs test examples"):
        fjp.run(given, data=people)


def test_tokens_that_a_network_does_not_know_are_refused_when_they_are_fetched():
    texts = {"inputs": np.array([[0, 1], [2, 5]]), "labels": np.array([[1, 2], [2, 1]])}
    store = stores.of_arrays(texts, np.arange(2), np.arange(3))
    store = store._replace(test=(texts["inputs"][:1], texts["labels"][:1]))
    dataset = conversion.as_dataset(store, task="sequence", num_classes=3)
    model = adapters.from_functions(
        lambda key: {"embedding": np.zeros((3, 2))}, lambda params, x: x
    )
    known = composing.with_known_tokens(dataset, model).clients
    assert known.fetch(np.array([0]))["inputs"].tolist() == [[0, 1]]
    with pytest.raises(DataError, match=r"must fetch tokens in \[0, 3\), .* got 2 to 5"):
        known.fetch(np.array([1]))


def test_a_table_is_read_by_row_groups(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    number = 40
    table = pa.table(
        {
            "a": np.arange(number, dtype=np.float64),
            "b": -np.arange(number, dtype=np.int64),
            "label": np.arange(number) % 3,
            "who": [f"client {i % 7}" for i in range(number)],
            "missing": [None, *range(number - 1)],
            "no_number": np.where(np.arange(number) == 3, np.nan, 1.0),
            "half": np.arange(number) + 0.5,
            "large": np.full(number, 2**33 + 1),
            "huge": np.full(number, 1e300),
        }
    )
    path = tmp_path / "t.parquet"
    pq.write_table(table, path, row_group_size=6)
    test = np.zeros((2, 2), np.float32), np.array([0, 2])
    columns: Any = {"inputs": ("a", "b"), "label": "label", "client": "who", "test": test}
    store = parquet_store.of_parquet(path, **columns)
    assert store.sizes.tolist() == [6, 6, 6, 6, 6, 5, 5]
    found = store.fetch(np.array([6, 2]))
    assert found["inputs"][:, 0].tolist() == [*range(6, 40, 7), *range(2, 40, 7)]
    assert found["labels"].tolist() == [i % 3 for i in (*range(6, 40, 7), *range(2, 40, 7))]
    made = conversion.as_dataset(store)
    assert (made.num_classes, made.input_shape, len(made.train["labels"])) == (3, (2,), 0)
    for changes, sentence in (
        ({"label": "lable"}, "has no column 'lable'; it has a, b, label, who, missing, no_number"),
        ({"client": "missing"}, "a client id in each row of 'missing'"),
        ({"client": "no_number"}, "a client id in each row of 'no_number'"),
        ({"label": "missing"}, "column 'missing' must have no missing values"),
        ({"label": "who"}, "column 'who' must be integers, as labels are"),
        ({"label": "half"}, "column 'half' must be integers, as labels are"),
        ({"label": "large"}, f"column 'large' must be classes, got 0 to {2**33 + 1}"),
        ({"inputs": ("a", "who")}, "column 'who' must be numbers, got object"),
        ({"inputs": ("large", "a")}, f"have the integer {2**33 + 1} in example 0"),
        ({"inputs": ("huge", "a")}, r"column 'huge' has 1e\+300, which float32 does not hold"),
    ):
        with pytest.raises(DataError, match=sentence):
            parquet_store.of_parquet(path, **{**columns, **changes}).fetch(np.array([0]))
    assert store.checksum is not None
    before = store.checksum()
    pq.write_table(table.set_column(0, "a", [np.arange(number) / 2]), path, row_group_size=6)
    again = parquet_store.of_parquet(path, **columns).checksum
    assert again is not None
    assert again() != before
    path.write_bytes(path.read_bytes()[:-9])
    for wrong, sentence in (
        (path, "cannot be read as a Parquet table"),
        ("nowhere", "there is no"),
    ):
        with pytest.raises(DataError, match=sentence):
            parquet_store.of_parquet(wrong, **columns)
