"""Presets: each makes a run whose method takes its network, on shapes alone."""

import numpy as np
import pytest

from fedjaxprune.experiment.config import files, resolve
from fedjaxprune.experiment.run import build, examples

SHAPES = {"digits": (8, 8, 1), "fashion_mnist": (28, 28, 1), "cifar10": (32, 32, 3)}
NUM_EXAMPLES = 6000


@pytest.mark.usual(
    "feddip-cifar10",
    "fedtiny-vgg11-cifar10",
    "mpfl-cifar10",
    "quick",
    "threshold-cifar10",
    "autoflip-cifar10",
)
@pytest.mark.parametrize("name", files.preset_texts())
def test_the_method_of_a_preset_is_built_without_its_data(name):
    given = files.read_source(name)
    shape = SHAPES[given.values["data.dataset.name"]]
    arrays = {
        "inputs": np.zeros((NUM_EXAMPLES, *shape), np.uint8),
        "labels": np.arange(NUM_EXAMPLES) % 10,
    }
    own = {path: v for path, v in given.values.items() if not path.startswith("data.dataset.")}
    instead = {"data.dataset.name": arrays, "execution.devices": 1, "execution.chunk_size": 1}
    config = resolve.resolve(given._replace(values=own | instead))
    found = examples.read(config)
    config = resolve.replace(config, {"data.num_clients": len(found.sizes)})
    model = build.make_model(config, found.dataset, found.test)
    task = build.make_task(config, model, found, chunk=1)
    build.check_needs(config, task)
    algorithm = build.make_algorithm(config, task)
    assert algorithm.stages[-1].num_rounds == config.federation.num_rounds
