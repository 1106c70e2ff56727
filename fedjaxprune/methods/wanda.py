"""Wanda: after dense training, masks keep for each output the weights that meet large inputs.

1. ``start``: `dense_rounds` rounds of dense FedAvg, since the size of random weights means nothing;
2. ``score``: all clients receive the model and pass their examples through it. They send, for each
   input of each layer, the sum of its squares; sums over clients are those over all examples, so
   how the data are spread makes no difference. A weight is worth its magnitude times the norm of
   its input, the root of that sum. Of the `n` weights of an output, the server leaves out those
   that are worth least, ``floor(sparsity * n)``;
3. ``train``: plain training under this mask, from the trained weights that are left.

The published method prunes a language model that was trained elsewhere, without training it again:
set ``federation.num_rounds`` to 1 for about that. It goes block by block, so that the inputs of a
block come from pruned ones; `blocks` says how many exchanges do so. With one, all layers are scored
with the inputs of the dense network. It spares embeddings and the last layer; here all kernels are
prunable. Its variant that chooses a sparsity for each output by the share of scores is not
implemented.

A convolution has one norm for each input channel, over all places of its images, and an output's
group has the weights of all its taps [inferred: the paper has dense layers only]. The network is in
inference mode. Clients that drop out do not count; if no client answers, the largest weights of
each output are kept [inferred]. Every kernel must be used as it is in products that can be followed
(`structure.moments`): one that is transposed or cut before is refused.

References:
  Sun et al., `A Simple and Effective Pruning Approach for Large Language Models
  <https://arxiv.org/abs/2306.11695>`_, 2024.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fedjaxprune import masks as masks_lib
from fedjaxprune import trees
from fedjaxprune.federated import aggregators, input_squares
from fedjaxprune.method import Method, Needs, Paper
from fedjaxprune.methods import _fixed_masks
from fedjaxprune.pruning import drop_and_grow, scores, selection
from fedjaxprune.rounds import reporting, server_work
from fedjaxprune.rounds.protocol import FieldSpec
from fedjaxprune.rounds.task import Task
from fedjaxprune.rounds.training import training
from fedjaxprune.settings import INT_MAX, Count, Settings, Sparsity, setting
from fedjaxprune.structure import moments
from fedjaxprune.traffic import EVALUATED
from fedjaxprune.types import Algorithm, Batch, Masks, Params, PrunerInputs, Stage

SQUARES = "squares"  # the field, and the statistic that scores are made of


class Wanda(Settings):
    """Settings of Wanda."""

    sparsity: Sparsity = setting(
        0.5, "Pruned fraction of the weights of each output of each layer.", unit="fraction"
    )
    dense_rounds: int = setting(
        10,
        "Rounds of dense FedAvg before the weights are scored, on top of the rounds of training. A "
        "sparsity of 0 has none of them.",
        unit="rounds",
        ge=0,
        le=INT_MAX,
    )
    blocks: Count = setting(
        1,
        "Exchanges that score weights, each those of as many consecutive layers, whose inputs come "
        "from layers that are pruned already; 1 scores all with the inputs of the dense network.",
        unit="exchanges",
    )


def build(settings: Wanda, task: Task) -> Algorithm:
    """Train densely, ask all clients for the norms of inputs, and train under the mask.

    Raises:
      ValueError: it is not clear which weights of a kernel make one output, or there are more
        blocks than layers.
    """
    if settings.sparsity == 0.0:
        return _fixed_masks.train_under(task, 0.0)
    uses = _uses(task)

    def settle(key, state, population):
        del population  # no data decides
        inputs = PrunerInputs(state.params, None, state.round)
        worth = scores.magnitude(key, inputs)
        masks = best_of_outputs(worth, state.masks, uses, settings.sparsity)
        after = state._replace(masks=masks, params=masks_lib.apply(masks, state.params))
        return after, server_work.no_loss()

    before = [
        _score(settings, task, own, number)
        for number, own in enumerate(_blocks(settings, task, uses))
    ]
    before.append(server_work.server_round("settle", settle))
    if settings.dense_rounds:
        dense = training(task.protocol, client=task.local_client(), name="start").stages[0]
        before.insert(0, dense._replace(num_rounds=settings.dense_rounds))
    return _fixed_masks.train_under(task, settings.sparsity, *before)


def _blocks(settings: Wanda, task: Task, uses: input_squares.Uses) -> Sequence[input_squares.Uses]:
    """Cut the layers into consecutive ones that are scored together."""
    num_blocks, paths = settings.blocks, list(uses)
    if num_blocks > max(1, len(paths)):
        raise ValueError(
            f"method.blocks must be at most the number of prunable layers ({len(paths)}), got "
            f"{num_blocks}."
        )
    if num_blocks == 1:
        return [uses]
    cut = drop_and_grow.consecutive(task.facts.reading_order(), num_blocks=num_blocks)
    numbers = dict(zip(paths, cut(paths), strict=True))
    return [
        {path: uses[path] for path in paths if numbers[path] == block}
        for block in range(num_blocks)
    ]


def _score(settings: Wanda, task: Task, uses: input_squares.Uses, number: int) -> Stage:
    """Make the exchange that scores and prunes some of the layers, behind `number` others."""

    def server_update(key, state, fields):
        squares = input_squares.spread(fields[SQUARES], state.params, uses)
        inputs = PrunerInputs(state.params, None, state.round, statistics={SQUARES: squares})
        worth = scores.input_norm(SQUARES)(key, inputs)
        masks = best_of_outputs(worth, state.masks, uses, settings.sparsity)
        return state._replace(masks=masks, params=masks_lib.apply(masks, state.params))

    def whole(state):
        return {EVALUATED: jnp.asarray(trees.sizes(state.params), jnp.int32)[None]}

    def live(state):
        return {EVALUATED: masks_lib.num_kept(state.masks)[None]}

    return reporting.reporting_round(
        task.protocol,
        name="score" if settings.blocks == 1 else f"score_{number + 1}",
        client=input_squares.report(
            task.model, batcher=task.batches(augment=False), uses=uses, name=SQUARES
        ),
        fields={SQUARES: FieldSpec(aggregators.unweighted_sum())},
        server_update=server_update,
        download=reporting.live_download if number else reporting.dense_download,
        exchange=reporting.Exchange(cohort="everyone", compute=live if number else whole),
    )


def best_of_outputs(
    worth: Params, masks: Masks, uses: input_squares.Uses, sparsity: float
) -> Masks:
    """Keep the live weights of each output that are worth most; dead ones stay dead."""

    def leaf(path, values, mask):
        if path not in uses:
            return mask
        outputs = uses[path].outputs
        ends = tuple(range(-len(outputs), 0))
        moved = jnp.moveaxis(jnp.where(mask, values, -jnp.inf), outputs, ends)
        num_inputs = math.prod(moved.shape[: moved.ndim - len(outputs)])
        flat = moved.reshape(num_inputs, -1)
        kept = selection.per_output(sparsity=sparsity)(flat, jnp.int32(0))
        return mask & jnp.moveaxis(kept.reshape(moved.shape), ends, outputs)

    return trees.map_with_path(leaf, worth, masks)


def _uses(task: Task) -> input_squares.Uses:
    """Find how inference uses the kernels, from shapes alone."""
    two: Any = jax.ShapeDtypeStruct((2,), jnp.float32)
    batch = Batch(task.facts.inputs, two, two)
    key = jax.eval_shape(lambda: jax.random.key(0))
    find = moments.uses(input_squares.of_network(task.model), prunable=masks_lib.is_kernel)
    return find(task.facts.params, task.facts.state, batch, key)


METHOD = Method(
    build=build,
    settings=Wanda,
    paper=Paper(
        "Sun et al.",
        2024,
        "A Simple and Effective Pruning Approach for Large Language Models",
        arxiv="2306.11695",
        code="https://github.com/locuslab/wanda",
    ),
    needs=Needs(products=True),
    law_settings={"sparsity": 0.5, "dense_rounds": 1},
    nothing_pruned={"sparsity": 0.0},
)
