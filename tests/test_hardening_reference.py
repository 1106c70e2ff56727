"""One round of each classical method against float64 NumPy, which is written out below."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjaxprune import metrics
from fedjaxprune.federated import aggregators, local_training, penalties, server_optimizers
from fedjaxprune.federated.corrections import fednova, scaffold
from fedjaxprune.rounds import training
from fedjaxprune.types import Batch, Batcher, Cohort, Population
from tests.playing import setup

SIZES = (5, 1, 0, 9, 3, 4)  # one has a single example, one has none
PRESENT = (True, True, True, True, False, True)
RATE, MU, MOMENTUM = 0.05, 0.3, 0.6  # of the clients
SERVER_RATE, SERVER_MOMENTUM = 0.7, 0.9
ADAM = {"b1": 0.9, "b2": 0.99, "eps": 1e-3}
RNG = np.random.default_rng(7)
LIKE = {"bias": np.zeros(3), "kernel": np.zeros((4, 3))}


def noise(scale=1.0):
    """Draw a tree that float32 represents exactly."""
    return {n: (scale * RNG.normal(size=x.shape)).astype(np.float32) for n, x in LIKE.items()}


INPUTS = RNG.normal(size=(sum(SIZES), 4)).astype(np.float32)
TARGETS = RNG.normal(size=(sum(SIZES), 3)).astype(np.float32)
STARTS = np.concatenate([[0], np.cumsum(SIZES)])
PARAMS, MEMORY, CONTROL = noise(), noise(0.1), noise(0.2)
OWN = [noise(0.2) for _ in SIZES]  # the clients' control variates
MASKS = {
    "dense": {name: np.ones(x.shape, bool) for name, x in LIKE.items()},
    "masked": {"bias": np.ones(3, bool), "kernel": RNG.random((4, 3)) < 0.5},
}


# The reference -------------------------------------------------------------------------------


def each(function, *trees):
    return {name: function(*(np.asarray(t[name], np.float64) for t in trees)) for name in LIKE}


def masked(tree, masks):
    return each(lambda x, mask: x * mask, tree, masks)


def examples_of(client):
    rows = slice(STARTS[client], STARTS[client + 1])
    return INPUTS[rows].astype(np.float64), TARGETS[rows].astype(np.float64)


def num_steps(client):
    return (SIZES[client] + 1) // 2


def gradient(params, inputs, targets):
    """Differentiate the mean over examples of half the squared error."""
    errors = inputs @ params["kernel"] + params["bias"] - targets
    return {"bias": errors.mean(axis=0), "kernel": inputs.T @ errors / len(inputs)}


def train(client, masks, *, mu=0.0, momentum=0.0, correction=None):
    """Give a client's delta and its mean gradient before correction and masks."""
    start = masked(PARAMS, masks)
    params, trace, total = start, masked(LIKE, masks), masked(LIKE, masks)
    for _ in range(num_steps(client)):
        grads = gradient(params, *examples_of(client))
        grads = each(lambda g, here, there: g + mu * (here - there), grads, params, start)
        total = each(np.add, total, grads)
        if correction is not None:
            grads = each(np.add, grads, correction)
        trace = each(lambda t, g: momentum * t + g, trace, masked(grads, masks))
        params = each(lambda p, t: p - RATE * t, params, trace)
    mean = each(lambda t: t / max(num_steps(client), 1), total)
    return each(np.subtract, params, start), mean


def average(trees, weights):
    return each(lambda *xs: sum(w * x for w, x in zip(weights, xs, strict=True)), *trees)


WORKING = [i for i, size in enumerate(SIZES) if PRESENT[i] and size > 0]
SHARES = [SIZES[i] / sum(SIZES[j] for j in WORKING) for i in WORKING]


def mean_delta(masks, **options):
    return average([train(i, masks, **options)[0] for i in WORKING], SHARES)


def nova(masks):
    """Count each local step with what it still moves in later ones."""
    reach = [
        sum((1 - MOMENTUM ** (num_steps(i) - k)) / (1 - MOMENTUM) for k in range(num_steps(i)))
        for i in WORKING
    ]
    deltas = [train(i, masks, momentum=MOMENTUM)[0] for i in WORKING]
    direction = average(
        [each(lambda d, r=r: d / r, delta) for delta, r in zip(deltas, reach, strict=True)], SHARES
    )
    return each(lambda d: d * np.dot(SHARES, reach), direction)


def scaffold_delta(masks):
    return average(
        [train(i, masks, correction=each(np.subtract, CONTROL, OWN[i]))[0] for i in WORKING],
        SHARES,
    )


def by_coordinate(function):
    def delta(masks):
        trees = [train(i, masks)[0] for i in WORKING]
        return {name: function(np.stack([t[name] for t in trees])) for name in LIKE}

    return delta


def trimmed(values):
    """Leave out the smallest and the largest of four."""
    return np.sort(values, axis=0)[1:-1].mean(axis=0)


def with_momentum(masks):
    return each(lambda d, m: -SERVER_RATE * (SERVER_MOMENTUM * m - d), mean_delta(masks), MEMORY)


def adam(masks):
    """Take Adam's first step, whose bias correction undoes both decays."""
    return each(lambda d: SERVER_RATE * d / (np.abs(d) + ADAM["eps"]), mean_delta(masks))


# name: (what differs from FedAvg, its reference: masks -> change of the parameters)
METHODS = {
    "fedavg": ({}, mean_delta),
    "fedprox": ({"mu": MU}, lambda masks: mean_delta(masks, mu=MU)),
    "fednova": ({"momentum": MOMENTUM, "correction": "fednova"}, nova),
    "scaffold": ({"correction": "scaffold"}, scaffold_delta),
    "fedavgm": (
        {"server": server_optimizers.fedavgm(learning_rate=SERVER_RATE, momentum=SERVER_MOMENTUM)},
        with_momentum,
    ),
    "fedadam": ({"server": server_optimizers.fedadam(learning_rate=SERVER_RATE, **ADAM)}, adam),
    "median": (
        {"aggregator": aggregators.median()},
        by_coordinate(lambda values: np.median(values, axis=0)),
    ),
    "trimmed_mean": (
        {"aggregator": aggregators.trimmed_mean(fraction=0.25)},
        by_coordinate(trimmed),
    ),
}


# What is tested ------------------------------------------------------------------------------


def loss(params, state, batch, key):
    del key
    errors = batch.inputs @ params["kernel"] + params["bias"][None] - batch.labels
    mean = metrics.mean(0.5 * jnp.sum(jnp.square(errors), axis=1), batch.weights)
    return mean.total / jnp.maximum(mean.weight, 1.0), (state, {"loss": mean})


def batch_of(key, data, step):
    del key, step
    slots = jnp.arange(max(SIZES))
    rows = data.order[jnp.minimum(data.start + slots, sum(SIZES) - 1)]
    return Batch(
        data.examples["inputs"][rows],
        data.examples["labels"][rows],
        (slots < data.size).astype(jnp.float32),
    )


BATCHER = Batcher(num_steps=lambda data: (data.size + 1) // 2, batch=batch_of)
PEOPLE = Population(
    examples={"inputs": jnp.asarray(INPUTS), "labels": jnp.asarray(TARGETS)},
    order=jnp.arange(sum(SIZES), dtype=jnp.int32),
    offsets=jnp.asarray(STARTS, jnp.int32),
)


def compiled(*, mu=0.0, momentum=0.0, correction=None, **protocol):
    """Make a round, and the state and the rows before it, without masks."""
    corrections = {
        "fednova": lambda: fednova.normalized_averaging(batcher=BATCHER, momentum=momentum),
        "scaffold": scaffold.control_variates,
    }
    algorithm = training.training(
        setup(correction=None if correction is None else corrections[correction](), **protocol),
        client=local_training.local_sgd(
            loss,
            batcher=BATCHER,
            optimizer=optax.sgd(RATE, momentum=momentum or None),
            penalties=(penalties.proximal(mu=mu),) if mu else (),
        ),
    )
    params = jax.tree.map(jnp.asarray, PARAMS)
    state, row = algorithm.init(params, {}), algorithm.init_client(params)
    rows = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(SIZES), *x.shape)), row)
    if correction == "scaffold":
        state = state._replace(correction=jax.tree.map(jnp.asarray, CONTROL))
        own = jax.tree.map(lambda *xs: jnp.stack(xs), *OWN)
        rows = rows._replace(client=rows.client._replace(control=own))
    return jax.jit(algorithm.stages[0].round), state, rows


def close(found, wanted):
    for name in LIKE:
        scale = np.abs(wanted[name]).max()
        np.testing.assert_allclose(found[name], wanted[name], rtol=0.0, atol=1e-6 * scale)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_round_is_that_of_float64_numpy(name, subtests):
    options, reference = METHODS[name]
    run, start, rows = compiled(**options)
    for kind, masks in MASKS.items():
        state = start._replace(
            params=jax.tree.map(jnp.asarray, masked(PARAMS, masks)),
            masks=jax.tree.map(jnp.asarray, masks),
        )
        state = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == "float64" else x, state)
        if name == "fedavgm":
            memory = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), masked(MEMORY, masks))
            state = state._replace(
                server=(state.server[0]._replace(trace=memory), *state.server[1:])
            )
        members = Cohort(jnp.arange(len(SIZES), dtype=jnp.int32), jnp.asarray(PRESENT), rows)
        after, own, counted = run(jax.random.key(0), state, members, PEOPLE)
        with subtests.test(kind):
            assert counted.num_rejected == 0
            change = masked(reference(masks), masks)
            close(after.params, each(np.add, masked(PARAMS, masks), change))
            if name == "scaffold":
                check_controls(after.correction, own.client.control, masks)


def check_controls(control, own, masks):
    """Hold the control variates to option II, weighted by examples; pruned entries stay."""
    server = masked(CONTROL, {n: np.ones(x.shape) for n, x in LIKE.items()})
    for client in range(len(SIZES)):
        wanted = each(np.copy, OWN[client])
        if client in WORKING:
            _, mean = train(client, masks, correction=each(np.subtract, CONTROL, OWN[client]))
            wanted = each(lambda old, new, m: np.where(m > 0, new, old), OWN[client], mean, masks)
            share = SIZES[client] / sum(SIZES)
            server = each(lambda s, n, o, f=share: s + f * (n - o), server, wanted, OWN[client])
        close({name: own[name][client] for name in LIKE}, wanted)
    close(control, server)
