"""Whole runs of every method and variant, stopped in every round of every stage and resumed."""

import chex
import jax
import pytest

from fedjaxprune import registry
from fedjaxprune.experiment.config import resolve
from fedjaxprune.experiment.folder import record
from fedjaxprune.experiment.run import build, loop
from fedjaxprune.experiment.run.listener import Listener
from tests import resuming
from tests.laws import rows

SETTINGS = {
    "federation": {"num_rounds": 2, "cohort_size": 2, "dropout_rate": 0.2},
    "data.num_clients": 4,
    "client": {"steps": 1, "batch_size": 8},
    "execution.devices": 1,
    "server.optimizer": "fedavgm",
    "uplink": {"name": "top_k", "error_feedback": True},
    "downlink": "top_k",
}
# Of single methods; where there are several rounds of a stage, one lies in its middle.
OWN = {
    "prune_every": 1,
    "pool_size": 2,
    "server_epochs": 1,
    "vote_epochs": 1,
    "num_prune_steps": 1,
    "explore_epochs": 2,
    "dense_rounds": 2,
}


def settings(name):
    found = registry.find("method", name)
    own = {one: OWN[one] for one in OWN if one in found.part.settings.model_fields}
    return {**SETTINGS, "method": {"name": name, **own}}


@pytest.mark.laws
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in rows.names() if name not in rows.BESIDE])
def test_stopped_in_any_round_of_any_stage_it_resumes_to_the_same_bits(name, tmp_path):
    parts = build.build(resolve.resolve(settings(name)))
    saves = {"checkpoints.every": 1, "checkpoints.keep": 2}
    parts = parts._replace(config=resolve.replace(parts.config, saves))
    options = {"eval_every": 100, "warn": lambda sentence: None}  # the last round is tested
    lines = resuming.assert_resumes(parts, tmp_path, **options)
    stages = [stage.name for stage in parts.algorithm.stages for _ in range(stage.num_rounds)]
    assert [line["stage"] for line in lines] == stages


@pytest.mark.laws
@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("name", [name for name in rows.names() if name not in rows.BESIDE])
def test_a_run_that_is_fed_has_the_bits_of_one_that_is_not(name, devices, tmp_path):
    found = []
    for examples, client_rows in (("device", "device"), ("host", "host")):
        places = {"execution.examples": examples, "execution.client_rows": client_rows}
        given = {**settings(name), **places, "execution.devices": devices}
        config = resolve.resolve({**given, "evaluation.every": 100})
        folder = tmp_path / examples
        folder.mkdir()
        quiet = Listener(warn=lambda sentence: None)
        state = loop.train(build.build(config), folder=folder, listener=quiet)
        lines = [{**line, "time_s": 0} for line in record.read(folder).lines]
        found.append((jax.device_get(state), lines))
    chex.assert_trees_all_equal(*found)
