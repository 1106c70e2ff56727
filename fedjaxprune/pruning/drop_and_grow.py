"""Drop and grow: exchange the smallest live weights for pruned weights with large gradients.

The papers count rounds from 1: round `r` is the one with index ``r - 1``. Weights are exchanged at
the end of rounds `period`, ``2 * period``, ... up to `until`; each exchange changes the next block
of layers.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from fedjaxprune import trees
from fedjaxprune.pruning import schedules, scores
from fedjaxprune.topk import top_k
from fedjaxprune.types import Masks, Params, PrunableFn, Pruner, PrunerInputs, Schedule

# (masks, round []) -> the tree with the number of weights to exchange, [] int32, per leaf
CountFn = Callable[[Masks, jax.Array], Any]
# (paths of the prunable leaves) -> the block of each, numbered from 0, from input to output
BlockFn = Callable[[Sequence[str]], Sequence[int]]


def every(*, period: int, until: int) -> schedules.Predicate:
    """Select the rounds ``r = period, 2 * period, ...`` with ``r <= until``, counted from 1.

    Raises:
      ValueError: `period` is below 1 or above `until`.
    """
    if period < 1 or until < period:
        raise ValueError(
            f"period must be at least 1 and at most until, got period={period} and until={until}."
        )
    return schedules.every(period, start=period - 1, until=until)


def cosine_decay(*, initial: float, until: int) -> Schedule:
    """Decay a fraction as ``initial / 2 * (1 + cos(pi * r / until))``, ``r`` counted from 1.

    Raises:
      ValueError: `initial` is outside [0, 1), or `until` is below 1.

    References:
      Dettmers and Zettlemoyer, `Sparse Networks from Scratch <https://arxiv.org/abs/1907.04840>`_,
      2019; with ``initial = 0.3`` and ``until = 100`` it is FedTiny's.
    """
    if not 0.0 <= initial < 1.0:
        raise ValueError(f"initial must lie in [0, 1), got {initial}.")
    if until < 1:
        raise ValueError(f"until must be at least 1 round, got {until}.")

    def schedule(round: jax.Array) -> jax.Array:
        progress = jnp.clip((round + 1.0) / until, 0.0, 1.0)
        return 0.5 * initial * (1.0 + jnp.cos(math.pi * progress))

    return schedule


def consecutive(order: Sequence[str], *, num_blocks: int) -> BlockFn:
    """Cut the layers into blocks of consecutive ones, as equal in number as possible.

    Args:
      order: paths of the layers' kernels from input to output; it may have more than the prunable.
      num_blocks: number of blocks; the first ones are larger if the layers do not divide evenly.

    Raises:
      ValueError: when used, if there are fewer layers than blocks, or one is missing in `order`.
    """
    if num_blocks < 1:
        raise ValueError(f"num_blocks must be at least 1, got {num_blocks}.")

    def blocks(paths):
        ordered = _ordered(order, paths)
        if len(ordered) < num_blocks:
            raise ValueError(
                f"num_blocks must be at most the number of prunable layers ({len(ordered)}), "
                f"got {num_blocks}."
            )
        small, larger = divmod(len(ordered), num_blocks)
        sizes = [small + (block < larger) for block in range(num_blocks)]
        numbers = [block for block, size in enumerate(sizes) for _ in range(size)]
        by_path = dict(zip(ordered, numbers, strict=True))
        return [by_path[path] for path in paths]

    return blocks


def by_stage(order: Sequence[str]) -> BlockFn:
    """Make a block of every stage of a residual network (``stage_2_block_1/...``).

    A layer outside the stages belongs to the block of the layer before it (the head to the last
    stage), or to the first block.

    Args:
      order: as in `consecutive`.

    Raises:
      ValueError: when used, if a layer is missing in `order`.
    """

    def blocks(paths):
        names = {path: re.match(r"(?:.*/)?(stage_\d+)", path) for path in order}
        found = list(dict.fromkeys(match.group(1) for match in names.values() if match))
        number, by_path = 0, {}
        for path in _ordered(order, paths):
            match = names[path]
            number = found.index(match.group(1)) if match else number
            by_path[path] = number
        present = sorted(set(by_path.values()))  # a stage without prunable layers is no block
        return [present.index(by_path[path]) for path in paths]

    return blocks


def _ordered(order: Sequence[str], paths: Sequence[str]) -> list[str]:
    """List `paths` in their order from input to output."""
    missing = sorted(set(paths) - set(order))
    if missing:
        raise ValueError(f"order must name every prunable layer, but lacks {', '.join(missing)}.")
    return [path for path in order if path in set(paths)]


def counts(
    *,
    fraction: Schedule,
    period: int,
    until: int,
    blocks: BlockFn,
    order: Literal["backward", "forward"],
    prunable: PrunableFn,
    rounding: Literal["up", "down"] = "up",
) -> CountFn:
    """Count the weights to exchange: ``ceil(fraction * live)`` of each layer of one block.

    Counts are computed in float64; a product within a part in 10¹² of an integer counts as it.

    Args:
      fraction: of a layer's live weights, by round.
      period: rounds from one exchange to the next.
      until: last round, counted from 1, in which weights may be exchanged.
      blocks: which layers change together.
      order: whether blocks take turns from output to input or from input to output; after the last
        block the first one follows.
      prunable: which leaves may change.
      rounding: ``"down"`` counts ``floor(fraction * live)``.

    Returns:
      ``(masks, round) -> counts``: zero for leaves outside the block whose turn it is, and for all
      leaves in the other rounds. The masks may lack leaves that are not prunable.

    Raises:
      ValueError: if a number is out of range, or the order is neither.
    """
    is_due = every(period=period, until=until)
    if order not in ("backward", "forward"):
        raise ValueError(f"order must be 'backward' or 'forward', got {order!r}.")

    def counts(masks, round_index):
        paths = [path for path, mask in trees.items(masks) if prunable(path, mask)]
        numbers = blocks(paths)
        block_of, num_blocks = iter(numbers), max(numbers, default=0) + 1
        turn = ((round_index + 1) // period - 1) % num_blocks
        turn = num_blocks - 1 - turn if order == "backward" else turn
        part = schedules.evaluate(fraction, round_index)

        def count(path, mask):
            if not prunable(path, mask):
                return jnp.int32(0)
            active = is_due(round_index) & (turn == next(block_of))
            num_live = jnp.sum(mask, dtype=jnp.int32)
            if rounding == "down":
                return jnp.where(active, _share(part, num_live), jnp.int32(0))
            with jax.enable_x64(True):
                product = part * num_live.astype(jnp.float64)
                number = jnp.ceil(product * (1.0 - 1e-12)).astype(jnp.int32)
            return jnp.where(active, number, jnp.int32(0))

        return trees.map_with_path(count, masks)

    return counts


def share_counts(*, fraction: Schedule) -> CountFn:
    """Count ``floor(fraction * live)`` weights of every layer, in every round.

    Counts are computed in float64; a product within a part in 10¹² below an integer counts as it.

    Args:
      fraction: of a layer's live weights, by round.

    Returns:
      ``(masks, round) -> counts``.
    """

    def counts(masks, round_index):
        part = schedules.evaluate(fraction, round_index)
        return jax.tree.map(lambda mask: _share(part, jnp.sum(mask, dtype=jnp.int32)), masks)

    return counts


def _share(part: Any, number: jax.Array) -> jax.Array:
    """Take a share of a number, rounded down: ``[]`` int32; `part` is a float or float64."""
    with jax.enable_x64(True):
        return jnp.floor(part * number.astype(jnp.float64) * (1.0 + 1e-12)).astype(jnp.int32)


class Guide(NamedTuple):
    """Weights that have precedence in an exchange; trees of the masks' shapes, bool.

    Attributes:
      drop_first: of the live weights.
      grow_first: of the pruned weights.
    """

    drop_first: Masks
    grow_first: Masks


def agreement(masks: Masks, there: Params, here: Params) -> Guide:
    """Let live weights go first that move against a direction, and pruned ones come that follow it.

    Args:
      masks: before the exchange.
      there: the direction; its sign counts, and 0 is none.
      here: how the weights move; likewise.

    References:
      Tian et al., `Gradient-Congruity Guided Federated Sparse Training
      <https://arxiv.org/abs/2405.01189>`_, 2024.
    """

    def signs(leaf):
        return jnp.sign(leaf).astype(jnp.int8)

    alike = jax.tree.map(lambda one, two: signs(one) * signs(two), there, here)
    return Guide(
        drop_first=jax.tree.map(lambda mask, sign: mask & (sign < 0), masks, alike),
        grow_first=jax.tree.map(lambda mask, sign: ~mask & (sign > 0), masks, alike),
    )


def drop_and_grow(
    num_exchanged: CountFn,
    *,
    drop: scores.ScoreFn = scores.magnitude,
    grow: scores.ScoreFn = scores.gradient,
    guide: Callable[[Masks, PrunerInputs], Guide] | None = None,
    guided_share: float = 0.0,
    offered: Literal["pruned", "pruned_or_dropped"] = "pruned",
) -> Pruner:
    """Drop the lowest-scoring live weights of every leaf, and grow as many pruned ones.

    Both are chosen by the masks before the exchange: a dropped weight is not grown again at once
    (unless `offered` says so), nor a grown one dropped. A pruned weight of score 0 (whose gradient
    no client sent) is never grown; if too few remain, fewer weights are exchanged. The number of
    live weights of a leaf is constant.

    Args:
      num_exchanged: ``(masks, round) -> counts``, as `counts` makes it.
      drop: score of live weights; the lowest are dropped.
      grow: score of pruned weights; the highest are grown.
      guide: ``(masks, inputs) -> Guide``, weights that have precedence; None for none.
      guided_share: share of a leaf's exchange, in [0, 1], that `guide` decides: of ``k`` weights
        ``floor(guided_share * k)`` are the lowest of `drop_first`, or all of these if they are
        fewer, and the lowest of the others follow. The same holds for `grow_first`.
      offered: which weights may be grown: those pruned before, or also those just dropped, as in
        SET and RigL as they are published. What comes back keeps its value. If too few are
        offered, the best of the dropped stay. Without a guide.

    Raises:
      ValueError: if the share is out of range, or there is a guide where dropped ones may return.
    """
    if not 0.0 <= guided_share <= 1.0:
        raise ValueError(f"guided_share must lie in [0, 1], got {guided_share}.")
    if offered != "pruned" and guide is not None:
        raise ValueError("offered must be 'pruned' with a guide, got 'pruned_or_dropped'.")

    def returning(mask, worth, promise, count):
        num_live = jnp.sum(mask, dtype=jnp.int32)
        kept = _highest(mask, _bounded(worth), num_live - jnp.minimum(count, num_live))
        grown = _highest(~kept & (promise > 0), promise, jnp.minimum(count, num_live))
        missing = num_live - jnp.sum(kept | grown, dtype=jnp.int32)
        return kept | grown | _highest(mask & ~kept & ~grown, _bounded(worth), missing)

    def update_fn(key, masks, state, inputs):
        drop_key, grow_key = jax.random.split(key)

        def leaf(mask, worth, promise, count, *first):
            num_live = jnp.sum(mask, dtype=jnp.int32)
            promising = ~mask & (promise > 0)
            num = jnp.minimum(count, jnp.sum(promising, dtype=jnp.int32))
            num = jnp.minimum(num, num_live)
            worth = _bounded(worth)
            if not first:
                kept = mask & top_k(jnp.where(mask, worth, -jnp.inf), num_live - num)
                return kept | _highest(promising, promise, num)
            quota = _share(guided_share, num)
            kept = mask & ~_lowest(mask & first[0], worth, quota)
            kept = _highest(kept, worth, num_live - num)
            grown = _highest(promising & first[1], promise, quota)
            num_left = num - jnp.sum(grown, dtype=jnp.int32)
            return kept | grown | _highest(promising & ~grown, promise, num_left)

        counts = num_exchanged(masks, inputs.round)
        worth, promise = drop(drop_key, inputs), grow(grow_key, inputs)
        if offered != "pruned":
            return jax.tree.map(returning, masks, worth, promise, counts), state
        first = () if guide is None else guide(masks, inputs)
        return jax.tree.map(leaf, masks, worth, promise, counts, *first), state

    return Pruner(init=lambda params: (), update=update_fn)


def _bounded(worth: jax.Array) -> jax.Array:
    """Rank NaN and -inf above what is not live."""
    lowest = jnp.finfo(worth.dtype).min
    return jnp.where(jnp.isnan(worth), lowest, jnp.maximum(worth, lowest))


def _highest(among: jax.Array, values: jax.Array, count: jax.Array) -> jax.Array:
    """Mark the `count` highest, or all if there are fewer."""
    return among & top_k(jnp.where(among, values, -jnp.inf), count)


def _lowest(among: jax.Array, values: jax.Array, count: jax.Array) -> jax.Array:
    """Mark the `count` lowest, or all if there are fewer; of equal ones those of higher index."""
    size = jnp.sum(among, dtype=jnp.int32)
    return among & ~_highest(among, values, size - jnp.minimum(count, size))
