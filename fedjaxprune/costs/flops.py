"""Multiply-adds of any function of parameters, by layer, counted from the graph that is traced.

A multiply-add is one multiplication with the addition of its result: two FLOPs. Only products of
arrays and convolutions count, as everywhere in the field: no normalization, activation, pooling or
loss. A convolution counts every output with every tap of its kernel, those that fall on padding
too, which is how published numbers count; `inside` leaves those out, as XLA does.

For each product the gradient of either operand takes the same number of multiply-adds again. One
that a gradient needs for a weight is the layer's weight gradient; one for an activation is its
input gradient, and is not needed where nothing trained lies before it (the first layer).
"""

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjaxprune import live_weights, trees
from fedjaxprune.costs import jaxpr_flops, sparsity_flow
from fedjaxprune.types import Batch, Masks, Model

FLOPS_PER_MULTIPLY_ADD = 2
BETWEEN = "(between activations)"  # the layer of a product without weights


class Cost(NamedTuple):
    """Multiply-adds of one pass over what was fed in.

    Attributes:
      forward: of the function itself.
      input_gradient: of the gradients with respect to activations.
      weight_gradient: of the gradients with respect to weights.
    """

    forward: int
    input_gradient: int
    weight_gradient: int


class Layer(NamedTuple):
    """All products with the same weights.

    Attributes:
      path: of the parameter; ``a + b`` for a weight made of two, ``a x b`` for a product of two
        weights, `BETWEEN` for a product of activations.
      weights: paths of the parameters, for each operand that is a weight.
      dense: as if nothing were pruned.
      sparse: with every multiply-add left out that masks (or gates) make needless.
      inside: dense forward multiply-adds that meet no padding.
    """

    path: str
    weights: tuple[tuple[str, ...], ...]
    dense: Cost
    sparse: Cost
    inside: int


def of_function(
    function: Callable[..., Any],
    params: Any,
    *args: Any,
    masks: Masks | None = None,
    gates: Mapping[str, float] | None = None,
    while_trips: int | None = None,
) -> tuple[Layer, ...]:
    """Count the multiply-adds of ``function(params, *args)``, forward and both gradients, by layer.

    Nothing is computed: the function is traced and its graph walked, loops by their number of
    steps, the branches of a condition by the most expensive one, products that no output needs not
    at all, and the plain form in the place of a fast one (`jaxprs.equivalent_to`). A mask is
    followed through whatever moves, scales or concatenates entries; an entry counts unless it is
    surely zero.

    Args:
      function: any function that JAX can trace; the gradient is meant with respect to `params`.
      params: tree of arrays or of their shapes; leaves that are neither (an Equinox module's
        functions) are passed on as they are.
      *args: trees of arrays or of their shapes: examples, state, keys.
      masks: what is kept, matched to `params` by path: bool arrays, or for each leaf the share of
        it that is kept, as a number; leaves that are missing are dense.
      gates: by a layer's path, the share of its multiply-adds that its gates let through, measured
        as the mean over examples of (live inputs) times (live outputs).
      while_trips: how often a loop runs whose number of steps the graph does not tell.

    Returns:
      The layers, in the order of their first product; counts are of all examples in `args`.

    Raises:
      ValueError: if the graph does not tell what is computed, or `masks` or `gates` do not fit.
    """
    graph, inputs = _trace(function, params, args, masks)
    rules = jaxpr_flops.Rules(while_trips=while_trips, plain=True)
    found = jaxpr_flops.products(graph, inputs, rules)
    return _by_layer(found, {} if gates is None else gates)


def of_model(
    model: Model,
    masks: Masks | None,
    example: Any,
    *,
    gates: Mapping[str, float] | None = None,
    while_trips: int | None = None,
) -> tuple[Layer, ...]:
    """Count the multiply-adds of a model on an example, as `of_function` does.

    Args:
      model: any `Model`.
      masks: as in `of_function`; None for the dense network.
      example: inputs ``[B, ...]``, arrays or shapes, for the network in inference; or a `Batch`,
        for the loss in training.
      gates: as in `of_function`.
      while_trips: as in `of_function`.
    """
    key = jax.random.key(0)
    params, state = jax.eval_shape(model.init, key)
    function, args = model.predict, (state, example)
    if isinstance(example, Batch):
        function, args = lambda *args: model.loss(*args)[0], (state, example, key)
    return of_function(function, params, *args, masks=masks, gates=gates, while_trips=while_trips)


def dense(layers: Sequence[Layer]) -> Cost:
    """Add up the layers as if nothing were pruned."""
    return _sum([layer.dense for layer in layers])


def sparse(layers: Sequence[Layer]) -> Cost:
    """Add up what masks and gates leave over."""
    return _sum([layer.sparse for layer in layers])


def reweigh(
    layers: Sequence[Layer], kept: Mapping[str, int], sizes: Mapping[str, int]
) -> tuple[Layer, ...]:
    """Put other masks on counted layers, by counts alone: a few operations on the host.

    It is exact where a layer's weight is one whole parameter. Of a weight joined from several, or a
    slice of one, it takes the mean density; gates are forgotten.

    Args:
      layers: as `of_function` counted them.
      kept: live entries of the parameters, by path.
      sizes: entries of the parameters, by path.
    """

    def weigh(layer: Layer) -> Layer:
        live = total = 1  # a layer is weighed every round: Fractions would be slower
        for paths in layer.weights:
            live *= sum(int(kept[path]) for path in paths)
            total *= max(1, sum(sizes[path] for path in paths))
        return layer._replace(sparse=Cost(*(_divide(n * live, total) for n in layer.dense)))

    return tuple(weigh(layer) for layer in layers)


def gated(layers: Sequence[Layer], gates: Mapping[str, float]) -> tuple[Layer, ...]:
    """Put measured gates on counted layers, on top of what masks leave over.

    Args:
      layers: as `of_function` counted them, or `reweigh` weighed them.
      gates: by a layer's path, the share of its multiply-adds that its gates let through.

    Raises:
      ValueError: if `gates` does not fit.
    """
    _check_names("gates", gates, "layers", [layer.path for layer in layers])

    def weigh(layer: Layer) -> Layer:
        share = _gate(layer.path, gates)
        return layer._replace(sparse=Cost(*(round(count * share) for count in layer.sparse)))

    return tuple(map(weigh, layers))


def _divide(numerator: int, denominator: int) -> int:
    """Divide to the nearest integer, half to even, exactly."""
    quotient, rest = divmod(numerator, denominator)
    return quotient + (2 * rest + quotient % 2 > denominator)


def table(layers: Sequence[Layer]) -> str:
    """Lay out the layers as a Markdown table, in multiply-adds."""
    rows = [
        "| layer | forward | input gradient | weight gradient | density | sparse forward |",
        "|---|---|---|---|---|---|",
    ]
    whole = Layer("all", (), dense(layers), sparse(layers), 0)
    for layer in (*layers, whole):
        counts = " | ".join(f"{count:,}" for count in layer.dense)
        share = layer.sparse.forward / layer.dense.forward if layer.dense.forward else 0.0
        rows.append(f"| {layer.path} | {counts} | {share:.4f} | {layer.sparse.forward:,} |")
    return "\n".join(rows)


def _trace(
    function: Any, params: Any, args: Any, masks: Any
) -> tuple[Any, list[jaxpr_flops.Value]]:
    """Trace a function of whatever leaves are arrays, and say what its inputs are."""
    leaves, structure = jax.tree.flatten((params, *args))
    arrays = {
        i: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for i, leaf in enumerate(leaves)
        if _is_array(leaf)
    }
    names = dict(enumerate(trees.paths(params)))
    paths = {i: path for i, path in names.items() if i in arrays}
    # The masks in a network's state, which is what comes after the parameters.
    twins = {f"1/{live_weights.COLLECTION}/{path}": i for i, path in paths.items()}
    everything = trees.paths((params, *args))

    def flat(*given: Any) -> Any:
        full = dict(enumerate(leaves)) | dict(zip(arrays, given, strict=True))
        return jax.tree.leaves(function(*jax.tree.unflatten(structure, full.values())))

    def describe(place: int, leaf: Any) -> jaxpr_flops.Value:
        if place in paths:
            is_active = bool(jnp.issubdtype(leaf.dtype, jnp.inexact))
            return jaxpr_flops.Value((paths[place],), False, is_active, supports[place])
        if (twin := twins.get(everything[place])) is not None:
            return jaxpr_flops.CONSTANT._replace(support=supports[twin])
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # noise is no data
        return jaxpr_flops.CONSTANT if is_key else jaxpr_flops.FED

    supports = _supports(masks, paths, arrays)
    graph = jax.make_jaxpr(flat)(*arrays.values())
    return graph, [describe(*each) for each in arrays.items()]


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _supports(
    masks: Any, paths: dict[int, str], leaves: dict[int, Any]
) -> dict[int, sparsity_flow.Support]:
    """Match masks to parameters by path."""
    given = dict(zip(trees.paths(masks), jax.tree.leaves(masks), strict=True))
    _check_names("masks", given, "parameters", list(paths.values()))

    def one(path: str, leaf: Any) -> sparsity_flow.Support:
        mask = given.get(path)
        if mask is None:
            return sparsity_flow.DENSE
        if _is_array(mask) and mask.dtype == jnp.bool_ and mask.shape == leaf.shape:
            return np.asarray(mask)
        if np.ndim(mask) == 0 and 0 <= mask <= 1:
            return Fraction(mask) if isinstance(mask, (int, Fraction)) else Fraction(float(mask))
        raise ValueError(
            f"the mask of {path!r} must be bool {tuple(leaf.shape)} or a share in [0, 1], got "
            f"{mask if np.ndim(mask) == 0 else f'{mask.dtype} {tuple(mask.shape)}'}."
        )

    return {i: one(path, leaves[i]) for i, path in paths.items()}


def _check_names(what: str, given: Mapping[str, Any], of: str, known: Sequence[str]) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(
            f"there are {what} for {', '.join(unknown)}, but the {of} are {', '.join(known)}."
        )


def _by_layer(
    found: Sequence[jaxpr_flops.Product], gates: Mapping[str, float]
) -> tuple[Layer, ...]:
    """Gather products by their weights; rounding comes last."""
    products: dict[str, list[jaxpr_flops.Product]] = {}
    for product in found:
        path = " x ".join(" + ".join(paths) for paths in _weights(product)) or BETWEEN
        products.setdefault(path, []).append(product)
    layers = [_layer(path, own, _gate(path, gates)) for path, own in products.items()]
    _check_names("gates", gates, "layers", list(products))
    return tuple(layers)


def _weights(product: jaxpr_flops.Product) -> tuple[tuple[str, ...], ...]:
    return tuple(value.params for value in product.operands if value.params)


def _layer(path: str, products: Sequence[jaxpr_flops.Product], gate: Fraction) -> Layer:
    counts, live = [0] * 3, [Fraction(0)] * 3
    for product in products:
        size = product.multiply_adds * product.times
        new = [size, 0, 0]
        for value in product.operands:
            if value.is_active:
                new[2 if value.params else 1] += size
        share = jaxpr_flops.share(product) * gate
        counts = [a + b for a, b in zip(counts, new, strict=True)]
        live = [a + b * share for a, b in zip(live, new, strict=True)]
    inside = sum(product.inside * product.times for product in products)
    return Layer(path, _weights(products[0]), Cost(*counts), Cost(*map(round, live)), inside)


def _gate(path: str, gates: Mapping[str, float]) -> Fraction:
    share = gates.get(path, 1)
    if not 0 <= share <= 1:
        raise ValueError(f"the gate of {path!r} must be a share in [0, 1], got {share}.")
    return Fraction(share)


def _sum(costs: Sequence[Cost]) -> Cost:
    return Cost(*(sum(column) for column in zip(*costs, strict=True))) if costs else Cost(0, 0, 0)
