"""Send one weight in a hundred, with and without error feedback, on real digits.

Each client sends only the largest entries of its delta. What it holds back is either lost or kept
as the client's own residual and added to its next delta. Run with
``python examples/error_feedback_top_k.py``.
"""

import jax
import numpy as np
import optax

from fedjaxprune.costs import ledger
from fedjaxprune.data import batching, datasets, partitions, transforms
from fedjaxprune.federated import sampling
from fedjaxprune.federated import uplinks as uplink
from fedjaxprune.methods import fedavg
from fedjaxprune.models import zoo
from fedjaxprune.rounds import facts, protocol, simulation, task


def uplinks(fraction):
    """List what is compared."""
    return {
        "everything": uplink.identity(),
        "top-k": uplink.top_k(fraction=fraction),
        "top-k with error feedback": uplink.error_feedback(uplink.top_k(fraction=fraction)),
    }


def train(wire, *, num_rounds, num_clients, cohort_size, seed):
    """Run FedAvg over one uplink; give the test accuracy and the bits sent."""
    digits = datasets.load("digits")
    train_prepare, test_prepare = transforms.for_dataset(digits, augment=False)
    model = zoo.mlp(input_shape=digits.input_shape, num_classes=digits.num_classes)
    setup = protocol.Protocol(
        num_rounds=num_rounds,
        batcher=batching.epochs(num_epochs=1, batch_size=16, preprocess=train_prepare),
        optimizer=optax.sgd(0.1),
        uplink=wire,
    )
    algorithm = fedavg.build(
        fedavg.FedAvg(), task.make(model, setup, inputs=facts.float_inputs(digits.input_shape))
    )

    parts = partitions.iid(
        np.random.default_rng(seed), digits.train["labels"], num_clients=num_clients
    )
    population = partitions.population(digits.train, parts)
    init_key, run_key, test_key = jax.random.split(jax.random.key(seed), 3)
    run = simulation.start(algorithm, *model.init(init_key), num_clients=num_clients)
    sample = sampling.uniform(num_clients=num_clients, cohort_size=cohort_size)
    advance = jax.jit(simulation.advance(algorithm.stages[0], sample))

    uplink_bits = 0
    for _ in range(num_rounds):
        run, record = advance(run_key, run, population)
        uplink_bits += ledger.account(jax.device_get(record), run.state, algorithm).uplink_bits

    inputs = test_prepare(test_key, digits.test["inputs"])
    logits = model.predict(algorithm.deployed_params(run.state), run.state.model_state, inputs)
    accuracy = float((logits.argmax(axis=-1) == digits.test["labels"]).mean())
    return accuracy, uplink_bits


def main(*, num_rounds=40, num_clients=20, cohort_size=10, fraction=0.01, seed=0):
    """Compare the uplinks; give accuracy and bits by name."""
    results = {}
    for name, wire in uplinks(fraction).items():
        results[name] = train(
            wire,
            num_rounds=num_rounds,
            num_clients=num_clients,
            cohort_size=cohort_size,
            seed=seed,
        )
        accuracy, bits = results[name]
        print(f"{name}: test accuracy {accuracy:.3f}, {bits / 8 / 2**20:.2f} MiB sent up")
    return results


if __name__ == "__main__":
    main()
