"""A run on several devices: the same result, traced once, resumed to the same bits."""

import shutil

import jax
import numpy as np
import pytest

from fedjaxprune.errors import ConfigError
from fedjaxprune.experiment.config import resolve
from fedjaxprune.experiment.execution import devices as devices_lib
from fedjaxprune.experiment.folder import layout, record
from fedjaxprune.experiment.folder.record import value
from fedjaxprune.experiment.run import build, loop
from fedjaxprune.experiment.run.listener import Listener
from fedjaxprune.rounds import simulation

SETTINGS = {
    "method": {"name": "feddip", "prune_every": 2},
    "model": {"name": "mlp", "hidden_sizes": [16]},
    "data": {"num_clients": 12, "partition": "dirichlet"},
    "federation": {"num_rounds": 5, "cohort_size": 9, "dropout_rate": 0.2},
    "uplink": {"name": "top_k", "error_feedback": True},
    "evaluation.every": 5,
    "checkpoints": {"every": 2, "keep": 2},
}


class Stop(Exception):
    pass


def train(folder, *, devices, stop_after=None, **changes):
    """Run in `folder`; return the final state, or None if it was stopped."""
    work = {} if "client.steps" in changes else {"client.epochs": 1}
    given = resolve.merge(resolve.read({**SETTINGS, **work}), resolve.read(changes))
    given = resolve.merge(given, resolve.read({"execution.devices": devices}))
    parts = build.build(resolve.resolve(given))
    assert (1 if parts.mesh is None else parts.mesh.size) == devices
    if not folder.exists():
        layout.create(folder, parts.config, {})

    def on_round(line):
        if line["round"] == stop_after:
            raise Stop

    try:
        return loop.train(parts, folder=folder, listener=Listener(round=on_round, warn=pytest.fail))
    except Stop:
        return None


def largest_difference(state, other):
    """Compare parameters: the largest absolute difference, in parts of the largest weight."""
    first, second = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(s.params)])
        for s in (state, other)
    )
    return np.max(np.abs(first - second)) / np.max(np.abs(second))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "chunk_size"),
    [(3, 2), *(pytest.param(n, 1, marks=pytest.mark.slow) for n in (2, 8))],
)
def test_devices_differ_in_rounding_only(tmp_path, devices, chunk_size):
    # Without top-k, whose choice among all but equal entries rounding may turn.
    plain = {"uplink": "identity", "execution.chunk_size": chunk_size}
    one = train(tmp_path / "one", devices=1, **plain)
    many = train(tmp_path / "many", devices=devices, **plain)
    assert largest_difference(many, one) < 1e-5
    first, second = (record.read(tmp_path / name).lines[-1] for name in ("one", "many"))
    for path in ("mask.num_live", "traffic.up.total_bits"):
        assert value(second, path) == value(first, path)
    assert value(second, "test.accuracy") == pytest.approx(value(first, "test.accuracy"), abs=0.01)


@pytest.mark.slow
def test_a_run_on_two_devices_resumes_to_the_same_bits(tmp_path):
    whole = train(tmp_path / "whole", devices=2)
    assert train(tmp_path / "run", devices=2, stop_after=4) is None
    again = train(tmp_path / "run", devices=2)
    for leaf, other in zip(jax.tree.leaves(again), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(other))
    lines = [
        [{**line, "time_s": 0.0} for line in record.read(tmp_path / name).lines]
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
    train(tmp_path / "run", devices=2, **{"federation.num_rounds": 3, "method.prune_every": 1})
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("method", "stages", "changes"),
    [
        (
            "fedtiny",
            ["prepare", "calibrate", "compare", "train", "train"],
            {"method.pool_size": 2, "method.prune_every": 1},
        ),
        (
            "snip/clients",
            ["prepare", "score", "train", "train"],
            {"method.num_prune_steps": 1},
        ),
        (
            "mpfl",
            ["agree", "agree", "train", "train"],
            {"model": "pooled_cnn", "method.vote_epochs": 1, "method.num_prune_steps": 1},
        ),
        ("autoflip", ["explore", "train", "train"], {"method.explore_epochs": 3}),
    ],
)
@pytest.mark.slow
def test_all_stages_of_a_method_run_on_two_devices(tmp_path, method, stages, changes):
    few = {"data.num_clients": 4, "federation": {"num_rounds": 2, "cohort_size": 4}}
    few |= {"federation.dropout_rate": 0.0, "client.steps": 1, "uplink": "identity"}
    for name, devices in (("one", 1), ("two", 2)):
        train(tmp_path / name, devices=devices, method=method, **few, **changes)
    one, two = (record.read(tmp_path / name).lines for name in ("one", "two"))
    assert [line["stage"] for line in two] == [line["stage"] for line in one] == stages
    for line, other in zip(two, one, strict=True):
        losses = [value(those, "train.loss") or 0.0 for those in (line, other)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        for path in ("mask.num_live", "traffic.down.total_bits"):
            assert value(line, path) == value(other, path)


def test_devices_that_are_not_there_are_refused():
    def number(**changes):
        config = resolve.resolve({"method": "fedavg", **changes})
        return devices_lib.resolve(config).execution.devices

    with pytest.raises(ConfigError, match=r"execution\.devices must be at most 8, the number"):
        number(**{"data.num_clients": 20, "federation.cohort_size": 9, "execution.devices": 9})
    assert number(**{"federation.cohort_size": 2, "execution.devices": 9}) == 2


SHARED = {"model": {"name": "mlp", "hidden_sizes": [256]}, "uplink": "identity"}


def test_a_run_whose_devices_share_a_model_goes_on_from_a_checkpoint(tmp_path):
    shared = {**SHARED, "execution.model_devices": 2, "federation.num_rounds": 3}
    whole = train(tmp_path / "run", devices=4, **shared)
    shutil.rmtree(tmp_path / "run" / layout.CHECKPOINTS / "3")  # as if it was stopped before
    again = train(tmp_path / "run", devices=4, **shared)
    assert again is not None
    kernel = again.params["dense_1"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (64, 128)  # of 64 x 256
    for leaf, other in zip(jax.tree.leaves(again), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(other))


@pytest.mark.slow
def test_devices_that_share_a_model_differ_in_rounding_only(tmp_path):
    two = train(tmp_path / "two", devices=2, **SHARED)
    four = train(tmp_path / "four", devices=4, **SHARED, **{"execution.model_devices": 2})
    assert largest_difference(four, two) < 1e-5


def test_devices_that_no_model_can_be_shared_among_are_refused():
    with pytest.raises(ConfigError, match=r"model_devices must divide execution.devices \(3 here"):
        train(None, devices=3, **SHARED, **{"execution.model_devices": 2})
