"""What a gated network and a method that steers gates agree on.

A gate lets a part of a layer's channels through, chosen anew for every example. How large a part is
one number, the density (rho), which a method may change from round to round: it is an array in the
model's state, ``state["gating"]["density"]``, so that training and predictions read the same one
and a change of it compiles nothing. It is not trained, and clients do not send it back. Which
channels the examples of a step kept is a metric, not state: a client reads it from the loss
(`kept`), and it neither travels with the statistics nor outlives the round.

A gated layer is named by its path, and all leaves of the parameters under that path have the
layer's output channels on their last axis: ``conv/kernel``, the normalization and the gate's own
``gate_kernel`` and ``gate_bias``. In this way kept channels of a layer become masks of its leaves.
"""

import jax
import jax.numpy as jnp

from fedjaxprune import live_weights, trees
from fedjaxprune.metrics import Mean
from fedjaxprune.types import Metrics, Params, State

COLLECTION = "gating"  # of the state
LAYERS = "layers"  # of the loss's metrics
KEPT = "kept"  # last part of the path of a layer's metric
THROUGH = "through"  # the same, of another
GATE = ("gate_kernel", "gate_bias")  # last parts of the paths of a gate's own parameters


def has_gates(state: State) -> bool:
    """Tell from a model's state, or its shapes, whether the network has gates."""
    return isinstance(state, dict) and COLLECTION in state


def density(state: State) -> jax.Array:
    """Read the fraction of channels that every gate keeps: ``[]`` float32.

    Raises:
      ValueError: if the network has no gates.
    """
    _check(state)
    return state[COLLECTION]["density"]


def is_of_client(path: str, leaf: jax.Array) -> bool:
    """Tell, by path in the model's state, what a client may change: all that no method sets."""
    return path != f"{COLLECTION}/density" and live_weights.is_of_client(path, leaf)


def with_density(state: State, density: jax.Array) -> State:
    """Replace the fraction of channels that every gate keeps, ``[]``; it may be traced.

    Raises:
      ValueError: if the network has no gates.
    """
    _check(state)
    before = state[COLLECTION]["density"]
    after = jnp.asarray(density).astype(before.dtype)
    return {**state, COLLECTION: {**state[COLLECTION], "density": after}}


def num_kept(density: jax.Array, num_channels: int) -> jax.Array:
    """Count what a gate keeps of its channels: ``round(density * num_channels)``, at least one.

    Args:
      density: ``[]``.
      num_channels: of the layer's output.

    Returns:
      ``[]`` int32; halves go to the even number.
    """
    count = jnp.round(density * jnp.float32(num_channels)).astype(jnp.int32)
    return jnp.clip(count, 1, num_channels)


def kept(metrics: Metrics) -> dict[str, Mean]:
    """Pick from the loss's metrics how many examples kept each channel of each gated layer.

    Metrics of several steps or clients add up (`metrics.merge`), so the same function serves one
    batch, a client's round and a cohort.

    Returns:
      By path of the layer: `total` ``[C_out]``, the examples that kept the channel, and `weight`
      ``[]``, the examples seen; filling counts in neither. Empty where the network has no gates.
    """
    return _of_layers(metrics, KEPT)


def through(metrics: Metrics) -> dict[str, Mean]:
    """Pick from the metrics of a loss, or of `Model.inspect`, what gates let through.

    Returns:
      By path of the layer, the mean over examples of (share of input channels that are not zero)
      times (share of output channels that are kept and not scaled by zero).
    """
    return _of_layers(metrics, THROUGH)


def is_gate(path: str, leaf: jax.Array) -> bool:
    """Tell a gate's own parameters, by path."""
    del leaf  # its path says it
    return path.rsplit("/", 1)[-1] in GATE


def layers_of(params: Params) -> list[str]:
    """List the paths of the gated layers: those with a gate of their own."""
    ending = f"/{GATE[0]}"
    return [path.removesuffix(ending) for path in trees.paths(params) if path.endswith(ending)]


def _of_layers(metrics: Metrics, name: str) -> dict[str, Mean]:
    ending = f"/{name}"
    return {
        path.removesuffix(ending): value
        for path, value in metrics.get(LAYERS, {}).items()
        if path.endswith(ending)
    }


def _check(state: State) -> None:
    if not has_gates(state):
        raise ValueError(
            "the network has no gates: its state has no collection "
            f"{COLLECTION!r}; take a gated network."
        )
