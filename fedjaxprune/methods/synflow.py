"""SynFlow: masks at the start by the flow through every weight, without any data.

1. ``prepare``: in each of `num_prune_steps` steps all weights that are left are replaced by their
   absolute values, biases by 0, and an input of ones is passed through the network in inference
   mode. A weight's score is ``|w * dR/dw|``, with `R` the sum of the outputs. The kept fraction
   shrinks by the same factor in each step; what is pruned stays pruned. One pool of all layers.
2. ``train``: plain training under the mask, from the initial weights.

The mask follows from the run's seed, so nothing travels before training. In a chain of layers the
scores of each layer add up to `R`, and those into a unit to those out of it, so that no layer is
emptied while another has weights to spare.

BatchNorm has its initial statistics (mean 0, variance 1), as in the public code. That code takes
absolute values of biases, too, which lets flow leak; here they are 0. Input and output are scaled
by powers of 2 in place of the code's double precision. Networks whose output is not proportional to
their input are refused, since flow is not conserved there: sigmoids, gates, attention, GroupNorm,
LayerNorm; so are token inputs. The published number of steps, 100, is [inferred].

References:
  Tanaka et al., `Pruning neural networks without any data by iteratively conserving synaptic flow
  <https://arxiv.org/abs/2006.05467>`_, 2020.
"""

import functools

import jax
import jax.numpy as jnp

from fedjaxprune import live_weights
from fedjaxprune import masks as masks_lib
from fedjaxprune.method import Method, Paper
from fedjaxprune.methods import _fixed_masks, _scored_masks
from fedjaxprune.pruning import scores, synaptic_flow
from fedjaxprune.rounds import facts as facts_lib
from fedjaxprune.rounds import server_work
from fedjaxprune.rounds.task import Task
from fedjaxprune.settings import Count, setting
from fedjaxprune.types import Algorithm


class Synflow(_fixed_masks.FixedMaskSettings):
    """Settings of SynFlow."""

    allocation: _fixed_masks.Allocation = _fixed_masks.allocation_setting("global")
    num_prune_steps: Count = setting(100, "Steps, with new scores at each.", unit="steps")
    steps: _scored_masks.Steps = _scored_masks.steps_setting("exponential")


def build(settings: Synflow, task: Task) -> Algorithm:
    """Score the weights of the initial network step by step, and train under the last mask.

    Raises:
      ValueError: the network reads tokens or has gates, or its output is not proportional to its
        input.
    """
    inputs = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype), task.facts.inputs
    )
    _check(task, inputs)
    after_steps = _scored_masks.sparsities(
        settings.sparsity, settings.num_prune_steps, settings.steps
    )
    tighten = _scored_masks.tighten(settings, task, scores.saliency, after_steps=after_steps)

    def work(key, state, population):
        del population  # no data decides

        def take(step, masks):
            params = synaptic_flow.absolute(masks_lib.apply(masks, state.params))
            grads, _ = synaptic_flow.gradients(
                task.model.predict, params, state.model_state, inputs
            )
            return tighten(jax.random.fold_in(key, step), masks, params, grads, step)

        number = jnp.int32(settings.num_prune_steps)
        masks = jax.lax.fori_loop(jnp.int32(0), number, take, state.masks)
        state = state._replace(masks=masks, params=masks_lib.apply(masks, state.params))
        return state, server_work.no_loss()

    prepare = server_work.server_round("prepare", work, masks_known_to="everybody")
    return _scored_masks.train_under(settings, task, prepare)


def _check(task: Task, inputs: jax.ShapeDtypeStruct) -> None:
    """Refuse a network through which flow is not conserved."""
    start = "synaptic flow needs a network whose output is proportional to its input"
    if any(not jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(inputs)):
        raise ValueError(f"{start}, got one that reads tokens: choose another method.")
    if facts_lib.has_gates(task.facts):
        raise ValueError(f"{start}, got one with gates: choose another method.")
    if live_weights.are_in(task.facts.state):
        raise ValueError(f"{start}, got one that normalizes its weights: choose another method.")
    facts = task.facts
    test = functools.partial(
        synaptic_flow.is_proportional, task.model.predict, facts.params, facts.state, inputs
    )
    if not jax.jit(test)():
        raise ValueError(
            f"{start}; sigmoids, attention, GroupNorm and LayerNorm are not (ReLU, pooling and "
            "BatchNorm are): choose another network or method."
        )


METHOD = Method(
    build=build,
    settings=Synflow,
    paper=Paper(
        "Tanaka et al.",
        2020,
        "Pruning neural networks without any data by iteratively conserving synaptic flow",
        arxiv="2006.05467",
        code="https://github.com/ganguli-lab/Synaptic-Flow",
    ),
    law_settings={"sparsity": 0.5, "num_prune_steps": 3},
    nothing_pruned={"sparsity": 0.0},
)
