"""Fed runs: examples and clients' rows off the device, the same bits as with all on it."""

import functools
import shutil
from typing import Any
from unittest import mock

import chex
import jax
import numpy as np
import pytest

import fedjaxprune as fjp
from fedjaxprune import types
from fedjaxprune.data import conversion, mapped, parquet_store, stores
from fedjaxprune.errors import ConfigError, DataError, RunFolderError
from fedjaxprune.experiment.config import resolve
from fedjaxprune.experiment.execution import memory
from fedjaxprune.experiment.feeding import feed as feed_lib
from fedjaxprune.experiment.feeding import placing, rows, snapshots
from fedjaxprune.experiment.folder import layout, record
from fedjaxprune.experiment.run import build, examples, loop
from fedjaxprune.experiment.run.listener import Listener
from fedjaxprune.rounds import feeding
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
        assert snapshots.is_whole(tmp_path, number, fresh.kept)
        snapshots.restore(tmp_path, number, fresh.kept)
        return fresh

    def size(number):
        return (tmp_path / str(number) / snapshots.IDS).stat().st_size // 8

    write(0, 1, 2, 3, 4)
    snapshots.save(tmp_path, 1, store.kept)
    write(1, 7)
    snapshots.save(tmp_path, 2, store.kept)
    assert (size(1), size(2)) == (5, 2)
    again = restored(2)
    everybody = np.arange(9)
    chex.assert_trees_all_equal(again.read(everybody), store.read(everybody))
    np.testing.assert_array_equal(again.kept.is_changed, store.kept.is_changed)
    write(2, 3)
    snapshots.save(tmp_path, 3, store.kept)
    assert size(3) == 6  # whole again
    snapshots.remove(tmp_path, keep=(2,))
    assert sorted(place.name for place in tmp_path.iterdir()) == ["1", "2"]
    damaged = tmp_path / "1" / snapshots.IDS
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    assert not snapshots.is_whole(tmp_path, 2, store.kept)
    assert not snapshots.is_whole(tmp_path, 8, store.kept)


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


def test_rows_that_may_fill_the_disk_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: mock.Mock(free=100))
    config = resolve.resolve({**SETTINGS, "execution.client_rows": "disk"})
    with pytest.raises(RunFolderError, match=r"may take 272 bytes of files in .*, where 100 are"):
        loop.train(build.build(config), folder=tmp_path, listener=Listener())


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
    places = placing.choose(config, placing.Sizes(sizes[0] * GIB, sizes[1] * GIB))
    assert (places.examples, places.rows) == wanted
    assert bool(places.sentence) == (wanted != ("device", "device"))
    if wanted == ("host", "device"):
        assert places.sentence == (
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
    del people.test
    with pytest.raises(DataError, match="needs test examples"):
        fjp.run(given, data=people)


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
        ({"label": "lable"}, "has no column 'lable'; it has a, b, label, who, missing"),
        ({"client": "missing"}, "a client id in each row of 'missing'"),
        ({"label": "missing"}, "column 'missing' must have no missing values"),
        ({"label": "who"}, "column 'who' must be numbers, got object"),
    ):
        with pytest.raises(DataError, match=sentence):
            parquet_store.of_parquet(path, **{**columns, **changes}).fetch(np.array([0]))
