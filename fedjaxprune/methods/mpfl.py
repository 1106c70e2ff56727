"""MPFL: agree on a mask of filters first, one bit each, and train the small model then.

Stages of one run:

1. ``start`` (only with `start_rounds`): dense FedAvg, for weights worth pruning;
2. ``agree``: in every exchange the nodes train from the weights of the start under the mask so far,
   rank the filters of each layer by norm, and vote for those they would keep; the server makes one
   mask of the votes, and all weights go back to the start. The first exchange prunes nothing;
3. ``train``: FedAvg under the mask, from the weights of the start.

The public code has no federated training, hands out pretrained weights with a classifier drawn
anew in every rebuild, and puts its threshold the wrong way round. Here the start is one, classifier
included, and follows from the run's seed; the threshold climbs (`consensus.ascending`), with the
code's rule as an option (`consensus.code_dynamic`); nodes prune towards an absolute share, with the
code's share of what is left as an option (`factor`); a filter takes its bias and normalization
along, so that it can be removed; and no layer loses all. Nodes vote with the weights of their last
epoch, not with those of the epoch that was best on examples set aside.

References:
  Gez and Cohen, `A Masked Pruning Approach for Dimensionality Reduction in Communication-Efficient
  Federated Learning Systems <https://arxiv.org/abs/2312.03889>`_, 2023.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from fedjaxprune import masks as masks_lib
from fedjaxprune import trees
from fedjaxprune.costs import coverage
from fedjaxprune.federated import aggregators, local_training
from fedjaxprune.methods import _filter_masks, _filter_stages
from fedjaxprune.pruning.structured import filters
from fedjaxprune.pruning.structured import voting as rules
from fedjaxprune.rounds.protocol import FieldSpec, Protocol
from fedjaxprune.structure.channels import groups
from fedjaxprune.types import Algorithm, Batcher, Client, Message, Model, PrunableFn


def mpfl(
    model: Model,
    setup: Protocol,
    *,
    channels: groups.Analysis,
    sparsity: float,
    iterations: int,
    agreement: Batcher,
    consensus: rules.ConsensusFn = rules.ascending,
    factor: float | None = None,
    votes: Literal["clients", "examples"] = "clients",
    stop: float | None = None,
    start_rounds: int = 0,
    drops: filters.Drops = "filters",
    prunable: PrunableFn = filters.convolutions,
) -> Algorithm:
    """Let the clients vote on filters, and train what the consensus keeps.

    Args:
      model: a network with convolutions.
      setup: what every method shares; `num_rounds` counts the rounds of training alone. The local
        training of the exchanges takes its optimizer too, without the factor on the learning rate.
      channels: of the network (`groups.analyze`).
      sparsity: fraction of each layer's filters that the last exchange wants pruned, in [0, 1).
        With ``consensus.top_k`` it is what is pruned; other rules may prune more or less.
      iterations: exchanges that prune, each an equal share of `sparsity` further (public code: 9
        towards 0.9).
      agreement: a node's local steps in an exchange (public code: 10 epochs).
      consensus: how votes become one mask (`fedjaxprune.pruning.structured.voting`).
      factor: fraction of the filters left that a node would prune in an exchange (public code:
        0.1); None lets it prune up to the share that is wanted by then.
      votes: one for every client (public code), or one for every example.
      stop: share of the layers' weights; once more is pruned no exchange follows. None takes 0.9
        (public code), or `sparsity` if that is more.
      start_rounds: rounds of dense FedAvg first, whose result the clients are then sent.
      drops: what training leaves out: pruned filters, or also what reads their channels, which
        changes no output and saves traffic.
      prunable: whose filters (public code: of all convolutions, shortcuts included).

    Raises:
      ValueError: if an option is out of range, or the network has no filters.
    """
    if votes not in ("clients", "examples"):
        raise ValueError(f"votes must be 'clients' or 'examples', got {votes!r}.")
    the = _filter_masks.plan(
        model,
        channels=channels,
        sparsity=sparsity,
        iterations=iterations,
        stop=stop,
        drops=drops,
        prunable=prunable,
    )
    quotas = [
        filters.quotas(_filter_masks.steps(sparsity, iterations), group.size)
        for group in the.layers
    ]
    counts = {"clients": aggregators.vote_counts, "examples": aggregators.vote_weights}[votes]()

    def conclude(key, state, fields):
        del key  # deterministic
        num_voters = fields["num_messages"]
        keepers, weight = fields["ballot"]
        keep = tuple(
            rules.decide(
                consensus,
                rules.Ballot(
                    votes=line, weight=weight, num_voters=num_voters, live=live, worth=norm
                ),
                trees.take_rows(quota, state.round),
            )
            for line, live, norm, quota in zip(
                keepers,
                state.method.keep,
                filters.norms(state.params, the.layers),
                quotas,
                strict=True,
            )
        )
        alike = [
            coverage.agreement((line,), num_voters, lambda path, leaf: True)
            for line in fields["masks"]
        ]
        state = _filter_masks.settle(the, setup, state, keep, step=state.round)
        log = state.method.agreement.at[state.round].set(jnp.stack(alike), mode="drop")
        return state._replace(method=state.method._replace(agreement=log))

    agree = _filter_stages.exchange(
        setup,
        the,
        name="agree",
        client=_voter(
            local_training.local_sgd(model.loss, batcher=agreement, optimizer=setup.optimizer),
            the,
            _filter_masks.targets(the, sparsity, factor),
        ),
        fields={
            "masks": FieldSpec(aggregators.vote_counts(), send="bits"),
            "ballot": FieldSpec(counts, send="nothing"),
            "size": FieldSpec(aggregators.unweighted_sum(), send="nothing"),
        },
        conclude=conclude,
        start_rounds=start_rounds,
    )
    return _filter_stages.federate(model, setup, the, (agree,), start_rounds=start_rounds)


def _voter(
    trainer: Client, the: _filter_masks.Plan, targets: _filter_masks.TargetFn
) -> _filter_stages.Local:
    """Make a client that trains, ranks its filters and votes; its weights are forgotten."""

    def update_fn(key, given, state, data):
        broadcast, keep = given
        message, _ = trainer.update(key, broadcast, trainer.init(broadcast.params), data)
        start = masks_lib.apply(broadcast.masks, broadcast.params)
        trained = jax.tree.map(jnp.add, start, message.fields["delta"])
        vote = _filter_masks.ranked(the, trained, keep, targets(broadcast.round, keep))
        norms = [jnp.sum(norm) for norm in filters.norms(trained, the.layers)]
        fields = {
            "masks": vote,
            "ballot": (vote, jnp.bool_(True)),
            "metrics": message.fields["metrics"],
            # Nobody reads it: a vote by weights that are not finite is left out because of it.
            "size": trees.tree_sum(norms, dtype=jnp.float32),
        }
        return Message(fields=fields, weight=message.weight), state

    return update_fn
