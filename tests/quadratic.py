"""The client with a known answer of `fedjaxprune.testing.scenario`, and what tests alone need."""

import jax
import jax.numpy as jnp
import numpy as np

from fedjaxprune import trees
from fedjaxprune.costs import flops
from fedjaxprune.experiment.run import round_costs
from fedjaxprune.method import Needs
from fedjaxprune.rounds.task import Task
from fedjaxprune.testing import scenario
from fedjaxprune.testing.scenario import NUM_WEIGHTS, flatten, full_batches, population
from fedjaxprune.types import Batch, Batcher, Cohort

__all__ = ["NUM_WEIGHTS", "Batch", "Batcher", "flatten", "full_batches", "population"]

PARAMS = scenario.parameters(convolutions=False)
NUM_PRUNABLE = 32
CHANNELS = scenario.channels(PARAMS)
READERS = scenario.readers(Needs(gates=True))
MODEL = scenario.network()
NORMALIZED = scenario.network(Needs(batch_norm=True))
GATED = scenario.network(Needs(gates=True))
DRAWING = scenario.network(Needs(gates=True), choice="random")
NORMALIZED_STATE = NORMALIZED.init(jax.random.key(0))[1]
GATED_STATE = GATED.init(jax.random.key(0))[1]


def task(protocol, *, model=MODEL, state=None, channels=CHANNELS, max_size=8, **changes) -> Task:
    """Make what a method's `build` is given: six clients, three examples at the server.

    Args:
      protocol: what every method shares.
      model: one of this module.
      state: its state, if it is not the one of `init`.
      channels: what is one channel.
      max_size: examples of the largest client or, where their data are pooled, of all.
      **changes: other fields of `Task`.
    """
    given = scenario.make_task(model, protocol, max_size=max_size)
    facts = given.facts._replace(channels=lambda: channels, gate_readers=lambda: READERS)
    if state is not None:
        facts = facts._replace(state=jax.eval_shape(lambda: state))
    return given._replace(**{"facts": facts, **changes})


def profile():
    """Count the parameters as if they were two dense layers: 24 and 8 multiply-adds forward."""

    def predict(params, inputs):
        hidden = inputs @ params["dense"]["kernel"] + params["dense"]["bias"]
        return hidden @ params["head"]["kernel"] + params["head"]["bias"]

    return round_costs.Profile(
        layers=flops.of_function(predict, PARAMS, jnp.zeros(6)),
        paths=tuple(trees.paths(PARAMS)),
        sizes=tuple(trees.sizes(PARAMS)),
        flags=(False, True, False, True),
    )


def mean_point(people, client_id):
    """Average one client's points."""
    first, end = np.asarray(people.offsets)[client_id : client_id + 2]
    return np.asarray(people.examples["inputs"])[np.asarray(people.order)[first:end]].mean(axis=0)


def cohort(algorithm, client_ids, participated=None, params=PARAMS):
    """Make a cohort of clients that never took part before."""
    row, size = jax.device_get(algorithm.init_client(params)), len(client_ids)
    here = np.ones(size, np.bool_) if participated is None else np.asarray(participated)
    states = jax.tree.map(lambda leaf: np.broadcast_to(leaf, (size, *leaf.shape)), row)
    return Cohort(*jax.device_put((np.asarray(client_ids, np.int32), here, states)))
