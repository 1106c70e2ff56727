"""A client with a known answer: the loss is ½‖w − c‖² averaged over the client's points c.

The parameters are a small tree with a prunable kernel and a bias; a point is one vector of all
their entries. With full batches and plain SGD of rate η, K steps lead from w to c̄ + (1−η)ᴷ (w − c̄).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from fedjaxprune import metrics, trees
from fedjaxprune.costs import flops
from fedjaxprune.experiment.run import round_costs
from fedjaxprune.federated import gated_updates
from fedjaxprune.models import gates
from fedjaxprune.rounds.facts import Facts
from fedjaxprune.rounds.task import Task
from fedjaxprune.structure.channels.groups import Analysis, Group, Member
from fedjaxprune.types import Batch, Batcher, Cohort, Model, Population

PARAMS = {
    "dense": {"bias": jnp.zeros([4]), "kernel": jnp.linspace(-1.0, 1.0, 24).reshape(6, 4)},
    "head": {"bias": jnp.zeros([2]), "kernel": jnp.linspace(0.5, -0.7, 8).reshape(4, 2)},
}
NUM_WEIGHTS = sum(leaf.size for leaf in jax.tree.leaves(PARAMS))
NUM_PRUNABLE = 32


def _layer(name, size, *readers):
    places = np.arange(size)[:, None]
    own = (
        Member(f"{name}/bias", 0, places, "channel"),
        Member(f"{name}/kernel", 1, places, "filter"),
    )
    read = tuple(Member(path, 0, places, "input") for path in readers)
    return Group(size=size, members=own + read, leaks=(), mixes=())


# As if these parameters were two layers of filters, of which the second reads the first.
CHANNELS = Analysis(
    groups=(_layer("dense", 4, "head/kernel"), _layer("head", 2)),
    filters=(_layer("dense", 4), _layer("head", 2)),
    fixed=(),
)


def flatten(params):
    return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(params)])


def loss(params, state, batch, key):
    del key
    errors = 0.5 * jnp.sum(jnp.square(flatten(params)[None] - batch.inputs), axis=1)
    mean = metrics.mean(errors, batch.weights)
    value = mean.total / jnp.maximum(mean.weight, 1.0)
    new_state = {**state, "steps": state["steps"] + 1.0} if "steps" in state else state
    return value, (new_state, {"loss": mean})


MODEL = Model(
    init=lambda key: (PARAMS, {"steps": jnp.float32(0.0)}),
    loss=loss,
    predict=lambda params, state, inputs: inputs,
)


def full_batches(num_steps, max_size=8):
    """Make every step see all the client's points (at most `max_size`)."""

    def batch(key, data, step):
        del key, step
        slots = jnp.arange(max_size)
        rows = data.order[data.start + jnp.minimum(slots, jnp.maximum(data.size - 1, 0))]
        return Batch(
            inputs=data.examples["inputs"][rows],
            labels=data.examples["labels"][rows],
            weights=(slots < data.size).astype(jnp.float32),
        )

    return Batcher(
        num_steps=lambda data: jnp.where(data.size > 0, jnp.int32(num_steps), jnp.int32(0)),
        batch=batch,
    )


def task(protocol, *, model=MODEL, state=None, channels=CHANNELS, max_size=8, **changes):
    """Make what a method's `build` is given: six clients, three examples at the server.

    Args:
      protocol: what every method shares.
      model: one of this module.
      state: its state, if it is not the one of `init`.
      channels: what is one channel.
      max_size: examples of the largest client or, where their data are pooled, of all.
      **changes: other fields of `Task`.
    """
    params, own_state = jax.eval_shape(model.init, jax.random.key(0))
    facts = Facts(
        params=params,
        state=own_state if state is None else jax.eval_shape(lambda: state),
        inputs=jax.ShapeDtypeStruct((2, NUM_WEIGHTS), jnp.float32),
        reading_order=lambda: trees.paths(params),
        channels=lambda: channels,
        gate_readers=lambda: READERS,
    )

    def batches(*, epochs=1, examples="all", share=0.1, augment=True):
        del examples, share, augment  # every step sees all
        return full_batches(epochs, max_size)

    given = Task(
        model=model,
        protocol=protocol,
        facts=facts,
        batches=batches,
        server_examples=np.arange(3, dtype=np.int32),
        num_clients=6,
        largest_client=8,
    )
    return given._replace(**changes)


def population(sizes=(3, 5, 2, 8, 4, 6), seed=0):
    """Make clients of the given sizes, with points of client-specific means."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(len(sizes), NUM_WEIGHTS))
    points = np.concatenate(
        [
            centre + 0.1 * rng.normal(size=(n, NUM_WEIGHTS))
            for centre, n in zip(centres, sizes, strict=True)
        ]
    )
    order = rng.permutation(len(points))  # stored in another order than they are grouped
    return Population(
        examples={
            "inputs": jnp.asarray(points[order], jnp.float32),
            "labels": jnp.zeros(len(points), jnp.int32),
        },
        order=jnp.asarray(np.argsort(order), jnp.int32),
        offsets=jnp.asarray(np.concatenate([[0], np.cumsum(sizes)]), jnp.int32),
    )


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
    rows = people.order[people.offsets[client_id] : people.offsets[client_id + 1]]
    return np.asarray(people.examples["inputs"])[np.asarray(rows)].mean(axis=0)


def cohort(algorithm, client_ids, participated=None, params=PARAMS):
    """Make a cohort of clients that never took part before."""
    row = algorithm.init_client(params)
    size = len(client_ids)
    return Cohort(
        client_ids=jnp.asarray(client_ids, jnp.int32),
        participated=jnp.ones(size, jnp.bool_)
        if participated is None
        else jnp.asarray(participated),
        states=jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (size, *leaf.shape)), row),
    )


def normalized_loss(params, state, batch, key):
    """Compute the same loss, with moving averages of the points' mean and variance beside it."""
    value, (_, seen) = loss(params, {}, batch, key)
    size = jnp.sum(batch.weights)
    share = (batch.weights / jnp.maximum(size, 1.0))[:, None]
    mean = jnp.sum(share * batch.inputs, axis=0)
    var = jnp.sum(share * jnp.square(batch.inputs - mean[None]), axis=0)

    def moved(old, new):
        return jnp.where(size > 0, 0.9 * old + 0.1 * new, old)

    norm = state["norm"]
    state = {**state, "norm": {"mean": moved(norm["mean"], mean), "var": moved(norm["var"], var)}}
    return value, (state, seen)


def normalized_predict(params, state, inputs):
    """Give two logits: weighted sums of normalized inputs."""
    norm = state["norm"]
    inputs = (inputs - norm["mean"][None]) / jnp.sqrt(norm["var"] + 0.01)[None]
    products = inputs * flatten(params)[None]
    return jnp.stack([jnp.sum(products[:, ::2], axis=1), jnp.sum(products[:, 1::2], axis=1)], 1)


NORMALIZED_STATE = {"norm": {"mean": jnp.zeros(NUM_WEIGHTS), "var": jnp.ones(NUM_WEIGHTS)}}
NORMALIZED = Model(
    init=lambda key: (PARAMS, NORMALIZED_STATE), loss=normalized_loss, predict=normalized_predict
)


def salient_channels(batch, key):
    """Rank the dense layer's channels by the size of an example's points."""
    del key
    points = batch.inputs[:, 4:28].reshape(-1, 6, 4)
    return jnp.sum(jnp.abs(points), axis=1)


def random_channels(batch, key):
    """Rank them at random for every example."""
    return jax.random.uniform(key, (batch.inputs.shape[0], 4))


def gated_loss(params, state, batch, key, salience=salient_channels):
    """Compute the same loss of what an example keeps: the dense layer's most salient channels.

    Channel `c` is column `c` of ``dense/kernel`` with its bias; dropped ones are at no distance.
    """
    density = state["gating"]["density"]
    rank = jnp.argsort(jnp.argsort(-salience(batch, key), axis=1), axis=1)
    keeps = rank.astype(jnp.int32) < gates.num_kept(density, 4)
    one = jnp.ones([batch.inputs.shape[0], 10], jnp.bool_)
    kept = jnp.concatenate([keeps, jnp.tile(keeps, (1, 6)), one], axis=1)
    distance = jnp.where(kept, flatten(params)[None] - batch.inputs, 0.0)
    mean = metrics.mean(0.5 * jnp.sum(jnp.square(distance), axis=1), batch.weights)
    counted = jnp.sum(jnp.where(keeps, batch.weights[:, None], 0.0), axis=0)
    layers = {
        "dense/kept": metrics.Mean(total=counted, weight=jnp.sum(batch.weights)),
        "dense/through": metrics.mean(jnp.mean(keeps.astype(jnp.float32), axis=1), batch.weights),
    }
    seen = {"dense": {"count": state["seen"]["dense"]["count"] + counted}}
    report = {"loss": mean, "layers": layers}
    return mean.total / jnp.maximum(mean.weight, 1.0), ({**state, "seen": seen}, report)


GATED_STATE = {
    "gating": {"density": jnp.float32(0.5)},
    "seen": {"dense": {"count": jnp.zeros(4)}},
}
GATED = Model(
    init=lambda key: (PARAMS, GATED_STATE),
    loss=gated_loss,
    predict=lambda params, state, inputs: inputs[:, :2],
)
DRAWING = GATED._replace(loss=functools.partial(gated_loss, salience=random_channels))
READERS = (gated_updates.Reader("head/kernel", 0, "dense"),)
