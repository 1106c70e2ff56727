"""The rival of `benchmarks.cifar10_cohort`: pfl-research plays rounds of the same work.

A process of its own, since the package ``pfl`` and JAX's ask for different versions of others.
It reads a number of rounds from every line of its input, plays them and prints the seconds that
they took, one line for each. Needs ``pip install pfl torch``.
"""

import argparse
import contextlib
import json
import sys
import time
from typing import Any

BATCH_SIZE, COHORT_SIZE, NUM_USERS, NUM_IMAGES = 10, 50, 1000, 50


def network(torch: Any) -> Any:
    """Write the published network for pfl: with a loss and metrics."""
    from torch import nn

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(
                nn.Conv2d(3, 32, 3),
                nn.ReLU(),
                nn.Conv2d(32, 64, 3),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Dropout(0.25),
                nn.Flatten(),
                nn.Linear(12544, 128),
                nn.ReLU(),
                nn.Dropout(0.5),
                nn.Linear(128, 10),
            )

        def forward(self, x):
            return self.layers(x)

        def loss(self, x, y, is_eval=False):
            self.train(not is_eval)
            return nn.functional.cross_entropy(self(x), y)

        def metrics(self, x, y, is_eval=False):
            return {}

    torch.manual_seed(0)
    return Network()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, required=True)
    threads = parser.parse_args().threads
    import torch
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.pytorch import PyTorchTensorDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel
    from pfl.version import __version__ as version

    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand([NUM_USERS * NUM_IMAGES, 3, 32, 32], generator=generator)
    labels = torch.randint(0, 10, [NUM_USERS * NUM_IMAGES], generator=generator)

    def dataset(user):
        rows = slice(user * NUM_IMAGES, (user + 1) * NUM_IMAGES)
        return PyTorchTensorDataset((images[rows], labels[rows]), user_id=user)

    users = list(range(NUM_USERS))
    data = FederatedDataset(dataset, get_user_sampler("random", users))
    module = network(torch)
    model = PyTorchModel(module, torch.optim.SGD, torch.optim.SGD(module.parameters(), lr=1.0))
    backend = SimulatedBackend(training_data=data, val_data=data)

    class Clock(TrainingProcessCallback):
        """Note when each round ended."""

        def __init__(self):
            self.times = []

        def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
            self.times.append(time.perf_counter())
            return False, Metrics()

    print(json.dumps({"pfl": version, "torch": torch.__version__}), flush=True)
    for line in sys.stdin:
        num_rounds = int(line)
        clock = Clock()
        with contextlib.redirect_stdout(sys.stderr):  # it reports every round
            FederatedAveraging().run(
                NNAlgorithmParams(
                    central_num_iterations=num_rounds + 1,  # the first prepares what the others use
                    evaluation_frequency=num_rounds + 2,
                    train_cohort_size=COHORT_SIZE,
                    val_cohort_size=0,
                ),
                backend,
                model,
                NNTrainHyperParams(
                    local_batch_size=BATCH_SIZE, local_num_epochs=1, local_learning_rate=0.1
                ),
                NNEvalHyperParams(local_batch_size=10_000),
                callbacks=[clock],
            )
        print(json.dumps(clock.times[-1] - clock.times[0]), flush=True)


if __name__ == "__main__":
    main()
