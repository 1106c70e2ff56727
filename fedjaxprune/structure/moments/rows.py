"""Which rows of a value belong to which example, read off the shapes for two numbers of examples.

Sizes that differ between the two traces grow with the batch. An axis as long as the batch holds one
row an example. A longer one, ``[outer * B * inner]``, was made by merging axes; `inner` is followed
from where they were merged.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjaxprune.structure import jaxprs, moves

# Of an axis that grows with the batch, in the place of `inner`:
ANY = 0  # the same for any examples (zeros, random numbers), so any order of them would do
UNCLEAR = -1  # rows of several examples, or in an order that is not known


class Sizes(NamedTuple):
    """The numbers of examples of the two traces."""

    batch: int
    other: int


class Rows(NamedTuple):
    """What is known of a value's rows.

    Attributes:
      is_fed: whether it depends on the examples.
      inners: for each axis None, if its size does not grow with the batch; else how many rows of
        one example lie side by side, or `ANY`, or `UNCLEAR`.
    """

    is_fed: bool
    inners: tuple[int | None, ...]


def of_constant(value: Any) -> Rows:
    """Describe a value that is the same for any batch."""
    return Rows(is_fed=False, inners=(None,) * len(value.shape))


def of_batch(leaf: Any) -> Rows:
    """Describe a leaf ``[B, ...]`` of a batch."""
    return Rows(is_fed=True, inners=(1, *(None,) * (leaf.ndim - 1)))


def spread(counted: jax.Array, size: int, inner: int) -> jax.Array:
    """Give each row of an axis of `size` what its example has: ``[B] -> [size]``."""
    shape = (size // (counted.shape[0] * inner), counted.shape[0], inner)
    return jnp.broadcast_to(counted[None, :, None], shape).reshape(size)


def pairs(graph: Any, twin: Any, live: Any) -> Iterator[tuple[Any, Any, Any]]:
    """List the equations of both traces that the plain form needs, and their needed outputs."""
    first = jaxprs.live_equations(graph, live, as_plain=True)
    second = jaxprs.live_equations(twin, live, as_plain=True)
    for (equation, wanted), (other, _) in zip(first, second, strict=True):
        yield equation, other, wanted


def are_alike(graph: Any, twin: Any, live: Any = None) -> bool:
    """Tell whether two traces list the same operations in the same order."""
    first = jaxprs.live_equations(graph, live, as_plain=True)
    second = jaxprs.live_equations(twin, live, as_plain=True)
    return len(first) == len(second) and all(
        _is_alike(a, b, wanted) for (a, wanted), (b, _) in zip(first, second, strict=True)
    )


def _is_alike(equation: Any, twin: Any, wanted: Any) -> bool:
    if equation.primitive is not twin.primitive:
        return False
    ours, theirs = bodies(equation), bodies(twin)
    live = wanted if equation.primitive.name in jaxprs.CALLS else None
    return len(ours) == len(theirs) and all(
        are_alike(a, b, live) for a, b in zip(ours, theirs, strict=True)
    )


def bodies(equation: Any) -> list[Any]:
    """List the graphs that an equation holds; of a fast form its plain one."""
    if equation.primitive.name == jaxprs.NAME:
        return [jaxprs.jaxpr_of_plain(equation)]
    return jaxprs.graphs_of(equation)


def walk(
    graph: Any, twin: Any, operands: Sequence[Rows], sizes: Sizes, live: Any = None
) -> list[Rows]:
    """Say what the outputs of a graph are, closed or not."""
    one = getattr(graph, "jaxpr", graph)
    known = dict(zip(one.invars, operands, strict=True))
    known.update((v, of_constant(v.aval)) for v in one.constvars)

    def read(atom: Any) -> Rows:
        if jaxprs.is_variable(atom) and atom in known:
            return known[atom]
        return of_constant(atom.aval)

    for equation, other, wanted in pairs(graph, twin, live):
        outputs = step(equation, other, [read(v) for v in equation.invars], sizes, wanted)
        known.update(zip(equation.outvars, outputs, strict=True))
    return [read(v) for v in one.outvars]


def step(
    equation: Any, twin: Any, operands: Sequence[Rows], sizes: Sizes, wanted: Any
) -> list[Rows]:
    """Say what the outputs of one equation are."""
    name = equation.primitive.name
    if name == jaxprs.NAME or name in jaxprs.CALLS:
        (ours,), (theirs,) = bodies(equation), bodies(twin)
        marked = name == jaxprs.NAME
        given, live = (operands[1:], None) if marked else (operands, wanted)
        return walk(ours, theirs, given, sizes, live)
    if name in _CONTROL:
        return _CONTROL[name](equation, twin, operands, sizes)
    is_fed = any(rows.is_fed for rows in operands)
    return [
        Rows(is_fed, _inners(equation, twin, operands, sizes, i))
        for i in range(len(equation.outvars))
    ]


def inside_scan(equation: Any, twin: Any, operands: Sequence[Rows], sizes: Sizes) -> list[Rows]:
    """Say what the operands of a loop's body are, in every step."""
    (ours,), (theirs,) = bodies(equation), bodies(twin)
    num_consts, num_carried = jaxprs.parts_of_scan(equation)
    consts, rest = operands[:num_consts], operands[num_consts:]
    slices = [Rows(rows.is_fed, rows.inners[1:]) for rows in rest[num_carried:]]

    def again(carried: Sequence[Rows]) -> list[Rows]:
        given = [*consts, *carried, *slices]
        return walk(ours, theirs, given, sizes)[:num_carried]

    return [*consts, *_stable(again, rest[:num_carried]), *slices]


def _scan(equation: Any, twin: Any, operands: Sequence[Rows], sizes: Sizes) -> list[Rows]:
    (ours,), (theirs,) = bodies(equation), bodies(twin)
    num_consts, num_carried = jaxprs.parts_of_scan(equation)
    inside = inside_scan(equation, twin, operands, sizes)
    outputs = walk(ours, theirs, inside, sizes)
    along = None
    if equation.params["length"] != twin.params["length"]:
        along = ANY
        for rows in operands[num_consts + num_carried :]:
            along = _join(along, rows.inners[0])
    stacked = [Rows(rows.is_fed, (along, *rows.inners)) for rows in outputs[num_carried:]]
    return [*inside[num_consts : num_consts + num_carried], *stacked]


def _while(equation: Any, twin: Any, operands: Sequence[Rows], sizes: Sizes) -> list[Rows]:
    first, second = equation.params["cond_nconsts"], equation.params["body_nconsts"]
    consts, carried = operands[first : first + second], operands[first + second :]
    ours, theirs = equation.params["body_jaxpr"], twin.params["body_jaxpr"]
    carried = _stable(lambda now: walk(ours, theirs, [*consts, *now], sizes), carried)
    until = equation.params["cond_jaxpr"], twin.params["cond_jaxpr"]
    (condition,) = walk(*until, [*operands[:first], *carried], sizes)
    return [rows._replace(is_fed=rows.is_fed or condition.is_fed) for rows in carried]


def _cond(equation: Any, twin: Any, operands: Sequence[Rows], sizes: Sizes) -> list[Rows]:
    branches = zip(equation.params["branches"], twin.params["branches"], strict=True)
    ends = [walk(*branch, operands[1:], sizes) for branch in branches]
    joined = ends[0]
    for end in ends[1:]:
        joined = [_join_rows(a, b) for a, b in zip(joined, end, strict=True)]
    return [rows._replace(is_fed=rows.is_fed or operands[0].is_fed) for rows in joined]


_CONTROL = {"scan": _scan, "while": _while, "cond": _cond}


def _stable(
    again: Callable[[Sequence[Rows]], list[Rows]], carried: Sequence[Rows]
) -> Sequence[Rows]:
    """Find what stays true of the values that a loop carries."""
    while True:
        after = [_join_rows(a, b) for a, b in zip(carried, again(carried), strict=True)]
        if after == list(carried):
            return carried
        carried = after


def _join_rows(first: Rows, second: Rows) -> Rows:
    inners = map(_join, first.inners, second.inners)
    return Rows(first.is_fed or second.is_fed, tuple(inners))


def _join(first: int | None, second: int | None) -> int | None:
    if first in (None, ANY) or first == second:
        return second
    return first if second in (None, ANY) else UNCLEAR


# ---- operations without a graph of their own


def _inners(
    equation: Any, twin: Any, operands: Sequence[Rows], sizes: Sizes, number: int
) -> tuple[int | None, ...]:
    """Follow the axes of one output."""
    shape = equation.outvars[number].aval.shape
    other = twin.outvars[number].aval.shape
    return tuple(
        None
        if size == grown
        else UNCLEAR
        if size % sizes.batch or size * sizes.other != grown * sizes.batch
        else _RULES.get(equation.primitive.name, _by_size)(equation, twin, operands, sizes, axis)
        for axis, (size, grown) in enumerate(zip(shape, other, strict=True))
    )


def _by_size(
    equation: Any, twin: Any, operands: Sequence[Rows], sizes: Sizes, axis: int
) -> int | None:
    """Look for the operands' axes that are as long and grow alike."""
    size, grown = (each.outvars[0].aval.shape[axis] for each in (equation, twin))
    found, is_growing = None, False
    for ours, theirs, rows in zip(equation.invars, twin.invars, operands, strict=True):
        lengths = zip(ours.aval.shape, theirs.aval.shape, rows.inners, strict=True)
        for length, longer, inner in lengths:
            is_growing = is_growing or inner is not None
            if inner is not None and (length, longer) == (size, grown):
                found = _join(found, inner)
    if found is not None:
        return found
    return UNCLEAR if is_growing else ANY


def _reshape(
    equation: Any, twin: Any, operands: Sequence[Rows], sizes: Sizes, axis: int
) -> int | None:
    """Follow the batch through a reshape, by how far apart neighbouring examples lie in memory."""
    del twin
    shape, made = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    growing = [i for i, inner in enumerate(operands[0].inners) if inner is not None]
    if len(growing) != 1 or equation.params.get("dimensions") is not None:
        return UNCLEAR
    inner = operands[0].inners[growing[0]]
    if inner is None or inner in (ANY, UNCLEAR):
        return inner
    stride = inner * math.prod(shape[growing[0] + 1 :])
    step = math.prod(made[axis + 1 :])
    lies_inside = stride % step == 0 and step * made[axis] % (stride * sizes.batch) == 0
    return stride // step if lies_inside else UNCLEAR


def _gather(
    equation: Any, twin: Any, operands: Sequence[Rows], sizes: Sizes, axis: int
) -> int | None:
    """Follow whole windows of what is looked up, and the axes of the indices."""
    del twin, sizes
    numbers, windows = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    table, indices = operands
    shape = equation.invars[0].aval.shape
    batching = getattr(numbers, "operand_batching_dims", ())
    sources = {place: source for source, place in moves.places_of_gather(equation).items()}
    if axis in sources:
        source = sources[axis]
        return table.inners[source] if windows[source] == shape[source] else UNCLEAR
    is_mixed = any(
        inner is not None and i not in batching and windows[i] != shape[i]
        for i, inner in enumerate(table.inners)
    )
    if is_mixed:
        return UNCLEAR
    free = [i for i in range(equation.outvars[0].aval.ndim) if i not in numbers.offset_dims]
    return indices.inners[free.index(axis)]


def _concatenate(
    equation: Any, twin: Any, operands: Sequence[Rows], sizes: Sizes, axis: int
) -> int | None:
    """Put whole batches one after another, or examples side by side along another axis."""
    if axis != equation.params["dimension"]:
        return _by_size(equation, twin, operands, sizes, axis)
    return 1 if all(rows.inners[axis] == 1 for rows in operands) else UNCLEAR


def _unless_moved(parameter: str) -> Callable[..., int | None]:
    """Follow axes that keep their order."""

    def rule(
        equation: Any, twin: Any, operands: Sequence[Rows], sizes: Sizes, axis: int
    ) -> int | None:
        moved = equation.params[parameter]
        if axis in (moved if isinstance(moved, tuple) else (moved,)):
            return UNCLEAR
        return _by_size(equation, twin, operands, sizes, axis)

    return rule


_RULES: dict[str, Callable[..., int | None]] = {
    "reshape": _reshape,
    "gather": _gather,
    "concatenate": _concatenate,
    "rev": _unless_moved("dimensions"),
    "sort": _unless_moved("dimension"),
}
