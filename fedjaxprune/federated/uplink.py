"""What a delta looks like after the wire: sparsified, reduced to signs, quantised, with feedback.

Values count 32 bits. An entry that may not travel (outside the masks) is an exact zero that the
receiver knows, so it costs nothing; positions are numbered among the entries that may travel.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjaxprune import masks as masks_lib
from fedjaxprune.base import Delta, State, Uplink


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

    def num_bits_fn(kept, sizes):
        del sizes  # what does not travel costs nothing
        return 32 * sum(int(n) for n in kept)

    return Uplink(init=_init_empty, update=update_fn, num_bits=num_bits_fn)


def error_feedback(inner: Uplink) -> Uplink:
    """Add to every delta what `inner` left behind in the client's earlier rounds.

    On the entries that may travel, what is sent and the new residual are together the delta and the
    old residual. What may not travel is an exact zero in both: when the masks shrink, the residual
    of a pruned entry is forgotten, and an entry that grows back starts without one.

    Args:
      inner: a contraction, such as `top_k`, `random_k` or `sign`; scaling to be unbiased, as
        `unbiased_random_k` does, makes the residual grow.

    Returns:
      An `Uplink` with a `ResidualState` per client; it costs what `inner` costs.

    References:
      Stich et al., `Sparsified SGD with memory <https://arxiv.org/abs/1809.07599>`_, 2018;
      Karimireddy et al., `Error feedback fixes SignSGD <https://arxiv.org/abs/1901.09847>`_, 2019.
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

    return Uplink(init=init_fn, update=update_fn, num_bits=inner.num_bits)


def _init_empty(params):
    """Start without any state."""
    del params
    return ()
