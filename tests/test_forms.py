"""A fast form that says what it computes: free in a program, found by those who walk the graph."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fedjaxprune import models
from fedjaxprune.structure import jaxprs
from fedjaxprune.types import Batch
from tests import draws

KEY = jax.random.key(0)
X, W = draws.normal(0, 3, 4), draws.normal(1, 4, 2)


def fast(x, w):
    return jnp.einsum("ij,jk->ik", 2.0 * x, 0.5 * w)


def marked(x, w):
    return jaxprs.equivalent_to(fast(x, w), jnp.matmul, x, w)


def loss(function):
    return lambda w, x: jnp.sum(jnp.square(function(x, w)))


def primitives(function, *args):
    found = []

    def look(graph):
        for equation in getattr(graph, "jaxpr", graph).eqns:
            found.append(equation.primitive.name)
            for inner in jaxprs.graphs_of(equation):
                look(inner)

    look(jax.make_jaxpr(function)(*args))
    return found


BOTH_W, BOTH_X = jnp.stack([W, 2 * W]), jnp.stack([X, -X])
CHANGES = {
    "nothing": (lambda f: f, W, X),
    "grad": (jax.grad, W, X),
    "jit": (jax.jit, W, X),
    "checkpoint": (lambda f: jax.grad(jax.checkpoint(f)), W, X),
    "vmap over weights": (lambda f: jax.vmap(f, in_axes=(0, None)), BOTH_W, X),
    "vmap over images": (lambda f: jax.vmap(f, in_axes=(None, 0)), W, BOTH_X),
    "vmap of grad": (lambda f: jax.vmap(jax.grad(f)), BOTH_W, BOTH_X),
    "grad of vmap": (lambda f: jax.grad(lambda w, x: jnp.sum(jax.vmap(f)(w, x))), BOTH_W, BOTH_X),
    "forward mode": (lambda f: lambda w, x: jax.jvp(f, (w, x), (x.T @ x @ w, x)), W, X),
}


@pytest.mark.parametrize("name", sorted(CHANGES))
def test_a_mark_changes_nothing(name):
    change, *args = CHANGES[name]
    plain, ours = (change(loss(function)) for function in (fast, marked))
    if name != "nothing":  # which is the case of each operation by itself
        plain, ours = jax.jit(plain), jax.jit(ours)
    jax.tree.map(np.testing.assert_array_equal, ours(*args), plain(*args))


def test_a_mark_leaves_no_trace_in_a_program():
    texts = [jax.jit(jax.grad(loss(f))).lower(W, X).as_text() for f in (fast, marked)]
    assert texts[0] == texts[1]


def test_a_plain_form_is_not_traced():
    def never(x, w):
        raise AssertionError("nobody asked")

    def function(x, w):
        return jaxprs.equivalent_to(fast(x, w), never, x, w)

    jax.jit(jax.vmap(jax.grad(loss(function)), in_axes=(None, 0)))(W, jnp.stack([X, X]))


NESTS = {
    "bare": lambda f: f,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "scan": lambda f: (
        lambda w, x: lax.scan(lambda c, _: (c + f(w, x), None), 0.0, None, length=3)[0]
    ),
    "cond": lambda f: lambda w, x: lax.cond(w[0, 0] > 9, lambda: 0.0, lambda: f(w, x)),
    "vmap": lambda f: lambda w, x: jnp.sum(jax.vmap(f, (0, None))(jnp.stack([w, 2 * w]), x)),
}


@pytest.mark.parametrize("nest", sorted(NESTS))
def test_plain_forms_are_put_in_wherever_the_fast_ones_are(nest):
    function, reference = NESTS[nest](loss(marked)), NESTS[nest](loss(jnp.matmul))
    plain = jaxprs.plain(function)
    for change in (lambda f: f, jax.grad):
        found, wanted = (jax.jit(change(f)) for f in (plain, reference))
        np.testing.assert_allclose(found(W, X), wanted(W, X), rtol=1e-5)
    assert jaxprs.NAME in primitives(function, W, X)
    assert jaxprs.NAME not in primitives(plain, W, X)
    assert primitives(plain, W, X).count("mul") == primitives(reference, W, X).count("mul")


def test_a_derivative_of_ones_own_gives_way_to_the_plain_forms():
    @jax.custom_vjp
    def function(w, x):
        return loss(marked)(w, x)

    function.defvjp(lambda w, x: (function(w, x), (w, x)), lambda r, g: (7 * r[0], 7 * r[1]))
    expected = jax.grad(loss(jnp.matmul))(W, X)
    np.testing.assert_allclose(jax.grad(jaxprs.plain(function))(W, X), expected, rtol=1e-5)


def test_a_plain_form_closes_over_no_arrays():
    def closing(x, w):
        bias = jnp.ones((3, 2))
        return jaxprs.equivalent_to(fast(x, w), lambda x, w: x @ w + bias, x, w)

    with pytest.raises(ValueError, match="closes over arrays"):
        jaxprs.plain(jax.jit(closing))(X, W)


@pytest.mark.usual("lenet5")
@pytest.mark.parametrize(
    "name", ["lenet5", "cnn", pytest.param("resnet20", marks=pytest.mark.slow)]
)
def test_the_networks_plain_forms_compute_the_same(name):
    options = {"norm": "batch"} if name == "resnet20" else {}
    model = getattr(models, name)(input_shape=(12, 12, 1), num_classes=3, **options)
    params, state = jax.jit(model.init)(KEY)
    batch = Batch(
        inputs=draws.normal(2, 4, 12, 12, 1),
        labels=jnp.arange(4) % 3,
        weights=jnp.ones(4),
    )

    def loss(params):
        return model.loss(params, state, batch, KEY)[0]

    fast = jax.jit(jax.value_and_grad(loss))(params)
    plain = jax.jit(jax.value_and_grad(jaxprs.plain(loss)))(params)
    for a, b in zip(jax.tree.leaves(fast), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert "custom_vmap_call" not in primitives(jax.grad(jaxprs.plain(loss)), params)
