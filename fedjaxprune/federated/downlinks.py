"""What clients see of the parameters: exact, exact where they changed most, or rounded.

The server keeps its parameters as they are, and moves them by deltas that are relative to what the
clients saw. An entry that a client does not receive (outside the masks) is an exact zero that it
knows, so it costs nothing. All clients of a round see the same.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjaxprune import topk
from fedjaxprune.federated._fractions import check_fraction, num_sent_traced
from fedjaxprune.registry import Part, call
from fedjaxprune.settings import Settings, Share, setting
from fedjaxprune.traffic import Payload
from fedjaxprune.types import Downlink, Params


class SharedState(NamedTuple):
    """What the clients of the last round saw, which all clients share.

    Attributes:
      params: what they saw.
      clock: tree of the parameters, int32: the version in which an entry changed last.
      version: ``[]`` int32, rounds in which clients saw parameters.
      is_fresh: ``[]`` bool, whether the next round sends everything to everybody.
    """

    params: Params
    clock: Params
    version: jax.Array
    is_fresh: jax.Array


def top_k(*, fraction: float) -> Downlink:
    """Send of every leaf the entries that differ most from what clients saw last.

    The server keeps the copy of the parameters that all clients share. In a round, the entries in
    which the parameters differ most from the copy are put into it, and the clients train from the
    copy. What was left behind is a difference still, so it is sent later: this is error feedback
    without a residual (EF21-P).

    An entry's clock is the version in which it changed last, by being sent or by being pruned. A
    client that saw version `h` last needs the entries whose clock is later. So it is known exactly
    what a client has to be sent after any number of missed rounds, and no history is kept. In the
    first round everything is sent, and so it is to a client that comes for the first time. A client
    that drops out after it was sent something counts as if it had not received it, since the server
    hears of no receipt: the next time it is sent that again, and charged again.

    With the fraction 1 clients see the exact parameters, and are sent what changed. Tests and
    exports use the exact parameters, whatever clients see.

    Args:
      fraction: of a leaf's entries that clients receive, how many change in a round at most:
        rounded, and at least one. In (0, 1].

    Returns:
      A `Downlink`, which sends values as they are, and their positions.

    Raises:
      ValueError: if `fraction` is outside (0, 1].

    References:
      Gruntkowska, Tyurin and Richtárik, `EF21-P and friends <https://arxiv.org/abs/2209.15218>`_,
      2023. The clock is ours.
    """
    check_fraction(fraction)

    def init_fn(params):
        return SharedState(
            params=jax.tree.map(jnp.zeros_like, params),
            clock=jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.int32), params),
            version=jnp.int32(0),
            is_fresh=jnp.bool_(True),
        )

    def update_fn(key, params, state, masks):
        del key  # deterministic
        is_fresh, version = state.is_fresh, state.version + 1

        def choose(new, old, mask):
            copy = jnp.where(mask, old, jnp.zeros_like(old))
            differs = mask & _differ(new, copy)
            scores = jnp.where(differs, jnp.abs(new - copy), jnp.full_like(new, -jnp.inf))
            chosen = differs & topk.top_k(scores, num_sent_traced(fraction, mask))
            return jnp.where(chosen | (mask & is_fresh), new, copy)

        def turn(clock, new, old):
            return jnp.where(_differ(new, old) | is_fresh, version, clock)

        seen = jax.tree.map(choose, params, state.params, masks)
        clock = jax.tree.map(turn, state.clock, seen, state.params)
        return seen, SharedState(seen, clock, version, is_fresh=jnp.bool_(False))

    return Downlink(
        init=init_fn,
        update=update_fn,
        payload=Payload,
        version=lambda state: state.version,
        due=lambda state, held: jax.tree.map(lambda clock: clock > held, state.clock),
        restart=lambda state: state._replace(is_fresh=jnp.bool_(True)),
    )


def quantize(*, bits: int) -> Downlink:
    """Round every entry to the nearest of ``2 ** bits`` evenly spaced levels, of which one is zero.

    The range of a leaf reaches from its smallest to its largest entry that clients receive, and is
    widened to contain 0. With ``step = (high - low) / (2 ** bits - 1)``, an entry `x` becomes
    ``step * (level - zero)``, where ``level = round(zero + x / step)`` is rounded half to even and
    `zero` is the level of 0. No entry is off by more than half a step, and a zero stays one.

    It is how FL-PQSU rounds weights, with two changes: its code does not widen the range, so that
    values of one sign may be cut off, and truncates `zero`, so that the ends may be. Its server
    also stores the mean of rounded weights; this one keeps the exact ones, and they are tested and
    exported.

    Args:
      bits: per entry, in [2, 16].

    Returns:
      A `Downlink`, which sends `bits` for each entry, and step and zero of each leaf that is not
      empty, to every client in every round.

    Raises:
      ValueError: if `bits` is outside [2, 16].

    References:
      Xu et al., `FL-PQSU <https://doi.org/10.1109/ACCESS.2021.3063291>`_, 2021.
    """
    if not 2 <= bits <= 16:
        raise ValueError(f"bits must lie in [2, 16], got {bits}.")

    def update_fn(key, params, state, masks):
        del key  # deterministic

        def leaf(values, mask):
            found = levels(values, mask, bits=bits)
            seen = found.step * (found.level - found.zero)
            return jnp.where(mask, seen, jnp.zeros_like(seen)).astype(values.dtype)

        return jax.tree.map(leaf, params, masks), state

    def payload_fn(num_kept):
        return Payload(num_kept, level_bits=bits, num_scales=2 if num_kept else 0)

    return Downlink(init=lambda params: (), update=update_fn, payload=payload_fn)


class Levels(NamedTuple):
    """A leaf in levels: ``step * (level - zero)``.

    Attributes:
      level: ``[...]`` float32, whole numbers.
      step, zero: ``[]`` float32, a whole number the latter.
    """

    level: jax.Array
    step: jax.Array
    zero: jax.Array


def levels(values: jax.Array, mask: jax.Array, *, bits: int) -> Levels:
    """Round the entries of a leaf under a mask to levels, as `quantize` sends them."""
    values, top = values.astype(jnp.float32), jnp.float32(2**bits - 1)
    low = jnp.min(values, where=mask, initial=0.0)
    high = jnp.max(values, where=mask, initial=0.0)
    step = high / top - low / top  # the difference itself could overflow
    step = jnp.where(step > 0, step, jnp.ones_like(step))
    zero = jnp.ceil(-low / step - 0.5)  # rounded half down
    return Levels(jnp.clip(jnp.round(zero + values / step), 0.0, top), step, zero)


def _differ(one: jax.Array, other: jax.Array) -> jax.Array:
    """Mark the entries that differ in any bit: 0.0 from -0.0, too."""
    bits = jnp.dtype(f"uint{8 * one.dtype.itemsize}")
    return jax.lax.bitcast_convert_type(one, bits) != jax.lax.bitcast_convert_type(other, bits)


def _identity() -> None:
    """Send every client all entries as they are, in every round."""


class FractionSettings(Settings):
    """Settings of `top_k`."""

    fraction: Share = setting(
        0.1,
        "Most of a layer's entries that change in a round, for all clients; 1: exact parameters.",
        unit="fraction",
    )


class QuantizeSettings(Settings):
    """Settings of `quantize`."""

    bits: int = setting(8, "Bits of a sent value.", unit="bits", ge=2, le=16)


PARTS = {
    "identity": Part(call(_identity), summary="sends all parameters as they are"),
    "top_k": Part(
        call(top_k),
        FractionSettings,
        summary="sends the largest changes, and what a client missed (EF21-P)",
    ),
    "quantize": Part(
        call(quantize), QuantizeSettings, summary="rounds parameters to the nearest of a few levels"
    ),
}
