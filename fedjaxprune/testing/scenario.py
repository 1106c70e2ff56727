"""A client with a known answer, and what a method needs around it to be held to laws.

The loss is ½‖w − c‖² averaged over the client's points c. The parameters are a small tree of two
layers with kernel and bias; a point is one vector of all their entries. With full batches and
plain SGD of rate η, K steps lead from w to c̄ + (1−η)ᴷ (w − c̄).

By a method's needs the state has running statistics, the first kernel four axes, the first layer
a gate, or kernels meet each example in products that give their entries. There are six clients;
the server's examples are the first three.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pydantic

from fedjaxprune import metrics, trees
from fedjaxprune.experiment.config import resolve
from fedjaxprune.federated import gated_updates, penalties, uplinks
from fedjaxprune.method import Method, Needs, needs_of
from fedjaxprune.models import gates
from fedjaxprune.registry import Part
from fedjaxprune.rounds.facts import Facts
from fedjaxprune.rounds.protocol import Protocol
from fedjaxprune.rounds.task import Task
from fedjaxprune.settings import Settings, Share, setting
from fedjaxprune.structure.channels.groups import Analysis, Group, Member
from fedjaxprune.types import Algorithm, Batch, Batcher, Model, Params, Population, State

NUM_ROUNDS = 6
SIZES = (3, 5, 2, 8, 4, 6)  # examples of the clients
NUM_WEIGHTS = 38
_NUM_HELD = 3  # examples of the server
NEEDS_NOTHING = Needs()
# Server and clients remember, so that there is something to lose.
PROTOCOL: Mapping[str, Any] = {
    "data.num_clients": len(SIZES),
    "federation.num_rounds": NUM_ROUNDS,
    "federation.cohort_size": 4,
    "client.epochs": 2,
    "client.optimizer": "sgd",
    "client.optimizer.learning_rate": 0.1,
    "client.learning_rate_decay": 1.0,
    "server.optimizer": "fedavgm",
    "server.optimizer.server_learning_rate": 0.5,
    "server.optimizer.server_momentum": 0.9,
    "uplink": "top_k",
    "uplink.fraction": 0.25,
    "uplink.error_feedback": True,
}
PLAIN = {path: one for path, one in PROTOCOL.items() if path[:6] not in ("server", "uplink")}


class GateSettings(Settings):
    """Settings of the network where the method needs gates."""

    density: Share = setting(0.5, "Share of the first layer's channels that stay open.")
    choice: Literal["salient", "random"] = setting("salient", "How an example ranks channels.")


class Scenario(NamedTuple):
    """A method among six clients: what it built, for which task, and what training starts from."""

    algorithm: Algorithm
    task: Task
    params: Params
    model_state: State


def make(
    method: Method,
    settings: Mapping[str, Any],
    protocol: Mapping[str, Any] = PROTOCOL,
    *,
    adapt: Callable[[Protocol], Protocol] | None = None,
) -> Scenario:
    """Build a method for the six clients, under a protocol that `adapt` may change.

    Settings are those of `laws_of`; those of a network that the scenario's does not have count for
    nothing.
    """
    own = {name: value for name, value in settings.items() if "." not in name}
    try:
        needs = needs_of(method, method.settings(**own))
    except pydantic.ValidationError:
        needs = NEEDS_NOTHING  # and the config says what is wrong
    part = Part(build=lambda *_, **__: None, settings=GateSettings if needs.gates else Settings)
    known = [f"model.{name}" for name in part.settings.model_fields]
    given = {
        path if "." in path else f"method.{path}": value
        for path, value in settings.items()
        if path in known or not path.startswith("model.")
    }
    base = resolve.read({**protocol, "method": method, "model": part})
    config = resolve.resolve(resolve.merge(base, resolve.read(given)))
    model = network(needs, **dict(config.model.model_dump(exclude={"name"})))
    shared = make_protocol(config)
    shared = shared if adapt is None else adapt(shared)
    task = make_task(model, shared, needs, num_epochs=config.client.epochs)
    task = task._replace(cohort_size=config.federation.cohort_size)
    if mu := config.client.proximal_mu:
        task = task._replace(penalties=(penalties.proximal(mu=mu),))
    params, state = model.init(jax.random.key(0))
    return Scenario(method.build(config.method, task), task, params, state)


def make_protocol(config: Any) -> Protocol:
    """Build the parts of a protocol that a config names; every local step sees all points."""
    parts, batcher = config.parts, full_batches(config.client.epochs)
    uplink = parts.uplink.part.build(config.uplink)
    if size := config.uplink.whole_below:
        uplink = uplinks.except_small(uplink, fewer_than=size)
    return Protocol(
        num_rounds=config.federation.num_rounds,
        batcher=batcher,
        optimizer=parts.optimizer.part.build(config.client.optimizer),
        uplink=uplinks.error_feedback(uplink) if config.uplink.error_feedback else uplink,
        aggregator=parts.aggregator.part.build(config.server.aggregator),
        server=parts.server_optimizer.part.build(config.server.optimizer),
        correction=parts.correction.part.build(
            config.client.correction, batcher=batcher, optimizer_settings=config.client.optimizer
        ),
        downlink=parts.downlink.part.build(config.downlink),
    )


def make_task(
    model: Model,
    protocol: Protocol,
    needs: Needs = NEEDS_NOTHING,
    *,
    max_size: int = sum(SIZES),
    num_epochs: int = 1,
) -> Task:
    """Make what a method's `build` is given; local steps beside the protocol's see `max_size`."""
    params, state = jax.eval_shape(model.init, jax.random.key(0))

    def batches(*, epochs=1, examples="all", share=0.1, augment=True):
        del examples, share, augment  # every step sees all
        return full_batches(epochs, max_size)

    return Task(
        model=model,
        protocol=protocol,
        facts=Facts(
            params=params,
            state=state,
            inputs=jax.ShapeDtypeStruct((2, NUM_WEIGHTS), jnp.float32),
            reading_order=lambda: trees.paths(params),
            channels=lambda: channels(params),
            gate_readers=lambda: readers(needs),
        ),
        batches=batches,
        num_clients=len(SIZES),
        largest_client=max(SIZES),
        num_server_examples=_NUM_HELD,
        num_epochs=num_epochs,
    )


def channels(params: Params) -> Analysis:
    """Take the parameters for two layers of filters, of which the second reads the first."""
    axis = len(params["dense"]["kernel"].shape) - 1

    def layer(name, size, axis, *readers):
        places = np.arange(size)[:, None]
        own = (
            Member(f"{name}/bias", 0, places, "channel"),
            Member(f"{name}/kernel", axis, places, "filter"),
        )
        read = tuple(Member(path, 0, places, "input") for path in readers)
        return Group(size=size, members=own + read, leaks=(), mixes=())

    head = layer("head", 2, 1)
    return Analysis(
        groups=(layer("dense", 4, axis, "head/kernel"), head),
        filters=(layer("dense", 4, axis), head),
        fixed=(),
    )


def readers(needs: Needs) -> tuple[gated_updates.Reader, ...]:
    """Let the second layer read the first one's gated channels."""
    return (gated_updates.Reader("head/kernel", 0, "dense"),) if needs.gates else ()


def full_batches(num_steps: int, max_size: int = max(SIZES)) -> Batcher:
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


@functools.cache
def population(sizes: tuple[int, ...] = SIZES, seed: int = 0) -> Population:
    """Make clients of the given sizes, with points of client-specific means."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(len(sizes), NUM_WEIGHTS))
    own = [0.1 * rng.normal(size=(size, NUM_WEIGHTS)) for size in sizes]
    points = np.repeat(centers, sizes, axis=0) + np.concatenate(own)
    order = rng.permutation(len(points))  # stored in another order than they are grouped
    examples = {
        "inputs": jnp.asarray(points[order], jnp.float32),
        "labels": jnp.zeros(len(points), jnp.int32),
    }
    return Population(
        examples=examples,
        held={name: leaf[:_NUM_HELD] for name, leaf in examples.items()},
        order=jnp.asarray(np.argsort(order), jnp.int32),
        offsets=jnp.asarray(np.concatenate([[0], np.cumsum(sizes)]), jnp.int32),
    )


def network(
    needs: Needs = NEEDS_NOTHING, *, density: float = 0.5, choice: str = "salient"
) -> Model:
    """Make the network that a method needs, with gates as `GateSettings` says."""
    salience = _random_channels if choice == "random" else _salient_channels
    state: dict[str, Any] = {}
    if needs.batch_norm:
        state |= {"norm": {"mean": jnp.zeros(NUM_WEIGHTS), "var": jnp.ones(NUM_WEIGHTS)}}
    if needs.gates:
        state |= {
            "gating": {"density": jnp.float32(density)},
            "seen": {"dense": {"count": jnp.zeros(4)}},
        }
    if not state:
        state = {"steps": jnp.float32(0.0)}
    loss = functools.partial(_gated_loss, salience=salience) if needs.gates else _loss
    return Model(
        init=lambda key: (parameters(convolutions=needs.convolutions), state),
        loss=_loss_of_products if needs.products else loss,
        predict=_predict_by_products if needs.products else predict,
    )


def parameters(*, convolutions: bool) -> Params:
    """Give the parameters to start from; the first kernel is perhaps a 1x1 convolution's."""
    kernel = jnp.linspace(-1.0, 1.0, 24).reshape((1, 1, 6, 4) if convolutions else (6, 4))
    return {
        "dense": {"bias": jnp.zeros([4]), "kernel": kernel},
        "head": {"bias": jnp.zeros([2]), "kernel": jnp.linspace(0.5, -0.7, 8).reshape(4, 2)},
    }


def flatten(params: Params) -> jax.Array:
    """Put all entries in one vector, ``[38]``."""
    return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(params)])


def products(params: Params, inputs: jax.Array) -> jax.Array:
    """Put all entries in one vector for each example, ``[B, 38]``, those of kernels by products.

    Row `i` of a kernel is multiplied with a power of two and divided by it again, so that numbers
    are exact, and that inputs differ in size.
    """

    def leaf(values: jax.Array) -> jax.Array:
        size = inputs.shape[0]
        if values.ndim < 2:
            return jnp.broadcast_to(values[None], (size, values.size))
        scales = 0.5 ** jnp.arange(values.shape[0], dtype=jnp.float32)
        seen = jnp.broadcast_to(jnp.diag(scales)[None], (size, *[values.shape[0]] * 2))
        return (jnp.matmul(seen, values) / scales[None, :, None]).reshape(size, -1)

    return jnp.concatenate([leaf(values) for values in jax.tree.leaves(params)], axis=1)


def _loss(params, state, batch, key):
    """Compute half the squared distance; steps are counted, and running statistics move."""
    del key
    return _distance(flatten(params)[None], state, batch)


def _loss_of_products(params, state, batch, key):
    """Compute the same of what products with the kernels give."""
    del key
    return _distance(products(params, batch.inputs), state, batch)


def _distance(entries, state, batch):
    errors = 0.5 * jnp.sum(jnp.square(entries - batch.inputs), axis=1)
    mean = metrics.mean(errors, batch.weights)
    value = mean.total / jnp.maximum(mean.weight, 1.0)
    if "steps" in state:
        state = {**state, "steps": state["steps"] + 1.0}
    return value, (_moved(state, batch), {"loss": mean})


def _moved(state, batch):
    """Let running statistics, if there are any, follow the points' mean and variance."""
    if "norm" not in state:
        return state
    size = jnp.sum(batch.weights)
    share = (batch.weights / jnp.maximum(size, 1.0))[:, None]
    mean = jnp.sum(share * batch.inputs, axis=0)
    var = jnp.sum(share * jnp.square(batch.inputs - mean[None]), axis=0)

    def moved(old, new):
        return jnp.where(size > 0, 0.9 * old + 0.1 * new, old)

    norm = jax.tree.map(moved, state["norm"], {"mean": mean, "var": var})
    return {**state, "norm": norm}


def predict(params, state, inputs):
    """Give two logits: weighted sums of the inputs, normalized if there are statistics."""
    return _logits(flatten(params)[None], state, inputs)


def _predict_by_products(params, state, inputs):
    return _logits(products(params, inputs), state, inputs)


def _logits(entries, state, inputs):
    if "norm" in state:
        norm = state["norm"]
        inputs = (inputs - norm["mean"][None]) / jnp.sqrt(norm["var"] + 0.01)[None]
    terms = inputs * entries
    return jnp.stack([jnp.sum(terms[:, ::2], axis=1), jnp.sum(terms[:, 1::2], axis=1)], 1)


def _salient_channels(batch, key):
    """Rank the first layer's channels by the size of an example's points, ``[B, 4]``."""
    del key
    points = batch.inputs[:, 4:28].reshape(-1, 6, 4)
    return jnp.sum(jnp.abs(points), axis=1)


def _random_channels(batch, key):
    """Rank them at random for every example, ``[B, 4]``."""
    return jax.random.uniform(key, (batch.inputs.shape[0], 4))


def _gated_loss(params, state, batch, key, salience):
    """Compute the same loss of what an example keeps: the first layer's most salient channels.

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
    state = {**_moved(state, batch), "seen": seen}
    return mean.total / jnp.maximum(mean.weight, 1.0), (state, {"loss": mean, "layers": layers})
