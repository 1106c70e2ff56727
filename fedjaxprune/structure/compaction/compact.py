"""Remove dead channels: a smaller network with the same outputs.

A filter whose weights are all pruned makes a channel that does not depend on the inputs, and a
channel that no operation reads need not be computed. `compact` follows both through a network's
program, as JAX traces it. It depends on arrays, not on layers, so it works for any network. What a
dead channel still contributes (a live bias or normalization) is the same for every example, and
becomes a constant where channels are added up. With the zero padding of a convolution this constant
differs at the border.

The smaller network executes the same program with smaller arrays: no module is rebuilt, and
parameters and state keep their structure and names. Convolutions take the forms that are fast on
CPU (`kernels.convolution`), whatever the network used.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjaxprune import trees
from fedjaxprune.structure.channels import groups
from fedjaxprune.structure.compaction import dependence, execute, program, shrink
from fedjaxprune.types import Masks, Model, Params, State

CONSTANTS = "constants"  # of the smaller network's state
STATE = "state"


class Change(NamedTuple):
    """A leaf that became smaller.

    Attributes:
      path: of the leaf in the parameters.
      before: its shape.
      after: its shape now.
    """

    path: str
    before: tuple[int, ...]
    after: tuple[int, ...]


class Remainder(NamedTuple):
    """Pruned filters that had to stay.

    Attributes:
      path: of the leaf that makes them.
      axis: of the leaf.
      indices: which of its filters.
      why: in words.
      others: the leaves in which their channels live, if that is why.
    """

    path: str
    axis: int
    indices: tuple[int, ...]
    why: str
    others: tuple[str, ...] = ()


class Compacted(NamedTuple):
    """A smaller network.

    Attributes:
      predict: ``(params, state, inputs [B, ...]) -> outputs`` in inference mode, for any `B`.
      params: its parameters, of the structure of the whole network's.
      masks: its masks.
      state: ``{"state": ..., "constants": ...}``: the network's own, and what the channels that are
        gone contribute; neither is trained.
      changes: which leaves became smaller; empty if no channel is dead, and then the network is
        left as it is.
      remainders: pruned filters that had to stay, and why.
      is_constant: whether the outputs are the same for all inputs: the masks cut the network off
        from them.
    """

    predict: Callable[[Params, State, Any], jax.Array]
    params: Params
    masks: Masks
    state: State
    changes: tuple[Change, ...]
    remainders: tuple[Remainder, ...]
    is_constant: bool


def compact(model: Model, params: Params, masks: Masks, *, state: State, inputs: Any) -> Compacted:
    """Remove the channels that are dead under masks, and fold what they contributed.

    Args:
      model: the network; of it only `predict` is asked.
      params: its parameters; entries that the masks prune count as exact zeros.
      masks: of the parameters.
      state: what is not trained; it is frozen into what is folded.
      inputs: a batch, or its shapes (`jax.ShapeDtypeStruct`); of the number of examples nothing is
        read.

    Raises:
      ValueError: if the masks do not fit the parameters, or the network does something else for
        another number of examples.
    """
    if jax.tree.map(jnp.shape, params) != jax.tree.map(jnp.shape, masks):
        raise ValueError("the masks do not have the structure and shapes of the parameters.")
    pruned = jax.tree.map(_pruned, jax.device_get(params), jax.device_get(masks))
    written = program.trace(model.predict, pruned, state, inputs)
    leaves, treedef = jax.tree.flatten(pruned)
    state_leaves, state_treedef = jax.tree.flatten(state)
    paths, count = trees.paths(pruned), len(leaves)
    small = shrink.shrink(written, leaves, state_leaves, paths)
    two = program.batch_of(program.FEW, inputs)
    output_treedef = jax.tree.structure(jax.eval_shape(model.predict, pruned, state, two))

    def cut(leaf: Any, kept: dependence.Kept) -> jax.Array:
        part = dependence.part(np.asarray(leaf), kept)
        return jax.device_put(np.ascontiguousarray(part).reshape(part.shape))

    kept = small.kept[:count]
    few, few_masks = (list(map(cut, each, kept)) for each in (leaves, jax.tree.leaves(masks)))
    few_state = [
        leaf if dependence.is_opaque(leaf.dtype) else cut(leaf, bits)
        for leaf, bits in zip(state_leaves, small.kept[count:], strict=True)
    ]
    changes = tuple(
        Change(path, tuple(old.shape), tuple(new.shape))
        for path, old, new in zip(paths, leaves, few, strict=True)
        if old.shape != new.shape
    )
    analysis = groups.analyze(model.predict, pruned, state, two)
    whole = dict(zip(paths, small.whole[:count], strict=True))
    remainders = _remainders(analysis, dict(zip(paths, leaves, strict=True)), kept, whole)

    def predict_fn(params: Params, state: State, inputs: Any) -> Any:
        examples = jax.tree.leaves(inputs)
        batch = examples[0].shape[0]
        if not changes and isinstance(batch, int):
            return model.predict(params, state[STATE], inputs)
        arrays = [*jax.tree.leaves(params), *jax.tree.leaves(state[STATE]), *examples]
        outputs = execute.smaller(small.plan, state[CONSTANTS], arrays, batch)
        return jax.tree.unflatten(output_treedef, outputs)

    return Compacted(
        predict_fn,
        jax.tree.unflatten(treedef, few),
        jax.tree.unflatten(treedef, few_masks),
        {
            STATE: jax.tree.unflatten(state_treedef, few_state),
            CONSTANTS: jax.device_put(small.constants),
        },
        changes,
        remainders,
        small.is_constant,
    )


def _pruned(leaf: Any, mask: Any) -> np.ndarray:
    """Set pruned entries to zeros, on the host."""
    leaf = np.asarray(leaf)
    return np.where(mask, leaf, np.zeros((), leaf.dtype))


def _remainders(
    analysis: groups.Analysis,
    leaves: dict[str, Any],
    kept: tuple[dependence.Kept, ...],
    whole: dict[str, tuple[str, ...] | None],
) -> tuple[Remainder, ...]:
    """List filters of zeros that are still there, with the best reason that can be given."""
    by_path = dict(zip(leaves, kept, strict=True))
    fixed = {(path, axis): why for path, axis, why in analysis.fixed}
    dead: dict[tuple[str, int], np.ndarray] = {}
    for each in analysis.filters:
        maker = each.members[0]
        leaf = np.asarray(leaves[maker.path])
        dead[maker.path, maker.axis] = ~dependence.along(leaf != 0, maker.axis)
    found: dict[tuple[str, int, str], tuple[list[int], dict[str, None]]] = {}
    for (path, axis), bits in dead.items():
        seen_by, left = whole[path], by_path[path][axis]
        if seen_by is None:  # one entry of it is left, for the structure's sake
            continue
        for index in np.flatnonzero(bits if left is None else bits & left):
            why, others = fixed.get((path, axis)), ()
            if why is None:
                why, others = _why(analysis, dead, path, axis, int(index), seen_by)
            indices, names = found.setdefault((path, axis, why), ([], {}))
            indices.append(int(index))
            names.update(dict.fromkeys(others))
    return tuple(
        Remainder(path, axis, tuple(indices), why, tuple(others))
        for (path, axis, why), (indices, others) in found.items()
    )


def _why(
    analysis: groups.Analysis,
    dead: dict[tuple[str, int], np.ndarray],
    path: str,
    axis: int,
    index: int,
    seen_by: tuple[str, ...],
) -> tuple[str, tuple[str, ...]]:
    """Say why a pruned filter cannot go, and in which leaves its channel lives, if in any."""
    if seen_by:
        return "; ".join(f"{name} is left as it is, with all channels" for name in seen_by), ()
    for group in analysis.groups:
        for member in group.members:
            rows = np.flatnonzero((member.indices == index).any(axis=1))
            if (member.path, member.axis) != (path, axis) or not len(rows):
                continue
            alive = tuple(
                other.path
                for other in group.members
                if other.role == "filter"
                and not dead[other.path, other.axis][other.indices[rows[0]]].all()
            )
            if alive:
                return "its channel lives in another layer, as in a residual sum", alive
            if group.mixes or group.leaks:
                notes = dict.fromkeys((*group.mixes, *group.leaks))
                return f"it counts where channels meet: {'; '.join(notes)}", ()
    return "what it sends on differs from example to example", ()
