"""Moments by the definition: what a layer sees and the gradient of its output, row by row."""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

LAYOUT = ("NHWC", "HWIO", "NHWC")


class Use(NamedTuple):
    """One product with a weight: its name, what it sees, its output's shape, and how."""

    name: str
    x: Any
    shape: tuple[int, ...]
    options: dict[str, Any] | None  # of a convolution


class Layers:
    """Products with weights, as a network uses them: written plainly, and noted if asked for.

    Attributes:
      errors: what is added to the outputs, by use; its gradients are those of the outputs.
      seen: what each use sees.
    """

    def __init__(self, errors=None, forms=(jnp.matmul, lax.conv_general_dilated)):
        self.errors = errors
        self.seen = []
        self.dot, self.convolution = forms

    def _note(self, name, x, output, options):
        if self.errors is None:
            return output
        self.seen.append(Use(name, x, output.shape, options))
        return output + self.errors[len(self.seen) - 1] if self.errors else output

    def dense(self, name, x, kernel):
        """Multiply ``[..., in]`` with ``[in, out]``."""
        return self._note(name, x, self.dot(x, kernel), None)

    def conv(self, name, x, kernel, strides=(1, 1), padding=((0, 0), (0, 0)), groups=1, holes=None):
        """Convolve ``[B, H, W, C]`` with ``[kh, kw, C / G, O]``."""
        options = {"window_strides": strides, "padding": padding, "feature_group_count": groups}
        options |= {"rhs_dilation": holes or (1, 1), "dimension_numbers": LAYOUT}
        return self._note(name, x, self.convolution(x, kernel, **options), options)


def traced(network, params, batch, forms):
    """List the uses of weights, what each sees, and the gradients of their outputs."""
    noted = Layers([], forms)
    jax.eval_shape(lambda params: network(params, batch, noted), params)

    def run(errors, params):
        layers = Layers(errors, forms)
        return network(params, batch, layers), [use.x for use in layers.seen]

    zeros = [jnp.zeros(use.shape) for use in noted.seen]
    backs, seen = jax.jit(jax.grad(run, has_aux=True))(zeros, params)
    return noted.seen, seen, backs


def sums(params, uses, seen, grads):
    """Add up the sums of all uses, by kind and leaf, in float64."""
    kinds = ("inputs", "outputs", "joint", "rows")
    found = {kind: {name: np.zeros(leaf.shape) for name, leaf in params.items()} for kind in kinds}
    for use, x, grad in zip(uses, seen, grads, strict=True):
        name, options = use.name, use.options
        x, grad = (np.square(np.asarray(each, np.float64)) for each in (x, grad))
        shape = params[name].shape
        if options is None:
            x, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
            parts = (x.sum(0)[:, None], grad.sum(0)[None], x.T @ grad, len(x))
        else:
            parts = _of_convolution(x, grad, shape, options)
        for kind, part in zip(kinds, parts, strict=True):
            found[kind][name] += np.broadcast_to(part, shape)
    return found


def _of_convolution(x, grad, shape, options):
    """Meet each tap's pixels, group by group."""
    (down, across), (before, beside) = options["window_strides"], options["padding"]
    x = np.pad(x, ((0, 0), before, beside, (0, 0)))
    height, width = grad.shape[1:3]
    groups, holes = options["feature_group_count"], options["rhs_dilation"]
    inputs, joint = np.zeros(shape), np.zeros(shape)
    size_in, size_out = shape[2], shape[3] // groups
    for i, j, group in itertools.product(range(shape[0]), range(shape[1]), range(groups)):
        y, z = i * holes[0], j * holes[1]
        met = x[:, y : y + down * height : down, z : z + across * width : across]
        met = met[:, :height, :width, group * size_in : (group + 1) * size_in]
        own = slice(group * size_out, (group + 1) * size_out)
        inputs[i, j, :, own] = met.sum((0, 1, 2))[:, None]
        joint[i, j, :, own] = np.einsum("bhwc,bhwo->co", met, grad[..., own])
    return inputs, grad.sum((0, 1, 2)), joint, grad[..., 0].size
