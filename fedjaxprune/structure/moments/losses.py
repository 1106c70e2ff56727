"""Gradients of a loss, and the moments of what its weights meet."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from fedjaxprune import trees
from fedjaxprune.errors import first_line
from fedjaxprune.structure.moments import following, products
from fedjaxprune.structure.moments import rows as rows_lib
from fedjaxprune.structure.moments.following import Context
from fedjaxprune.structure.moments.rows import Sizes
from fedjaxprune.structure.moments.shadows import Shadow, Value
from fedjaxprune.types import Batch, Key, Metrics, Params, PrunableFn, State

Kind = Literal["inputs", "channels", "outputs", "joint", "rows"]
LossFn = Callable[[Params, State, Batch, Key], tuple[jax.Array, tuple[State, Metrics]]]


class Moments(NamedTuple):
    """Sums over all rows of a batch at which a weight is used: example, pixel, token.

    Each is ``()`` if it was not asked for, else the tree of the parameters in float32. With ``a``
    what a weight is multiplied with and ``g`` the gradient of the loss by the product's output,
    entry ``[i, o]`` of a dense kernel ``[in, out]`` has the sums below; other layouts likewise. A
    leaf that is not followed, or that no product uses, has zeros.

    Attributes:
      inputs: sum of ``a_i ** 2``.
      channels: the same, but in a convolution over all of its input that is in the channel which
        the weight reads, so that it is the same for all taps.
      outputs: sum of ``g_o ** 2``.
      joint: sum of ``(a_i * g_o) ** 2``.
      rows: number of rows; 0 where nothing that the loss needs uses the weight.
    """

    inputs: Params = ()
    channels: Params = ()
    outputs: Params = ()
    joint: Params = ()
    rows: Params = ()


Result = tuple[tuple[jax.Array, Any], Params, Moments]


def of_loss(
    loss: LossFn, *, prunable: PrunableFn, kinds: Sequence[Kind] = ("inputs", "outputs", "rows")
) -> Callable[[Params, State, Batch, Key], Result]:
    """Make a function that computes a loss, its gradients, and moments at every product of a leaf.

    The products are found in the traced loss, so any network will do: dense layers, convolutions,
    groups, under masks, transposed, in parts, in loops, rematerialized. What several products, or
    the steps of a loop, do with a leaf adds up. The gradients are those of the loss itself, to the
    bit: its products and its fast forms stay, and the sums are taken beside them. Rows of examples
    of weight 0 do not count. The loss is traced a second time, with another number of examples, to
    find the rows; the function runs under ``jit``, ``vmap`` and in loops.

    Args:
      loss: ``(params, state, batch, key) -> (loss, (state, metrics))``, as in a `Model`.
      prunable: ``(path, leaf) -> bool``, the leaves that are followed.
      kinds: which sums are computed, by the names in `Moments`. Joint costs one weight gradient
        more for each product; the others cost little.

    Returns:
      ``(params, state, batch, key) -> ((loss, (state, metrics)), grads, moments)``.

    Raises:
      ValueError: a kind is unknown; while tracing, if the use of a followed leaf cannot be followed
        (an embedding that is looked up, a weight that is multiplied with another weight or used
        outside of a product), if rows cannot be told apart by example, or if the loss does
        something else for another number of examples.

    References:
      Martens and Grosse, `K-FAC <https://arxiv.org/abs/1503.05671>`_, 2015, whose factors have
      these sums, divided by the rows, on their diagonals.
    """
    if not kinds or not set(kinds) <= set(get_args(Kind)):
        raise ValueError(f"kinds must be some of {', '.join(get_args(Kind))}, got {tuple(kinds)}.")
    wanted = tuple(kind for kind in get_args(Kind) if kind in kinds)
    return _of_loss(loss, prunable, wanted, None)


def uses(
    loss: LossFn, *, prunable: PrunableFn
) -> Callable[[Params, State, Batch, Key], dict[str, products.Use]]:
    """Make a function that tells how products use each followed leaf, by its path.

    Nothing is computed: of what it is given, shapes will do.

    Args:
      loss: as in `of_loss`.
      prunable: ``(path, leaf) -> bool``, the leaves that are followed.

    Returns:
      ``(params, state, batch, key) -> {path: Use}``.

    Raises:
      ValueError: when called, as `of_loss`; if a leaf is not used, or transposed, reshaped or cut
        before a product, or used in several ways.
    """

    def run(params: Params, state: State, batch: Batch, key: Key) -> dict[str, products.Use]:
        notes: list[tuple[str, Any, products.Use]] = []
        jax.eval_shape(_of_loss(loss, prunable, ("rows",), notes), params, state, batch, key)
        found = {path: set() for path, leaf in trees.items(params) if prunable(path, leaf)}
        for path, layout, use in notes:
            found[path].add(use if layout == path else None)
        for path, ways in found.items():
            if not ways or None in ways:
                what = "is moved or cut before it is used" if ways else "is not used"
                raise ValueError(
                    f"it is not clear which entries of {path!r} make one output, as it {what} in a "
                    "product; leave it out of `prunable`."
                )
            if len(ways) > 1:
                raise ValueError(
                    f"products use {path!r} in several ways, so that its entries do not belong to "
                    "one output each; leave it out of `prunable`."
                )
        return {path: next(iter(ways)) for path, ways in found.items()}

    return run


def _of_loss(
    loss: LossFn, prunable: PrunableFn, wanted: tuple[str, ...], notes: list[Any] | None
) -> Callable[[Params, State, Batch, Key], Result]:
    """Make the function of `of_loss`; it notes the uses of leaves if there is a list for them."""

    def run(params: Params, state: State, batch: Batch, key: Key) -> Result:
        leaves, structure = jax.tree.flatten(params)
        names = trees.paths(params)
        followed = {n: leaf for n, leaf in zip(names, leaves, strict=True) if prunable(n, leaf)}
        zeros = {
            name: {kind: jnp.zeros(leaf.shape, jnp.float32) for kind in wanted}
            for name, leaf in followed.items()
        }
        sizes, graph, twin, shapes = _traced(loss, params, state, batch, key)
        marks = products.Marks(batch.weights.astype(jnp.float32), None)
        context = Context(sizes, marks, wanted, notes=notes)

        def tapped(params: Params, dummies: Any) -> Any:
            weights = [
                Value(
                    leaf,
                    rows_lib.of_constant(leaf),
                    {name: Shadow(name, dummies[name])} if name in dummies else {},
                )
                for name, leaf in zip(names, jax.tree.leaves(params), strict=True)
            ]
            others = [
                *(Value(x, rows_lib.of_constant(x)) for x in jax.tree.leaves(state)),
                *(Value(x, rows_lib.of_batch(x)) for x in jax.tree.leaves(batch)),
                Value(key, rows_lib.of_constant(key)),
            ]
            outputs = following.play(context, graph, twin, [*weights, *others])
            return jax.tree.unflatten(jax.tree.structure(shapes), [v.array for v in outputs])

        result, (grads, sums) = jax.value_and_grad(tapped, argnums=(0, 1), has_aux=True)(
            params, zeros
        )

        def tree(kind: str) -> Params:
            found = [
                sums[name][kind] if name in sums else jnp.zeros(leaf.shape, jnp.float32)
                for name, leaf in zip(names, leaves, strict=True)
            ]
            return jax.tree.unflatten(structure, found)

        return result, grads, Moments(**{kind: tree(kind) for kind in wanted})

    return run


def _traced(loss: LossFn, params: Any, state: Any, batch: Any, key: Any) -> Any:
    """Trace a loss for the batch and for another number of examples."""
    size = batch.weights.shape[0]
    graph, shapes = jax.make_jaxpr(loss, return_shape=True)(params, state, batch, key)
    refusals = []
    # A fast form may begin between two sizes, so there are several to try.
    for other in (size + 1, max(size - 1, 1), 2 * size):
        resized = jax.tree.map(
            lambda leaf, n=other: jax.ShapeDtypeStruct((n, *leaf.shape[1:]), leaf.dtype), batch
        )
        try:
            twin = jax.make_jaxpr(loss)(params, state, resized, key)
        except (TypeError, ValueError) as error:
            refusals.append(error)
            continue
        if other != size and rows_lib.are_alike(graph, twin):
            return Sizes(size, other), graph, twin, shapes
    why = f": {first_line(refusals[0])}" if refusals else "."
    raise ValueError(
        f"moments need a loss that does the same for any number of examples, and this one does not "
        f"for {size} and {size + 1}{why}"
    ) from (refusals[0] if refusals else None)
