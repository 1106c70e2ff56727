"""Moments of the built-in networks equal the sums over what their layers see, layer by layer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fedjaxprune import masks, models, trees
from fedjaxprune.models import layers as layers_lib
from fedjaxprune.models import lstm
from fedjaxprune.structure import moments
from fedjaxprune.types import Batch
from tests import draws
from tests.explicit_moments import sums, traced

KEY = jax.random.key(0)
KINDS = ("inputs", "outputs", "joint", "rows")


def lstm_by_hand(noted, module, x):
    """Write the loop over time out, every product a use."""
    name, params = "/".join(module.path), module.variables["params"]
    bias = params["input"]["bias"] + params["recurrent"]["bias"]
    inputs = noted.dense(f"{name}/input/kernel", x, params["input"]["kernel"]) + bias[None, None]
    hidden = memory = jnp.zeros((x.shape[0], module.features))
    outputs = []
    for i in range(x.shape[1]):
        past = noted.dense(f"{name}/recurrent/kernel", hidden, params["recurrent"]["kernel"])
        enter, forget, cell, leave = jnp.split(inputs[:, i] + past, 4, axis=-1)
        memory = nn.sigmoid(forget) * memory + nn.sigmoid(enter) * jnp.tanh(cell)
        hidden = nn.sigmoid(leave) * jnp.tanh(memory)
        outputs.append(hidden)
    return jnp.stack(outputs, axis=1)


def by_layer(model, state):
    """Make the model's loss with every use of a kernel noted, beside the layers' own products."""

    def network(params, batch, noted):
        def note(call, args, kwargs, context):
            module, x = context.module, args[0] if args else None
            name = "/".join((*module.path, "kernel"))
            if isinstance(module, lstm.Lstm):
                return lstm_by_hand(noted, module, x)
            if isinstance(module, layers_lib.ConvReluMaxPool):
                own, pads = module.variables["params"], ((module.padding,) * 2,) * 2
                y = noted.conv(name, x, own["kernel"], padding=pads) + own["bias"][None, None, None]
                window = (1, 2, 2, 1)
                return nn.relu(lax.reduce_window(y, -jnp.inf, lax.max, window, window, "VALID"))
            output = call(*args, **kwargs)
            if isinstance(module, layers_lib.Dense):
                return noted._note(name, x, output, None)
            if isinstance(module, layers_lib.Conv):
                side = module.kernel_size // 2 if module.padding is None else module.padding
                options = {"window_strides": (module.stride,) * 2, "feature_group_count": 1}
                options |= {"padding": ((side, side),) * 2, "rhs_dilation": (1, 1)}
                return noted._note(name, x, output, options)
            return output

        with nn.intercept_methods(note):
            return model.loss(params, state, batch, KEY)[0]

    return network


def case(name):
    """Make a network and a batch of which two examples do not count."""
    if name == "char_lstm":
        options = {"hidden_sizes": (5, 4), "labels": "every"}
        model = models.char_lstm(input_shape=(4,), num_classes=7, **options)
        inputs = jax.random.randint(KEY, (5, 4), 0, 7)
        labels = (inputs + 1) % 7
    else:
        shape = {"mlp": (4, 4, 1), "lenet5": (14, 14, 1), "resnet8": (8, 8, 3)}[name]
        options = {"norm": "batch"} if name == "resnet8" else {}
        model = getattr(models, name)(input_shape=shape, num_classes=3, **options)
        inputs = draws.normal(0, 5, *shape)
        labels = jnp.arange(5) % 3
    counts = jnp.asarray([1.0, 0.0, 1.0, 1.0, 0.0])
    return model, Batch(inputs, labels, counts)


@pytest.mark.parametrize(
    "name",
    ["mlp", "char_lstm", *(pytest.param(n, marks=pytest.mark.slow) for n in ("lenet5", "resnet8"))],
)
def test_moments_of_a_built_in_network_are_the_explicit_sums(name):
    model, batch = case(name)
    params, state = jax.jit(model.init)(jax.random.key(1))
    function = moments.of_loss(model.loss, prunable=masks.is_kernel, kinds=KINDS)
    result, grads, found = jax.jit(function)(params, state, batch, KEY)
    plain = jax.jit(jax.value_and_grad(model.loss, has_aux=True))(params, state, batch, KEY)
    np.testing.assert_allclose(result[0], plain[0][0], rtol=1e-6)
    for got, wanted in zip(*map(jax.tree.leaves, (grads, plain[1])), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6 * np.abs(wanted).max())
    here = np.flatnonzero(batch.weights)
    uses, seen, backs = traced(
        by_layer(model, state), params, batch, (jnp.matmul, lax.conv_general_dilated)
    )
    seen, backs = ([np.asarray(leaf)[here] for leaf in each] for each in (seen, backs))
    shapes = {path: leaf for path, leaf in trees.items(params) if masks.is_kernel(path, leaf)}
    explicit = sums(shapes, uses, seen, backs)
    for kind in KINDS:
        got = dict(trees.items(getattr(found, kind)))
        for path, wanted in explicit[kind].items():
            error = np.abs(np.asarray(got[path], np.float64) - wanted).max()
            assert wanted.max() > 0
            assert error <= 1e-6 * wanted.max(), f"{kind} of {path}: {error / wanted.max():.1e}"
