"""Let clients vote on filters, one bit each, and train what the consensus keeps.

Stages of one run:

1. ``start`` (only with `dense_rounds`): dense FedAvg, for weights worth pruning;
2. ``agree``: in every exchange the nodes train from the weights of the start under the mask so far,
   rank the filters of each layer by norm, and vote for those they would keep; the server makes one
   mask of the votes, and all weights go back to the start. The first exchange prunes nothing
   (`skip_first_exchange` leaves it out);
3. ``train``: FedAvg under the mask, from the weights of the start.

The public code has no federated training, hands out pretrained weights with a classifier drawn
anew in every rebuild, and puts its threshold the wrong way round. Here the start is one, classifier
included, and follows from the run's seed; the threshold climbs (consensus ``ascending``), with the
code's rule as an option (``code_dynamic``); nodes prune towards an absolute share, with the code's
share of the remaining filters as an option (`prune_fraction_per_step`); a filter takes its bias and
normalization along, so that it can be removed; and no layer loses all. Nodes vote with the weights
of their last epoch, not with those of the epoch that was best on held-out examples.

References:
  Gez and Cohen, `A Masked Pruning Approach for Dimensionality Reduction in Communication-Efficient
  Federated Learning Systems <https://arxiv.org/abs/2312.03889>`_, 2023.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from fedjaxprune import masks as masks_lib
from fedjaxprune import registry, trees
from fedjaxprune.costs import coverage
from fedjaxprune.federated import aggregators
from fedjaxprune.method import Method, Needs, Paper
from fedjaxprune.methods import _filter_rounds
from fedjaxprune.pruning.structured import filters, voting
from fedjaxprune.rounds.protocol import FieldSpec
from fedjaxprune.rounds.task import Task
from fedjaxprune.settings import setting
from fedjaxprune.types import Algorithm, Client, RoundMetrics

AGREEMENT = "agreement"  # of the record, and a report [C, layers] of each exchange


class MPFL(_filter_rounds.RankingSettings):
    """Settings of MPFL; its sparsity is what the last exchange wants.

    With the consensus ``top_k`` it is what is pruned; other rules may prune more or less.
    """

    consensus: str = setting(
        "ascending",
        "How votes become one mask: the lowest threshold that prunes enough (ascending), as many "
        "as wanted (top_k), more than half (majority), all (unanimous), any (anybody), the "
        "percentile of the votes (histogram), the public code's rule (code_dynamic), or "
        "module:NAME.",
        min_length=1,
    )
    votes: Literal["clients", "examples"] = setting(
        "clients", "Whether every client has one vote (public code), or every example."
    )


def build(settings: MPFL, task: Task) -> Algorithm:
    """Build MPFL.

    Raises:
      ConfigError: there is no such consensus rule.
      ValueError: the network has no filters.
    """
    part = registry.find("consensus", settings.consensus, path="method.consensus").part
    rule: voting.ConsensusFn = part.build(part.settings())
    plan, targets = _filter_rounds.plan_ranking(task, settings)
    wanted = filters.even_steps(settings.sparsity, plan.num_steps)
    quotas = [filters.quotas(wanted, group.size) for group in plan.layers]
    counts = {"clients": aggregators.vote_counts, "examples": aggregators.vote_weights}

    def server_update(key, state, fields):
        del key  # deterministic
        votes, weight = fields["ballot"]
        num_voters = fields["num_messages"]
        norms = filters.norms(state.params, plan.layers)
        step = plan.first_step + state.round

        def decide(line, live, norm, quota):
            ballot = voting.Ballot(
                votes=line, weight=weight, num_voters=num_voters, live=live, worth=norm
            )
            return voting.decide(rule, ballot, trees.take_rows(quota, step))

        keep = tuple(map(decide, votes, state.method.keep, norms, quotas))
        alike = [
            coverage.agreement((line,), num_voters, lambda path, leaf: True)
            for line in fields["masks"]
        ]
        state = _filter_rounds.apply_filters(plan, task.protocol, state, keep, step=step)
        log = state.method.agreement.at[state.round].set(jnp.stack(alike), mode="drop")
        return state._replace(method=state.method._replace(agreement=log))

    agree = _filter_rounds.exchange(
        task,
        settings,
        plan,
        name="agree",
        client=_voter(_filter_rounds.trainer(task, settings), plan, targets),
        fields={
            "masks": FieldSpec(aggregators.vote_counts(), send="bits"),
            "ballot": FieldSpec(counts[settings.votes](), send="nothing"),
            "size": FieldSpec(aggregators.unweighted_sum(), send="nothing"),
        },
        server_update=server_update,
        reports=lambda before, after: {
            AGREEMENT: trees.take_rows(after.method.agreement, before.round)
        },
    )
    algorithm = _filter_rounds.train_after(task, settings, plan, (agree,))
    return algorithm._replace(diagnostics=diagnostics)


def diagnostics(metrics: RoundMetrics) -> dict[str, Any]:
    """Say how far voters agreed on each layer's filters, in an exchange with two or more."""
    found = metrics.sent.reports.get(AGREEMENT)
    if found is None or int(metrics.num_participating) - int(metrics.num_rejected) < 2:
        return {}
    return {AGREEMENT: np.round(np.asarray(found[0], np.float64), 6).tolist()}


def _voter(trainer: Client, plan: _filter_rounds.Plan, targets: filters.TargetFn) -> Client:
    """Make a client that trains, ranks its filters and votes; its weights are forgotten."""

    def update_fn(key, broadcast, state, data):
        message, state = trainer.update(key, broadcast, state, data)
        start = masks_lib.apply(broadcast.masks, broadcast.params)
        trained = jax.tree.map(jnp.add, start, message.fields["delta"])
        keep = filters.of_masks(plan.layers, broadcast.masks)
        step = plan.first_step + broadcast.round
        vote = filters.ranked(plan.layers, trained, keep, targets(step, keep))
        norms = [jnp.sum(norm) for norm in filters.norms(trained, plan.layers)]
        fields = {
            "masks": vote,
            "ballot": (vote, jnp.bool_(True)),
            "metrics": message.fields["metrics"],
            # Nobody reads it: a vote by weights that are not finite is left out because of it.
            "size": trees.tree_sum(norms, dtype=jnp.float32),
        }
        return message._replace(fields=fields), state

    return Client(init=trainer.init, update=update_fn)


METHOD = Method(
    build=build,
    settings=MPFL,
    paper=Paper(
        authors="Gez and Cohen",
        year=2023,
        title="A Masked Pruning Approach for Dimensionality Reduction in Communication-Efficient "
        "Federated Learning Systems",
        arxiv="2312.03889",
        code="https://github.com/TamirGez/MPFL",
    ),
    needs=Needs(convolutions=True),
    default_model="resnet8",
    law_settings={"num_prune_steps": 1, "vote_epochs": 3, "layers": "all"},
    nothing_pruned={"sparsity": 0.0},
)
