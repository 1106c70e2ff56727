"""Store less for the backward pass: the largest entries of what each layer multiplies its weights.

The products of a traced function are swapped for products with a derivative of their own, so any
network will do: its layers are convolutions and matrix products of the examples with parameters.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from fedjaxprune import topk
from fedjaxprune.structure import jaxprs
from fedjaxprune.structure.moments import products

# What a value of the program depends on.
WEIGHT, EXAMPLE = "weight", "example"
Roles = frozenset[str]

_OPENED = frozenset(
    ("jit", "pjit", "closed_call", "core_call", "call", "remat", "remat2", "checkpoint")
)


def sparse_residuals(
    function: Callable[..., Any], *, share: float, roles: Sequence[Roles]
) -> Callable[..., Any]:
    """Make a function that stores a part of what its layers multiply with weights.

    A layer is a product of a value that depends on examples with one that depends on weights and on
    no example. It keeps the ``floor((1 - share) * size)`` entries of largest magnitude of the whole
    value, with a bit for each entry that says which they are. So the gradient of the value is
    exact, and that of the weight is as if all other entries were zero. Products inside of functions
    with derivatives of their own and inside of ``while`` are left alone. There is no derivative by
    forward mode.

    Args:
      function: of trees of arrays.
      share: of the entries that is not stored, in [0, 1).
      roles: of each argument, what its arrays count for.

    References:
      Huang et al., `FedMef <https://arxiv.org/abs/2403.14737>`_, 2024.
    """
    if not 0.0 <= share < 1.0:
        raise ValueError(f"share must lie in [0, 1), got {share}.")

    def run(*args: Any) -> Any:
        graph, shapes = jax.make_jaxpr(jaxprs.plain(function), return_shape=True)(*args)
        pairs = zip(args, roles, strict=True)
        given = [role for arg, role in pairs for _ in jax.tree.leaves(arg)]
        rewritten, _ = _rewrite(graph, given, share)
        outputs = core.jaxpr_as_fun(rewritten)(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    return run


def largest_entries(value: jax.Array, num_kept: int) -> tuple[jax.Array, jax.Array]:
    """Pack the entries of largest magnitude of an array.

    Returns:
      ``[num_kept]``, in the order of their places, and a bit for each entry of the array,
      ``[ceil(size / 8)]`` uint8.
    """
    flat = value.ravel()
    kept = topk.top_k(jnp.abs(flat), jnp.int32(num_kept))
    places = jnp.flatnonzero(kept, size=num_kept)
    return flat[places], jnp.packbits(kept)


def unpack_entries(entries: jax.Array, bits: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Put packed entries in their places of an array, zero elsewhere."""
    size = 1
    for length in shape:
        size *= length
    if not entries.shape[0]:
        return jnp.zeros(shape, entries.dtype)
    kept = jnp.unpackbits(bits, count=size).astype(jnp.bool_)
    order = jnp.cumsum(kept.astype(jnp.int32)) - 1
    return jnp.where(kept, entries[jnp.maximum(order, 0)], 0).reshape(shape).astype(entries.dtype)


def _product(name: str, params: Mapping[str, Any], side: int, share: float) -> Callable[..., Any]:
    """Make a product of two operands, of which the one beside the weight is stored in part."""

    def multiply(*operands: jax.Array) -> jax.Array:
        return products.multiply(name, operands, params)

    plain = jax.lax.dot_general if name == "dot_general" else jax.lax.conv_general_dilated

    @jax.custom_vjp
    def run(one: jax.Array, two: jax.Array) -> jax.Array:
        return plain(one, two, **params)

    def forward(*operands: jax.Array) -> Any:
        value, weight = operands[1 - side], operands[side]
        num_kept = int((1.0 - share) * value.size * (1.0 + 1e-12))
        stored = largest_entries(value, num_kept)
        return multiply(*operands), (stored, weight, jnp.zeros((0, *value.shape)))

    def backward(residuals: Any, cotangent: jax.Array) -> Any:
        (entries, bits), weight, like = residuals
        operands = [unpack_entries(entries, bits, like.shape[1:])] * 2
        operands[side] = weight
        _, pull_back = jax.vjp(multiply, *operands)  # linear in each, so the value's is exact
        return pull_back(cotangent)

    run.defvjp(forward, backward)
    return run


def _rewrite(graph: Any, roles: Sequence[Roles], share: float) -> tuple[Any, list[Roles]]:
    """Swap the products of a graph, closed or not, and tell what its outputs depend on."""
    inner = getattr(graph, "jaxpr", graph)
    known = dict(zip(inner.invars, roles, strict=True))

    def read(atom: Any) -> Roles:
        return known.get(atom, frozenset()) if jaxprs.is_variable(atom) else frozenset()

    equations = []
    for equation in inner.eqns:
        made, outputs = _step(equation, [read(v) for v in equation.invars], share)
        equations.append(made)
        known.update(zip(equation.outvars, outputs, strict=True))
    new = inner.replace(eqns=equations)
    new = new if inner is graph else graph.replace(jaxpr=new)
    return new, [read(v) for v in inner.outvars]


def _step(equation: Any, roles: list[Roles], share: float) -> tuple[Any, list[Roles]]:
    """Rewrite one equation, and tell what its outputs depend on."""
    name = equation.primitive.name
    all_roles = frozenset[str]().union(*roles)
    whole = [all_roles] * len(equation.outvars)
    if name in products.PRODUCTS:
        side = _side_of_weight(roles)
        if side is None:
            return equation, whole
        function = _product(name, equation.params, side, share)
        return jaxprs.call(function, equation.invars, equation.outvars), whole
    given = roles
    if name == "cond":
        given = roles[1:]
    elif name == "scan":
        given = _carried(equation, roles, share)
    elif name not in _OPENED:
        return equation, whole
    found: list[list[Roles]] = []

    def one(body: Any) -> Any:
        new, outputs = _rewrite(body, given, share)
        found.append(outputs)
        return new

    made = equation.replace(params=jaxprs.map_graphs(one, equation.params))
    index = roles[0] if name == "cond" else frozenset()
    return made, [frozenset(index).union(*each) for each in zip(*found, strict=True)]


def _carried(equation: Any, roles: list[Roles], share: float) -> list[Roles]:
    """Find what a loop's operands depend on in any of its steps."""
    num_consts, num_carried = jaxprs.parts_of_scan(equation)
    (body,) = jaxprs.graphs_of(equation)
    while True:
        _, outputs = _rewrite(body, roles, share)
        after = list(roles)
        for i in range(num_carried):
            after[num_consts + i] = roles[num_consts + i] | outputs[i]
        if after == roles:
            return roles
        roles = after


def _side_of_weight(roles: Sequence[Roles]) -> int | None:
    """Tell which operand of a product is a weight that meets examples; None if none is."""
    for side in (0, 1):
        if roles[side] == {WEIGHT} and EXAMPLE in roles[1 - side]:
            return side
    return None
