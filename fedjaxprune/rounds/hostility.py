"""Training rounds with hostile clients, and with a server that judges messages by its own."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fedjaxprune import trees
from fedjaxprune.federated import attacks, populations
from fedjaxprune.federated.aggregators import ServerAggregator
from fedjaxprune.rounds import server_work
from fedjaxprune.types import (
    Aggregator,
    ClientData,
    Cohort,
    CohortAggregator,
    Population,
)

_Plain = dict[str, Aggregator | CohortAggregator]  # by field
ByField = Mapping[str, Aggregator | CohortAggregator | ServerAggregator]


def beside_server(
    by_field: ByField, population: Population, work: Callable[[ClientData], Mapping[str, Any]]
) -> _Plain:
    """Give the aggregators that ask for it the message that the server would send itself.

    Args:
      by_field: the aggregators; only if one of them is a `ServerAggregator` the server works.
      population: everybody's examples.
      work: ``data -> fields`` of the server's message. Where it has a NaN or an infinity, it is
        all zero.

    Raises:
      ValueError: while tracing, if the server holds no examples.
    """
    judges = {name: a for name, a in by_field.items() if isinstance(a, ServerAggregator)}
    plain = {name: a for name, a in by_field.items() if not isinstance(a, ServerAggregator)}
    if not judges:
        return plain
    if populations.num_held(population) == 0:
        raise ValueError(
            "the aggregator compares messages with what the server computes on examples of its "
            "own, and it has none: set `server.data_fraction` (in Python: `Population.held`)."
        )
    fields = work(server_work.server_examples()(population))
    own = {name: fields[name] for name in judges if name in fields}
    own = trees.tree_where(trees.all_finite(own), own, jax.tree.map(jnp.zeros_like, own))
    return {**plain, **{name: judges[name].beside(one) for name, one in own.items()}}


def under_attack(
    attackers: attacks.Attackers, by_field: _Plain, members: Cohort
) -> tuple[_Plain, Cohort]:
    """Mark the hostile ones of a cohort, and let them see what the others send.

    The cohort's clients are those of `attacks.among`.
    """
    is_hostile = attackers.are_among(members.client_ids)
    marked = members.states.client._replace(is_hostile=is_hostile)
    members = members._replace(states=members.states._replace(client=marked))
    changed = dict(by_field)
    if attackers.attack.collude is not None:
        for name in attacks.FIELDS:
            changed[name] = attacks.together(changed[name], attackers.attack, is_hostile)
    return changed, members
