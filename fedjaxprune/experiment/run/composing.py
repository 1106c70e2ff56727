"""A method's task from a network, clients' examples and a protocol of one's own."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjaxprune.data import batching, transforms
from fedjaxprune.experiment.run import keys
from fedjaxprune.rounds import facts
from fedjaxprune.rounds.protocol import Protocol
from fedjaxprune.rounds.task import BatchesFn, Task
from fedjaxprune.types import Batcher, Model, Population, client_data


def batches_of(
    *, batch_size: int, train: transforms.Preprocess, test: transforms.Preprocess, seed: int
) -> BatchesFn:
    """Make local steps beside those of the protocol, as `Task.batches`."""

    def batches(*, epochs=1, examples="all", share=0.1, augment=True) -> Batcher:
        common: dict[str, Any] = {
            "batch_size": batch_size,
            "preprocess": train if augment else test,
        }
        if examples == "all":
            return batching.epochs(num_epochs=epochs, **common)
        make = {"validation": batching.development, "training": batching.undeveloped}[examples]
        key = jax.random.fold_in(jax.random.key(seed), keys.VALIDATION)
        return make(key, share=share, **common)

    return batches


def task(
    model: Model,
    population: Population,
    protocol: Protocol,
    *,
    batch_size: int,
    preprocess: transforms.Preprocess | None,
    server_examples: Sequence[int],
    num_epochs: int,
) -> Task:
    """Make the task; see `verbs.task`."""
    prepare = preprocess or transforms.chain()
    sizes = np.diff(np.asarray(population.offsets))
    batch = jax.eval_shape(
        lambda key, population: protocol.batcher.batch(
            key, client_data(population, jnp.int32(0)), jnp.int32(0)
        ),
        jax.random.key(0),
        population,
    )
    two = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((2, *leaf.shape[1:]), leaf.dtype), batch.inputs
    )
    return Task(
        model=model,
        protocol=protocol,
        facts=facts.of_model(model, inputs=two),
        batches=batches_of(batch_size=batch_size, train=prepare, test=prepare, seed=0),
        server_examples=np.asarray(server_examples, np.int32),
        num_clients=len(sizes),
        largest_client=int(sizes.max()),
        num_epochs=num_epochs,
    )
