"""FedTiny's stages before training: make candidates, measure their statistics, compare them."""

import math
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjaxprune import masks as masks_lib
from fedjaxprune import trees
from fedjaxprune.federated import batch_norm
from fedjaxprune.methods.fedtiny import traffic
from fedjaxprune.models import heads
from fedjaxprune.pruning import candidates
from fedjaxprune.rounds import facts as facts_lib
from fedjaxprune.rounds import server_work, stages
from fedjaxprune.rounds.protocol import FieldSpec, broadcast_of
from fedjaxprune.rounds.reporting import Exchange, reporting_round
from fedjaxprune.rounds.task import Task
from fedjaxprune.types import Batcher, Broadcast, Client, PrunableFn, RoundState, Stage, State

if TYPE_CHECKING:
    from fedjaxprune.methods.fedtiny import FedTiny


class Plan(NamedTuple):
    """What is known of the candidates before the first round."""

    prunable: PrunableFn
    num_candidates: int
    sizes: np.ndarray  # [layers] int64, weights of each prunable leaf
    densities: np.ndarray  # [layers] float64, around which candidates are drawn
    noise: float  # largest relative deviation of a layer's density
    num_wanted: float  # live weights of all prunable leaves together
    tolerance: float  # weights by which a candidate may miss these


class Pool(NamedTuple):
    """The candidates, and what is known of them: the `method` of a `RoundState`."""

    counts: jax.Array  # [candidates, layers] int32, live weights of each prunable leaf
    statistics: list[jax.Array]  # [candidates, ...] float32 each, the normalization statistics
    losses: jax.Array  # [candidates] float32, mean losses over the clients; infinite before
    chosen: jax.Array  # [] int32, the candidate that training starts from
    held_id: jax.Array  # [] int32, `masks_held` of clients that hold all candidates; -1 before
    chosen_id: jax.Array  # [] int32, `masks_id` of the chosen candidate's masks; -1 before


def make_plan(facts: facts_lib.Facts, prunable: PrunableFn, settings: "FedTiny") -> Plan:
    """Decide the number of candidates and their densities.

    The sparsity is that of all kernels, also of those that are not `prunable`.
    """
    if not batch_norm.pick(facts.state):
        raise ValueError(
            "FedTiny chooses its start by BatchNorm statistics, but the network has none: take one "
            "with BatchNorm, such as a ResNet."
        )
    stages.check_prunable(facts.params, prunable)
    density = 1.0 - settings.sparsity
    sizes = candidates.sizes_of(facts.params, prunable)
    num_prunable = int(sizes.sum())

    def is_counted(path, leaf):
        return prunable(path, leaf) or masks_lib.is_kernel(path, leaf)

    num_weights = int(candidates.sizes_of(facts.params, is_counted).sum())
    num_whole = num_weights - num_prunable
    share = (density * num_weights - num_whole) / num_prunable
    if share * num_prunable < len(sizes):
        most = 1.0 - (num_whole + len(sizes)) / num_weights
        raise ValueError(
            f"method.sparsity must be at most {math.floor(most * 1e6) / 1e6} in this network, "
            f"which keeps its {num_whole} kernel weights outside the prunable layers and one "
            f"weight in each of {len(sizes)} prunable layers, got {settings.sparsity}."
        )
    share = min(share, 1.0)
    densities = {"uniform": candidates.uniform, "erk": candidates.erk}[settings.allocation]
    return Plan(
        prunable=prunable,
        num_candidates=settings.pool_size or candidates.pool_size(density),
        sizes=sizes,
        densities=densities(facts.params, share, prunable),
        noise=settings.noise,
        num_wanted=share * float(sizes.sum()),
        tolerance=candidates.TOLERANCE * density * num_weights,
    )


def empty_pool(plan: Plan, model_state: State) -> Pool:
    """Make the pool of before the first round."""
    return Pool(
        counts=jnp.zeros((plan.num_candidates, len(plan.sizes)), jnp.int32),
        statistics=[
            jnp.zeros((plan.num_candidates, *leaf.shape), jnp.float32)
            for leaf in batch_norm.pick(model_state)
        ],
        losses=jnp.full(plan.num_candidates, jnp.inf, jnp.float32),
        chosen=jnp.int32(0),
        held_id=jnp.int32(-1),
        chosen_id=jnp.int32(-1),
    )


def prepare(plan: Plan, *, client: Client, source: server_work.SourceFn) -> Stage:
    """Train at the server on its own examples, then draw the candidates."""
    train_at_server = server_work.train_at(client, source)

    def work(key, state, population):
        train_key, pool_key = jax.random.split(key)
        state, train = train_at_server(train_key, state, population)

        def draw(candidate_key):
            return candidates.noisy_counts(
                candidate_key,
                plan.sizes,
                plan.densities,
                noise=plan.noise,
                num_wanted=plan.num_wanted,
                tolerance=plan.tolerance,
            )

        counts = jax.lax.map(draw, jax.random.split(pool_key, plan.num_candidates))
        pool = state.method._replace(
            counts=counts,
            statistics=[
                jnp.broadcast_to(leaf[None], (plan.num_candidates, *leaf.shape)).astype(jnp.float32)
                for leaf in batch_norm.pick(state.model_state)
            ],
        )
        # The first candidate's masks hold until the clients have compared; the weights stay dense.
        masks = candidates.by_magnitude(state.params, counts[0], plan.prunable)
        return state._replace(masks=masks, method=pool), train

    return server_work.server_round("prepare", work, masks_known_to="nobody")


def calibrate(plan: Plan, task: Task, settings: "FedTiny") -> Stage:
    """Average the statistics that the clients measure for each candidate."""
    batcher, num_passes = _validation(task, settings), settings.calibration_passes
    if num_passes is None:
        measure = batch_norm.statistics(task.model.loss, batcher=batcher)
    else:
        measure = batch_norm.moving_statistics(
            task.model.loss, batcher=batcher, num_passes=num_passes
        )
    measure = batch_norm.leave_out(measure)
    # The server tells what was measured, and computes the squares, from what it receives.
    fields = {"statistics": FieldSpec(), "measured": FieldSpec(send="nothing")}
    is_total = settings.variance == "total"
    if is_total:
        measure = batch_norm.with_squares(measure)
        fields["squares"] = FieldSpec(send="nothing")

    def server_update(key, state, fields):
        del key  # deterministic
        before = state.method.statistics
        found = batch_norm.combine(fields["statistics"], fields["measured"], before)
        if is_total:
            found = batch_norm.add_spread(state.model_state, found, fields["squares"])
        return state._replace(method=state.method._replace(statistics=found))

    # Exact statistics start from zero, so that none are sent.
    sent = _statistics_of_one if num_passes is not None else lambda state: []
    return _ask(plan, task, "calibrate", measure, fields, server_update, sent)


def compare(plan: Plan, task: Task, settings: "FedTiny") -> Stage:
    """Start from the candidate of the lowest mean loss."""

    def server_update(key, state, fields):
        del key  # deterministic
        losses = fields["losses"]
        chosen = jnp.argmin(losses).astype(jnp.int32)
        pool = state.method._replace(losses=losses, chosen=chosen, held_id=state.masks_id)
        masks = candidates.by_magnitude(state.params, pool.counts[chosen], plan.prunable)
        has_changed = masks_lib.num_changed(state.masks, masks) > 0
        pool = pool._replace(chosen_id=state.masks_id + has_changed.astype(jnp.int32))
        statistics = [leaf[chosen] for leaf in pool.statistics]
        return state._replace(
            params=masks_lib.apply(masks, state.params),
            masks=masks,
            model_state=batch_norm.put(state.model_state, statistics),
            method=pool,
        )

    losses = batch_norm.losses(
        task.model.predict,
        loss=heads.prediction_loss(task.model),
        batcher=_validation(task, settings),
    )
    fields = {"losses": FieldSpec()}
    # Measured by the clients, each candidate has statistics of its own.
    sent = _statistics_of_all if settings.selection == "adaptive" else _statistics_of_one
    return _ask(plan, task, "compare", losses, fields, server_update, sent)


def _validation(task: Task, settings: "FedTiny") -> Batcher:
    """Make one pass over the examples that clients look at."""
    return task.batches(examples="validation", share=settings.validation_fraction, augment=False)


def _ask(plan, task, name, measure, fields, server_update, sent_statistics) -> Stage:
    """Ask the same clients in both stages: each measures all candidates."""

    def broadcast(state: RoundState) -> Broadcast:
        pool: Pool = state.method  # masks and model state get a leading axis [candidates]
        masks = jax.lax.map(
            lambda counts: candidates.by_magnitude(state.params, counts, plan.prunable), pool.counts
        )
        model_state = jax.vmap(lambda statistics: batch_norm.put(state.model_state, statistics))(
            pool.statistics
        )
        return broadcast_of(state)._replace(masks=masks, model_state=model_state)

    return reporting_round(
        task.protocol,
        name=name,
        client=batch_norm.each_candidate(measure),
        fields=fields,
        server_update=server_update,
        broadcast=broadcast,
        download=lambda state, masks_held: traffic.download(
            state, masks_held, sent_statistics(state), prunable=plan.prunable
        ),
        exchange=Exchange(
            cohort="same", compute=lambda state: traffic.evaluated(state, prunable=plan.prunable)
        ),
    )


def _statistics_of_all(state: RoundState) -> list[jax.Array]:
    return trees.shape_only(state.method.statistics)


def _statistics_of_one(state: RoundState) -> list[jax.Array]:
    return [leaf[:, 0] for leaf in _statistics_of_all(state)]
