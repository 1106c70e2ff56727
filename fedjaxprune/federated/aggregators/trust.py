"""Trust by example: messages count as far as they agree with what the server computes itself.

All leaves of a field are one vector. A client of weight 0 is absent: whatever its message holds
(NaN too), it adds nothing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjaxprune.federated.aggregators import _sums, _vectors
from fedjaxprune.registry import Part
from fedjaxprune.settings import Settings
from fedjaxprune.types import CohortAggregator, Masks


class ServerAggregator(NamedTuple):
    """Many messages to one, judged by the message that the server would send itself.

    In every training round the server trains as a client does, on examples of its own and under the
    same masks. A field of its message is the `reference` for that field of the others'. This work
    is not part of the record of arithmetic.

    Attributes:
      reduce: ``(values [C, ...], masks [C, ...] or None, weights [C], reference) -> value``.
    """

    reduce: Callable[[Any, Masks | None, jax.Array, Any], Any]

    def beside(self, reference: Any) -> CohortAggregator:
        """Make an aggregator that knows the server's own value."""
        return CohortAggregator(
            reduce=lambda values, masks, weights: self.reduce(values, masks, weights, reference)
        )


def server_trust() -> ServerAggregator:
    """Average messages by their agreement with the server's own, at its length (FLTrust).

    A message's trust is its cosine with the server's message, or zero if that is negative. Each
    message is scaled to the norm of the server's, then they are averaged by trust. Every client
    counts by its trust alone, whatever its weight.

    The server's examples are `Population.held`; a run sets them by ``server.data_fraction``.

    Returns:
      A `ServerAggregator` to one value ``[...]``; zero where nobody is trusted. What a client does
      not hold counts as zero: the server's message is under the same global masks, and a client
      with personal masks agrees only where it holds a weight.

    Raises:
      ValueError: while tracing, if a leaf is not of floating point.

    References:
      Cao et al., `FLTrust: Byzantine-robust federated learning via trust bootstrapping
      <https://arxiv.org/abs/2012.13995>`_, 2021.
    """

    def reduce_fn(values, masks, weights, reference):
        del masks  # everybody counts everywhere
        _sums.require_inexact("server_trust", values)
        values, present = _vectors.of_present(values, weights)
        # All cosines are of scaled vectors, whose squares and products are ordinary numbers.
        values, _ = _vectors.unit(values)
        scaled, power = _vectors.unit(jax.tree.map(lambda leaf: leaf[None], reference))
        own = jnp.sum(_vectors.norms(scaled))  # of one vector
        norms = _vectors.norms(values)
        has_length = present & (norms > 0) & jnp.isfinite(norms) & (own > 0)
        lengths = jnp.where(has_length, norms, jnp.ones_like(norms))
        reference = jax.tree.map(lambda leaf: leaf[0], scaled)
        product = _vectors.products(values, reference) / lengths / jnp.where(own > 0, own, 1.0)
        trust = jnp.where(has_length, jnp.maximum(product, 0.0), jnp.zeros_like(product))
        total = jnp.sum(trust)
        shares = trust / jnp.where(total > 0, total, 1.0)
        own = jnp.ldexp(own, jnp.sum(power))
        return _vectors.combine(values, shares * own / lengths)

    return ServerAggregator(reduce=reduce_fn)


def build(settings: Settings) -> ServerAggregator:
    """Make the aggregator."""
    del settings  # there are none
    return server_trust()


PARTS = {
    "server_trust": Part(
        build, summary="mean by agreement with the server's own training (FLTrust, 2021)"
    ),
}
