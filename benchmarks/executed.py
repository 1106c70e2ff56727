"""What a graph really executes, and what XLA says of it: checks of `fedjaxprune.costs.flops`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedjaxprune.costs import jaxpr_flops
from fedjaxprune.kernels import chosen


def executed(function: Callable[..., Any], *args: Any) -> tuple[int, int]:
    """Count the multiply-adds that the graph of ``function(*args)`` really executes.

    Forms that are fast on CPU count with all the arithmetic that they do, and whatever the graph
    computes twice counts twice. Hand over the gradient to see a training step.

    Returns:
      ``(multiply_adds, inside)``: with taps on padding, and without.
    """
    graph = jax.make_jaxpr(lambda *args: jax.tree.leaves(function(*args)))(*args)
    inputs = [
        jaxpr_flops.CONSTANT if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else jaxpr_flops.FED
        for leaf in jax.tree.leaves(args)
    ]
    graph = chosen.opened(graph, on_cpu=True)
    rules = jaxpr_flops.Rules(while_trips=None, plain=False)
    found = jaxpr_flops.products(graph, inputs, rules)
    return jaxpr_flops.total(found), sum(product.inside * product.times for product in found)


def by_xla(function: Callable[..., Any], *args: Any) -> float:
    """Compile ``function(*args)`` and ask XLA for its FLOPs, everything included.

    XLA counts taps on padding out, elementwise operations in, and the body of a loop once.
    """
    analysis = jax.jit(function).lower(*args).compile().cost_analysis()
    return float((analysis or {}).get("flops", float("nan")))
