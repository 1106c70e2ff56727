"""What a training step holds in memory on a device, modeled from shapes, masks and the graph.

All in bits. What a parameter, its gradient and its optimizer's state take depends on how a device
stores a sparse array, so that is an argument; activations are the values that the backward pass
reads, as JAX saves them. Apart from it, `costs.liveness` predicts what the simulator itself needs.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjaxprune import trees
from fedjaxprune.costs import jaxpr_flops
from fedjaxprune.structure import jaxprs
from fedjaxprune.types import Params

_SAME_VALUE = frozenset(("reshape", "squeeze", "expand_dims", "copy", "name", "stop_gradient"))


class Encoding(NamedTuple):
    """How a device stores a masked array.

    Attributes:
      array: ``(kept, size, value_bits) -> bits`` of one array.
      mask: ``(kept, size) -> bits`` held once, beside all arrays under the same mask.
    """

    array: Callable[[int, int, int], int]
    mask: Callable[[int, int], int]


def dense() -> Encoding:
    """Store all entries, and one bit of mask for each entry of an array that has pruned ones."""
    return Encoding(array=lambda kept, size, bits: size * bits, mask=_one_bit)


def shared_bitmap() -> Encoding:
    """Store live entries only; their places are in the mask, one bit an entry, held once."""
    return Encoding(array=lambda kept, size, bits: kept * bits, mask=_one_bit)


def own_bitmap() -> Encoding:
    """Store live entries with a bitmap of their places in every array; dense where none is pruned.

    It is the reading of FedRTS's appendix F.4 that its published figure follows.

    References:
      `FedRTS <https://arxiv.org/abs/2501.19122>`_, 2025.
    """
    return Encoding(
        array=lambda kept, size, bits: kept * bits + _one_bit(kept, size),
        mask=lambda kept, size: 0,
    )


def _one_bit(kept: int, size: int) -> int:
    return size if kept < size else 0


class StepMemory(NamedTuple):
    """Bits that a training step holds, modeled.

    Attributes:
      parameters: the weights.
      gradients: their gradients.
      optimizer: the optimizer's state.
      activations: what the backward pass reads of the forward pass, with the examples.
      masks: what is held once beside the arrays.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    masks: int


def step(
    loss: Callable[..., Any],
    params: Params,
    *args: Any,
    optimizer: optax.GradientTransformation,
    encoding: Encoding,
    kept: Mapping[str, int] | None = None,
    dense_gradients: Callable[[str], bool] | None = None,
) -> StepMemory:
    """Model the memory of one step of ``loss(params, *args)`` on a device.

    Args:
      loss: gives a number; its plain form is looked at (`jaxprs.plain`).
      params: tree of arrays or of their shapes.
      *args: trees of arrays or of their shapes: state, a batch, a key.
      optimizer: of the device.
      encoding: how it stores masked arrays.
      kept: live entries by a parameter's path; parameters that are missing are dense.
      dense_gradients: tells by path whose gradient is held dense, pruned entries included (growing
        by gradient); nobody's by default.
    """
    counts = {} if kept is None else kept

    def live(path: str, leaf: Any) -> int:
        return int(counts[path]) if path in counts else leaf.size

    def bits(path: str, leaf: Any, *, is_dense: bool = False) -> int:
        num_kept = leaf.size if is_dense else live(path, leaf)
        return encoding.array(num_kept, leaf.size, _bits(leaf))

    paths, leaves = trees.paths(params), jax.tree.leaves(params)
    pairs = list(zip(paths, leaves, strict=True))
    unknown = sorted(set(counts) - set(paths))
    if unknown:
        raise ValueError(
            f"there are counts for {', '.join(unknown)}, but the parameters are {', '.join(paths)}."
        )
    with jax.numpy_dtype_promotion("standard"):  # optax does not keep to strict promotion
        state = jax.eval_shape(optimizer.init, params)
        in_bits = optax.tree.map_params(
            optimizer,
            lambda leaf, path: bits(path, leaf),
            state,
            trees.map_with_path(lambda path, leaf: path, params),
            transform_non_params=lambda leaf: leaf.size * _bits(leaf),
        )
    is_dense = dense_gradients if dense_gradients is not None else lambda path: False
    return StepMemory(
        parameters=sum(bits(path, leaf) for path, leaf in pairs),
        gradients=sum(bits(path, leaf, is_dense=is_dense(path)) for path, leaf in pairs),
        optimizer=sum(jax.tree.leaves(in_bits)),
        activations=activations(loss, params, *args),
        masks=sum(encoding.mask(live(path, leaf), leaf.size) for path, leaf in pairs),
    )


def activations(loss: Callable[..., Any], params: Params, *args: Any) -> int:
    """Count the bits of the values that the backward pass of ``loss(params, *args)`` reads.

    They are the residuals that `jax.vjp` saves of the plain form, each once, but for those that are
    made of parameters alone; a boolean takes the byte that JAX gives it.
    """
    plain = jaxprs.plain(loss)

    def residuals(params: Params, *args: Any) -> list[Any]:
        return jax.tree.leaves(jax.vjp(lambda params: plain(params, *args), params)[1])

    graph = jax.make_jaxpr(residuals)(params, *args)
    inputs = [jaxpr_flops.CONSTANT] * len(jax.tree.leaves(params))
    inputs += [jaxpr_flops.FED] * (len(graph.jaxpr.invars) - len(inputs))
    values = jaxpr_flops.outputs(graph, inputs, jaxpr_flops.Rules(while_trips=1, plain=False))
    made_by: dict[Any, Any] = {
        equation.outvars[0]: equation.invars[0]
        for equation in graph.jaxpr.eqns
        if equation.primitive.name in _SAME_VALUE
    }
    saved = set()
    for atom, value in zip(graph.jaxpr.outvars, values, strict=True):
        while atom in made_by if jaxprs.is_variable(atom) else False:
            atom = made_by[atom]
        if value.is_fed and jaxprs.is_variable(atom):
            saved.add(atom)
    return sum(atom.aval.size * _bits(atom.aval) for atom in saved)


def _bits(leaf: Any) -> int:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return 64  # threefry: two words
    return 8 * leaf.dtype.itemsize


def of_fedtiny(sparse_bits: int) -> int:
    """State FedTiny's memory but for its buffer: parameters and gradients, both sparse.

    References:
      Huang et al., `FedTiny <https://arxiv.org/abs/2212.01977>`_, 2022, as its ratios imply.
    """
    return 2 * sparse_bits


def of_prunefl(sparse_bits: int, dense_bits: int) -> int:
    """State PruneFL's memory as FedTiny's paper implies it: sparse parameters, dense gradients."""
    return sparse_bits + dense_bits


def of_fedrts(model_bits: int) -> int:
    """State a method's memory as FedRTS publishes it: three times the encoded model.

    References:
      `FedRTS <https://arxiv.org/abs/2501.19122>`_, 2025, table 4: 134.29 MB is three times 44.76.
    """
    return 3 * model_bits
