"""Masks at the start by derivatives: scores of a network computed by hand, and their masks."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjaxprune import masks, models
from fedjaxprune.data import partitions
from fedjaxprune.federated import derivatives
from fedjaxprune.federated.derivatives import Given
from fedjaxprune.methods import force_masks, grasp, snip, ssfl, synflow
from fedjaxprune.pruning import scores, synaptic_flow
from fedjaxprune.rounds import facts, protocol
from fedjaxprune.rounds import task as task_lib
from fedjaxprune.testing import scenario
from fedjaxprune.types import Broadcast, Cohort, PrunerInputs, client_data

KEY = jax.random.key(0)
A = np.array([[0.5, -0.4, 0.3], [0.2, 0.6, -0.1]], np.float32)
B = np.array([[0.7, -0.3], [0.1, 0.8], [-0.5, 0.2]], np.float32)
X = np.array([[1, 2], [-1, 1], [2, 0], [0.5, -1.5]], np.float32)
Y = np.array([0, 1, 0, 1], np.int32)
START = {"a": {"kernel": jnp.asarray(A)}, "b": {"kernel": jnp.asarray(B)}}


def apply(params, inputs):
    return jax.nn.relu(inputs @ params["a"]["kernel"]) @ params["b"]["kernel"]


MODEL = models.adapters.from_functions(lambda key: START, apply)
INPUTS = jax.ShapeDtypeStruct((1, 2), jnp.float32)


def population(*groups):
    return partitions.population({"inputs": X, "labels": Y}, [np.array(rows) for rows in groups])


def batches(*, epochs=1, examples="all", share=0.1, augment=True):
    del examples, share, augment
    return scenario.full_batches(epochs, 4)


def make_task(**changes):
    setup = protocol.Protocol(num_rounds=1, batcher=batches(), optimizer=optax.sgd(0.1))
    made = task_lib.make(MODEL, setup, inputs=facts.float_inputs((2,)))
    return made._replace(batches=batches, num_clients=2, largest_client=4, **changes)


def flat(tree):
    return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(tree)])


def bits(tree):
    text = "".join("01"[int(bit)] for bit in flat(tree))
    return f"{text[:6]} {text[6:]}"


def play(method, people, **settings):
    """Play the stages before training; the states after each round."""
    algorithm = method.build(method.METHOD.settings(**settings), make_task())
    state = algorithm.init(START, {})
    number = people.offsets.shape[0] - 1
    row = algorithm.init_client(START)
    members = Cohort(
        client_ids=jnp.arange(number, dtype=jnp.int32),
        participated=jnp.ones(number, jnp.bool_),
        states=jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (number, *leaf.shape)), row),
    )
    states = []
    for stage in algorithm.stages[:-1]:
        run = jax.jit(stage.round)
        for _ in range(stage.num_rounds):
            state, rows, _ = run(jax.random.fold_in(KEY, state.round), state, members, people)
            members = members._replace(states=rows)
            states.append(state)
    return states


POOLED, APART = population([0, 1, 2, 3]), population([0, 1, 2], [3])
SENSITIVITY = [
    *(0.143847, 0.053530, 0.048664, 0.043291, 0.056070, 0.026904),
    *(0.130996, 0.056141, 0.000363, 0.002903, 0.015543, 0.006217),
]
FLOW = {  # weight * (Hessian * gradient), by the temperature, times its square
    1.0: [
        *(-0.070752, -0.031542, 0.055306, -0.027599, 0.092075, -0.019064),
        *(-0.027141, -0.011632, -0.012450, 0.099599, 0.095002, 0.038001),
    ],
    200.0: [
        *(0.088036, 0.004770, 0.009684, 0.023446, -0.003193, -0.004463),
        *(0.141133, 0.060486, -0.005508, 0.044064, 0.101171, 0.040469),
    ],
}


@functools.cache
def asked(derivative):
    """Let a client report a derivative."""
    client = derivatives.report(
        MODEL.loss, batcher=batches(), name="found", derivative=derivative()
    )
    return jax.jit(client.update)


def report(derivative, people, client_id=0, direction=()):
    """Ask one client for a derivative, as a vector."""
    data = client_data(people, jnp.int32(client_id))
    broadcast = Broadcast(START, masks.full(START), {}, jnp.int32(0))
    given: Any = Given(broadcast, direction)
    message, _ = asked(derivative)(KEY, given, (), data)
    return message.fields["found"]


def scored(score, tree, name="grads"):
    seen = PrunerInputs(START, tree if name == "grads" else None, jnp.int32(0), {name: tree})
    return flat(score(KEY, seen))


def test_the_scores_of_the_mean_gradient_are_those_computed_by_hand():
    found = scored(scores.saliency, report(derivatives.gradient, POOLED))
    np.testing.assert_allclose(found, SENSITIVITY, atol=1e-6)


def test_means_of_scores_are_not_scores_of_means():
    each = [flat(report(derivatives.sensitivity, APART, client)) for client in (0, 1)]
    found = 0.75 * each[0] + 0.25 * each[1]
    expected = np.array(SENSITIVITY)
    expected[[2, 10, 11]] = 0.072167, 0.049120, 0.019648
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_products_with_the_hessian_are_those_computed_by_hand():
    gradient = report(derivatives.gradient, POOLED)
    product = report(derivatives.curvature, POOLED, direction=gradient)
    found = scored(scores.gradient_flow, product, "curvature")
    np.testing.assert_allclose(found, FLOW[1.0], atol=1e-6)
    np.testing.assert_allclose(found.sum(), 0.179804, atol=1e-6)


def test_products_with_the_mean_gradient_add_up_and_those_with_own_ones_do_not():
    mean = report(derivatives.gradient, POOLED)
    products = [report(derivatives.curvature, APART, client, mean) for client in (0, 1)]
    both = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, *products)
    np.testing.assert_allclose(
        scored(scores.gradient_flow, both, "curvature"), FLOW[1.0], atol=1e-6
    )
    own = [report(derivatives.gradient, APART, client) for client in (0, 1)]
    apart = [report(derivatives.curvature, APART, i, own[i]) for i in (0, 1)]
    both = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, *apart)
    expected = [
        *(-0.096298, -0.039068, 0.085904, -0.032530, 0.113804, -0.022252),
        *(-0.034573, -0.014817, -0.015746, 0.125970, 0.135392, 0.054157),
    ]
    found = scored(scores.gradient_flow, both, "curvature")
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_flow_is_conserved_from_layer_to_layer_and_through_every_unit():
    params = synaptic_flow.absolute(START)
    grads, flow = synaptic_flow.gradients(MODEL.predict, params, {}, INPUTS)
    found = jax.tree.map(lambda leaf, grad: np.asarray(leaf * grad), params, grads)
    found = jax.tree.map(lambda leaf: leaf * (1.88 / float(flow)), found)
    np.testing.assert_allclose(
        found["a"]["kernel"].ravel(), [0.5, 0.36, 0.21, 0.2, 0.54, 0.07], atol=1e-6
    )
    np.testing.assert_allclose(
        found["b"]["kernel"].ravel(), [0.49, 0.21, 0.1, 0.8, 0.2, 0.08], atol=1e-6
    )
    for units in (found["a"]["kernel"].sum(axis=0), found["b"]["kernel"].sum(axis=1)):
        np.testing.assert_allclose(units, [0.7, 0.9, 0.28], atol=1e-6)


@pytest.mark.parametrize("growth", [1e-6, 1.0, 1e6])
def test_flow_through_deep_networks_neither_overflows_nor_vanishes(growth):
    depth = 10

    def predict(params, state, inputs):
        del state
        for kernel in params:
            inputs = jax.nn.relu(inputs @ kernel)
        return inputs

    params = [jnp.full((2, 2), growth, jnp.float32) for _ in range(depth)]
    grads, flow = synaptic_flow.gradients(predict, params, {}, INPUTS)
    assert 0.1 < float(flow) < 10
    for leaf, grad in zip(params, grads, strict=True):
        np.testing.assert_allclose(np.sum(leaf * grad), flow, rtol=1e-5)


STEPWISE = {
    "snip": ["111111 110000", "110100 110000", "100000 110000"],
    "force_masks": ["111111 110000", "100100 110100", "100000 110000"],
}


@pytest.mark.usual("snip")
@pytest.mark.parametrize("method", [snip, force_masks], ids=["snip", "force_masks"])
def test_stepwise_masks_over_clients_are_those_on_pooled_data(method):
    settings = {"sparsity": 0.75, "num_prune_steps": 3, "steps": "exponential"}
    wanted = STEPWISE[method.__name__.rsplit(".", 1)[-1]]
    settings["allocation"] = "global"
    states = play(method, APART, examples="clients", **settings)
    assert [bits(state.masks) for state in states] == [*wanted, wanted[-1]]  # and nothing is left
    np.testing.assert_array_equal(flat(states[-1].params), flat(START) * flat(states[-1].masks))
    (pooled,) = play(method, POOLED, examples="pooled", **settings)
    assert bits(pooled.masks) == wanted[-1]


def test_one_step_of_each_is_snip():
    settings = {"sparsity": 0.5, "num_prune_steps": 1, "examples": "pooled"}
    (one,) = play(snip, POOLED, allocation="global", **settings)
    assert bits(one.masks) == "111010 110000"
    (other,) = play(force_masks, POOLED, **settings)
    (pooled,) = play(ssfl, POOLED, sparsity=0.5)[:1]
    assert bits(other.masks) == bits(pooled.masks) == bits(one.masks)


def test_synaptic_flow_leaves_one_path():
    (state,) = play(synflow, POOLED, sparsity=0.75, num_prune_steps=3)
    assert bits(state.masks) == "100010 000100"
    steps = {2: "110010 100100", 1: "111110 110100"}
    after = [1 - 0.25 ** (step / 3) for step in (1, 2)]
    for number, wanted in steps.items():
        (state,) = play(synflow, POOLED, sparsity=after[number - 1], num_prune_steps=number)
        assert bits(state.masks) == wanted


@pytest.mark.parametrize(
    ("temperature", "wanted"), [(1.0, "001010 010111"), (None, "100000 110111")]
)
def test_grasp_keeps_signed_scores(temperature, wanted):
    (state,) = play(grasp, POOLED, sparsity=0.5, examples="pooled", temperature=temperature)
    assert bits(state.masks) == wanted
    if temperature:
        largest = np.isin(np.arange(12), np.argsort(-np.abs(FLOW[temperature]))[:6])
        assert bits({"all": jnp.asarray(largest)}) != wanted  # signs count


def test_grasp_in_two_exchanges_is_that_of_pooled_data():
    settings = {"sparsity": 0.5, "examples": "clients", "temperature": 1.0}
    states = play(grasp, APART, **settings)
    assert [bits(state.masks) for state in states] == ["111111 111111", *["001010 010111"] * 2]
    states = play(grasp, APART, exchanges="one", **settings)
    assert bits(states[-1].masks) == "001010 010111"


def test_the_temperature_needs_logits():
    own = models.adapters.from_functions(
        lambda key: START, apply, loss=lambda logits, labels: jnp.sum(logits, axis=-1)
    )
    with pytest.raises(ValueError, match=r"temperature must be 1 .* got 2.0"):
        grasp.build(grasp.Grasp(temperature=2.0, examples="pooled"), make_task(model=own))


def normalized(params, inputs):
    hidden = inputs @ params["a"]["kernel"]
    centered = hidden - jnp.mean(hidden, axis=1, keepdims=True)
    return (
        centered / jnp.sqrt(jnp.var(hidden, axis=1, keepdims=True) + 1e-5) @ params["b"]["kernel"]
    )


def gated(params, inputs):
    return jax.nn.sigmoid(inputs @ params["a"]["kernel"]) @ params["b"]["kernel"]


@pytest.mark.parametrize("network", [normalized, gated])
def test_networks_that_do_not_conserve_flow_are_refused(network):
    model = models.adapters.from_functions(lambda key: START, network)
    with pytest.raises(ValueError, match="output is proportional to its input; sigmoids"):
        synflow.build(synflow.Synflow(), make_task(model=model))


def test_tokens_are_refused():
    task = make_task()
    tokens = task.facts._replace(inputs=jax.ShapeDtypeStruct((2, 5), jnp.int32))
    with pytest.raises(ValueError, match="got one that reads tokens"):
        synflow.build(synflow.Synflow(), task._replace(facts=tokens))


def test_nothing_is_asked_where_nothing_is_pruned():
    for method in (force_masks, grasp, snip, ssfl, synflow):
        algorithm = method.build(
            method.METHOD.settings(
                sparsity=0.0, **({} if method in (ssfl, synflow) else {"examples": "clients"})
            ),
            make_task(),
        )
        assert [stage.name for stage in algorithm.stages] == ["train"]
