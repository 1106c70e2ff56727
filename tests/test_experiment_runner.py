"""The runner on a small federation: every client pulls the weights to its own centre."""

import contextlib
import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjaxprune import masks as masks_lib
from fedjaxprune import metrics as metrics_lib
from fedjaxprune.errors import RunFolderError
from fedjaxprune.experiment.config import resolve
from fedjaxprune.experiment.folder import checkpoints, layout, record
from fedjaxprune.experiment.folder.network import Network
from fedjaxprune.experiment.run import loop
from fedjaxprune.experiment.run.evaluation import TestSet, evaluate
from fedjaxprune.experiment.run.listener import Listener
from fedjaxprune.federated import sampling
from fedjaxprune.rounds import simulation
from fedjaxprune.traffic import FieldLength, Payload, Sent
from fedjaxprune.types import (
    Algorithm,
    ClientState,
    Model,
    Population,
    RoundMetrics,
    RoundState,
    Stage,
)
from tests import draws

NUM_CLIENTS, COHORT_SIZE, NUM_ROUNDS, WIDTH = 6, 4, 12, 5
CENTRES = np.random.default_rng(0).normal(size=(NUM_CLIENTS, WIDTH, 2)).astype(np.float32)


def quadratic() -> Model:
    """Make a model whose loss is half the squared distance to the example (the client's centre)."""

    def init(key):
        return {"dense": {"kernel": jax.random.normal(key, (WIDTH, 2))}}, {}

    def loss(params, state, batch, key):
        del key
        distance = params["dense"]["kernel"][None] - batch.inputs
        values = 0.5 * jnp.sum(jnp.square(distance), axis=(1, 2))
        mean = metrics_lib.mean(values, batch.weights)
        return metrics_lib.value(mean), (state, {"loss": mean})

    def predict(params, state, inputs):
        del state
        return jnp.sum(inputs * params["dense"]["kernel"][None], axis=1)

    return Model(init=init, loss=loss, predict=predict)


def pull() -> Algorithm:
    """Move towards the cohort's centres with noise; clients keep what they sent; prune in steps.

    It has all that can go wrong in resuming: client rows, drop-outs, randomness, changing masks.
    """

    def init(params, model_state):
        return RoundState(
            round=jnp.int32(0),
            params=params,
            masks=masks_lib.full(params),
            masks_id=jnp.int32(0),
            model_state=model_state,
            server=optax.tree.zeros_like(params),
            pruner=(),
        )

    def init_client(params):
        return ClientState(client=optax.tree.zeros_like(params), uplink=(), masks_held=jnp.int32(0))

    def round_fn(key, state, cohort, population):
        kernel = state.params["dense"]["kernel"]
        centres = population.examples["inputs"][cohort.client_ids]
        noise = 0.01 * jax.random.normal(key, centres.shape)
        own = cohort.states.client["dense"]["kernel"]
        deltas = 0.5 * (centres - kernel[None]) + 0.1 * own + noise
        present = cohort.participated[:, None, None]
        delta = jnp.sum(jnp.where(present, deltas, 0.0), axis=0) / COHORT_SIZE
        velocity = 0.5 * state.server["dense"]["kernel"] + delta
        moved = kernel + velocity
        limit = 0.02 * state.round.astype(jnp.float32)
        mask = (jnp.abs(moved) >= limit) | (state.round % 3 != 0)
        mask = mask & state.masks["dense"]["kernel"]
        tree = lambda leaf: {"dense": {"kernel": leaf}}  # noqa: E731
        losses = jnp.sum(jnp.square(deltas), axis=(1, 2))
        kept = jnp.sum(mask, dtype=jnp.int32)[None]
        num_participating = jnp.sum(cohort.participated, dtype=jnp.int32)
        num_changed = masks_lib.num_changed(state.masks, tree(mask))
        after = state._replace(
            round=state.round + 1,
            params=tree(jnp.where(mask, moved, 0.0)),
            masks=tree(mask),
            masks_id=state.masks_id + (num_changed > 0).astype(jnp.int32),
            server=tree(jnp.where(mask, velocity, 0.0)),
        )
        rows = ClientState(
            client=tree(deltas),
            uplink=(),
            masks_held=jnp.full((COHORT_SIZE,), state.masks_id),
        )
        return (
            after,
            rows,
            RoundMetrics(
                train={"loss": metrics_lib.mean(losses, cohort.participated.astype(jnp.float32))},
                num_live=kept,
                num_changed=num_changed,
                num_downloaded=jnp.broadcast_to(kept, (COHORT_SIZE, 1, 1)),
                num_uploaded=jnp.repeat(kept[None], COHORT_SIZE, axis=0),
                participated=cohort.participated,
                num_participating=num_participating,
                num_rejected=jnp.int32(0),
                sent=Sent(
                    round=state.round,
                    client_ids=cohort.client_ids,
                    num_masks=cohort.participated.astype(jnp.int32),
                    packed_masks=(),
                    down={"broadcast": {"params": FieldLength()}},
                    up={"reply": {"delta": FieldLength(live_counts=kept)}},
                    reports={},
                ),
            ),
        )

    return Algorithm(
        init=init,
        init_client=init_client,
        stages=(Stage("warm", 4, round_fn), Stage("train", NUM_ROUNDS - 4, round_fn)),
        deployed_params=lambda state: state.params,
        prunable=masks_lib.is_kernel,
        payload=Payload,
    )


NETWORK = Network(
    task="classification",
    input_shape=(WIDTH, 2),
    input_dtype="float32",
    num_outputs=2,
    num_classes=2,
    positions=(),
    max_value=None,
    mean=None,
    std=None,
    params={},
    state={},
    prunable=("dense/kernel",),
    data_checksum=0,
)


OPTIONS = {"seed": 3, "evaluation.every": 5, "checkpoints.every": 2, "checkpoints.keep": 3}


@functools.cache
def make_parts(trace=lambda: None) -> loop.RunParts:
    """Put the federation together; call `trace` whenever a round is traced.

    What is compiled of its rounds serves all runs that count no traces.
    """
    algorithm = pull()

    def counted(round_fn):
        def round_counted(*args):
            trace()
            return round_fn(*args)

        return round_counted

    stages = tuple(stage._replace(round=counted(stage.round)) for stage in algorithm.stages)
    labels = np.zeros(NUM_CLIENTS, np.int32)
    draw = sampling.with_dropout(
        sampling.uniform(num_clients=NUM_CLIENTS, cohort_size=COHORT_SIZE), probability=0.2
    )
    return loop.RunParts(
        config=resolve.resolve(OPTIONS),
        network=NETWORK,
        model=quadratic(),
        algorithm=algorithm._replace(stages=stages),
        population=Population(
            examples={"inputs": jnp.asarray(CENTRES), "labels": jnp.asarray(labels)},
            order=jnp.arange(NUM_CLIENTS, dtype=jnp.int32),
            offsets=jnp.arange(NUM_CLIENTS + 1, dtype=jnp.int32),
        ),
        test=TestSet(jnp.asarray(CENTRES), jnp.asarray(labels)),
        preprocess=lambda key, inputs: inputs,
        advance=tuple(simulation.advance(stage, draw) for stage in stages),
    )


class Stop(Exception):
    pass


def train(folder, *, stop_after=None, trace=(), allow=(), **changes):
    """Train in `folder`; return the state, the record without times, and the warnings."""
    folder.mkdir(exist_ok=True)
    warnings = []

    def on_round(line):
        if line["round"] == stop_after:
            raise Stop

    parts = make_parts(*trace)
    parts = parts._replace(config=resolve.replace(parts.config, changes))
    state = None
    with contextlib.suppress(Stop):
        loop.check(parts)  # as a run does before it makes a folder
        listener = Listener(round=on_round, warn=warnings.append)
        state = loop.train(parts, folder=folder, listener=listener, allow=allow)
    lines = [{**line, "time_s": 0.0} for line in record.read(folder).lines]
    return state, lines, warnings


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Run once without a stop: (folder, state, lines)."""
    folder = tmp_path_factory.mktemp("whole")
    state, lines, warnings = train(folder)
    assert warnings == []
    return folder, state, lines


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory):
    """Stop a run after nine rounds."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    train(folder, stop_after=9)
    return folder


@pytest.fixture
def folder(stopped_once, tmp_path):
    """Give a run that was stopped after nine rounds, to be changed."""
    return pathlib.Path(shutil.copytree(stopped_once, tmp_path / "run"))


def assert_same(state, lines, whole):
    _, expected, expected_lines = whole
    assert lines == expected_lines
    leaves = jax.tree.leaves(state), jax.tree.leaves(expected)
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for leaf, other in zip(*leaves, strict=True):
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(other))


def test_the_record_is_valid_json_with_nulls_where_nothing_was_tested(whole):
    folder, _, lines = whole
    rows = (folder / layout.METRICS).read_text().splitlines()

    def refuse(constant):
        raise AssertionError(constant)

    header, *parsed = [json.loads(row, parse_constant=refuse) for row in rows]
    assert header["schema"] == layout.SCHEMA
    stages = {stage["name"]: stage["num_rounds"] for stage in header["stages"]}
    assert stages == {"warm": 4, "train": NUM_ROUNDS - 4}
    assert header["num_prunable"] == header["num_weights"] == WIDTH * 2
    assert [row["round"] for row in parsed] == list(range(1, NUM_ROUNDS + 1))
    tested = [row["round"] for row in parsed if row["test"]]
    assert tested == [5, 10, NUM_ROUNDS]
    live = [line["mask"]["num_live"] for line in lines]
    assert live[-1] == WIDTH * 2 - round(lines[-1]["mask"]["sparsity"] * WIDTH * 2)
    assert [line["stage"] for line in lines] == ["warm"] * 4 + ["train"] * (NUM_ROUNDS - 4)
    assert [line["stage_round"] for line in lines] == [*range(1, 5), *range(1, NUM_ROUNDS - 3)]
    traffic = lines[0]["traffic"]
    assert 0 < traffic["up"]["total_bits"] <= traffic["down"]["total_bits"]
    present = [line["clients"]["participating"] for line in lines]
    assert [line["traffic"]["dense"]["up_bits"] for line in lines] == [
        32 * WIDTH * 2 * number for number in present
    ]
    assert 0 < live[-1] < WIDTH * 2
    assert sum(COHORT_SIZE - number for number in present) > 0  # some dropped out


def test_a_record_is_columns_by_dotted_field(whole):
    columns = record.columns(whole[2])
    assert columns["round"].tolist() == list(range(1, NUM_ROUNDS + 1))
    assert columns["stage"].tolist() == [line["stage"] for line in whole[2]]
    accuracy = columns["test.accuracy"]
    assert np.flatnonzero(np.isfinite(accuracy)).tolist() == [4, 9, NUM_ROUNDS - 1]
    assert columns["traffic.up.total_bits"].dtype == np.float64


def test_a_run_traces_the_round_of_each_stage_once(tmp_path):
    traces = []
    train(tmp_path / "run", trace=[lambda: traces.append(1)])
    assert len(traces) == 2


def test_a_resumed_run_traces_the_round_once(tmp_path):
    train(tmp_path / "run", stop_after=7)  # in the second stage
    traces = []
    train(tmp_path / "run", trace=[lambda: traces.append(1)])
    assert len(traces) == 2  # of the first stage in the check, of the second in the run


def test_the_seed_decides_everything(tmp_path, whole):
    state, lines, _ = train(tmp_path / "same")
    assert_same(state, lines, whole)
    _, lines, _ = train(tmp_path / "other", seed=4)
    assert lines != whole[2]


@pytest.mark.usual("3", "8")
@pytest.mark.parametrize("stop_after", [1, 2, 3, 8, NUM_ROUNDS])
def test_a_stopped_run_resumes_to_the_same_bits(tmp_path, whole, stop_after):
    folder = tmp_path / "run"
    state, _, _ = train(folder, stop_after=stop_after)
    assert state is None
    state, lines, _ = train(folder)
    assert_same(state, lines, whole)


def test_how_often_one_saves_changes_nothing(tmp_path, whole):
    state, lines, _ = train(tmp_path / "run", **{"checkpoints.every": 100})
    assert_same(state, lines, whole)


def test_a_torn_line_is_dropped(folder, whole):
    with (folder / layout.METRICS).open("a") as file:
        file.write('{"stage": "train", "rou')
    state, lines, warnings = train(folder)
    assert_same(state, lines, whole)
    assert warnings == []


def test_a_checkpoint_that_the_record_does_not_reach_is_skipped(folder, whole):
    record.cut(folder, record.read(folder).header, 7)
    state, lines, warnings = train(folder)
    assert_same(state, lines, whole)
    assert len(warnings) == 1
    assert "round 8" in warnings[0]
    assert len(list((folder / layout.SKIPPED / "8").iterdir())) > 0  # whole, so not deleted


def damage_remove(folder: pathlib.Path):
    """Remove the file that holds most of the arrays."""
    files = [file for file in (folder / "arrays" / "d").iterdir() if file.is_file()]
    max(files, key=lambda file: file.stat().st_size).unlink()


def damage_truncate(folder: pathlib.Path):
    for file in folder.rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def damage_empty(folder: pathlib.Path):
    shutil.rmtree(folder)
    folder.mkdir()


def damage_checksum(folder: pathlib.Path):
    """Leave a checkpoint that orbax takes for good, with other contents than it was given."""
    about = folder / "about" / "metadata"
    changed = json.loads(about.read_text())
    changed["checksums"]["state/params/dense/kernel"] += 1
    about.write_text(json.dumps(changed))


DAMAGES = [damage_remove, damage_truncate, damage_empty, damage_checksum]


@pytest.mark.usual("damage_truncate", "damage_checksum")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_skipped_for_the_one_before(folder, whole, damage):
    damage(folder / layout.CHECKPOINTS / "8")
    state, lines, warnings = train(folder)
    assert_same(state, lines, whole)
    assert len(warnings) == 1
    assert "round 8 is damaged" in warnings[0]


def test_without_any_whole_checkpoint_the_run_starts_again_only_on_demand(folder, whole):
    for step in (4, 6, 8):
        damage_truncate(folder / layout.CHECKPOINTS / str(step))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(
        RunFolderError, match=r"that of round 4 is damaged .* `--allow restart` starts"
    ):
        train(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    state, lines, warnings = train(folder, allow=["restart"])
    assert_same(state, lines, whole)
    assert len(warnings) == 4
    assert "starts again at round 1" in warnings[-1]
    assert sorted(entry.name for entry in (folder / layout.SKIPPED).iterdir()) == ["4", "6", "8"]


def test_only_the_newest_checkpoints_are_kept(whole):
    folder, _, _ = whole
    steps = sorted(int(entry.name) for entry in (folder / layout.CHECKPOINTS).iterdir())
    assert steps == [NUM_ROUNDS - 4, NUM_ROUNDS - 2, NUM_ROUNDS]


def test_a_checkpoint_keeps_empty_leaves_and_every_dtype(tmp_path):
    tree = {
        "empty": jnp.zeros((3, 0), jnp.float32),
        "mask": jnp.array([True, False]),
        "bits": jnp.arange(5, dtype=jnp.uint8),
        "half": jnp.arange(3, dtype=jnp.bfloat16),
        "scalar": jnp.int32(7),
        "nothing": {},
    }
    with checkpoints.open_manager(tmp_path / "saved", keep=1) as manager:
        checkpoints.save(manager, 1, tree, fingerprint=7, deployed={})  # pyright: ignore
    with checkpoints.open_manager(tmp_path / "saved", keep=1) as manager:
        found = checkpoints.restore(
            manager, tree, usable=lambda step: True, aside=tmp_path, warn=pytest.fail
        )
    assert checkpoints.fingerprints(tmp_path / "saved") == {1: 7}
    assert found is not None
    assert found[0] == 1
    jax.tree.map(np.testing.assert_array_equal, found[1], tree)
    assert [leaf.dtype for leaf in jax.tree.leaves(found[1])] == [
        leaf.dtype for leaf in jax.tree.leaves(tree)
    ]


@pytest.mark.usual("7", "100")
@pytest.mark.parametrize("batch_size", [1, 4, 7, 100])
def test_the_batch_size_of_a_test_changes_nothing(batch_size):
    model = quadratic()
    params, state = jax.jit(model.init)(jax.random.key(0))
    inputs = draws.normal(1, 7, WIDTH, 2)
    labels = jnp.array([0, 1, 0, 1, 1, 0, 0], jnp.int32)
    test = evaluate(model, lambda key, inputs: inputs, batch_size=batch_size)
    got = jax.jit(test)(params, state, TestSet(inputs, labels))
    logits = model.predict(params, state, inputs)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    np.testing.assert_allclose(got.total_loss, jnp.sum(losses), rtol=1e-6)
    assert int(got.num_correct) == int(jnp.sum(jnp.argmax(logits, axis=1) == labels))


def test_a_diverged_run_is_recorded_as_null(tmp_path):
    assert record.finite(float("nan")) is None
    assert record.finite(float("inf")) is None
    assert record.finite(1.5) == 1.5
