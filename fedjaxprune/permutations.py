"""Random permutations that are evaluated place by place, and never made as a whole."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fedjaxprune.types import Key

# Two positions keep their distance through one round with probability 1/2 (else it is uniform), so
# what is left of their neighbourhood after all rounds is about 2^-24.
_NUM_ROUNDS = 24
# By the bound of the paper a tenth of all positions are together within 10^-3 of random places in a
# population of a million, each of them: sqrt(N ((q + N) / 2N)^rounds) / 2 for q of N.
_NUM_ROUNDS_TOGETHER = 48
# A round reads its argument several times. Fused into the address of a gather, XLA (JAX 0.12, CPU)
# writes all rounds out as a tree, doubling with each: 7 s of compilation at 16, minutes at 24.
_ROUNDS_FUSED = 8  # divides the number of rounds, so that the last one ends in a barrier


def permute(key: Key, positions: jax.Array, size: jax.Array) -> jax.Array:
    """Map positions through a random permutation of ``[0, size)``, without making the permutation.

    A swap-or-not shuffle: every round pairs `x` with `pivot - x` modulo `size` and exchanges the
    two on the flip of a coin that both of them see. Each round is an involution, so the result is
    an exact bijection for every size, which may be a traced value.

    Args:
      key: decides the permutation.
      positions: ``[B]`` int32 in ``[0, size)``.
      size: ``[]`` int32; 0 is treated as 1.

    Returns:
      ``[B]`` int32 in ``[0, size)``.

    References:
      Hoang, Morris and Rogaway, `An Enciphering Scheme Based on a Card Shuffle
      <https://arxiv.org/abs/1208.1176>`_, 2012.
    """
    size = jnp.maximum(size, 1)
    pivots, seeds = draw(key, size)
    return walk(lambda r: (pivots[r], seeds[r]), positions, size)


def draw(key: Key, size: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Draw the pivots and the coins' seeds of a permutation, ``[rounds]`` uint32 each."""
    pivots, seeds = jax.random.bits(key, (2, _NUM_ROUNDS), jnp.uint32)
    return pivots % size.astype(jnp.uint32), seeds  # biased by less than size / 2^32


def walk(
    drawn: Callable[[int], tuple[jax.Array, jax.Array]], positions: jax.Array, size: jax.Array
) -> jax.Array:
    """Take positions ``[B]`` through all rounds of a permutation, or each through one of its own.

    Args:
      drawn: number of a round to its pivot and its seed (`draw`), ``[]`` or ``[B]``.
      positions: as for `permute`.
      size: ``[]`` int32, at least 1.
    """
    size = size.astype(jnp.uint32)
    x = positions.astype(jnp.uint32)
    for r in range(_NUM_ROUNDS):
        x = _swap_or_not(x, *drawn(r), size)
        if r % _ROUNDS_FUSED == _ROUNDS_FUSED - 1:
            x = jax.lax.optimization_barrier(x)
    return x.astype(jnp.int32)


def permute_each(key: Key, positions: jax.Array, sizes: jax.Array) -> jax.Array:
    """Map positions through random permutations, one for each size.

    For the few draws of a round: it has more rounds than `permute`, so that the places of many
    positions together are random, too, and they are a loop, which is compiled in less time.

    Args:
      key: decides the permutations.
      positions: ``[..., B]`` int32 in ``[0, size)``.
      sizes: ``[...]`` int32, at least 1.

    Returns:
      ``[..., B]`` int32.
    """
    sizes = sizes[..., None].astype(jnp.uint32)
    pivots, seeds = jax.random.bits(key, (2, _NUM_ROUNDS_TOGETHER, *sizes.shape), jnp.uint32)

    def round_fn(x, drawn):
        pivot, seed = drawn
        return _swap_or_not(x, pivot, seed, sizes), None

    # Two at a time: for 4,000 positions that takes two thirds of the time of one.
    drawn = (pivots % sizes[None], seeds)
    x, _ = jax.lax.scan(round_fn, positions.astype(jnp.uint32), drawn, unroll=2)
    return x.astype(jnp.int32)


@functools.partial(jax.jit, inline=True)  # traced once for all rounds
def _swap_or_not(x: jax.Array, pivot: jax.Array, seed: jax.Array, size: jax.Array) -> jax.Array:
    """Exchange each place with its partner, or not; all uint32."""
    difference = pivot - x  # modulo 2^32: a negative one is put right by adding the size
    partner = jnp.where(x > pivot, difference + size, difference)
    coin = _mix(jnp.maximum(x, partner) ^ seed) >> 31
    return jnp.where(coin == 1, partner, x)


def _mix(bits: jax.Array) -> jax.Array:
    """Spread every input bit over the high bits of a uint32 (finaliser of MurmurHash3)."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)
