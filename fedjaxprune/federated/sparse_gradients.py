"""Pairs of position and value as a message: the few largest gradients of pruned weights.

In the simulation pairs are held as a tree of the parameters' shapes that is zero where nothing was
sent, so that they add up by position in any mean; what travels is one pair for each entry that is
not zero (`compose` is told by ``sent_as={"grads": "pairs"}``).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedjaxprune import topk, trees
from fedjaxprune.traffic import DENSE_GRADIENT
from fedjaxprune.types import Client, Masks

# (masks, round []) -> the tree with the number of pairs to send, [] int32, per leaf
CountFn = Callable[[Masks, jax.Array], Any]


def top_gradients(client: Client, *, num_pairs: CountFn) -> Client:
    """Cut the gradients that a client reports down to the largest ones of pruned weights.

    A device needs no more memory for it than the pairs: it can stream over a layer and keep the
    best in a heap. Here that is a plain top-k with the same result. A gradient of exactly zero is
    not worth a pair and is not sent.

    Args:
      client: reports `grads` (``local_sgd(..., report_grads=...)``).
      num_pairs: ``(masks, round) -> tree of [] int32``, pairs of each leaf; may be zero.

    Returns:
      A `Client` whose message has in `grads` the chosen entries and zeros elsewhere. In a weighted
      mean of `grads`, a client that did not send an entry counts as zero there.

    Raises:
      ValueError: while tracing, if the client reports no gradients.

    References:
      Huang et al., `FedTiny <https://arxiv.org/abs/2212.01977>`_, 2023.
    """

    def update_fn(key, broadcast, state, data):
        message, state = client.update(key, broadcast, state, data)
        if "grads" not in message.fields:
            raise ValueError(
                "pairs.top_gradients sends the largest gradients, but the client reports none: "
                "build it with local_sgd(..., report_grads=...)."
            )
        counts = num_pairs(broadcast.masks, broadcast.round)

        def leaf(grad, mask, count):
            offered = ~mask & (grad != 0)
            sizes = jnp.where(offered, jnp.abs(grad.astype(jnp.float32)), -jnp.inf)
            chosen = offered & topk.top_k(sizes, count)
            return jnp.where(chosen, grad, jnp.zeros_like(grad))

        grads = message.fields["grads"]
        grads = jax.lax.cond(
            trees.tree_sum(counts, dtype=jnp.int32) > 0,
            lambda: jax.tree.map(leaf, grads, broadcast.masks, counts),
            lambda: jax.tree.map(jnp.zeros_like, grads),
        )
        fields = {**message.fields, "grads": grads}
        told = fields.get("metrics", {})
        if DENSE_GRADIENT in told:  # of the layers that send no pairs nobody asks it
            asked = jnp.stack(jax.tree.leaves(counts)) > 0
            seen = told[DENSE_GRADIENT]
            total = jnp.where(asked, seen.total, jnp.zeros_like(seen.total))
            fields["metrics"] = {**told, DENSE_GRADIENT: seen._replace(total=total)}
        return message._replace(fields=fields), state

    return Client(init=client.init, update=update_fn)
