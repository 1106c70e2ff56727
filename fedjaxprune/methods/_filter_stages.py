"""Stages of methods that choose filters before training: exchanges about bits, and then FedAvg.

Nothing but a bit a filter travels for the masks, in every stage, in a coding whose length follows
from how many are live.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjaxprune import masks as masks_lib
from fedjaxprune import trees
from fedjaxprune.costs import ledger, storage_models
from fedjaxprune.federated import local_training
from fedjaxprune.methods._filter_masks import FilterState, Plan, is_over
from fedjaxprune.pruning.structured import filters
from fedjaxprune.rounds.protocol import (
    FieldSpec,
    Hooks,
    Masking,
    MaskTransport,
    Protocol,
    add_reports,
    broadcast_of,
)
from fedjaxprune.rounds.reporting import Download, Exchange, reporting_round
from fedjaxprune.rounds.stages import in_order
from fedjaxprune.rounds.training import training
from fedjaxprune.traffic import AGREEMENT, TRAINED, FieldLength, PublishedBits
from fedjaxprune.types import (
    Algorithm,
    Broadcast,
    Client,
    ClientData,
    Key,
    Message,
    Model,
    RoundMetrics,
    RoundState,
    Stage,
    State,
)

COUNTS, REMOVED = "num_filters", "removed_kept"  # reports [C, layers] and [C, L]

# (key, (broadcast, keep), (), data) -> (message, ()): a client's work in an exchange
Local = Callable[[Key, tuple[Broadcast, filters.Keep], State, ClientData], tuple[Message, State]]


def _bits(state: RoundState) -> FieldLength:
    """Describe the filters in force as a field of a message."""
    keep = state.method.keep
    return FieldLength(template=trees.shape_only(keep), sent_counts=filters.num_kept(keep))


# The filters in force travel as a bit each, to whom they are news; all are known to live at first.
TRANSPORT = MaskTransport(
    encode=_bits,
    is_needed=lambda state: ~_is_whole(state.method.keep),
)


def exchange(
    setup: Protocol,
    the: Plan,
    *,
    name: str,
    client: Local,
    fields: Mapping[str, FieldSpec],
    conclude: Callable[[Key, RoundState, Mapping[str, Any]], RoundState],
    start_rounds: int,
) -> Stage:
    """Make the stage in which clients train from the start, again and again, and report.

    Down go the filters in force, to clients that hold others, and, where the start was trained, its
    live weights and statistics to clients that come for the first time. Once `is_over`, nobody is
    asked any more.

    Args:
      setup: says how the cohort is mapped.
      the: what is pruned; there are ``iterations + 1`` exchanges.
      name: the stage's name in the record.
      client: one client's work; it trains under the broadcast's masks.
      fields: of the message.
      conclude: ``(key, state, fields) -> state`` from the aggregated fields; `settle` is its end.
      start_rounds: whether, and how long, the start was trained.
    """

    def download(state: RoundState, masks_held: jax.Array) -> Download:
        newcomers = (masks_held == 0) & (start_rounds > 0)
        kept = masks_lib.num_kept(state.masks)
        receivers = TRANSPORT.receivers(state, masks_held)
        messages = {"masks": {"masks": _bits(state)._replace(clients=receivers)}}
        if start_rounds:
            messages["start"] = {
                "params": FieldLength(clients=newcomers, live_counts=kept),
                "model_state": FieldLength(clients=newcomers),
            }
        return Download(
            messages=messages,
            num_downloaded=jnp.where(newcomers[:, None, None], kept[None, None], 0),
            num_masks=receivers.astype(jnp.int32),
        )

    def before_round(state: RoundState) -> RoundState:
        # Masks of id 0 are those of clients which know nothing yet; a trained start has to be sent.
        first = 1 if start_rounds else 0
        return state._replace(masks_id=jnp.maximum(state.masks_id, first))

    def after_round(
        before: RoundState, after: RoundState, metrics: RoundMetrics
    ) -> tuple[RoundState, RoundMetrics]:
        reports = {AGREEMENT: trees.take_rows(after.method.agreement, before.round)}
        if "masks" in fields:
            metrics = add_reports(metrics, reports)
        masks_id = jnp.where(metrics.num_participating > 0, after.masks_id, before.masks_id)
        return after._replace(masks_id=masks_id), metrics

    return reporting_round(
        setup,
        name=name,
        client=Client(init=lambda params: (), update=client),  # pyright: ignore[reportArgumentType]
        fields=fields,
        server_update=conclude,
        broadcast=lambda state: (broadcast_of(state), state.method.keep),
        download=download,
        exchange=Exchange(
            num_rounds=the.iterations + 1,
            cohort="everyone",
            compute=lambda state: {TRAINED: masks_lib.num_kept(state.masks)[None]},
            is_over=lambda state: is_over(the, state.method.keep),
            hooks=Hooks(before_round, after_round),
        ),
    )


def federate(
    model: Model, setup: Protocol, the: Plan, before: Sequence[Stage], *, start_rounds: int
) -> Algorithm:
    """Put FedAvg under the filters in force behind the stages that choose them.

    Args:
      model: the network.
      setup: what every method shares; `num_rounds` counts the rounds of training alone.
      the: what is pruned.
      before: the stages that choose; they count their rounds from 0.
      start_rounds: rounds of dense FedAvg before these, which lead to the weights of the start.
    """
    if start_rounds < 0:
        raise ValueError(f"start_rounds must not be negative, got {start_rounds}.")
    trained = training(
        setup,
        client=local_training.local_sgd(
            model.loss,
            batcher=setup.batcher,
            optimizer=setup.optimizer,
            learning_rate_scale=setup.learning_rate_scale,
        ),
        prunable=lambda path, leaf: path in the.paths,
        masking=Masking(transport=TRANSPORT),
        hooks=Hooks(after_round=_report),
    )
    (train,) = trained.stages
    start = (train._replace(name="start", num_rounds=start_rounds),) if start_rounds else ()

    def init_fn(state):
        method = FilterState(
            keep=filters.full(the.layers),
            agreement=jnp.zeros((the.iterations + 1, len(the.layers)), jnp.float32),
            removed_kept=jnp.asarray(trees.sizes(state.params), jnp.int32),
        )
        return state._replace(method=method)

    return in_order(trained, (*start, *before), init=init_fn)._replace(
        published={
            "filter_masked": lambda metrics, state: _formula(the, metrics, state, _filter_masked),
            "channel_removed": lambda metrics, state: _formula(the, metrics, state, _removed),
        }
    )


def _report(
    before: RoundState, after: RoundState, metrics: RoundMetrics
) -> tuple[RoundState, RoundMetrics]:
    """Report what formulas need."""
    method: FilterState = before.method
    counts = {COUNTS: filters.num_kept(method.keep), REMOVED: method.removed_kept}
    return after, add_reports(metrics, counts)


def _formula(
    the: Plan,
    metrics: RoundMetrics,
    state: RoundState,
    transfer: Callable[[Plan, Mapping[str, np.ndarray], RoundState], int],
) -> PublishedBits:
    """Charge a bit a filter in exchanges about masks, and `transfer` for a model in training.

    Statistics are not charged, and the last masks only once, in the exchange that finds them. What
    else travels in an exchange, as the weights of a trained start, is charged dense.
    """
    present = np.asarray(metrics.participated)
    reached = ledger.received(present, np.asarray(metrics.sent.client_ids))
    num_up, num_down = int(present.sum()), int(reached.sum())
    reply = metrics.sent.up.get("reply", {})
    if "delta" in reply:
        bits = transfer(the, metrics.sent.reports, state)
        return PublishedBits(num_up * bits, num_down * bits)
    stored = ledger.charge_storage(metrics, state, storage_models.values)
    num_filters = sum(group.size for group in the.layers)
    up = num_filters if "masks" in reply else 32 * sum(trees.sizes(state.params))
    return PublishedBits(num_up * up, num_down * num_filters + stored.downlink)


def _filter_masked(the: Plan, reports: Mapping[str, np.ndarray], state: RoundState) -> int:
    num_weights = sum(g.size * size for g, size in zip(the.layers, the.filter_sizes, strict=True))
    return storage_models.filter_masked(
        np.asarray(reports[COUNTS])[0].tolist(),
        the.filter_sizes,
        sum(trees.sizes(state.params)) - num_weights,
    )


def _removed(the: Plan, reports: Mapping[str, np.ndarray], state: RoundState) -> int:
    del the, state  # the masks were counted
    return 32 * int(np.asarray(reports[REMOVED])[0].sum(dtype=np.int64))


def _is_whole(keep: filters.Keep) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(bits) for bits in keep]))
