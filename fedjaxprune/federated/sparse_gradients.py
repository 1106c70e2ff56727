"""Top-k gradients as a message: pairs of index and value for the largest ones of pruned weights.

In the simulation the pairs are a tree of the parameters' shapes, zero where nothing was sent, so
that any mean adds them by index. One pair is sent for each entry that is not zero: declare the
field ``FieldSpec(send="pairs")``. Places without values are 1 in such a tree: declare them
``FieldSpec(send="places", to_pruner=True)``.
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
    """Keep only the largest gradients of pruned weights that a client reports.

    A device needs memory for the pairs alone: it can stream over a layer and keep the largest in a
    heap. Here it is a plain top-k with the same result. A gradient of exactly zero is not sent.

    Args:
      client: reports `grads` (``local_sgd(..., report_grads=...)``).
      num_pairs: ``(masks, round) -> tree of [] int32``, pairs of each leaf; may be zero.

    Returns:
      A `Client` whose message has the chosen entries in `grads`, and zeros elsewhere. In a weighted
      mean of `grads`, an entry that a client did not send counts as zero.

    Raises:
      ValueError: while tracing, if the client reports no gradients.

    References:
      Huang et al., `FedTiny <https://arxiv.org/abs/2212.01977>`_, 2023.
    """

    def pick(grads, chosen):
        return jax.tree.map(
            lambda grad, mark: jnp.where(mark, grad, jnp.zeros_like(grad)), grads, chosen
        )

    return _sending_largest(client, num_pairs, pick, field="grads", name="top_gradients")


def top_places(client: Client, *, num_places: CountFn, field: str = "places") -> Client:
    """Send where the largest gradients of pruned weights are, and no values.

    Otherwise as `top_gradients`.

    Args:
      client: reports `grads` (``local_sgd(..., report_grads=...)``), which stay with it.
      num_places: ``(masks, round) -> tree of [] int32``, places of each leaf; may be zero.
      field: the name of what is sent.

    Returns:
      A `Client` whose message has, in the place of `grads`, a tree of float32: 1 at the chosen
      entries, 0 elsewhere. A weighted mean of it is the share of votes for each entry.

    Raises:
      ValueError: while tracing, if the client reports no gradients.

    References:
      Huang et al., `FedRTS <https://arxiv.org/abs/2501.19122>`_, 2025.
    """

    def pick(grads, chosen):
        del grads  # their places are all that is sent
        return jax.tree.map(lambda mark: mark.astype(jnp.float32), chosen)

    return _sending_largest(client, num_places, pick, field=field, name="top_places")


def _sending_largest(
    client: Client, num_sent: CountFn, pick: Callable[[Any, Masks], Any], *, field: str, name: str
) -> Client:
    """Replace the gradients that a client reports by what `pick` makes of the largest of them."""

    def update_fn(key, broadcast, state, data):
        message, state = client.update(key, broadcast, state, data)
        if "grads" not in message.fields:
            raise ValueError(
                f"sparse_gradients.{name} sends the largest gradients, but the client "
                "reports none: build it with local_sgd(..., report_grads=...)."
            )
        counts = num_sent(broadcast.masks, broadcast.round)

        def leaf(grad, mask, count):
            offered = ~mask & (grad != 0)
            sizes = jnp.where(offered, jnp.abs(grad.astype(jnp.float32)), -jnp.inf)
            return offered & topk.top_k(sizes, count)

        grads = message.fields["grads"]
        sent = jax.lax.cond(
            trees.tree_sum(counts, dtype=jnp.int32) > 0,
            lambda: pick(grads, jax.tree.map(leaf, grads, broadcast.masks, counts)),
            lambda: jax.tree.map(jnp.zeros_like, jax.eval_shape(pick, grads, broadcast.masks)),
        )
        fields = {other: tree for other, tree in message.fields.items() if other != "grads"}
        fields[field] = sent
        metrics = fields.get("metrics", {})
        if DENSE_GRADIENT in metrics:  # layers that send nothing need no dense gradient
            is_sent = jnp.stack(jax.tree.leaves(counts)) > 0
            dense = metrics[DENSE_GRADIENT]
            total = jnp.where(is_sent, dense.total, jnp.zeros_like(dense.total))
            fields["metrics"] = {**metrics, DENSE_GRADIENT: dense._replace(total=total)}
        return message._replace(fields=fields), state

    return Client(init=client.init, update=update_fn)
