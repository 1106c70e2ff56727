"""What MPFL and its controls share: filters chosen before training, by norms and with rewinding.

The masks in force are one bit a filter. They travel as such, in a coding whose length follows from
how many are live. Until training, all weights that are not pruned stay as they were at the start.
"""

import fractions
import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjaxprune import masks as masks_lib
from fedjaxprune import trees
from fedjaxprune.costs import ledger, storage_models
from fedjaxprune.federated import local_training, selective_sending, server_optimizers
from fedjaxprune.pruning.structured import filters
from fedjaxprune.rounds import reporting, stages
from fedjaxprune.rounds.protocol import (
    FieldSpec,
    Hooks,
    Masking,
    MaskTransport,
    Protocol,
    add_reports,
)
from fedjaxprune.rounds.task import Task
from fedjaxprune.rounds.training import training
from fedjaxprune.settings import INT_MAX, Count, Settings, Sparsity, setting
from fedjaxprune.structure.channels import groups
from fedjaxprune.traffic import TRAINED, FieldLength, PublishedBits
from fedjaxprune.types import Algorithm, Client, Key, PrunableFn, RoundMetrics, RoundState, Stage

STOP = 0.9  # of MPFL's code: no further exchange once more than this is pruned
NUM_FILTERS, REMOVED = "num_filters", "removed_kept"  # reports [C, layers] and [C, L]


class FilterSettings(Settings):
    """Settings of every method by filter."""

    sparsity: Sparsity = setting(
        0.5, "Fraction of each layer's filters that is pruned in the end.", unit="fraction"
    )
    dense_rounds: int = setting(
        0,
        "Rounds of dense FedAvg that lead to the weights which are pruned and rewound to.",
        unit="rounds",
        ge=0,
        le=INT_MAX,
    )
    remove: filters.Drops = setting(
        "filters",
        "What training leaves out: pruned filters, or also the weights that read their channels, "
        "which changes no output and saves traffic.",
    )
    layers: Literal["convolutions", "all"] = setting(
        "convolutions",
        "Whose filters are pruned: those of all convolutions, shortcuts included, or also the "
        "units of dense layers.",
    )


class RankingSettings(FilterSettings):
    """Settings of the methods that train, rank filters and rewind, step by step."""

    num_prune_steps: int = setting(
        9,
        "Exchanges that prune filters, each an equal share of the sparsity further; one that does "
        "not prune comes before them.",
        unit="exchanges",
        ge=1,
        le=10_000,
    )
    skip_first_exchange: bool = setting(
        False,
        "Whether to leave out the exchange that does not prune (the public code has it): nobody "
        "trains or sends anything for it, and the later exchanges want the same.",
    )
    prune_fraction_per_step: float | None = setting(
        None,
        "Fraction of the remaining filters that a ranking prunes in an exchange (public code: "
        "0.1).",
        unit="fraction",
        unset="as many as are wanted by then",
        gt=0,
        lt=1,
    )
    vote_epochs: Count = setting(
        3,
        "Passes over the examples in an exchange, after which filters are ranked (public code: "
        "10).",
        unit="epochs",
    )
    stop_sparsity: float | None = setting(
        None,
        "Fraction of the layers' weights; once more is pruned, no exchange follows.",
        unit="fraction",
        unset="0.9 (public code), or the sparsity if that is more",
        ge=0,
        le=1,
    )


class FilterState(NamedTuple):
    """What the stages hand on beside weights and masks.

    The agreement of an exchange is the share of a layer's filters on which two voters agree, in the
    mean over all pairs; 0 where nobody voted.
    """

    keep: filters.Keep  # [F] bool a layer: the filters in force
    agreement: jax.Array  # [exchanges, layers] float32
    removed_kept: jax.Array  # [L] int32: left if what reads a pruned channel is removed with it


class Plan(NamedTuple):
    """What is pruned, and how far, in Python values."""

    channels: groups.Analysis
    layers: tuple[groups.Group, ...]  # the filters, layer by layer
    filter_sizes: tuple[int, ...]  # weights of one filter of each layer
    remove: filters.Drops
    num_steps: int  # exchanges that prune; one that does not comes before them
    stop: fractions.Fraction  # of the layers' weights; no exchange once more is pruned
    first_step: int  # 0, or 1 to leave the exchange out that does not prune

    @property
    def num_exchanges(self) -> int:
        """Count the exchanges; that of index `i` in its stage makes the step ``first_step + i``."""
        return self.num_steps + 1 - self.first_step


def make_plan(
    task: Task,
    settings: FilterSettings,
    *,
    num_steps: int,
    stop: float | None = None,
    first_step: int = 0,
) -> Plan:
    """Find the filters of the network; without `stop` exchanges end as MPFL's code has it."""
    channels, params = task.facts.channels(), task.facts.params
    layers = filters.layers(channels, params, prunable=_prunable(settings))
    sizes = dict(zip(trees.paths(params), trees.sizes(params), strict=True))

    def filter_size(group):
        path = next(member.path for member in group.members if member.role == "filter")
        return sizes[path] // group.size

    return Plan(
        channels=channels,
        layers=layers,
        filter_sizes=tuple(map(filter_size, layers)),
        remove=settings.remove,
        num_steps=num_steps,
        stop=filters.exact(max(STOP, settings.sparsity) if stop is None else stop),
        first_step=first_step,
    )


def plan_ranking(task: Task, settings: RankingSettings) -> tuple[Plan, filters.TargetFn]:
    """Find the filters, and how many a ranking leaves in each exchange."""
    plan = make_plan(
        task,
        settings,
        num_steps=settings.num_prune_steps,
        stop=settings.stop_sparsity,
        first_step=int(settings.skip_first_exchange),
    )
    wanted = filters.even_steps(settings.sparsity, plan.num_steps)
    share = settings.prune_fraction_per_step
    return plan, filters.targets(plan.layers, wanted, of_remaining=share)


def is_over(plan: Plan, keep: filters.Keep) -> jax.Array:
    """Tell whether more is pruned than the share after which exchanges stop: ``[]`` bool."""
    pruned = [
        (group.size - jnp.sum(bits, dtype=jnp.int32)) * size
        for group, bits, size in zip(plan.layers, keep, plan.filter_sizes, strict=True)
    ]
    return trees.tree_sum(pruned, dtype=jnp.int32) > int(plan.stop * _num_weights(plan))


def apply_filters(
    plan: Plan, protocol: Protocol, state: RoundState, keep: filters.Keep, *, step: jax.Array
) -> RoundState:
    """Put new filters in force: masks, exact zeros in the weights, and a server without memory.

    Weights that stay are those of the start, since no stage before training moves them. So the next
    stage is rewound, and the server forgets the momentum that led to the start. What reads removed
    channels is cleared at the last exchange only, since it counts in the norms that filters are
    ranked by.
    """
    server = server_optimizers.fedavg() if protocol.server is None else protocol.server
    masks, removed = (
        filters.to_masks(plan.channels, plan.layers, keep, state.params, drops=drops)
        for drops in ("filters", "channels")
    )
    counts = masks_lib.num_kept(removed)
    if plan.remove == "channels":
        masks = trees.tree_where((step == plan.num_steps) | is_over(plan, keep), removed, masks)
    return state._replace(
        params=masks_lib.apply(masks, state.params),
        masks=masks,
        server=server_optimizers.init(server, state.params),
        method=state.method._replace(keep=keep, removed_kept=counts),
    )


def trainer(task: Task, settings: RankingSettings) -> Client:
    """Make the local training of an exchange; its learning rate does not decay."""
    return local_training.local_sgd(
        task.model.loss,
        batcher=task.batches(epochs=settings.vote_epochs),
        optimizer=task.protocol.optimizer,
        penalties=task.penalties,
    )


def exchange(
    task: Task,
    settings: FilterSettings,
    plan: Plan,
    *,
    name: str,
    client: Client,
    fields: Mapping[str, FieldSpec],
    server_update: Callable[[Key, RoundState, Mapping[str, Any]], RoundState],
    reports: Callable[[RoundState, RoundState], Mapping[str, jax.Array]] = lambda before, after: {},
) -> Stage:
    """Make the stage in which all clients train from the start, again and again, and report.

    Clients receive the filters in force where they hold others. Where the start was trained, they
    receive its live weights and statistics when they come for the first time. Once `is_over`,
    nobody is asked any more. `server_update` ends with `apply_filters`; `reports` maps the states
    before and after to arrays for the record.
    """
    is_trained = settings.dense_rounds > 0

    def before_round(state):
        # Masks of id 0 are those of clients that were sent nothing; a trained start is sent.
        least = jnp.maximum(state.masks_id, 1) if is_trained else state.masks_id
        return state._replace(masks_id=least)

    def download(state, masks_held):
        receivers = transport.receivers(state, masks_held)
        newcomers = (masks_held == 0) & is_trained
        kept = masks_lib.num_kept(state.masks)
        messages = {"masks": {"masks": _encode(state)._replace(clients=receivers)}}
        if is_trained:
            messages["start"] = {
                "params": FieldLength(clients=newcomers, live_counts=kept),
                "model_state": FieldLength(clients=newcomers),
            }
        return reporting.Download(
            messages=messages,
            num_downloaded=jnp.where(newcomers[:, None, None], kept[None, None], 0),
            num_masks=receivers.astype(jnp.int32),
        )

    def after_round(before, after, metrics):
        heard_of = jnp.where(metrics.num_participating > 0, after.masks_id, before.masks_id)
        metrics = add_reports(metrics, reports(before, after))
        return after._replace(masks_id=heard_of), metrics

    transport = mask_transport()
    return reporting.reporting_round(
        task.protocol,
        name=name,
        client=client,
        fields=fields,
        server_update=server_update,
        download=download,
        exchange=reporting.Exchange(
            num_rounds=plan.num_exchanges,
            cohort="everyone",
            compute=lambda state: {TRAINED: masks_lib.num_kept(state.masks)[None]},
            is_over=lambda state: is_over(plan, state.method.keep),
            hooks=Hooks(before_round=before_round, after_round=after_round),
        ),
    )


def train_after(
    task: Task,
    settings: FilterSettings,
    plan: Plan,
    before: Sequence[Stage],
    *,
    client: Client | None = None,
    fields: Mapping[str, FieldSpec] = MappingProxyType({}),
) -> Algorithm:
    """Put training under the filters in force behind the stages that choose them.

    Before these come the rounds of dense FedAvg, if there are any; the task's `num_rounds` counts
    the rounds of training alone. It is FedAvg unless there is a `client`, whose message may have
    other `fields`; what such a client remembers begins with training.
    """

    def report(before, after, metrics):
        method: FilterState = before.method
        counts = {NUM_FILTERS: filters.num_kept(method.keep), REMOVED: method.removed_kept}
        return after, add_reports(metrics, counts)

    def init(state):
        method = FilterState(
            keep=filters.full(plan.layers),
            agreement=jnp.zeros((plan.num_exchanges, len(plan.layers)), jnp.float32),
            removed_kept=jnp.asarray(trees.sizes(state.params), jnp.int32),
        )
        return state._replace(method=method)

    make = functools.partial(
        training,
        task.protocol,
        prunable=_prunable(settings),
        masking=Masking(transport=mask_transport()),
        hooks=Hooks(after_round=report),
    )
    plain = task.local_client()
    trained = make(client=plain if client is None else client, fields=fields)
    if settings.dense_rounds:
        start = plain if client is None else selective_sending.with_state_of(client, plain)
        (stage,) = make(client=start).stages
        before = (stage._replace(name="start", num_rounds=settings.dense_rounds), *before)
    published = {
        "filter_masked": functools.partial(_charge, plan, _filter_masked),
        "channel_removed": functools.partial(_charge, plan, _removed),
    }
    return stages.in_order(trained, before, init=init)._replace(
        published=published, has_fixed_masks=True
    )


def _num_weights(plan: Plan) -> int:
    """Count the weights of all filters."""
    return sum(g.size * size for g, size in zip(plan.layers, plan.filter_sizes, strict=True))


def mask_transport() -> MaskTransport:
    """Send a bit a filter of ``state.method.keep``, in a counted coding.

    That all are live is known at the start.
    """

    def is_needed(state):
        return ~jnp.all(jnp.stack([jnp.all(bits) for bits in state.method.keep]))

    return MaskTransport(encode=_encode, is_needed=is_needed)


def _encode(state: RoundState) -> FieldLength:
    keep = state.method.keep
    return FieldLength(template=trees.shape_only(keep), sent_counts=filters.num_kept(keep))


def _prunable(settings: FilterSettings) -> PrunableFn:
    return filters.convolutions if settings.layers == "convolutions" else masks_lib.is_kernel


def _charge(
    plan: Plan, transfer: Callable[..., int], metrics: RoundMetrics, state: RoundState
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
        bits = transfer(plan, metrics.sent.reports, state)
        return PublishedBits(num_up * bits, num_down * bits)
    stored = ledger.charge_storage(metrics, state, storage_models.values)
    num_filters = sum(group.size for group in plan.layers)
    up = num_filters if "masks" in reply else 32 * sum(trees.sizes(state.params))
    return PublishedBits(num_up * up, num_down * num_filters + stored.downlink)


def _filter_masked(plan: Plan, reports: Mapping[str, np.ndarray], state: RoundState) -> int:
    """Charge 32 bits for every weight of a live filter and for all other parameters, live or not.

    So biases, normalization, dense layers and what reads a pruned channel are charged.
    """
    kept = np.asarray(reports[NUM_FILTERS])[0].tolist()
    live = sum(n * size for n, size in zip(kept, plan.filter_sizes, strict=True))
    return 32 * (live + sum(trees.sizes(state.params)) - _num_weights(plan))


def _removed(plan: Plan, reports: Mapping[str, np.ndarray], state: RoundState) -> int:
    """Charge 32 bits for every parameter that is left if what reads pruned channels is removed."""
    del plan, state  # the masks were counted
    return 32 * int(np.asarray(reports[REMOVED])[0].sum(dtype=np.int64))
