"""Channels that are pruned as one: a filter, its bias and normalization, and what reads them.

`analyze` walks the jaxpr of a network's `predict` and finds which indices of which leaves are the
same channel: through residual additions, concatenation, normalization, pooling, flattening before
a dense layer, and recurrence. It knows arrays and no layers, so a user's own network serves as
well as a built-in one. What it cannot follow it says, channel by channel.

There are two readings of "a channel". A *group* is a channel of the network: all that makes it,
in every layer that adds to it, so that it can be removed for good. A *filter* is one layer's
contribution, with the bias and normalization that act on it before it meets another's, as methods
take it that prune each layer by itself; where nothing is added up, the two are the same.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjaxprune import trees
from fedjaxprune.structure import jaxprs
from fedjaxprune.structure.channels import rules
from fedjaxprune.structure.channels.propagation import labels
from fedjaxprune.types import Masks, Params, State

Role = Literal["filter", "channel", "input"]


class Member(NamedTuple):
    """What a group is in one leaf.

    Attributes:
      path: of the leaf in the parameters.
      axis: of the leaf.
      indices: ``[G, n]`` ints, the places of each channel along the axis (several after flattening,
        or in the gates of a recurrence).
      role: ``"filter"`` makes the channel, ``"channel"`` acts on it (bias, normalization), and
        ``"input"`` reads it.
    """

    path: str
    axis: int
    indices: np.ndarray
    role: Role


class Group(NamedTuple):
    """``G`` channels that stand in the same leaves.

    Attributes:
      size: ``G``.
      members: the leaves, in the tree's order.
      leaks: why a channel whose filter, bias and normalization are zero may still be read as
        something else than zero (a sigmoid); empty if it is exactly zero wherever it is read.
      mixes: where the channel enters what others are made of (statistics over channels, a
        competition between them); empty if a channel that no operation reads may be anything, or be
        removed. A sum to which a pruned channel adds zero stands here too: removing the channel is
        exact if a mean over the sum keeps its divisor.
    """

    size: int
    members: tuple[Member, ...]
    leaks: tuple[str, ...]
    mixes: tuple[str, ...]


class Analysis(NamedTuple):
    """The channels of a network.

    Attributes:
      groups: channels that the network is free to lose, one group for each set of leaves.
      filters: the same by layer: one for every leaf that makes channels, outputs included, with
        what acts on them alone and without what reads them.
      fixed: ``(path, axis, why)`` of filters that belong to no group, such as the network's output.
    """

    groups: tuple[Group, ...]
    filters: tuple[Group, ...]
    fixed: tuple[tuple[str, int, str], ...]


def analyze(
    predict: Callable[[Params, State, Any], jax.Array], params: Params, state: State, inputs: Any
) -> Analysis:
    """Find the channels of a network; nothing is computed, shapes are enough.

    Args:
      predict: ``(params, state, inputs [B, ...]) -> outputs``.
      params: arrays or shapes (`jax.ShapeDtypeStruct`).
      state: the same, of what is not trained.
      inputs: the same, of a batch; a batch of two or more keeps its axis apart from channels.

    Returns:
      An `Analysis`. A primitive that it does not know is no error: it stands in `leaks` and `mixes`
      of the channels that pass through it.
    """
    closed = jax.make_jaxpr(jaxprs.plain(predict))(params, state, inputs)
    book = labels.new_book()
    param_leaves, state_leaves = jax.tree.leaves(params), jax.tree.leaves(state)
    values = [
        labels.new_value(book, i, tuple(leaf.shape), is_param=i < len(param_leaves))
        for i, leaf in enumerate([*param_leaves, *state_leaves])
    ]
    values += [labels.Value(tuple(leaf.shape), varies=True) for leaf in jax.tree.leaves(inputs)]
    for value in rules.walk(book, closed, values):
        for label in value.labels:
            labels.note(book.fixed, label.ids, "is the network's output")
    return _collect(book, trees.paths(params))


def to_masks(
    groups: Sequence[Group], keep: Sequence[jax.Array], params: Params, *, drop_inputs: bool
) -> Masks:
    """Expand a bit a channel to masks of the parameters.

    Args:
      groups: of `Analysis.groups` or `Analysis.filters`.
      keep: one ``[G]`` bool a group, False for a channel that is pruned; may be traced.
      params: the parameters, or their shapes.
      drop_inputs: whether what reads a pruned channel is pruned too, which changes no output where
        the group has no `leaks`.

    Returns:
      Masks: the filters, biases and normalization of pruned channels are False.

    Raises:
      ValueError: if `keep` does not fit the groups.
    """
    if len(keep) != len(groups):
        raise ValueError(f"there are {len(groups)} groups, got {len(keep)} vectors.")
    for group, bits in zip(groups, keep, strict=True):
        if bits.shape != (group.size,):
            raise ValueError(f"a group of {group.size} channels got bits of shape {bits.shape}.")
    by_path: dict[str, list[tuple[Member, jax.Array]]] = defaultdict(list)
    for group, bits in zip(groups, keep, strict=True):
        for member in group.members:
            if drop_inputs or member.role != "input":
                by_path[member.path].append((member, bits))

    def leaf_mask(path: str, leaf: Any) -> jax.Array:
        mask = jnp.ones(leaf.shape, jnp.bool_)
        for member, bits in by_path[path]:
            flat = member.indices.ravel()
            line = jnp.ones(leaf.shape[member.axis], jnp.bool_)
            line = line.at[flat].set(jnp.repeat(bits, member.indices.shape[1]))
            shape = [1] * len(leaf.shape)
            shape[member.axis] = -1
            mask = mask & line.reshape(shape)
        return mask

    return trees.map_with_path(leaf_mask, params)


def norms(params: Params, group: Group, *, order: int) -> jax.Array:
    """Measure each channel of a group by the norm of its filters: ``[G]`` float32.

    Args:
      params: the parameters.
      group: of an `Analysis`.
      order: 1 for the sum of magnitudes, 2 for the Euclidean norm, over all filters of the channel.

    Raises:
      ValueError: if the order is neither.
    """
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order}.")
    leaves = dict(zip(trees.paths(params), jax.tree.leaves(params), strict=True))
    total = jnp.zeros(group.size, jnp.float32)
    for member in group.members:
        if member.role == "filter":
            leaf = jnp.moveaxis(leaves[member.path].astype(jnp.float32), member.axis, 0)
            leaf = leaf.reshape(leaf.shape[0], -1)
            lines = jnp.sum(jnp.abs(leaf) if order == 1 else jnp.square(leaf), axis=1)
            total = total + jnp.sum(lines[member.indices], axis=1)
    return total if order == 1 else jnp.sqrt(total)


def _collect(book: labels.Book, paths: list[str]) -> Analysis:
    """Sort classes of atoms into groups."""
    classes: dict[int, dict[tuple[int, int], list[int]]] = defaultdict(lambda: defaultdict(list))
    for atom, (leaf, axis, index) in enumerate(book.owners):
        if leaf < len(paths):
            classes[labels.find(book, atom)][leaf, axis].append(index)
    leaks, mixes, fixed = (_by_class(book, x) for x in (book.leaks, book.mixes, book.fixed))
    # What a kernel meets in the network's state, such as its masks, makes no channels.
    makers = {place for place, role in book.roles.items() if role == "filter"}
    makers = {place for place in makers if place[0] < len(paths)}

    alike: dict[Any, list[int]] = defaultdict(list)
    bound: dict[tuple[int, int], set[str]] = defaultdict(set)
    for root, places in classes.items():
        own = [place for place in places if place in makers]
        if root in fixed:
            for place in own:
                bound[place] |= fixed[root]
        elif own:
            alike[tuple(sorted((place, len(i)) for place, i in places.items()))].append(root)
    groups = []
    for signature, roots in alike.items():
        first = min((place for place, _ in signature if place in makers))
        roots.sort(key=lambda root: classes[root][first][0])
        members = tuple(
            Member(
                paths[leaf],
                axis,
                np.array([classes[root][leaf, axis] for root in roots]),
                book.roles.get((leaf, axis), "channel"),  # pyright: ignore[reportArgumentType]
            )
            for (leaf, axis), _ in signature
        )
        groups.append(_group(members, roots, leaks, mixes))

    filters = []
    for maker in sorted(makers):
        roots = [labels.find(book, i) for i, owner in enumerate(book.owners) if owner[:2] == maker]
        indices = {maker: np.arange(len(roots))[:, None]}
        for place in sorted(book.attached.get(maker, ())):
            counts = {len(classes[root].get(place, ())) for root in roots}
            if place != maker and counts == {1} and place[0] < len(paths):
                indices[place] = np.array([classes[root][place] for root in roots])
        members = tuple(
            Member(paths[place[0]], place[1], each, "filter" if place == maker else "channel")
            for place, each in indices.items()
        )
        filters.append(_group(members, roots, leaks, mixes))
    said = ((paths[leaf], axis, sorted(why)) for (leaf, axis), why in sorted(bound.items()))
    fixed = tuple((path, axis, "; ".join(why)) for path, axis, why in said)
    return Analysis(tuple(groups), tuple(filters), fixed)


def _group(members: tuple[Member, ...], roots: list[int], leaks: Any, mixes: Any) -> Group:
    def united(notes: dict[int, set[str]]) -> tuple[str, ...]:
        return tuple(sorted(set().union(*(notes.get(root, ()) for root in roots))))

    return Group(size=len(roots), members=members, leaks=united(leaks), mixes=united(mixes))


def _by_class(book: labels.Book, notes: set[tuple[int, str]]) -> dict[int, set[str]]:
    by_class: dict[int, set[str]] = defaultdict(set)
    for atom, why in notes:
        by_class[labels.find(book, atom)].add(why)
    return by_class
