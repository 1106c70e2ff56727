"""What aggregators share: sums that count beyond 2²⁴, types of sums, division, refusals."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjaxprune import trees
from fedjaxprune.types import Aggregator, Masks

EXACT = 2.0**24  # float32 counts one by one up to here


class Sums(NamedTuple):
    """Sums in the making.

    Attributes:
      totals: tree of sums.
      lost: what rounding has taken from those that keep it, in the tree's order.
    """

    totals: Any
    lost: tuple[jax.Array, ...]


def additive(
    zeros: Callable[[Any], Any],
    terms: Callable[[Any, Masks | None, jax.Array], Any],
    finish: Callable[[Any], Any],
) -> Aggregator:
    """Make an aggregator of sums that keeps what rounding takes from them.

    A total of 2²⁴ in float32 ignores a 1. So a scalar (a weight, a metric) keeps the rest of each
    addition, which counts once its total has reached 2²⁴. Arrays keep it in the aggregator's
    `wide` form, for cohorts that may have so many examples.

    Args:
      zeros: ``like -> tree`` of the sums of nothing.
      terms: ``(value, masks, weight) -> tree``, what one client adds; zeros for weight 0.
      finish: ``tree -> value``, of the sums.
    """
    wide = _make(zeros, terms, finish, is_wide=True)
    return _make(zeros, terms, finish, is_wide=False)._replace(wide=lambda: wide)


def _make(zeros, terms, finish, *, is_wide) -> Aggregator:
    """Make one of the two forms."""

    def keeps(leaf: jax.Array) -> bool:
        return (is_wide or leaf.ndim == 0) and jnp.issubdtype(leaf.dtype, jnp.inexact)

    def join(sums: Sums, more: Any, rest: Any) -> Sums:
        added = jax.tree.map(jnp.add, sums.totals, more)
        leaves = zip(*map(jax.tree.leaves, (sums.totals, more, added)), strict=True)
        rounded = [_rounded(*three) for three in leaves if keeps(three[0])]
        kept = zip(rounded, sums.lost, rest, strict=True)
        return Sums(added, tuple(error + (one + two) for error, one, two in kept))

    def init_fn(like):
        totals = zeros(like)
        kept = [leaf for leaf in jax.tree.leaves(totals) if keeps(leaf)]
        return Sums(totals, tuple(map(jnp.zeros_like, kept)))

    def add_fn(sums, value, masks, weight):
        return join(sums, terms(value, masks, weight), tuple(map(jnp.zeros_like, sums.lost)))

    def finish_fn(sums):
        lost = iter(sums.lost)

        def read(total):
            if not keeps(total):
                return total
            exact = total + next(lost)
            return exact if is_wide else jnp.where(jnp.abs(total) < EXACT, total, exact)

        return finish(jax.tree.map(read, sums.totals))

    return Aggregator(
        init=init_fn,
        add=add_fn,
        merge=lambda first, second: join(first, second.totals, second.lost),
        finish=finish_fn,
    )


def _rounded(first: jax.Array, second: jax.Array, total: jax.Array) -> jax.Array:
    """Compute what rounding took from ``total = first + second``, exactly (Knuth's two-sum)."""
    part = total - first
    return (first - (total - part)) + (second - part)


def sum_dtype(dtype: Any) -> Any:
    """Widen half precision to float32."""
    return dtype if jnp.dtype(dtype).itemsize >= 4 else jnp.float32


def divide(total: jax.Array, weight: jax.Array) -> jax.Array:
    """Divide, or give zero where there is nothing to divide by."""
    weight = weight.astype(total.dtype)
    safe = jnp.where(weight > 0, weight, jnp.ones_like(weight))
    return jnp.where(weight > 0, total / safe, jnp.zeros_like(total))


def require_inexact(name: str, tree: Any) -> None:
    """Refuse leaves that have no mean."""
    for path, leaf in trees.items(tree):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise ValueError(
                f"aggregators.{name} averages floating-point leaves, but {path!r} is {leaf.dtype}: "
                "aggregate it with aggregators.unweighted_sum or aggregators.vote_counts."
            )
