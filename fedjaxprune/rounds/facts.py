"""Facts of a network that methods ask for: shapes, reading order, channels.

Everything is read off shapes and the traced network; nothing is computed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjaxprune import masks as masks_lib
from fedjaxprune import trees
from fedjaxprune.federated import gated_updates
from fedjaxprune.models import gates, parameters
from fedjaxprune.structure import jaxprs
from fedjaxprune.structure.channels import groups
from fedjaxprune.types import Model, PrunableFn


class Facts(NamedTuple):
    """What is known of a network before any round.

    Attributes:
      params: tree of shapes, as `Model.init` gives the parameters.
      state: tree of shapes of what is not trained.
      inputs: shapes of a batch of two examples, as the network takes them.
      reading_order: ``() -> paths`` of the parameters in the order in which inference uses them.
      channels: ``() -> Analysis``, which indices of which leaves are one channel.
      gate_readers: ``() -> readers``, kernels that read the channels of one gated layer alone.
    """

    params: Any
    state: Any
    inputs: Any
    reading_order: Callable[[], list[str]]
    channels: Callable[[], groups.Analysis]
    gate_readers: Callable[[], tuple[gated_updates.Reader, ...]] = tuple


def of_model(model: Model, *, inputs: Any) -> Facts:
    """Collect the facts of a network.

    Args:
      model: the network.
      inputs: tree of shapes (or arrays) ``[2, ...]`` of two examples.
    """
    params, state = jax.eval_shape(model.init, jax.random.key(0))
    parameters.check(params, state)
    inputs = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), inputs)

    def channels() -> groups.Analysis:
        return groups.analyze(model.predict, params, state, inputs)

    return Facts(
        params=params,
        state=state,
        inputs=inputs,
        reading_order=lambda: jaxprs.reading_order(model, input_shape=inputs.shape[1:]),
        channels=channels,
        gate_readers=lambda: gated_updates.readers_of(channels(), params),
    )


def leaves_by_path(facts: Facts) -> dict[str, Any]:
    """Give the shapes of the parameters by path."""
    return dict(trees.items(facts.params))


def sizes(facts: Facts, prunable: PrunableFn) -> dict[str, int]:
    """Count the weights of each prunable leaf, by path."""
    return {path: int(x.size) for path, x in trees.items(facts.params) if prunable(path, x)}


def first_convolution(facts: Facts) -> str | None:
    """Find the path of the first kernel, if it is a convolution's."""
    shapes = leaves_by_path(facts)
    kernels = (path for path in facts.reading_order() if masks_lib.is_kernel(path, shapes[path]))
    first = next(kernels, None)
    return None if first is None or len(shapes[first].shape) < 4 else first


def depthwise_convolutions(facts: Facts) -> list[str]:
    """Find the kernels of convolutions that read one channel each, but for the first kernel."""
    first = first_convolution(facts)
    return [
        path
        for path, leaf in leaves_by_path(facts).items()
        if masks_lib.is_kernel(path, leaf)
        and len(leaf.shape) >= 4
        and leaf.shape[-2] == 1
        and path != first
    ]


def has_kernels(facts: Facts) -> bool:
    """Tell whether there is a kernel of a dense or convolution layer."""
    return any(masks_lib.is_kernel(path, leaf) for path, leaf in leaves_by_path(facts).items())


def has_convolutions(facts: Facts) -> bool:
    """Tell whether a kernel is a convolution's (at least four axes)."""
    leaves = leaves_by_path(facts).items()
    return any(masks_lib.is_kernel(path, leaf) and len(leaf.shape) >= 4 for path, leaf in leaves)


def has_batch_norm(facts: Facts) -> bool:
    """Tell whether the state has running means and variances."""
    names = {path.rsplit("/", 1)[-1] for path in trees.paths(facts.state)}
    return {"mean", "var"} <= names


def has_gates(facts: Facts) -> bool:
    """Tell whether layers choose their channels for every example."""
    return gates.has_gates(facts.state)


def float_inputs(input_shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """Name two examples of float32 features."""
    return jax.ShapeDtypeStruct((2, *input_shape), jnp.float32)
