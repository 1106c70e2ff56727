"""Controls of MPFL: filters chosen without a vote, and then the same training.

The mask of each layer keeps exactly ``F - round(sparsity * F)`` filters, as MPFL's does under
``consensus.top_k``; so masks can be compared at equal sparsity, layer by layer. With a `factor` it
keeps as many as this leaves.

References:
  Gez and Cohen, `MPFL <https://arxiv.org/abs/2312.03889>`_, 2023, whose public code compares its
  mask with those of pooled data and of averaged weights.
"""

import jax
import jax.numpy as jnp

from fedjaxprune import masks as masks_lib
from fedjaxprune import trees
from fedjaxprune.federated import aggregators, local_training
from fedjaxprune.methods import _filter_masks, _filter_stages
from fedjaxprune.pruning.structured import filters
from fedjaxprune.rounds import server_work
from fedjaxprune.rounds.protocol import FieldSpec, Protocol
from fedjaxprune.structure.channels import groups
from fedjaxprune.types import Algorithm, Batcher, Message, Model, PrunableFn


def random_filters(
    model: Model,
    setup: Protocol,
    *,
    channels: groups.Analysis,
    sparsity: float,
    start_rounds: int = 0,
    drops: filters.Drops = "filters",
    prunable: PrunableFn = filters.convolutions,
) -> Algorithm:
    """Train under filters drawn at random; they follow from the run's seed and do not travel.

    Arguments as of `mpfl.mpfl`.
    """
    the = _filter_masks.plan(
        model,
        channels=channels,
        sparsity=sparsity,
        iterations=1,
        stop=1.0,
        drops=drops,
        prunable=prunable,
    )
    targets = _filter_masks.targets(the, sparsity, None)

    def work(key, state, population):
        del population  # no data decides
        last, keep = jnp.int32(1), state.method.keep
        drawn = tuple(
            filters.largest((jax.random.uniform(own, bits.shape),), bits, count)
            for own, bits, count in zip(
                jax.random.split(key, len(keep)), keep, targets(last, keep), strict=True
            )
        )
        return _filter_masks.settle(the, setup, state, drawn, step=last), server_work.no_loss()

    draw = server_work.server_round("draw", work, masks_known_to="everybody")
    return _filter_stages.federate(model, setup, the, (draw,), start_rounds=start_rounds)


def pooled_filters(
    model: Model,
    setup: Protocol,
    *,
    channels: groups.Analysis,
    sparsity: float,
    iterations: int,
    agreement: Batcher,
    factor: float | None = None,
    stop: float | None = None,
    start_rounds: int = 0,
    drops: filters.Drops = "filters",
    prunable: PrunableFn = filters.convolutions,
) -> Algorithm:
    """Prune filters on the data of all, which nobody has: the bound of what a vote can find.

    One model is trained on the pooled data, loses the filters of smallest norm and is rewound, as
    often as MPFL exchanges votes: iterative magnitude pruning. Nothing travels. Arguments as of
    `mpfl.mpfl`, `agreement` being steps on the pooled data.

    References:
      Frankle and Carbin, `The Lottery Ticket Hypothesis <https://arxiv.org/abs/1803.03635>`_, 2019.
    """
    the = _filter_masks.plan(
        model,
        channels=channels,
        sparsity=sparsity,
        iterations=iterations,
        stop=stop,
        drops=drops,
        prunable=prunable,
    )
    targets = _filter_masks.targets(the, sparsity, factor)
    train = server_work.train_at(
        local_training.local_sgd(model.loss, batcher=agreement, optimizer=setup.optimizer),
        server_work.all_examples(),
    )

    def work(key, state, population):
        trained, seen = train(key, state, population)
        before = state.method.keep
        counts = targets(state.round, before)
        keep = trees.tree_where(
            _filter_masks.is_over(the, before),
            before,
            _filter_masks.ranked(the, trained.params, before, counts),
        )
        return _filter_masks.settle(the, setup, state, keep, step=state.round), seen

    prepare = server_work.server_round("prepare", work, num_rounds=iterations + 1)
    return _filter_stages.federate(model, setup, the, (prepare,), start_rounds=start_rounds)


def averaged_filters(
    model: Model,
    setup: Protocol,
    *,
    channels: groups.Analysis,
    sparsity: float,
    iterations: int,
    agreement: Batcher,
    factor: float | None = None,
    stop: float | None = None,
    start_rounds: int = 0,
    drops: filters.Drops = "filters",
    prunable: PrunableFn = filters.convolutions,
) -> Algorithm:
    """Prune filters by the norms of averaged weights, which travel whole in every exchange.

    Clients count equally, as in the public code; that ranks by weights of another model by mistake,
    and here it is the averaged ones. Arguments as of `mpfl.mpfl`.
    """
    the = _filter_masks.plan(
        model,
        channels=channels,
        sparsity=sparsity,
        iterations=iterations,
        stop=stop,
        drops=drops,
        prunable=prunable,
    )
    targets = _filter_masks.targets(the, sparsity, factor)
    trainer = local_training.local_sgd(model.loss, batcher=agreement, optimizer=setup.optimizer)

    def update(key, given, state, data):
        broadcast, _ = given
        message, _ = trainer.update(key, broadcast, trainer.init(broadcast.params), data)
        fields = {"trained": message.fields["delta"], "metrics": message.fields["metrics"]}
        return Message(fields=fields, weight=message.weight), state

    def conclude(key, state, fields):
        del key  # deterministic
        share = 1.0 / fields["num_messages"].astype(jnp.float32)
        mean = jax.tree.map(
            lambda start, total: start + (share * total).astype(start.dtype),
            masks_lib.apply(state.masks, state.params),
            fields["trained"],
        )
        keep = state.method.keep
        keep = _filter_masks.ranked(the, mean, keep, targets(state.round, keep))
        return _filter_masks.settle(the, setup, state, keep, step=state.round)

    average = _filter_stages.exchange(
        setup,
        the,
        name="average",
        client=update,
        fields={"trained": FieldSpec(aggregators.unweighted_sum())},
        conclude=conclude,
        start_rounds=start_rounds,
    )
    return _filter_stages.federate(model, setup, the, (average,), start_rounds=start_rounds)
