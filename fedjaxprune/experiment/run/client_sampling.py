"""Who takes part in a run's rounds, stage by stage."""

import jax
import numpy as np

from fedjaxprune.experiment.config.sections import RunConfig
from fedjaxprune.experiment.run import keys
from fedjaxprune.federated import sampling
from fedjaxprune.rounds.simulation import SamplingFn
from fedjaxprune.types import Stage


def of_stage(stage: Stage, config: RunConfig, sizes: np.ndarray) -> SamplingFn:
    """Choose how the cohorts of a stage are drawn; whoever is drawn may drop out."""
    section, number = config.federation, len(sizes)
    if stage.cohort == "everyone":
        chosen = sampling.all_clients(num_clients=number)
    elif isinstance(stage.cohort, int):
        chosen = sampling.uniform(num_clients=number, cohort_size=stage.cohort)
    else:
        build = config.parts.sampling.part.build
        chosen = build(
            section.sampling, num_clients=number, cohort_size=section.cohort_size, sizes=sizes
        )
    if section.dropout_rate:
        chosen = sampling.with_dropout(chosen, probability=section.dropout_rate)
    if stage.cohort == "same":
        key = jax.random.fold_in(jax.random.key(config.seed), keys.COHORT)
        chosen = sampling.same_every_round(key, chosen)
    return chosen
