"""Compose a method and its training loop: federated dynamic sparse training on real digits.

Masks start at a random ERK draw; every few rounds the weakest live weights are dropped and as many
grow back where the clients' mean dense gradient is largest. The loop is written out here, without
`fjp.run` and its run folder. Run with ``python examples/compose_your_own.py``.
"""

import jax
import numpy as np
import optax

from fedjaxprune import masks, metrics, models
from fedjaxprune.data import batching, datasets, partitions, transforms
from fedjaxprune.federated import local_training, sampling, server_optimizers
from fedjaxprune.pruning import allocation, pruners, schedules, scores
from fedjaxprune.rounds import protocol, simulation, training


def build(model, *, num_rounds, sparsity, prepare):
    """Make the method from pruners and a client."""
    revision = schedules.every(5, start=5, until=3 * num_rounds // 4)
    setup = protocol.Protocol(
        num_rounds=num_rounds,
        batcher=batching.epochs(num_epochs=2, batch_size=16, preprocess=prepare),
        optimizer=optax.sgd(0.3),
        server=server_optimizers.fedavgm(learning_rate=1.0, momentum=0.5),
    )
    client = local_training.local_sgd(
        model.loss, batcher=setup.batcher, optimizer=setup.optimizer, report_grads=revision
    )
    erk_start = pruners.prune_to(sparsity, score=scores.random, allocation=allocation.erk())
    revise = pruners.chain(
        pruners.drop(0.3),
        pruners.grow_to(sparsity, score=scores.gradient, allocation=allocation.erk()),
    )
    pruner = pruners.chain(pruners.when(schedules.at(0), erk_start), pruners.when(revision, revise))
    return training.training(setup, client=client, pruner=pruner)


def main(*, num_rounds=60, num_clients=20, cohort_size=10, sparsity=0.9, seed=0):
    """Train, print a line every ten rounds, and give the last test accuracy and sparsity."""
    digits = datasets.load("digits")
    train_prepare, test_prepare = transforms.for_dataset(digits, augment=False)
    parts = partitions.dirichlet(
        np.random.default_rng(seed),
        digits.train["labels"],
        num_clients=num_clients,
        alpha=0.5,
        min_size=8,
    )
    population = partitions.population(digits.train, parts)
    model = models.mlp(input_shape=digits.input_shape, num_classes=digits.num_classes)
    algorithm = build(model, num_rounds=num_rounds, sparsity=sparsity, prepare=train_prepare)

    init_key, run_key, test_key = jax.random.split(jax.random.key(seed), 3)
    run = simulation.start(algorithm, *model.init(init_key), num_clients=num_clients)
    advance = jax.jit(
        simulation.advance(
            algorithm.stages[0],
            sampling.uniform(num_clients=num_clients, cohort_size=cohort_size),
        )
    )

    @jax.jit
    def evaluate(state):
        inputs = test_prepare(test_key, digits.test["inputs"])
        logits = model.predict(algorithm.deployed_params(state), state.model_state, inputs)
        return (logits.argmax(axis=-1) == digits.test["labels"]).mean()

    changed = 0
    for index in range(num_rounds):
        run, record = advance(run_key, run, population)
        changed += int(record.num_changed)
        if (index + 1) % 10 == 0 or index + 1 == num_rounds:
            loss = float(metrics.value(record.train["loss"]))
            print(f"round {index + 1}: loss {loss:.3f}, mask entries changed so far {changed}")
    accuracy = float(evaluate(run.state))
    sparsity = float(masks.sparsity(run.state.masks, masks.is_kernel))
    print(f"test accuracy {accuracy:.3f} at sparsity {sparsity:.3f}")
    return accuracy, sparsity


if __name__ == "__main__":
    main()
