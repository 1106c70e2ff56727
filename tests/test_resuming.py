"""Every method that `fedjaxprune list` shows, stopped in every round of every stage and resumed."""

import pytest

from fedjaxprune.experiment import methods
from fedjaxprune.experiment.config.flat import validation
from fedjaxprune.experiment.config.flat.sections import RunConfig
from fedjaxprune.experiment.run import build
from tests import resuming

SETTINGS = {
    "rounds": 2,
    "num_clients": 4,
    "cohort_size": 2,
    "dropout_probability": 0.2,
    "local_steps": 1,
    "batch_size": 8,
    "devices": 1,
    "server": "fedavgm",
    "uplink": "top_k",
    "error_feedback": True,
    # Of single methods; where there are several rounds of a stage, one lies in its middle.
    "prune_every": 1,
    "pool_size": 2,
    "pretrain_epochs": 1,
    "mask_iterations": 1,
    "explore_epochs": 2,
    "refresh_every": 1,
}


def settings(name):
    own = {"start_rounds": 2} if name in methods.BY_FILTER else {}
    return {**SETTINGS, **own, "algorithm": name}


@pytest.mark.slow
@pytest.mark.parametrize("name", validation.alternatives("algorithm"))
def test_stopped_in_any_round_of_any_stage_it_resumes_to_the_same_bits(name, tmp_path):
    parts = build.build(RunConfig(**settings(name)))
    options = {"eval_every": 100, "warn": lambda sentence: None}  # the last round is tested
    lines = resuming.assert_resumes(parts, tmp_path, **options)
    stages = [stage.name for stage in parts.algorithm.stages for _ in range(stage.num_rounds)]
    assert [line.stage for line in lines] == stages
