"""From a config to the task that a method's `build` is given."""

import jax
import numpy as np

from fedjaxprune.data import batching
from fedjaxprune.experiment.config.flat.sections import RunConfig
from fedjaxprune.experiment.recipes import Given
from fedjaxprune.experiment.run import loop
from fedjaxprune.rounds import facts
from fedjaxprune.rounds.protocol import Protocol
from fedjaxprune.rounds.task import Task
from fedjaxprune.types import Batcher, Model


def task_of(
    config: RunConfig, model: Model, protocol: Protocol, given: Given, *, largest_client: int = 0
) -> Task:
    """Make the task of a run."""

    def batches(*, epochs=1, examples="all", share=0.1, augment=True) -> Batcher:
        common = {
            "batch_size": config.batch_size,
            "preprocess": given.train if augment else given.test,
        }
        if examples == "all":
            return batching.epochs(num_epochs=epochs, **common)
        make = {"validation": batching.development, "training": batching.undeveloped}[examples]
        key = jax.random.fold_in(jax.random.key(config.seed), loop.DEVELOPMENT)
        return make(key, share=share, **common)

    return Task(
        model=model,
        protocol=protocol,
        facts=facts.of_model(model, inputs=facts.float_inputs(given.input_shape)),
        batches=batches,
        server_examples=np.asarray(given.held),
        num_clients=config.num_clients,
        largest_client=largest_client,
        num_epochs=1 if config.local_steps is not None else config.local_epochs,
    )
