"""What a delta looks like after the wire: sparsified, reduced to signs, quantized, with feedback.

An entry that may not travel (outside the masks) is an exact zero that the receiver knows, so it
costs nothing; positions are numbered among the entries that may travel. Each uplink tells by
`payload` what it sends, and `costs` knows how long that is.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from fedjaxprune import masks as masks_lib
from fedjaxprune import topk
from fedjaxprune.federated._fractions import check_fraction, num_sent, num_sent_traced
from fedjaxprune.registry import Part, call
from fedjaxprune.settings import Settings, Share, setting
from fedjaxprune.traffic import Payload
from fedjaxprune.types import Delta, Key, Masks, State, Uplink

Rounding = Literal["random", "nearest"]


class ResidualState(NamedTuple):
    """What one client has computed and not yet sent.

    Attributes:
      residual: delta left behind by earlier rounds; the structure of the parameters.
      inner: state of the wrapped transformation.
    """

    residual: Delta
    inner: State


def identity() -> Uplink:
    """Send every entry that may travel, as it is."""

    def update_fn(key, delta, state, masks):
        del key  # deterministic
        return masks_lib.apply(masks, delta), state

    return Uplink(init=lambda params: (), update=update_fn, payload=Payload)


def top_k(*, fraction: float) -> Uplink:
    """Send of every leaf the entries of largest magnitude.

    It is a contraction, and biased: wrap it in `error_feedback`.

    Args:
      fraction: of a leaf's entries that may travel, how many are sent: rounded, and at least one (a
        short bias would never be sent at all). In (0, 1].

    Returns:
      An `Uplink`, which sends values and their positions, or values alone where all are sent.

    Raises:
      ValueError: if `fraction` is outside (0, 1].

    References:
      Stich et al., `Sparsified SGD with memory <https://arxiv.org/abs/1809.07599>`_, 2018.
    """
    check_fraction(fraction)

    def update_fn(key, delta, state, masks):
        del key  # deterministic

        def leaf(delta, mask):
            scores = jnp.where(mask, jnp.abs(delta), jnp.full_like(delta, -jnp.inf))
            chosen = mask & topk.top_k(scores, num_sent_traced(fraction, mask))
            return jnp.where(chosen, delta, jnp.zeros_like(delta))

        return jax.tree.map(leaf, delta, masks), state

    return Uplink(init=lambda params: (), update=update_fn, payload=_payload(fraction, "explicit"))


def random_k(*, fraction: float) -> Uplink:
    """Send of every leaf a uniformly random choice of entries, as they are.

    Unscaled, it is the contraction that `error_feedback` wants. Positions follow from a seed of 32
    bits, once per message. `fraction`, errors and reference are those of `top_k`.
    """
    check_fraction(fraction)
    update_fn = _map_leaves(lambda key, delta, mask: _pick(key, delta, mask, fraction)[0])
    return Uplink(init=lambda params: (), update=update_fn, payload=_payload(fraction, "from_seed"))


def unbiased_random_k(*, fraction: float) -> Uplink:
    """Send of every leaf a uniformly random choice of entries, scaled so that the mean is right.

    An entry is sent with probability ``sent / kept``, and is multiplied by ``kept / sent`` (this is
    ``1 / fraction`` but for the rounding). Without feedback it is the better one, with feedback the
    worse: see `random_k`, whose arguments, costs and errors it shares.
    """
    check_fraction(fraction)

    def leaf(key, delta, mask):
        sent, num_kept, count = _pick(key, delta, mask, fraction)
        scale = num_kept.astype(delta.dtype) / jnp.maximum(count, 1).astype(delta.dtype)
        return sent * scale

    payload = _payload(fraction, "from_seed")
    return Uplink(init=lambda params: (), update=_map_leaves(leaf), payload=payload)


def sign() -> Uplink:
    """Send of every leaf the signs, and one scale: the mean magnitude.

    The mean is over the entries that may travel; of these an exact zero travels as plus. It is
    biased: wrap it in `error_feedback`.

    Returns:
      An `Uplink`, which sends a bit for each entry and the scale of each leaf that is not empty.

    References:
      Karimireddy et al., `Error feedback fixes SignSGD <https://arxiv.org/abs/1901.09847>`_, 2019.
    """

    def leaf(key, delta, mask):
        del key  # deterministic
        zeros = jnp.zeros_like(delta)
        num_kept = jnp.maximum(jnp.sum(mask, dtype=jnp.int32), 1).astype(delta.dtype)
        scale = jnp.sum(jnp.where(mask, jnp.abs(delta), zeros)) / num_kept
        return jnp.where(mask, jnp.where(delta < 0, -scale, scale), zeros)

    def payload_fn(num_kept):
        return Payload(num_kept, level_bits=1, num_scales=1 if num_kept else 0)

    return Uplink(init=lambda params: (), update=_map_leaves(leaf), payload=payload_fn)


def quantize(*, bits: int, rounding: Rounding = "random") -> Uplink:
    """Round every entry to one of ``2 ** bits`` evenly spaced levels, at random or to the nearest.

    At random it is right on average: an entry goes up with a probability that is the part of a
    level by which it exceeds the one below. To the nearest (half to even) it is off by half a level
    at most, and biased: wrap it in `error_feedback`.

    The levels of a leaf reach from its smallest to its largest entry that may travel. QSGD spaces
    them from zero to the norm and sends signs apart; this is the same rounding on the leaf's own
    range, as deltas are not sparse after the mask.

    Args:
      bits: per entry, in [1, 16].
      rounding: ``"random"`` or ``"nearest"``.

    Returns:
      An `Uplink`, which sends `bits` for each entry and the range of each leaf that is not empty.

    Raises:
      ValueError: if `bits` is outside [1, 16], or `rounding` is none of the two.

    References:
      Alistarh et al., `QSGD <https://arxiv.org/abs/1610.02132>`_, 2017.
    """
    if not 1 <= bits <= 16:
        raise ValueError(f"bits must lie in [1, 16], got {bits}.")
    if rounding not in get_args(Rounding):
        raise ValueError(f"rounding must be 'random' or 'nearest', got {rounding!r}.")
    top = float(2**bits - 1)

    def leaf(key, delta, mask):
        zeros = jnp.zeros_like(delta)
        low = jnp.min(delta, where=mask, initial=jnp.inf)
        high = jnp.max(delta, where=mask, initial=-jnp.inf)
        step = high / top - low / top  # the difference itself could overflow
        constant = ~(step > 0)  # or empty, where it is -inf
        step = jnp.where(constant, jnp.ones_like(step), step)
        position = jnp.clip((delta - low) / step, 0.0, top)
        if rounding == "nearest":
            level = jnp.round(position)
        else:
            below = jnp.floor(position)
            up = jax.random.uniform(key, delta.shape, delta.dtype) < position - below
            level = jnp.where(up, below + 1.0, below)
        # the ends are sent exactly: low + top * step may miss high by a rounding
        value = jnp.where(level >= top, high, low + level * step)
        return jnp.where(mask, jnp.where(constant, delta, value), zeros)

    def payload_fn(num_kept):
        return Payload(num_kept, level_bits=bits, num_scales=2 if num_kept else 0)

    return Uplink(init=lambda params: (), update=_map_leaves(leaf), payload=payload_fn)


def except_small(inner: Uplink, *, fewer_than: int) -> Uplink:
    """Send leaves of few entries whole, such as biases, and all others as `inner` sends them.

    They cost little, and what `inner` does may harm them: a sign has one scale for all entries of a
    leaf. It belongs inside `error_feedback`, which then keeps nothing of such a leaf.

    Args:
      inner: any uplink without a residual.
      fewer_than: a leaf of fewer entries, pruned ones included, is sent whole.

    Raises:
      ValueError: if `fewer_than` is negative.
    """
    if fewer_than < 0:
        raise ValueError(f"fewer_than must be at least 0, got {fewer_than}.")

    def update_fn(key, delta, state, masks):
        sent, state = inner.update(key, delta, state, masks)
        exact = masks_lib.apply(masks, delta)

        def leaf(whole, part):
            return whole if whole.size < fewer_than else part

        return jax.tree.map(leaf, exact, sent), state

    def shaped_fn(num_kept, shape):
        if math.prod(shape) < fewer_than:
            return Payload(num_kept)
        shaped = inner.shaped_payload
        return inner.payload(num_kept) if shaped is None else shaped(num_kept, shape)

    return inner._replace(update=update_fn, shaped_payload=shaped_fn)


def error_feedback(inner: Uplink) -> Uplink:
    """Add to every delta what `inner` left behind in the client's earlier rounds.

    On the entries that may travel, what is sent and the new residual are together the delta and the
    old residual. What may not travel is an exact zero in both: when the masks shrink, the residual
    of a pruned entry is forgotten, and an entry that grows back starts without one.

    Args:
      inner: a contraction, such as `top_k`, `random_k` or `sign`. Scaling to be unbiased, as
        `unbiased_random_k` does, makes the residual grow, and so does `quantize` with fewer than
        three bits, whose error can exceed what it rounds.

    Returns:
      An `Uplink` with a `ResidualState` per client; it sends what `inner` sends.

    References:
      Those of `top_k` and `sign`.
    """

    def init_fn(params):
        return ResidualState(
            residual=jax.tree.map(jnp.zeros_like, params), inner=inner.init(params)
        )

    def update_fn(key, delta, state, masks):
        corrected = masks_lib.apply(masks, jax.tree.map(jnp.add, delta, state.residual))
        sent, inner_state = inner.update(key, corrected, state.inner, masks)
        residual = masks_lib.apply(masks, jax.tree.map(jnp.subtract, corrected, sent))
        return sent, ResidualState(residual=residual, inner=inner_state)

    return inner._replace(init=init_fn, update=update_fn)


def _pick(key, delta, mask, fraction) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Choose entries at random; also count those that may travel and those that are sent."""
    count = num_sent_traced(fraction, mask)
    bits = jax.random.bits(key, delta.shape, jnp.uint32) | jnp.uint32(1)
    scores = jnp.where(mask, bits, jnp.zeros_like(bits))  # zero ranks below all that may travel
    chosen = mask & topk.top_k(scores, count)
    num_kept = jnp.sum(mask, dtype=jnp.int32)
    return jnp.where(chosen, delta, jnp.zeros_like(delta)), num_kept, count


def _payload(fraction: float, indices: Any) -> Callable[[int], Payload]:
    """Send the chosen values, and say where they stand unless all are sent."""

    def payload_fn(num_kept):
        count = num_sent(fraction, num_kept)
        return Payload(count, indices=indices if count < num_kept else "implied")

    return payload_fn


def _map_leaves(function: Callable) -> Callable:
    """Make an update without state from ``(key, delta, mask) -> delta`` of one float32 leaf."""

    def update_fn(key: Key, delta: Delta, state: State, masks: Masks) -> tuple[Delta, State]:
        leaves, structure = jax.tree.flatten(delta)
        keys = jax.random.split(key, len(leaves))
        sent = [
            function(keys[i], leaf.astype(jnp.float32), mask).astype(leaf.dtype)
            for i, (leaf, mask) in enumerate(zip(leaves, jax.tree.leaves(masks), strict=True))
        ]
        return jax.tree.unflatten(structure, sent), state

    return update_fn


class FractionSettings(Settings):
    """Settings of uplinks that send some entries of each leaf."""

    fraction: Share = setting(0.1, "Fraction of the entries that are sent.", unit="fraction")


class QuantizeSettings(Settings):
    """Settings of `quantize`."""

    bits: int = setting(8, "Bits of a sent value.", unit="bits", ge=1, le=16)
    rounding: Rounding = setting(
        "random", "To one of the two levels beside a value, right on average, or to the nearest."
    )


PARTS = {
    "identity": Part(call(identity), summary="sends the delta as it is"),
    "top_k": Part(call(top_k), FractionSettings, summary="sends the largest entries of each leaf"),
    "random_k": Part(
        call(random_k),
        FractionSettings,
        summary="sends random entries, whose places follow from a seed",
    ),
    "unbiased_random_k": Part(
        call(unbiased_random_k),
        FractionSettings,
        summary="random_k, scaled so that its mean is right",
    ),
    "sign": Part(call(sign), summary="sends signs and one scale a leaf"),
    "quantize": Part(call(quantize), QuantizeSettings, summary="rounds values to a few levels"),
}
