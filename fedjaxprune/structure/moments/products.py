"""The sums of one product, computed where its output's gradient arrives.

A product's output goes through a function that changes nothing, whose derivative also gives the
sums as the "gradients" of dummy arguments. So the product and its gradients stay what they are, and
loops, conditions, rematerialization and ``vmap`` transform the sums as they transform gradients.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fedjaxprune.kernels import convolution, dense
from fedjaxprune.structure import moves
from fedjaxprune.structure.moments import rows

PRODUCTS = frozenset(("dot_general", "conv_general_dilated"))
Dummies = Any  # tree of float32 arrays
Sums = Mapping[str, jax.Array]
Form = tuple[jax.Array, jax.Array, Callable[[jax.Array], jax.Array]]  # rows, errors, place


class Marks(NamedTuple):
    """Which rows count.

    Attributes:
      examples: ``[B]`` float32, 0 for filling.
      branch: ``[]`` bool, whether the branch of a condition runs; None outside of branches.
    """

    examples: jax.Array
    branch: jax.Array | None


class Site(NamedTuple):
    """One product of a value with a weight.

    Attributes:
      name: of the primitive.
      params: of the primitive.
      side: which of the two operands is the weight.
      shape: of the weight.
      axis: of the value, along which examples lie; None if it does not depend on the batch's size.
      inner: rows of one example side by side along it.
      kinds: the sums that are wanted.
    """

    name: str
    params: Mapping[str, Any]
    side: int
    shape: tuple[int, ...]
    axis: int | None
    inner: int
    kinds: tuple[str, ...]


class Use(NamedTuple):
    """How a product uses a leaf, as it lies in the parameters.

    Attributes:
      outputs: axes that are the output's; the others are summed over.
      taps: of the others, those of a convolution's places.
      groups: of a convolution.
    """

    outputs: tuple[int, ...]
    taps: tuple[int, ...]
    groups: int


def tap(backward: Callable[[Any, Marks, jax.Array], Dummies]) -> Callable[..., jax.Array]:
    """Make ``(output, operands, marks, dummies) -> output``.

    ``backward(operands, marks, cotangent)`` gives what is added to the dummies' gradients.
    """

    @jax.custom_vjp
    def pass_on(output: jax.Array, operands: Any, marks: Marks, dummies: Dummies) -> jax.Array:
        del operands, marks, dummies
        return output

    def forward(output: jax.Array, operands: Any, marks: Marks, dummies: Dummies) -> Any:
        del dummies
        return output, (operands, marks)

    def pull_back(residuals: Any, cotangent: jax.Array) -> Any:
        operands, marks = residuals
        return cotangent, None, None, backward(operands, marks, cotangent)

    pass_on.defvjp(forward, pull_back)
    return pass_on


def sums(site: Site, value: jax.Array, marks: Marks, cotangent: jax.Array) -> Sums:
    """Compute the sums of a product, each of the weight's shape, in float32.

    Args:
      site: of the product.
      value: what is multiplied with the weight, any shape.
      marks: which rows count.
      cotangent: gradient of the product's output.
    """
    squares = _squares(value, marks, site.axis, site.inner)
    backs = jnp.square(cotangent.astype(jnp.float32))
    makers: dict[str, Callable[[], jax.Array]] = {
        "inputs": lambda: _inputs(site, squares, cotangent.shape),
        "channels": lambda: _channels(site, squares),
        "outputs": lambda: _to_weight(site, backs, value.ndim),
        "joint": lambda: _gradient(site, squares, backs),
        "rows": lambda: _rows(site, value, marks, cotangent.shape),
    }
    return _made(site, makers, marks)


def sums_of_rows(
    site: Site,
    value: jax.Array,
    marks: Marks,
    output: tuple[int, ...],
    form: Form,
) -> Sums:
    """Compute the same for a convolution that is done as another product.

    Args:
      site: of the convolution; examples lie along the first axis of its value.
      value: what is convolved.
      marks: which rows count.
      output: shape of the convolution's output.
      form: rows, errors and place of `jaxprs.equivalent_to`.
    """
    lines, errors, place = form
    num_lines = lines.shape[0] // value.shape[0]  # of an example, side by side
    backs = jnp.square(errors.astype(jnp.float32))

    def joint() -> jax.Array:
        squares = _squares(lines, marks, 0, num_lines)
        return place(lax.dot_general(squares, backs, (((0,), (0,)), ((), ()))))

    def outputs() -> jax.Array:
        # A product with ones, as XLA's CPU sums columns of a computed array many times as slowly.
        by_column = jnp.ones(lines.shape[0], jnp.float32) @ backs
        by_channel = jnp.sum(by_column.reshape(-1, site.shape[-1]), axis=0)
        return _spread(by_channel, [len(site.shape) - 1], site.shape)

    makers: dict[str, Callable[[], jax.Array]] = {
        "inputs": lambda: _inputs(site, _squares(value, marks, 0, 1), output),
        "channels": lambda: _channels(site, _squares(value, marks, 0, 1)),
        "outputs": outputs,
        "joint": joint,
        "rows": lambda: _rows(site, value, marks, output),
    }
    return _made(site, makers, marks)


def _squares(value: jax.Array, marks: Marks, axis: int | None, inner: int) -> jax.Array:
    """Square a value, and put zeros in the rows of examples that do not count."""
    squares = jnp.square(value.astype(jnp.float32))
    if axis is None:
        return squares
    counted = rows.spread(marks.examples, value.shape[axis], inner) > 0
    counted = counted.reshape(-1, *[1] * (value.ndim - axis - 1))
    counted = jnp.broadcast_to(counted, value.shape)
    return jnp.where(counted, squares, jnp.zeros_like(squares))


def _made(site: Site, makers: Mapping[str, Callable[[], jax.Array]], marks: Marks) -> Sums:
    """Make the sums that are wanted, zeros in a branch that does not run."""
    found = {kind: makers[kind]() for kind in site.kinds}
    if marks.branch is None:
        return found
    return {k: jnp.where(marks.branch, v, jnp.zeros_like(v)) for k, v in found.items()}


def _inputs(site: Site, squares: jax.Array, output: tuple[int, ...]) -> jax.Array:
    """Sum over all rows that meet each entry of the weight."""
    if site.name == "conv_general_dilated":
        # All outputs of a channel and all images are treated alike: one image is enough.
        numbers = site.params["dimension_numbers"]
        batch, place = numbers.lhs_spec[0], numbers.out_spec[0]
        image = jnp.sum(squares, axis=batch, keepdims=True)
        ones = jnp.ones([1 if i == place else n for i, n in enumerate(output)], jnp.float32)
        return _gradient(site, image, ones)
    free, partners = _axes_of_value(site, squares.ndim)
    rest = [axis for axis in range(squares.ndim) if axis not in free]
    return _spread(jnp.sum(squares, axis=free), [partners[axis] for axis in rest], site.shape)


def _channels(site: Site, squares: jax.Array) -> jax.Array:
    """Sum over all of a value that has the channel which each entry of the weight reads."""
    if site.name != "conv_general_dilated":
        return _inputs(site, squares, ())
    numbers, groups = site.params["dimension_numbers"], site.params["feature_group_count"]
    channel, (out_axis, in_axis, *_) = numbers.lhs_spec[1], numbers.rhs_spec
    rest = tuple(axis for axis in range(squares.ndim) if axis != channel)
    by_group = jnp.sum(squares, axis=rest).reshape(groups, -1)
    by_output = jnp.repeat(by_group, site.shape[out_axis] // groups, axis=0)
    return _spread(by_output, [out_axis, in_axis], site.shape)


def use_of(site: Site, ndim: int) -> Use:
    """Say how a product uses its weight; its value has so many axes."""
    own = tuple(sorted(_axes_of_output(site, ndim).values()))
    if site.name != "conv_general_dilated":
        return Use(own, (), 1)
    taps = tuple(sorted(site.params["dimension_numbers"].rhs_spec[2:]))
    return Use(own, taps, site.params["feature_group_count"])


def _axes_of_value(site: Site, ndim: int) -> tuple[tuple[int, ...], dict[int, int]]:
    """List the value's axes that the weight does not have, and say which of its axes the rest are.

    Of a product of matrices, whose value has so many axes.
    """
    contracted, batched = site.params["dimension_numbers"]
    other, own = 1 - site.side, site.side
    partners = dict(zip(contracted[other], contracted[own], strict=True))
    partners.update(zip(batched[other], batched[own], strict=True))
    return tuple(axis for axis in range(ndim) if axis not in partners), partners


def _axes_of_output(site: Site, ndim: int) -> dict[int, int]:
    """Say which axes of the output are which of the weight; the rest are rows."""
    numbers = site.params["dimension_numbers"]
    if site.name == "conv_general_dilated":
        return {numbers.out_spec[1]: numbers.rhs_spec[0]}
    ndims = [ndim, ndim]
    ndims[site.side] = len(site.shape)
    places = moves.places_of_dot(numbers, ndims)[site.side]
    return {place: axis for axis, place in places.items()}


def _to_weight(site: Site, backs: jax.Array, ndim: int) -> jax.Array:
    """Sum an array of the output's shape over rows, for each entry of the weight."""
    own = _axes_of_output(site, ndim)
    summed = tuple(axis for axis in range(backs.ndim) if axis not in own)
    return _spread(jnp.sum(backs, axis=summed), [own[axis] for axis in sorted(own)], site.shape)


def _rows(site: Site, value: jax.Array, marks: Marks, output: tuple[int, ...]) -> jax.Array:
    """Count the rows of each entry of the weight: sizes of axes, and examples that count."""
    own = _axes_of_output(site, value.ndim)
    shape, place = [1] * len(output), None
    if site.axis is not None:
        if site.name == "conv_general_dilated":
            place = site.params["dimension_numbers"].out_spec[0]
        else:
            ndims = [value.ndim, value.ndim]
            ndims[site.side] = len(site.shape)
            places = moves.places_of_dot(site.params["dimension_numbers"], ndims)
            place = places[1 - site.side][site.axis]
        shape[place] = output[place]
    fixed = [n for i, n in enumerate(output) if i not in own and i != place]
    counts = jnp.full(shape, math.prod(fixed), jnp.float32)
    if place is not None:
        counted = rows.spread(marks.examples, output[place], site.inner) > 0
        counts = counts * counted.astype(jnp.float32).reshape(shape)
    summed = tuple(i for i in range(len(output)) if i not in own)
    counts = jnp.sum(counts, axis=summed)  # of the weight's own axes, mostly of size 1
    axes = [own[i] for i in sorted(own)]
    return _spread(jnp.broadcast_to(counts, [site.shape[i] for i in axes]), axes, site.shape)


def _spread(array: jax.Array, axes: Sequence[int], shape: tuple[int, ...]) -> jax.Array:
    """Repeat an array, whose axes are these of the weight, along the others."""
    order = sorted(range(len(axes)), key=axes.__getitem__)
    return lax.broadcast_in_dim(array.transpose(order), shape, sorted(axes))


def _gradient(site: Site, value: jax.Array, cotangent: jax.Array) -> jax.Array:
    """Compute the weight's gradient for a value and a cotangent."""

    def product(weight: jax.Array) -> jax.Array:
        operands = (weight, value) if site.side == 0 else (value, weight)
        return multiply(site.name, operands, {**site.params, "preferred_element_type": None})

    _, pull_back = jax.vjp(product, jnp.zeros(site.shape, jnp.float32))
    return pull_back(cotangent)[0]


def multiply(name: str, operands: Sequence[jax.Array], params: Mapping[str, Any]) -> jax.Array:
    """Compute a product as its primitive does, in the forms that are fast on CPU."""
    form: Any = dense.dot_general if name == "dot_general" else convolution.conv_general_dilated
    return form(*operands, **params)
