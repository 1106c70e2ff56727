"""Inside a run nothing travels between host and device but metrics, and the state lives once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjaxprune.experiment.config import resolve
from fedjaxprune.experiment.folder import layout
from fedjaxprune.experiment.run import build, loop
from fedjaxprune.experiment.run.listener import Listener

NUM_ROUNDS = 4
SETTINGS = {
    "method": {"name": "feddip", "prune_every": 2},
    "federation": {"num_rounds": NUM_ROUNDS, "cohort_size": 4},
    "data.num_clients": 6,
    "client.steps": 2,
    "uplink": {"name": "top_k", "error_feedback": True},
    "execution.chunk_size": 2,
    "checkpoints.every": 100,
}
PLAIN = {"method": "fedavg", "uplink": "identity", "execution.chunk_size": 1}
# What XLA calls a way back to the host, out of a compiled program.
WAYS_OUT = ("callback", "infeed", "outfeed", " send(", " recv(")


def train(folder, monkeypatch, *, devices, around, **changes):
    """Run, with the calls of the compiled round made by ``around(step, number, *arguments)``."""
    config = resolve.resolve({**SETTINGS, **changes, "execution.devices": devices})
    parts = build.build(config)
    layout.create(folder, parts.config, {})
    compiled = loop._compiled

    def watched(advance, parts, where):
        step, numbers = compiled(advance, parts, where), iter(range(1, 1 + NUM_ROUNDS))
        return lambda *arguments: around(step, next(numbers), *arguments)

    def on_round(line):
        # From the first round's end to the last's: what the loop does besides is watched too. Only
        # what is asked for by name (`jax.device_get`) may travel.
        last = line["round"] == NUM_ROUNDS
        jax.config.update("jax_transfer_guard", "allow" if last else "disallow")

    monkeypatch.setattr(loop, "_compiled", watched)
    try:
        loop.train(parts, folder=folder, listener=Listener(round=on_round, warn=pytest.fail))
    finally:
        jax.config.update("jax_transfer_guard", "allow")


def guarded(step, number, *arguments):
    """Forbid all transfers, asked for or not, once the round is compiled."""
    with jax.transfer_guard("allow" if number == 1 else "disallow_explicit"):
        return step(*arguments)


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_round_transfers_nothing_and_writes_over_its_state(tmp_path, monkeypatch, devices):
    rounds, programs = [], []

    def look(step, number, key, now, population):
        if number == 1:
            programs.append(step.lower(key, now, population).compile())
            (program,) = programs
            assert [way for way in WAYS_OUT if way in program.as_text()] == []
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(now))
            assert program.memory_analysis().alias_size_in_bytes == size
        after, metrics = guarded(programs[0], number, key, now, population)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(now))
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((key, population, after)))
        rounds.append(number)
        return after, metrics

    train(tmp_path / "run", monkeypatch, devices=devices, around=look)
    assert rounds == [1, 2, 3, 4]


@pytest.mark.usual("loop")
@pytest.mark.parametrize("place", ["round", "loop"])
def test_a_transfer_would_be_seen(tmp_path, monkeypatch, place):
    def careless(step, number, key, now, population):
        if place == "loop":
            after, metrics = guarded(step, number, key, now, population)
            return after, metrics._replace(
                num_participating=metrics.num_participating + np.int32(0)
            )
        # A setting that comes from the host in every round.
        state = now.state._replace(round=np.int32(number - 1))
        return guarded(step, number, key, now._replace(state=state), population)

    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        train(tmp_path / "run", monkeypatch, devices=1, around=careless, **PLAIN)


def test_a_way_out_of_a_program_would_be_seen():
    def careless(x):
        jax.debug.callback(lambda value: None, x)
        return x + 1

    text = jax.jit(careless).lower(jnp.float32(0.0)).compile().as_text() or ""
    assert [way for way in WAYS_OUT if way in text] == ["callback"]
