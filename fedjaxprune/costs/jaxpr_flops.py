"""Walk a graph and list its products of arrays, with what their operands are made of.

Three things are followed along every edge: which parameters a value is made of and of nothing
that was fed in (then it is a weight), whether a gradient will flow back into it, and where it may
differ from zero.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fedjaxprune.costs import sparsity_flow
from fedjaxprune.costs.sparsity_flow import Support
from fedjaxprune.structure import jaxprs

_is_var = jaxprs.is_variable


class Value(NamedTuple):
    """What is known of a value."""

    params: tuple[str, ...]  # paths of those it is made of, if of nothing that is fed in
    is_fed: bool  # whether it depends on what is fed in (examples, activations)
    is_active: bool  # whether it depends on a trained parameter, so that a gradient flows into it
    support: Support  # where it may differ from zero; followed for weights only


CONSTANT = Value(params=(), is_fed=False, is_active=False, support=sparsity_flow.DENSE)
FED = CONSTANT._replace(is_fed=True)


class Product(NamedTuple):
    """One product of two arrays, or one convolution."""

    operands: tuple[Value, Value]
    multiply_adds: int  # of one execution, every output with every tap (those on padding too)
    inside: int  # of these, how many meet an entry of the image and no padding
    times: int  # how often loops execute it


_OPAQUE = frozenset(("pallas_call", "ffi_call", "ragged_dot_general", "shard_map", "xla_pmap"))


class Rules(NamedTuple):
    """How to walk."""

    # How often the body of a loop runs whose number of steps the graph does not tell; None refuses
    # products in such loops.
    while_trips: int | None
    plain: bool  # whether to look at plain forms in the place of fast ones


def products(graph: Any, inputs: Sequence[Value], rules: Rules) -> list[Product]:
    """List the products that a closed jaxpr executes, in order; what no output needs is left out.

    Raises:
      ValueError: if the number of products is unknown.
    """
    found: list[Product] = []
    _walk(graph, inputs, rules, 1, found, None)
    return found


def outputs(graph: Any, inputs: Sequence[Value], rules: Rules) -> list[Value]:
    """Say what the outputs of a closed jaxpr are; arguments as in `products`."""
    return _walk(graph, inputs, rules, 1, [], None)


def _walk(graph: Any, inputs: Any, rules: Rules, times: int, found: list, live: Any) -> list[Value]:
    """Walk a jaxpr, closed or not; what it finds goes into `found`, the outputs are returned."""
    inner = getattr(graph, "jaxpr", graph)
    consts = [
        CONSTANT._replace(support=sparsity_flow.of_value(const))
        for const in getattr(graph, "consts", ())
    ]
    # An open jaxpr may have constants whose values are elsewhere.
    consts += [CONSTANT] * (len(inner.constvars) - len(consts))
    known = dict(zip([*inner.constvars, *inner.invars], [*consts, *inputs], strict=True))

    def read(atom: Any) -> Value:
        if _is_var(atom):  # what is not needed is not walked, though it may still be an operand
            return known.get(atom, FED)
        return CONSTANT._replace(support=sparsity_flow.of_value(atom.val))

    for equation, wanted in jaxprs.live_equations(inner, live, as_plain=rules.plain):
        operands = [read(v) for v in equation.invars]
        outputs = _step(equation, operands, rules, times, found, wanted)
        known.update(zip(equation.outvars, outputs, strict=True))
    return [read(v) for v in inner.outvars]


def _step(equation: Any, operands: list, rules: Rules, times: int, found: list, live: Any) -> Any:
    """Look at one equation; return what its outputs are."""
    name = equation.primitive.name
    if name == jaxprs.NAME:
        if not rules.plain:
            return [operands[0]]
        return _walk(jaxprs.jaxpr_of_plain(equation), operands[1:], rules, times, found, None)
    if name in jaxprs.CALLS:
        (body,) = jaxprs.graphs_of(equation)
        return _walk(body, operands, rules, times, found, live)
    if name in _LOOPS:
        return _LOOPS[name](equation, operands, rules, times, found)
    if name in _OPAQUE:
        raise ValueError(
            f"cannot count the multiply-adds of {name!r}: it cannot be looked into; "
            "say what it computes by jaxprs.equivalent_to, or count the function without it."
        )
    if any(_has_products(graph) for graph in jaxprs.graphs_of(equation)):
        raise ValueError(f"cannot tell how often {name!r} executes the products inside it.")
    if name in ("dot_general", "conv_general_dilated"):
        counts = _dot(equation) if name == "dot_general" else _convolution(equation)
        found.append(Product((operands[0], operands[1]), *counts, times=times))
    return _outputs(equation, operands)


def _outputs(equation: Any, operands: list) -> list[Value]:
    """Say what the outputs of an operation without a graph of its own are."""
    name, params = equation.primitive.name, equation.params
    is_fed = any(value.is_fed for value in operands)
    is_active = any(value.is_active for value in operands) and name != "stop_gradient"
    made_of = () if is_fed else _union(operands)
    supports = [sparsity_flow.DENSE] * len(equation.outvars)
    if not is_fed:
        shapes, out_shapes = (
            [tuple(v.aval.shape) for v in each] for each in (equation.invars, equation.outvars)
        )
        known = [v.support for v in operands]
        supports = sparsity_flow.through(name, params, known, shapes, out_shapes)
    return [
        Value(made_of, is_fed, is_active and jnp.issubdtype(v.aval.dtype, jnp.inexact), entry)
        for v, entry in zip(equation.outvars, supports, strict=True)
    ]


def _union(values: Sequence[Value]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(itertools.chain.from_iterable(value.params for value in values)))


def _join(first: Value, second: Value) -> Value:
    """Know what is true of a value that may be either."""
    is_fed = first.is_fed or second.is_fed
    return Value(
        params=() if is_fed else _union((first, second)),
        is_fed=is_fed,
        is_active=first.is_active or second.is_active,
        support=sparsity_flow.join(first.support, second.support),
    )


def _same(first: Value, second: Value) -> bool:
    here, there = first.support, second.support
    if isinstance(here, np.ndarray) and isinstance(there, np.ndarray):
        return first[:3] == second[:3] and np.array_equal(here, there)
    return first[:3] == second[:3] and type(here) is type(there) and here == there


def _stable(walk: Any, carried: list[Value]) -> list[Value]:
    """Find what stays true of the values that a loop carries round."""
    for attempt in range(8):
        after = [_join(a, b) for a, b in zip(carried, walk(carried), strict=True)]
        if all(_same(a, b) for a, b in zip(carried, after, strict=True)):
            return carried
        if attempt > 4:  # places that keep moving
            after = [value._replace(support=sparsity_flow.DENSE) for value in after]
        carried = after
    return [FED._replace(is_active=value.is_active) for value in carried]


def _somewhere(value: Value) -> Value:
    """Forget the places of a support, for one slice of an array or all slices stacked."""
    return value._replace(support=sparsity_flow.density(value.support))


def _scan(equation: Any, operands: list, rules: Rules, times: int, found: list) -> list[Value]:
    (body,) = jaxprs.graphs_of(equation)
    num_consts, num_carried = jaxprs.parts_of_scan(equation)
    consts, rest = operands[:num_consts], operands[num_consts:]
    slices = list(map(_somewhere, rest[num_carried:]))

    def walk(carried: list[Value]) -> list[Value]:
        return _walk(body, [*consts, *carried, *slices], rules, 1, [], None)[:num_carried]

    carried = _stable(walk, rest[:num_carried])
    times = times * equation.params["length"]
    outputs = _walk(body, [*consts, *carried, *slices], rules, times, found, None)
    return [*outputs[:num_carried], *map(_somewhere, outputs[num_carried:])]


def _while(equation: Any, operands: list, rules: Rules, times: int, found: list) -> list[Value]:
    params = equation.params
    condition, body = params["cond_jaxpr"], params["body_jaxpr"]
    first, second = params["cond_nconsts"], params["body_nconsts"]
    consts, carried = operands[first : first + second], operands[first + second :]

    def walk(carried: list[Value]) -> list[Value]:
        return _walk(body, [*consts, *carried], rules, 1, [], None)

    if rules.while_trips is None and (_has_products(body) or _has_products(condition)):
        raise ValueError(
            "the graph has a loop whose number of steps it does not tell, with products in it; say "
            "how often it runs by while_trips=."
        )
    trips = rules.while_trips or 0
    carried = _stable(walk, carried)
    _walk(condition, [*operands[:first], *carried], rules, times * (trips + 1), found, None)
    return _walk(body, [*consts, *carried], rules, times * trips, found, None)


def _cond(equation: Any, operands: list, rules: Rules, times: int, found: list) -> list[Value]:
    """Walk all branches and count the one with the most multiply-adds."""
    listed: list[list[Product]] = [[] for _ in equation.params["branches"]]
    ends = [
        _walk(branch, operands[1:], rules, times, products, None)
        for branch, products in zip(equation.params["branches"], listed, strict=True)
    ]
    found += max(listed, key=total)
    outputs = [functools.reduce(_join, cases) for cases in zip(*ends, strict=True)]
    return [_join(value, operands[0]._replace(support=sparsity_flow.EMPTY)) for value in outputs]


_LOOPS = {"scan": _scan, "while": _while, "cond": _cond}


def total(found: Sequence[Product]) -> int:
    """Add up the multiply-adds of all executions."""
    return sum(product.multiply_adds * product.times for product in found)


def _has_products(graph: Any) -> bool:
    return any(
        equation.primitive.name in ("dot_general", "conv_general_dilated", *_OPAQUE)
        or any(map(_has_products, jaxprs.graphs_of(equation)))
        for equation in getattr(graph, "jaxpr", graph).eqns
    )


def _dot(equation: Any) -> tuple[int, int]:
    (contracted, _), _ = equation.params["dimension_numbers"]
    depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
    count = math.prod(equation.outvars[0].aval.shape) * depth
    return count, count


def _convolution(equation: Any) -> tuple[int, int]:
    """Count every output with every tap; taps on the holes of a dilated image never count."""
    params = equation.params
    numbers = params["dimension_numbers"]
    image, kernel = (v.aval.shape for v in equation.invars)
    output = equation.outvars[0].aval.shape
    channels = math.prod(output[axis] for axis in numbers.out_spec[:2])
    counts = [channels * kernel[numbers.rhs_spec[1]]] * 2
    for i, (before, _) in enumerate(params["padding"]):
        side, taps = image[numbers.lhs_spec[i + 2]], kernel[numbers.rhs_spec[i + 2]]
        holes = params["lhs_dilation"][i]
        places = np.arange(output[numbers.out_spec[i + 2]])[:, None] * params["window_strides"][i]
        places = places + np.arange(taps)[None] * params["rhs_dilation"][i] - before
        met = places % holes == 0
        inside = met & (places >= 0) & (places <= (side - 1) * holes)
        counts[0] *= int(np.count_nonzero(met))
        counts[1] *= int(np.count_nonzero(inside))
    return counts[0], counts[1]


def share(product: Product) -> Fraction:
    """Measure the share of a product's multiply-adds that masks leave over.

    Every entry of a weight is used equally often, so for one masked operand this is its density,
    exactly; for two it is the product of both, which holds if their zeros do not line up.
    """
    return math.prod(
        (sparsity_flow.density(value.support) for value in product.operands if value.params),
        start=sparsity_flow.DENSE,
    )
