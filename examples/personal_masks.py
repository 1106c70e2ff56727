"""Give every client a sub-model of its own and average each weight over those who hold it.

Every client draws a random mask of its own, the same in every round, trains under it and sends only
the entries that it holds. A plain mean would move rarely held weights towards the broadcast ones;
the mean over holders does not. Run with ``python examples/personal_masks.py``.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjaxprune import masks, models
from fedjaxprune.data import batching, datasets, partitions, transforms
from fedjaxprune.federated import aggregators, local_training, sampling
from fedjaxprune.pruning import allocation, pruners, scores
from fedjaxprune.rounds import protocol, simulation, training
from fedjaxprune.types import Client, PrunerInputs


def with_personal_mask(inner: Client, *, sparsity, seed) -> Client:
    """Wrap a client so that it trains under, and reports, a mask that it keeps for good."""
    draw = pruners.exempt(
        pruners.prune_to(sparsity, score=scores.random, allocation=allocation.uniform()),
        masks.is_kernel,
    )

    def update_fn(key, broadcast, state, data):
        own_key = jax.random.fold_in(jax.random.key(seed), data.start)  # the same in every round
        inputs = PrunerInputs(params=broadcast.params, grads=None, round=jnp.int32(0))
        mine, _ = draw.update(own_key, masks.full(broadcast.params), (), inputs)
        message, state = inner.update(key, broadcast._replace(masks=mine), state, data)
        return message._replace(fields={**message.fields, "masks": mine}), state

    return Client(init=inner.init, update=update_fn)


def train(aggregator, *, num_rounds, num_clients, cohort_size, sparsity, seed):
    """Train with personal masks; give the test accuracy of the server's dense model."""
    digits = datasets.load("digits")
    train_prepare, test_prepare = transforms.for_dataset(digits, augment=False)
    model = models.mlp(input_shape=digits.input_shape, num_classes=digits.num_classes)
    setup = protocol.Protocol(
        num_rounds=num_rounds,
        batcher=batching.epochs(num_epochs=3, batch_size=16, preprocess=train_prepare),
        optimizer=optax.sgd(0.3),
        aggregator=aggregator,
    )
    local = local_training.local_sgd(model.loss, batcher=setup.batcher, optimizer=setup.optimizer)
    algorithm = training.training(
        setup, client=with_personal_mask(local, sparsity=sparsity, seed=seed)
    )

    parts = partitions.iid(
        np.random.default_rng(seed), digits.train["labels"], num_clients=num_clients
    )
    population = partitions.population(digits.train, parts)
    init_key, run_key, test_key = jax.random.split(jax.random.key(seed), 3)
    run = simulation.start(algorithm, *model.init(init_key), num_clients=num_clients)
    sample = sampling.uniform(num_clients=num_clients, cohort_size=cohort_size)
    advance = jax.jit(simulation.advance(algorithm.stages[0], sample))
    for _ in range(num_rounds):
        run, _ = advance(run_key, run, population)

    inputs = test_prepare(test_key, digits.test["inputs"])
    logits = model.predict(run.state.params, run.state.model_state, inputs)
    return float((logits.argmax(axis=-1) == digits.test["labels"]).mean())


def main(*, num_rounds=40, num_clients=20, cohort_size=10, sparsity=0.5, seed=0):
    """Compare the plain mean with the mean over holders."""
    rules = {
        "weighted mean": aggregators.weighted_mean(),
        "mean over holders": aggregators.holder_mean(),
    }
    results = {}
    for name, aggregator in rules.items():
        results[name] = train(
            aggregator,
            num_rounds=num_rounds,
            num_clients=num_clients,
            cohort_size=cohort_size,
            sparsity=sparsity,
            seed=seed,
        )
        print(f"{name}: test accuracy {results[name]:.3f}")
    return results


if __name__ == "__main__":
    main()
