"""A run on several devices: the same result, traced once, resumed to the same bits."""

import jax
import numpy as np
import pytest

from fedjaxprune.experiment.config.flat.sections import RunConfig, UserError
from fedjaxprune.experiment.folder import record
from fedjaxprune.experiment.run import build, loop
from fedjaxprune.experiment.tracking import progress
from fedjaxprune.rounds import simulation

SETTINGS = {
    "rounds": 5,
    "num_clients": 12,
    "cohort_size": 9,
    "local_epochs": 1,
    "partition": "dirichlet",
    "dropout_probability": 0.2,
    "prune_every": 2,
    "uplink": "top_k",
    "error_feedback": True,
    "eval_every": 5,
}


class Stop(Exception):
    pass


def train(folder, *, devices, stop_after=None, **changes):
    """Run in `folder`; return the final state, or None if it was stopped."""
    config = build.resolve(RunConfig(**{**SETTINGS, "devices": devices, **changes}))
    parts = build.build(config)
    assert (1 if parts.mesh is None else parts.mesh.size) == devices
    if not folder.exists():
        record.create(folder, config)

    def on_round(line):
        if line.round == stop_after:
            raise Stop

    report = progress.Listener(start=lambda lines: None, round=on_round, warn=lambda text: None)
    try:
        return loop.train(
            parts,
            seed=0,
            folder=folder,
            eval_every=config.eval_every,
            checkpoint_every=2,
            keep_checkpoints=2,
            fingerprint=0,
            report=report,
        )
    except Stop:
        return None


def largest_difference(state, other):
    """Compare parameters: the largest absolute difference, in parts of the largest weight."""
    first, second = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(s.params)])
        for s in (state, other)
    )
    return np.max(np.abs(first - second)) / np.max(np.abs(second))


@pytest.mark.parametrize(
    ("devices", "chunk_size"), [(8, 1), (3, 2), pytest.param(2, 1, marks=pytest.mark.slow)]
)
def test_devices_differ_in_rounding_only(tmp_path, devices, chunk_size):
    # Without top-k, whose choice among all but equal entries rounding may turn.
    plain = {"uplink": "identity", "error_feedback": False, "chunk_size": chunk_size}
    one = train(tmp_path / "one", devices=1, **plain)
    many = train(tmp_path / "many", devices=devices, **plain)
    assert largest_difference(many, one) < 1e-5
    first, second = (record.read(tmp_path / name)[-1] for name in ("one", "many"))
    assert second.num_kept == first.num_kept
    assert second.test_accuracy == pytest.approx(first.test_accuracy, abs=0.01)
    assert second.uplink_bits == first.uplink_bits


def test_a_run_on_two_devices_resumes_to_the_same_bits(tmp_path):
    whole = train(tmp_path / "whole", devices=2)
    assert train(tmp_path / "run", devices=2, stop_after=4) is None
    again = train(tmp_path / "run", devices=2)
    for leaf, other in zip(jax.tree.leaves(again), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(other))
    lines = [
        [line._replace(wall_s=0.0) for line in record.read(tmp_path / name)]
        for name in ("run", "whole")
    ]
    assert lines[0] == lines[1]


def test_a_run_on_two_devices_traces_the_round_once(tmp_path, monkeypatch):
    traces = []
    advance = simulation.advance

    def counted(stage, draw):
        play = advance(stage, draw)

        def play_counted(*arguments):
            traces.append(stage.name)
            return play(*arguments)

        return play_counted

    monkeypatch.setattr(simulation, "advance", counted)
    train(tmp_path / "run", devices=2, rounds=3, prune_every=1)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("algorithm", "stages"),
    [
        ("fedtiny", ["prepare", "calibrate", "compare", "train", "train"]),
        ("snip_masks_of_clients", ["prepare", "score", "train", "train"]),
        ("mpfl", ["agree", "agree", "train", "train"]),
        ("autoflip", ["explore", "train", "train"]),
    ],
)
@pytest.mark.slow
def test_all_stages_of_a_method_run_on_two_devices(tmp_path, algorithm, stages):
    few = {"num_clients": 4, "cohort_size": 4, "dropout_probability": 0.0, "rounds": 2}
    few |= {"local_steps": 1, "prune_every": 1, "pool_size": 2}
    few |= {"mask_iterations": 1, "explore_epochs": 3}
    if algorithm == "mpfl":
        few |= {"model": "pooled_cnn", "pretrain_epochs": 1, "consensus": "top_k"}
    plain = {"uplink": "identity", "error_feedback": False}
    for name, devices in (("one", 1), ("two", 2)):
        train(tmp_path / name, devices=devices, algorithm=algorithm, **few, **plain)
    one, two = (record.read(tmp_path / name) for name in ("one", "two"))
    assert [line.stage for line in two] == [line.stage for line in one] == stages
    for line, other in zip(two, one, strict=True):
        losses = [0.0 if those.train_loss is None else those.train_loss for those in (line, other)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        assert line.num_kept == other.num_kept
        assert line.downlink_bits == other.downlink_bits


def test_devices_that_are_not_there_are_refused():
    with pytest.raises(UserError, match="devices must be at most 8, the number of cpu devices"):
        build.resolve(RunConfig(num_clients=20, cohort_size=9, devices=9))
    assert build.resolve(RunConfig(cohort_size=2, devices=9)).devices == 2
