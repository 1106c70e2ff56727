"""What a gated network's examples kept decides what a client changes and what it sends.

A channel of a gated layer is a filter with its normalization, its statistics and its gate's own
weights (`gating` says where they lie). *Touched* are the channels that at least one of the examples
kept; *salient* are those that were kept most often. Both are one bit a channel, ``{layer: [C]}``.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjaxprune import masks as masks_lib
from fedjaxprune import topk, trees
from fedjaxprune.federated.local_training import Local, LocalStep, PostStepFn
from fedjaxprune.models import gates
from fedjaxprune.structure.channels import groups
from fedjaxprune.types import Client, Masks, Metrics

SALIENT = "salient"  # the field of the message
Bits = Mapping[str, jax.Array]  # by layer, [C] bool


class Reader(NamedTuple):
    """A kernel that reads the channels of one gated layer and of nothing else.

    Attributes:
      path: of the kernel in the parameters.
      axis: of the kernel that numbers the channels, in their order.
      layer: path of the gated layer that makes them.
    """

    path: str
    axis: int
    layer: str


def readers_of(channels: groups.Analysis, params: Any) -> tuple[Reader, ...]:
    """Find the kernels of gated layers that read the channels of one other gated layer alone.

    Where layers are added up, as on a residual network's main path, channels have several makers,
    and the kernels that read them are left out.

    Args:
      channels: of a gated network (`groups.analyze`).
      params: arrays or shapes.
    """
    leaves = dict(trees.items(params))
    layers = gates.layers_of(params)

    def owner(path: str) -> str | None:
        return next((layer for layer in layers if path.startswith(f"{layer}/")), None)

    def is_in_order(member: groups.Member) -> bool:
        size = leaves[member.path].shape[member.axis]
        return bool(np.array_equal(member.indices, np.arange(size)[:, None]))

    found = []
    for group in channels.groups:
        makers = [member for member in group.members if member.role == "filter"]
        (layer, *others) = {owner(member.path) for member in makers}
        if layer is None or others or not all(map(is_in_order, makers)):
            continue
        found += [
            Reader(member.path, member.axis, layer)
            for member in group.members
            if member.role == "input"
            and owner(member.path) is not None
            and masks_lib.is_kernel(member.path, leaves[member.path])
            and is_in_order(member)
        ]
    return tuple(found)


def touched(metrics: Metrics) -> dict[str, jax.Array]:
    """Mark the channels that any example kept: ``[C]`` bool by layer."""
    return {layer: value.total > 0 for layer, value in gates.kept(metrics).items()}


def most_kept(metrics: Metrics, density: jax.Array) -> dict[str, jax.Array]:
    """Mark the channels that were kept by most examples, as many as a gate keeps of them.

    Args:
      metrics: the loss's, of a batch, a round, or any number of them merged.
      density: ``[]``, of the gates.

    Returns:
      By layer ``[C]`` bool; of channels that were kept equally often the lower goes first.
    """
    return {
        layer: topk.top_k(value.total, gates.num_kept(density, value.total.shape[0]))
        for layer, value in gates.kept(metrics).items()
    }


def of_params(bits: Bits, params: Any) -> Masks:
    """Spread a bit a channel over the filters, gates and normalization of the gated layers.

    Returns:
      Masks of the parameters; all that lies outside the layers is True.
    """
    return trees.map_with_path(lambda path, leaf: _spread(bits, path, leaf), params)


def of_state(bits: Bits, model_state: Any) -> Masks:
    """Spread a bit a channel over the normalization statistics of the gated layers.

    Returns:
      Masks of the untrained state, whose paths are a collection and then the layer's.
    """
    return trees.map_with_path(
        lambda path, leaf: _spread(bits, path.partition("/")[2], leaf), model_state
    )


def of_readers(bits: Bits, readers: tuple[Reader, ...], params: Any) -> Masks:
    """Mark what reads marked channels: False where a kernel's input is a channel that is not."""
    by_path = {reader.path: reader for reader in readers}

    def leaf_mask(path: str, leaf: Any) -> jax.Array:
        reader = by_path.get(path)
        if reader is None:
            return jnp.ones(leaf.shape, jnp.bool_)
        return _along(reader.axis, bits[reader.layer], leaf)

    return trees.map_with_path(leaf_mask, params)


def freeze_unused(optimizer: optax.GradientTransformation) -> PostStepFn:
    """Undo what a local step did to channels that no example of its batch kept.

    Their gradient is zero. But momentum would move them, weight decay would shrink them, and
    normalization would measure what no device computes. So weights, statistics and the optimizer's
    state of them stay as if there had been no step.

    Args:
      optimizer: the clients' own; memory of it that has not the parameters' shape is left alone.

    Returns:
      A function for `clients.local_sgd`.
    """

    def post_step_fn(step: LocalStep) -> Local:
        bits = touched(step.metrics)
        masks = of_params(bits, step.after.params)
        new, old = step.after, step.before
        return Local(
            params=_where(masks, new.params, old.params),
            optimizer=_where(_of_memory(optimizer, masks, new.optimizer), new.optimizer, old[1]),
            model_state=_where(of_state(bits, new.model_state), new.model_state, old.model_state),
        )

    return post_step_fn


def report(client: Client, *, rule: Literal["salient", "touched"]) -> Client:
    """Let a client say which channels its examples of the round kept: one bit a channel.

    Args:
      client: trains a gated network, and reports the loss's metrics.
      rule: ``"salient"`` marks those kept most often, as many as a gate keeps; ``"touched"`` those
        that any example kept.

    Returns:
      A `Client` whose message has the field `salient`, ``{layer: [C] bool}``.

    Raises:
      ValueError: while tracing, if the network has no gates; or if the rule is unknown.
    """
    if rule not in ("salient", "touched"):
        raise ValueError(f"rule must be 'salient' or 'touched', got {rule!r}.")

    def update_fn(key, broadcast, state, data):
        density = gates.density(broadcast.model_state)
        message, state = client.update(key, broadcast, state, data)
        metrics = message.fields["metrics"]
        bits = most_kept(metrics, density) if rule == "salient" else touched(metrics)
        return message._replace(fields={**message.fields, SALIENT: bits}), state

    return Client(init=client.init, update=update_fn)


def _spread(bits: Bits, path: str, leaf: Any) -> jax.Array:
    """Give a leaf of a gated layer the layer's bits along its last axis, any other leaf True."""
    layer = next((name for name in bits if path.startswith(f"{name}/")), None)
    if layer is None or leaf.shape[-1:] != bits[layer].shape:
        return jnp.ones(leaf.shape, jnp.bool_)
    return _along(-1, bits[layer], leaf)


def _along(axis: int, bits: jax.Array, leaf: Any) -> jax.Array:
    shape = [1] * leaf.ndim
    shape[axis] = -1
    return jnp.broadcast_to(bits.reshape(shape), leaf.shape)


def _of_memory(optimizer: optax.GradientTransformation, masks: Masks, state: Any) -> Any:
    """Lay masks over whatever an optimizer remembers by parameter; all else is True."""

    def leaf(value: Any, mask: jax.Array) -> Any:
        if isinstance(value, optax.MaskedNode):
            return value
        return mask if value.shape == mask.shape else jnp.bool_(True)

    def other(value: Any) -> Any:
        return value if isinstance(value, optax.MaskedNode) else jnp.bool_(True)

    def is_leaf(value: Any) -> bool:
        return isinstance(value, optax.MaskedNode)

    with jax.numpy_dtype_promotion("standard"):  # init is called to tell the state's leaves apart
        return optax.tree.map_params(
            optimizer, leaf, state, masks, transform_non_params=other, is_leaf=is_leaf
        )


def _where(masks: Any, new: Any, old: Any) -> Any:
    return jax.tree.map(jnp.where, masks, new, old)
