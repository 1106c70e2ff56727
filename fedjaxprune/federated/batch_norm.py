"""BatchNorm calibration: clients that compute statistics and losses by forward passes only.

Statistics are a field of a message: the leaves of the model state that `normalization` accepts, as
a list ``[leaf, ...]`` in the state's order. `put` writes such a list into a state. No client here
trains weights or computes gradients.

A single value has no variance. So a variance leaf that is all zero, or that training leaves as it
was, is not a measurement: the field `measured`, one number a leaf, is 0 for it, and 1 otherwise.
`combine` leaves it out. The server can tell without the field, so it need not be sent.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedjaxprune import live_weights, metrics, trees
from fedjaxprune import masks as masks_lib
from fedjaxprune.federated import _steps
from fedjaxprune.types import Batcher, Broadcast, Client, ClientData, Key, Message, State

# A running statistic is set to this value to measure which share of it one training step keeps. It
# is far larger than real statistics, so that rounding is relative to the share.
_PROBE = float(2**20)
_HOPELESS = 1e18  # replaces a loss that is larger or not finite


def normalization(path: str, leaf: jax.Array) -> bool:
    """Accept leaves whose name ends in ``mean`` or ``var`` (``batch_stats/.../running_var``)."""
    name = path.rsplit("/", 1)[-1]
    return name.endswith(("mean", "var")) and jnp.issubdtype(leaf.dtype, jnp.inexact)


def pick(model_state: State) -> list[jax.Array]:
    """List the statistics of a model state."""
    return [leaf for path, leaf in trees.items(model_state) if normalization(path, leaf)]


def put(model_state: State, statistics: list[jax.Array]) -> State:
    """Write statistics, as `pick` lists them, into a state, in its dtypes; other leaves stay."""
    rest = iter(statistics)

    def leaf(path, old):
        return next(rest).astype(old.dtype) if normalization(path, old) else old

    return trees.map_with_path(leaf, model_state)


def statistics(loss: Any, *, batcher: Batcher) -> Client:
    """Measure the normalization statistics of a model on a client's data, exactly, in one pass.

    The result is the mean, weighted by examples, of the batches' means and variances; where batches
    are equally large it equals a running average of momentum ``1 / i``. The model returns only
    moving averages. So each batch starts from statistics of zero, and the share of the old
    statistics that a step keeps is measured once, at the first batch.

    Args:
      loss: as in a `Model`; in training mode its state must be moving averages that its forward
        pass does not read, as BatchNorm's are.
      batcher: the client's examples, without augmentation.

    Returns:
      A `Client` whose message has the fields `statistics` (a list, see `pick`), `measured` and
      `metrics`; its weight is the number of examples. The broadcast's masks are applied to the
      parameters. Batches whose variance is no measurement do not count in its mean.

    References:
      Huang et al., `FedTiny <https://arxiv.org/abs/2212.01977>`_, 2023 (adaptive BatchNorm
      selection; its first code makes ten passes of momentum 0.1 instead: `moving_statistics`).
    """

    def update_fn(key, broadcast, state, data):
        batch_key, loss_key = jax.random.split(key)
        look = _look(loss, broadcast)
        old = pick(broadcast.model_state)
        zeros = [jnp.zeros(leaf.shape, jnp.float32) for leaf in old]

        first = batcher.batch(batch_key, data, jnp.int32(0))
        near, _ = look(zeros, first, loss_key)
        far, _ = look([leaf + _PROBE for leaf in zeros], first, loss_key)
        moved = [1.0 - (up - down) / _PROBE for up, down in zip(far, near, strict=True)]

        def step_fn(step, sums):
            batch = batcher.batch(batch_key, data, step)
            seen, step_metrics = look(zeros, batch, jax.random.fold_in(loss_key, step))
            size = jnp.sum(batch.weights)
            counts = _measured(broadcast.model_state, seen, zeros)
            sizes = [jnp.where(counted > 0, size, jnp.zeros_like(size)) for counted in counts]
            totals = [
                total + jnp.where(size > 0, size * leaf, jnp.zeros_like(leaf))
                for total, leaf, size in zip(sums[0], seen, sizes, strict=True)
            ]
            sizes = [total + size for total, size in zip(sums[1], sizes, strict=True)]
            return totals, sizes, sums[2] + size, metrics.merge(sums[3], step_metrics)

        none = jnp.float32(0.0)
        seen = _steps.zero_metrics(loss_key, loss, broadcast, first)
        totals, sizes, size, seen = jax.lax.fori_loop(
            jnp.int32(0), batcher.num_steps(data), step_fn, (zeros, [none] * len(old), none, seen)
        )

        def mean(total, size, share, before):  # a leaf that no step changes keeps its value
            usable = (size > 0) & (share > 0)
            divisor = jnp.where(usable, size * share, jnp.ones_like(share))
            return jnp.where(usable, total / divisor, before.astype(jnp.float32))

        found = [mean(*leaves) for leaves in zip(totals, sizes, moved, old, strict=True)]
        measured = [(size > 0).astype(jnp.float32) for size in sizes]
        fields = {"statistics": found, "measured": measured, "metrics": seen}
        return Message(fields=fields, weight=size), state

    return Client(init=lambda params: (), update=update_fn)


def moving_statistics(loss: Any, *, batcher: Batcher, num_passes: int) -> Client:
    """Update the statistics in `num_passes` passes over a client's data, by the model's momentum.

    It starts from the broadcast's statistics, of which a small share remains. FedTiny's first code
    makes 10 passes. Arguments and message as in `statistics`; the weight counts every example once.

    Raises:
      ValueError: `num_passes` is below 1.
    """
    if num_passes < 1:
        raise ValueError(f"num_passes must be at least 1, got {num_passes}.")

    def update_fn(key, broadcast, state, data):
        batch_key, loss_key = jax.random.split(key)
        look = _look(loss, broadcast)
        first = batcher.batch(batch_key, data, jnp.int32(0))
        old = [leaf.astype(jnp.float32) for leaf in pick(broadcast.model_state)]
        num_steps = batcher.num_steps(data)

        def step_fn(step, carry):
            batch = batcher.batch(batch_key, data, step % jnp.maximum(num_steps, 1))
            seen, step_metrics = look(carry[0], batch, jax.random.fold_in(loss_key, step))
            return seen, carry[1] + jnp.sum(batch.weights), metrics.merge(carry[2], step_metrics)

        start = (old, jnp.float32(0.0), _steps.zero_metrics(loss_key, loss, broadcast, first))
        found, size, seen = jax.lax.fori_loop(jnp.int32(0), num_passes * num_steps, step_fn, start)
        measured = _measured(broadcast.model_state, found, old)
        fields = {"statistics": found, "measured": measured, "metrics": seen}
        return Message(fields=fields, weight=size / num_passes), state

    return Client(init=lambda params: (), update=update_fn)


def losses(
    predict: Any, *, loss: Callable[[jax.Array, jax.Array], jax.Array], batcher: Batcher
) -> Client:
    """Report the loss of the broadcast model on a client's data, in inference mode.

    Args:
      predict: as in a `Model`.
      loss: ``(outputs, labels) -> [B]``, or ``[B, T]`` for a label at each position of a sequence
        (`models.heads.prediction_loss`).
      batcher: the client's examples, without augmentation.

    Returns:
      A `Client` whose message has the field `losses`, the mean over its labels ``[]`` float32, and
      `metrics` with the accumulator ``loss`` (the sum and the number of labels); its weight is the
      number of labels. A negative label of a sequence does not count. A sum that is not finite, or
      larger, becomes 1e18: otherwise the whole message would be rejected, with the losses of all
      other candidates.
    """

    def update_fn(key, broadcast, state, data):
        params = masks_lib.apply(broadcast.masks, broadcast.params)

        def step_fn(step, total):
            batch = batcher.batch(key, data, step)
            labels, weights = batch.labels, batch.weights
            if labels.ndim > 1 and jnp.issubdtype(labels.dtype, jnp.integer):
                weights = jnp.where(labels >= 0, weights[:, None], 0.0)
                labels = jnp.maximum(labels, 0)
            values = loss(predict(params, broadcast.model_state, batch.inputs), labels)
            return metrics.merge(total, metrics.mean(values, weights))

        total = jax.lax.fori_loop(jnp.int32(0), batcher.num_steps(data), step_fn, metrics.zero())
        is_usable = jnp.abs(total.total) < _HOPELESS
        total = total._replace(total=jnp.where(is_usable, total.total, _HOPELESS))
        mean = total.total / jnp.maximum(total.weight, 1.0)
        fields = {"losses": mean, "metrics": {"loss": total}}
        return Message(fields=fields, weight=total.weight), state

    return Client(init=lambda params: (), update=update_fn)


def each_candidate(client: Client) -> Client:
    """Run a client without state once for every candidate, one after another.

    Args:
      client: receives one candidate as its broadcast's masks and model state.

    Returns:
      A `Client` for a broadcast whose masks and model state have a leading axis ``[candidates]``;
      so have the fields of its message. All candidates use the same key, hence the same batches.
    """

    def update_fn(key: Key, broadcast: Broadcast, state: State, data: ClientData):
        def one(candidate):
            masks, model_state = candidate
            told = live_weights.with_masks(model_state, masks)
            seen = broadcast._replace(masks=masks, model_state=told)
            return client.update(key, seen, (), data)[0]

        messages = jax.lax.map(one, (broadcast.masks, broadcast.model_state))
        return Message(fields=messages.fields, weight=messages.weight[0]), state

    return Client(init=lambda params: (), update=update_fn)


def leave_out(client: Client) -> Client:
    """Set what a client did not measure to zero, so that `combine` can leave it out."""

    def update_fn(key, broadcast, state, data):
        message, state = client.update(key, broadcast, state, data)
        fields = dict(message.fields)
        pairs = zip(fields["statistics"], fields["measured"], strict=True)
        fields["statistics"] = [jnp.where(is_known > 0, leaf, 0.0) for leaf, is_known in pairs]
        return message._replace(fields=fields), state

    return Client(init=client.init, update=update_fn)


def combine(
    statistics: list[jax.Array], measured: list[jax.Array], before: list[jax.Array]
) -> list[jax.Array]:
    """Average statistics over the clients that measured them.

    Args:
      statistics: means over the clients, zero where one did not measure; leading axes are allowed.
      measured: means over the clients of `measured`, of these leading axes.
      before: what stays where no client measured.
    """

    def leaf(total, share, before):
        share = share.reshape((*share.shape, *[1] * (total.ndim - share.ndim)))
        return jnp.where(share > 0, total / jnp.where(share > 0, share, 1.0), before)

    return [leaf(*leaves) for leaves in zip(statistics, measured, before, strict=True)]


def with_squares(client: Client) -> Client:
    """Add the squares of a client's statistics to its message, as `squares`.

    The server can compute them from the statistics, so they need not be sent. `add_spread` reads
    from their mean how much the clients' means differ.
    """

    def update_fn(key, broadcast, state, data):
        message, state = client.update(key, broadcast, state, data)
        squares = [jnp.square(leaf) for leaf in message.fields["statistics"]]
        return message._replace(fields={**message.fields, "squares": squares}), state

    return Client(init=client.init, update=update_fn)


def add_spread(
    model_state: State, statistics: list[jax.Array], squares: list[jax.Array]
) -> list[jax.Array]:
    """Turn mean variances into the variance of all data: add the variance of the clients' means.

    Args:
      model_state: its paths pair each mean (``.../mean``) with a variance (``.../var``).
      statistics: means over the clients, as `pick` lists them; leading axes are allowed.
      squares: means over the clients of the squares.

    Raises:
      ValueError: if a variance has no mean beside it.
    """
    paths = [path for path, leaf in trees.items(model_state) if normalization(path, leaf)]
    found = []
    for path, value in zip(paths, statistics, strict=True):
        if path.endswith("var"):
            beside = path.removesuffix("var") + "mean"
            if beside not in paths:
                raise ValueError(f"the variance {path!r} has no mean beside it ({beside!r}).")
            mean, square = (tree[paths.index(beside)] for tree in (statistics, squares))
            value = value + jnp.maximum(square - jnp.square(mean), 0.0)
        found.append(value)
    return found


def _measured(model_state, seen, before) -> list[jax.Array]:
    """Tell of each statistic whether it is a measurement: 1 or 0, ``[]`` float32."""
    paths = [path for path, leaf in trees.items(model_state) if normalization(path, leaf)]
    return [
        jnp.any(new != old).astype(jnp.float32) if path.endswith("var") else jnp.float32(1.0)
        for path, new, old in zip(paths, seen, before, strict=True)
    ]


def _look(loss, broadcast):
    """Make ``(statistics, batch, key) -> (statistics, metrics)``: one forward pass."""
    params = masks_lib.apply(broadcast.masks, broadcast.params)

    def look(statistics, batch, key):
        before = put(broadcast.model_state, statistics)
        _, (after, seen) = loss(params, before, batch, key)
        return [leaf.astype(jnp.float32) for leaf in pick(after)], seen

    return look
