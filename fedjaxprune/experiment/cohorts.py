"""Who takes part in a run's rounds, stage by stage."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjaxprune.experiment import runner
from fedjaxprune.experiment.config import RunConfig
from fedjaxprune.federated import participation

ONE_COHORT = ("calibrate", "compare")  # stages whose exchanges are with one and the same cohort
EVERYBODY = ("agree", "average", "explore")  # stages in which all clients are asked


def draw(config: RunConfig, sizes: np.ndarray, *, stage: str) -> participation.ParticipationFn:
    """Choose how the cohorts of a stage are drawn, given the clients' ``[N]`` numbers of examples.

    Whoever is drawn may drop out.
    """
    if stage == "explore" and config.explorers:
        chosen: Any = participation.uniform(
            num_clients=config.num_clients, cohort_size=config.explorers
        )
    elif stage in EVERYBODY:
        chosen = participation.everyone(num_clients=config.num_clients)
    elif config.participation == "weighted":
        chosen = participation.weighted(
            jnp.asarray(sizes, jnp.float32), cohort_size=config.cohort_size
        )
    else:
        chosen = participation.uniform(
            num_clients=config.num_clients, cohort_size=config.cohort_size
        )
    if config.dropout_probability:
        chosen = participation.drop_out(chosen, probability=config.dropout_probability)
    if stage in ONE_COHORT:
        once_key = jax.random.fold_in(jax.random.key(config.seed), runner.COHORT)
        chosen = participation.repeat(once_key, chosen)
    return chosen
