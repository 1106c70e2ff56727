"""A method, a network of 16 weights and a data set that take no time, found through the open door.

``tests/stub.py:METHOD``, ``tests/stub.py:net`` and ``tests/stub.py:data`` are names for a config.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from fedjaxprune.method import Method
from fedjaxprune.models import adapters
from fedjaxprune.pruning import pruners
from fedjaxprune.rounds.task import Task
from fedjaxprune.rounds.training import training
from fedjaxprune.settings import Settings, Sparsity, setting
from fedjaxprune.types import Algorithm

FILE = pathlib.Path(__file__)
WIDTH = 4


class Stub(Settings):
    """Settings of a method that keeps the largest weights."""

    sparsity: Sparsity = setting(0.5, "Pruned fraction after every round.", unit="fraction")


def build(settings: Stub, task: Task) -> Algorithm:
    """Train under masks of the largest weights."""
    made = training(
        task.protocol, client=task.local_client(), pruner=pruners.prune_to(settings.sparsity)
    )
    return made._replace(diagnostics=lambda metrics: {"changes": int(metrics.num_changed)})


METHOD = Method(build=build, settings=Stub, default_model=f"{FILE}:net")


def net(*, input_shape, num_classes, scale: float = 0.1):
    """Make one dense layer without a bias."""

    def init(key):
        kernel = jax.random.normal(key, (*input_shape, num_classes), jnp.float32)
        return {"dense": {"kernel": scale * kernel}}

    return adapters.from_functions(init, lambda params, x: x @ params["dense"]["kernel"])


def data(*, num_examples: int = 48):
    """Make examples whose largest feature is their class, and whom each belongs to."""
    inputs = np.random.default_rng(0).normal(size=(num_examples, WIDTH)).astype(np.float32)
    owners = np.arange(num_examples) % 6
    return {"inputs": inputs, "labels": np.argmax(inputs, axis=1), "owner": owners}


def settings(**changes):
    """Name these parts in a config of three rounds."""
    return {
        "method": f"{FILE}:METHOD",
        "model": f"{FILE}:net",
        "data.dataset": f"{FILE}:data",
        "data.num_clients": 4,
        "federation.num_rounds": 3,
        "client.batch_size": 4,
        "client.epochs": 1,
        "execution.chunk_size": 1,  # `auto` measures, and may choose another
        "execution.devices": 1,
        "checkpoints.every": 1,
        **changes,
    }
