"""Who takes part in a run's rounds, stage by stage."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjaxprune.experiment.config.flat.sections import RunConfig
from fedjaxprune.experiment.run import loop
from fedjaxprune.federated import sampling

ONE_COHORT = ("calibrate", "compare")  # stages whose exchanges are with one and the same cohort
EVERYBODY = ("agree", "average", "explore")  # stages in which all clients are asked


def draw(config: RunConfig, sizes: np.ndarray, *, stage: str) -> sampling.SamplingFn:
    """Choose how the cohorts of a stage are drawn, given the clients' ``[N]`` numbers of examples.

    Whoever is drawn may drop out.
    """
    if stage == "explore" and config.explorers:
        chosen: Any = sampling.uniform(num_clients=config.num_clients, cohort_size=config.explorers)
    elif stage in EVERYBODY:
        chosen = sampling.all_clients(num_clients=config.num_clients)
    elif config.participation == "weighted":
        chosen = sampling.weighted(jnp.asarray(sizes, jnp.float32), cohort_size=config.cohort_size)
    else:
        chosen = sampling.uniform(num_clients=config.num_clients, cohort_size=config.cohort_size)
    if config.dropout_probability:
        chosen = sampling.with_dropout(chosen, probability=config.dropout_probability)
    if stage in ONE_COHORT:
        once_key = jax.random.fold_in(jax.random.key(config.seed), loop.COHORT)
        chosen = sampling.same_every_round(once_key, chosen)
    return chosen
