"""Moments of layers: what JAX's own graph gives equals the sums that a person would write."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fedjaxprune.kernels import blocked, convolution, dense
from fedjaxprune.structure import moments
from fedjaxprune.types import Batch
from tests.draws import normal as draw
from tests.explicit_moments import Layers, sums, traced

KEY = jax.random.key(0)
KINDS = ("inputs", "outputs", "joint", "rows")


def as_loss(network, layers=None):
    """Make a model's loss of ``(params, batch, layers) -> loss``."""

    def loss(params, state, batch, key):
        del key
        return network(params, batch, layers or Layers()), (state, {})

    return loss


def of(loss, params, batch, *, kinds=KINDS, prunable=lambda path, leaf: leaf.ndim > 1):
    """Compute gradients and moments of a loss without state."""
    function = moments.of_loss(loss, prunable=prunable, kinds=kinds)
    return jax.jit(function)(params, {}, batch, KEY)


def mean_square(outputs, batch):
    """Average an example's squares over those that count."""
    squares = jnp.square(outputs).reshape(outputs.shape[0], -1).mean(axis=1)
    return jnp.sum(squares * batch.weights) / jnp.sum(batch.weights)


# ---- the specification's numbers


def test_a_dense_layer_has_the_moments_of_the_specification():
    x = jnp.array([[1.0, 2.0], [0.0, -1.0], [2.0, 1.0]])
    g = jnp.array([[0.2, -0.1], [-0.3, 0.1], [0.1, 0.3]])
    params = {"w": jnp.array([[0.5, 0.0], [-0.25, 1.0]])}
    loss = as_loss(lambda p, b, layers: jnp.sum(layers.dense("w", b.inputs, p["w"]) * b.labels))
    _, grads, found = of(loss, params, Batch(x, g, jnp.ones(3)))
    np.testing.assert_allclose(grads["w"], [[0.4, 0.5], [0.8, 0.0]], atol=1e-7)
    np.testing.assert_allclose(found.inputs["w"], [[5.0, 5.0], [6.0, 6.0]], rtol=1e-6)
    np.testing.assert_allclose(found.outputs["w"], [[0.14, 0.11]] * 2, rtol=1e-6)
    np.testing.assert_allclose(3 * found.joint["w"], [[0.24, 1.11], [0.78, 0.42]], rtol=1e-6)
    np.testing.assert_array_equal(found.rows["w"], jnp.full((2, 2), 3.0))


def test_a_convolution_has_the_moments_of_the_specification():
    x = jnp.array([[[1, 0, 2], [0, 1, 0], [3, 0, 1]], [[0, 1, 0], [2, 0, 0], [0, 0, 1]]], float)
    g = jnp.array([[[0.1, 0.0], [-0.2, 0.1]], [[0.0, 0.2], [0.1, 0.0]]])
    params = {"w": draw(0, 2, 2, 1, 1)}
    batch = Batch(x[..., None], g[..., None], jnp.ones(2))
    loss = as_loss(lambda p, b, layers: jnp.sum(layers.conv("w", b.inputs, p["w"]) * b.labels))
    _, grads, found = of(loss, params, batch)

    def square(leaf):
        return np.asarray(leaf).reshape(2, 2)

    np.testing.assert_allclose(square(grads["w"]), [[0.6, -0.2], [-0.6, 0.2]], rtol=1e-6)
    np.testing.assert_allclose(square(found.inputs["w"]), [[7, 6], [14, 3]], rtol=1e-6)
    np.testing.assert_allclose(square(found.outputs["w"]), np.full((2, 2), 0.11), rtol=1e-6)
    np.testing.assert_allclose(2 * square(found.joint["w"]), [[0.2, 0.08], [0.72, 0.04]], rtol=1e-6)
    np.testing.assert_array_equal(square(found.rows["w"]), np.full((2, 2), 8.0))


# ---- networks, against explicit sums


def mlp(params, batch, layers):
    hidden = jnp.tanh(layers.dense("first", batch.inputs, params["first"]) + params["bias"][None])
    return mean_square(layers.dense("second", hidden, params["second"]), batch)


def cnn(params, batch, layers):
    """Strides, padding, holes, groups and a kernel for each channel."""
    x = batch.inputs
    x = jax.nn.relu(layers.conv("first", x, params["first"], (2, 1), ((1, 1), (0, 2))))
    x = jax.nn.relu(layers.conv("groups", x, params["groups"], groups=2, holes=(1, 2)))
    x = jnp.tanh(layers.conv("channels", x, params["channels"], padding=((1, 1),) * 2, groups=8))
    return mean_square(layers.dense("last", x.mean(axis=(1, 2)), params["last"]), batch)


def residual(params, batch, layers):
    """Batch statistics over the examples that count, and a leaf under a mask."""
    x = layers.conv("first", batch.inputs, params["first"], padding=((1, 1),) * 2)
    weights = batch.weights[:, None, None, None]
    mean = jnp.sum(x * weights, axis=(0, 1, 2)) / (jnp.sum(weights) * x.shape[1] * x.shape[2])
    x = jax.nn.relu(x - mean[None, None, None])
    mask = jnp.arange(144).reshape(3, 3, 4, 4) % 3 > 0
    kernel = jnp.where(mask, params["second"], jnp.zeros_like(params["second"]))
    x = x + layers.conv("second", x, kernel, padding=((1, 1),) * 2)
    return mean_square(layers.dense("last", x.mean(axis=(1, 2)), params["last"]), batch)


def recurrent(params, batch, layers, *, unrolled=False):
    """A loop over time that uses one masked leaf, and once more transposed."""
    mask = jnp.arange(16).reshape(4, 4) % 3 > 0
    kernel = params["loop"] * mask.astype(jnp.float32)
    inputs = jnp.swapaxes(layers.dense("enter", batch.inputs, params["enter"]), 0, 1)

    def step(hidden, now):
        hidden = jnp.tanh(now + layers.dense("loop", hidden, kernel))
        return hidden, hidden

    hidden = jnp.zeros(inputs.shape[1:])
    if unrolled:
        for now in inputs:
            hidden, _ = step(hidden, now)
    else:
        hidden, _ = lax.scan(step, hidden, inputs)
    return mean_square(hidden, batch)


def transformer(params, batch, layers):
    """Attention with a joint kernel cut in three, learned positions, tokens merged into rows."""
    size, length, width = batch.inputs.shape
    tokens = (batch.inputs + params["positions"][None, :, 0]).reshape(size * length, width)
    joint = layers.dense("joint", tokens, params["joint"])
    q, k, v = jnp.split(joint.reshape(size, length, -1), 3, axis=2)
    scores = jax.nn.softmax(jnp.einsum("btd,bsd->bts", q, k), axis=-1)
    mixed = jnp.einsum("bts,bsd->btd", scores, v).reshape(size * length, -1)
    x = tokens + layers.dense("out", mixed, params["out"])
    x = x + layers.dense("down", jax.nn.gelu(layers.dense("up", x, params["up"])), params["down"])
    return mean_square(x.reshape(size, length, width), batch)


NETWORKS = {
    "mlp": (mlp, {"first": (6, 5), "bias": (5,), "second": (5, 3)}, (6,)),
    "cnn": (
        cnn,
        {"first": (3, 2, 2, 4), "groups": (2, 2, 2, 8), "channels": (3, 3, 1, 16), "last": (16, 3)},
        (7, 6, 2),
    ),
    "residual": (
        residual,
        {"first": (3, 3, 2, 4), "second": (3, 3, 4, 4), "last": (4, 3)},
        (5, 5, 2),
    ),
    "recurrent": (recurrent, {"enter": (3, 4), "loop": (4, 4)}, (5, 3)),
    "transformer": (
        transformer,
        {"positions": (4, 1, 6), "joint": (6, 12), "out": (4, 6), "up": (6, 8), "down": (8, 6)},
        (4, 6),
    ),
}


def case(name, num_examples):
    network, shapes, example = NETWORKS[name]
    params = {leaf: draw(i, *shape) for i, (leaf, shape) in enumerate(shapes.items())}
    inputs = draw(9, num_examples, *example)
    return network, params, Batch(inputs, jnp.zeros(num_examples, int), jnp.ones(num_examples))


def is_kernel(path, leaf):
    return leaf.ndim > 1 and path != "positions"


FORMS = {
    "plain": (jnp.matmul, lax.conv_general_dilated),
    "fast": (
        lambda x, kernel: dense.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ()))),
        convolution.conv_general_dilated,
    ),
}


CASES = (
    "mlp fast",
    "cnn plain",
    "cnn fast",
    "residual fast",
    "recurrent plain",
    "transformer fast",
)


@pytest.mark.usual("cnn fast", "recurrent plain", "transformer fast")
@pytest.mark.parametrize("name", CASES)
def test_moments_are_the_explicit_sums_and_gradients_the_plain_ones(name):
    name, forms = name.split()
    network, params, batch = case(name, 3)
    loss = as_loss(network, Layers(forms=FORMS[forms]))
    given = params, {}, batch, KEY
    function = jax.jit(moments.of_loss(loss, prunable=is_kernel, kinds=KINDS))
    result, grads, found = function(*given)
    expected = jax.jit(jax.value_and_grad(loss, has_aux=True))(*given)
    if name == "recurrent":
        # What XLA fuses in a loop, and so how it rounds, depends on all that the loop computes.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), grads, expected[1])
        result, grads = jax.jit(lambda *given: function(*given)[:2])(*given)
    jax.tree.map(np.testing.assert_array_equal, (result, grads), expected)
    if name == "recurrent":
        network = functools.partial(recurrent, unrolled=True)
    explicit = sums(params, *traced(network, params, batch, FORMS[forms]))
    for kind in KINDS:
        for leaf in filter(lambda leaf: is_kernel(leaf, params[leaf]), params):
            got, wanted = getattr(found, kind)[leaf], explicit[kind][leaf]
            np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=3e-7 * wanted.max())


# ---- examples that do not count


@pytest.mark.parametrize("name", ["residual", "transformer"])
def test_filling_slots_add_nothing(name):
    network, params, batch = case(name, 8)
    counts = jnp.arange(8) % 3 != 1  # of 8 slots 5
    five = jax.tree.map(lambda leaf: leaf[counts], batch)
    filled = batch._replace(weights=counts.astype(jnp.float32))
    loss = as_loss(network)
    run = jax.jit(functools.partial(of, loss, prunable=is_kernel))
    found, expected = run(params, filled)[2], run(params, five)[2]
    for kind in KINDS:
        for got, wanted in zip(
            *map(jax.tree.leaves, (getattr(found, kind), getattr(expected, kind))), strict=True
        ):
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6 * wanted.max())


@pytest.mark.parametrize("order", ["example first", "token first"])
def test_rows_are_followed_to_their_examples_through_a_merged_axis(order):
    def network(params, batch, layers):
        x = batch.inputs if order == "example first" else jnp.swapaxes(batch.inputs, 0, 1)
        y = layers.dense("w", x.reshape(-1, 3), params["w"]).reshape(*x.shape[:2], -1)
        y = y if order == "example first" else jnp.swapaxes(y, 0, 1)
        return mean_square(y, batch)

    x, weights = draw(0, 4, 2, 3), jnp.array([1.0, 0.0, 1.0, 0.0])
    found = of(as_loss(network), {"w": draw(1, 3, 2)}, Batch(x, weights, weights))[2]
    wanted = np.square(x[::2]).sum((0, 1))
    np.testing.assert_allclose(found.inputs["w"][:, 0], wanted, rtol=1e-6)
    assert (found.rows["w"] == 4).all()


def test_a_weight_that_no_output_needs_has_no_rows():
    def network(params, batch, layers):
        layers.dense("idle", batch.inputs, params["idle"])
        return mean_square(layers.dense("w", jnp.zeros_like(batch.inputs), params["w"]), batch)

    batch = Batch(draw(0, 4, 3), jnp.zeros(4, int), jnp.ones(4))
    params = {"idle": draw(1, 3, 2), "w": draw(2, 3, 2)}
    found = of(as_loss(network), params, batch)[2]
    for kind in KINDS:
        assert not getattr(found, kind)["idle"].any()
    assert not found.inputs["w"].any()
    assert (found.rows["w"] == 4).all()


# ---- transformations


def test_clients_under_vmap_have_their_own_moments():
    network, params, batch = case("mlp", 3)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    batches = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), batch)
    loss = as_loss(network, Layers(forms=FORMS["fast"]))
    both = jax.jit(jax.vmap(functools.partial(of, loss)))(stacked, batches)
    second = jax.jit(functools.partial(of, loss))(jax.tree.map(lambda x: x[1], stacked), batch)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[1], b, rtol=2e-6, atol=1e-7), both, second
    )


def one_layer(use):
    """Make a network of one leaf ``[3, 3]``, used as ``use(x, w)``."""
    return as_loss(lambda p, batch, layers: mean_square(use(batch.inputs, p["w"]), batch))


def chosen(x, w):
    return lax.cond(w[0, 0] > -9.0, lambda x, w: x @ w, lambda x, w: jnp.sin(x) @ w, x, w)


def pieces(x, w):
    return jnp.concatenate([x @ w[:, :1], x @ w[:, 1:]], axis=1)


@jax.custom_jvp
def quantized(w):
    return jnp.round(w)


quantized.defjvp(lambda primals, tangents: (jnp.round(primals[0]), tangents[0]))

SAME = {  # ways to write x @ w
    "transposed": lambda x, w: lax.dot_general(w.T, x, (((1,), (1,)), ((), ()))).T,
    "rematerialized": jax.checkpoint(lambda x, w: x @ w),
    "in pieces": pieces,
    "in heads": lambda x, w: jnp.einsum("bi,iho->bho", x, w.reshape(3, 3, 1))[..., 0],
    "jitted": jax.jit(lambda x, w: x @ w),
    "an example at a time": lambda x, w: jax.vmap(lambda x: x @ w)(x),
    "chosen": chosen,
    "in a loop": lambda x, w: lax.fori_loop(0, 1, lambda _, c: (c[0] @ c[1], c[1]), (x, w))[0],
    "sliced by a loop": lambda x, w: lax.scan(lambda x, w: (x @ w, None), x, w[None])[0],
}


@pytest.mark.parametrize("way", sorted(SAME))
def test_a_product_has_the_same_moments_however_it_is_written(way):
    params, batch = {"w": draw(1, 3, 3)}, Batch(draw(0, 4, 3), jnp.zeros(4, int), jnp.ones(4))
    batch = batch._replace(weights=jnp.array([1.0, 1.0, 0.0, 1.0]))
    found = of(one_layer(SAME[way]), params, batch)
    expected = of(one_layer(jnp.matmul), params, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)


def test_a_straight_through_function_passes_moments_on():
    batch = Batch(draw(0, 4, 3), jnp.zeros(4, int), jnp.ones(4))
    found = of(one_layer(lambda x, w: x @ quantized(w)), {"w": 3 * draw(1, 3, 3)}, batch)
    expected = of(one_layer(jnp.matmul), {"w": jnp.round(3 * draw(1, 3, 3))}, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)


def test_only_the_branch_that_runs_counts_under_vmap():
    def use(x, w):
        return lax.cond(w[0, 0] > 0.0, lambda x, w: x @ w, lambda x, w: x[:, ::-1] @ w, x, w)

    batch = Batch(draw(0, 4, 3), jnp.zeros(4, int), jnp.ones(4))
    params = {"w": jnp.stack([jnp.ones((3, 3)), -jnp.ones((3, 3))])}
    found = jax.vmap(lambda p: of(one_layer(use), p, batch))(params)[2]
    squares = np.square(batch.inputs).sum(axis=0)
    np.testing.assert_allclose(found.inputs["w"][0, :, 0], squares, rtol=1e-6)
    np.testing.assert_allclose(found.inputs["w"][1, :, 0], squares[::-1], rtol=1e-6)
    assert (found.rows["w"] == 4).all()


def test_a_layer_with_pooling_keeps_its_fast_form():
    def network(params, batch, layers):
        del layers
        bias = jnp.zeros(4)
        y = blocked.conv_relu_max_pool(batch.inputs, params["w"], bias, padding=1, block=2)
        return mean_square(y, batch)

    def plainly(params, batch, layers):
        y = layers.conv("w", batch.inputs, params["w"], padding=((1, 1),) * 2)
        y = jax.nn.relu(y.reshape(2, 3, 2, 3, 2, 4).max(axis=(2, 4)))
        return mean_square(y, batch)

    params, batch = (
        {"w": draw(1, 3, 3, 2, 4)},
        Batch(draw(0, 2, 6, 6, 2), jnp.zeros(2), jnp.ones(2)),
    )
    given = params, {}, batch, KEY
    _, grads, found = jax.jit(functools.partial(of, as_loss(network)))(params, batch)
    plain = jax.jit(jax.grad(as_loss(network), has_aux=True))(*given)[0]
    np.testing.assert_array_equal(grads["w"], plain["w"])
    explicit = sums(params, *traced(plainly, params, batch, FORMS["plain"]))
    for kind in KINDS:
        np.testing.assert_allclose(getattr(found, kind)["w"], explicit[kind]["w"], rtol=3e-6)


# ---- what cannot be followed

REFUSED = {
    "looked up": (lambda x, w: w[jnp.argmax(x, axis=1)], "looks|gather"),
    "a product of weights": (lambda x, w: x @ (w @ w.T), "another weight"),
    "outside of a product": (lambda x, w: x + w[:1], "outside of a product"),
    "one by one": (
        lambda x, w: lax.map(lambda row: row @ w, x),
        "a loop over the examples",
    ),
    "accumulated": (lambda x, w: x @ jnp.cumsum(w, axis=0), "cumsum"),
    "changed by a loop": (
        lambda x, w: lax.fori_loop(0, 2, lambda _, c: (c[0] @ c[1], 2.0 * c[1]), (x, w))[0],
        "a loop changes it",
    ),
    "with itself": (lambda x, w: x @ (w * w.T), "with one another"),
    "shuffled": (lambda x, w: x[::-1] @ w, "unclear"),
    "between examples": (lambda x, w: ((x @ x.T)[:, :, None] * x[None]) @ w, "unclear"),
}


@pytest.mark.parametrize("use", sorted(REFUSED))
def test_a_use_that_cannot_be_followed_is_refused_by_name(use):
    function, why = REFUSED[use]
    batch = Batch(draw(0, 4, 3), jnp.zeros(4, int), jnp.ones(4))
    with pytest.raises(ValueError, match=f"no moments of 'w': .*({why})"):
        jax.eval_shape(functools.partial(of, one_layer(function)), {"w": draw(1, 3, 3)}, batch)


def test_a_loss_for_one_number_of_examples_is_refused():
    loss = one_layer(lambda x, w: x @ w * jnp.ones((4, 1)))
    batch = Batch(draw(0, 4, 3), jnp.zeros(4, int), jnp.ones(4))
    with pytest.raises(ValueError, match=r"any number of examples, .* for 4 and 5: mul"):
        of(loss, {"w": draw(1, 3, 3)}, batch)


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match=r"kinds must be some of inputs, .* got \('fisher',\)"):
        moments.of_loss(one_layer(jnp.matmul), prunable=is_kernel, kinds=("fisher",))  # pyright: ignore[reportArgumentType]
