"""Rounds of the server alone, and whose examples it works on."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from fedjaxprune import masks as masks_lib
from fedjaxprune import metrics as metrics_lib
from fedjaxprune import trees
from fedjaxprune.federated import populations, server_optimizers
from fedjaxprune.rounds import stages
from fedjaxprune.rounds.protocol import broadcast_of
from fedjaxprune.traffic import TRAINED, FieldLength, Sent
from fedjaxprune.types import (
    Client,
    ClientData,
    Key,
    Metrics,
    Population,
    ReadRule,
    RoundMetrics,
    RoundState,
    Stage,
    client_data,
)

SourceFn = Callable[[Population], ClientData]  # whose examples work at the server is done with
WorkFn = Callable[[Key, RoundState, Population], tuple[RoundState, Metrics]]


@dataclasses.dataclass(frozen=True)
class Source:
    """A `SourceFn` that says which clients' examples it gives.

    Attributes:
      choose: ``population -> ClientData``.
      reads: ids of the clients, or of everyone; as `Stage.reads`.
    """

    choose: SourceFn
    reads: ReadRule = ()

    def __call__(self, population: Population) -> ClientData:
        """Look the examples up."""
        return self.choose(population)


def reads_of(source: SourceFn) -> ReadRule:
    """Tell which clients' examples a function gives; none for one that does not say."""
    return getattr(source, "reads", ())


def server_round(
    name: str,
    work: WorkFn,
    *,
    num_rounds: int = 1,
    masks_known_to: Literal["holders", "everybody", "nobody"] = "holders",
    working_clients: Sequence[int] = (),
    clients_send: Literal["masks", "model"] = "masks",
    reads: ReadRule = (),
) -> Stage:
    """Make a round in which the server works alone: no client takes part, nothing travels.

    Args:
      name: the stage's name in the record.
      work: ``(key, state, population) -> (state, metrics)``.
      num_rounds: how often.
      masks_known_to: who holds the masks that it leaves. Masks that follow from the run's seed and
        the weights that everybody has are known to ``"everybody"`` and need not be sent; otherwise
        to the ``"holders"`` of those before, if they are the same, or to ``"nobody"`` even then.
      working_clients: ids of clients that do the work in truth, for the record: each is sent the
        dense model, trains it and sends a mask back. No more than a cohort.
      clients_send: whether they send the mask alone, or also what they have trained, under it.
      reads: ids of clients whose examples `work` uses, or of everyone (`reads_of`).

    Raises:
      ValueError: while tracing, if more clients work than a cohort has.
    """
    num_working = len(working_clients)

    def round_fn(key, state, members, population):
        after, train = work(key, state, population)
        after = trees.tree_where(stages.is_sound(state, after), after, state)
        num_slots = members.participated.shape[0]
        if num_working > num_slots:
            raise ValueError(
                f"working_clients must be at most a cohort ({num_slots}), got {num_working}."
            )
        ids = jnp.asarray([*working_clients, *[-1] * (num_slots - num_working)], jnp.int32)
        sizes = jnp.asarray(trees.sizes(state.params), jnp.int32)
        num_live = masks_lib.num_kept(after.masks)
        down, up, reports = {}, {}, {}
        if num_working:
            reports = {TRAINED: jnp.broadcast_to(sizes[None, None], (num_slots, 1, *sizes.shape))}
            down = {"broadcast": {"params": FieldLength(), "model_state": FieldLength()}}
            up = {"masks": {"masks": FieldLength(sent_counts=num_live)}}
            if clients_send == "model":
                up["model"] = {
                    "params": FieldLength(live_counts=num_live),
                    "model_state": FieldLength(),
                }
        metrics = RoundMetrics(
            train=train,
            num_live=num_live,
            num_changed=masks_lib.num_changed(state.masks, after.masks),
            num_downloaded=jnp.where((ids >= 0)[:, None, None], sizes[None, None], 0),
            num_uploaded=jnp.zeros((num_slots, *sizes.shape), jnp.int32),
            participated=ids >= 0,
            num_participating=jnp.int32(num_working),
            num_rejected=jnp.int32(0),
            sent=Sent(
                round=state.round,
                client_ids=ids,
                num_masks=jnp.zeros(num_slots, jnp.int32),
                packed_masks=(),
                down=down,
                up=up,
                reports=reports,
            ),
        )
        return stages.close(state, after, known_to=masks_known_to), members.states, metrics

    guarded = stages.mark_guarded(round_fn)
    return Stage(name=name, num_rounds=num_rounds, round=guarded, reads=reads)


def train_at(client: Client, source: SourceFn) -> WorkFn:
    """Make the server train its model on examples of its own, under the masks in force.

    Args:
      client: any local work; its state is forgotten.
      source: ``population -> ClientData``.

    Returns:
      Work for `server_round`. Training that ends in NaN or infinities changes nothing.
    """

    def work(key, state, population):
        own = client.init(state.params)
        message, _ = client.update(key, broadcast_of(state), own, source(population))
        trained = (
            jax.tree.map(jnp.add, state.params, message.fields["delta"]),
            server_optimizers.shift(state.model_state, message.fields["model_state"]),
        )
        params, model_state = trees.tree_where(
            trees.all_finite(trained), trained, (state.params, state.model_state)
        )
        return state._replace(params=params, model_state=model_state), message.fields["metrics"]

    return work


def no_loss() -> Metrics:
    """Report work that has no loss."""
    return {"loss": metrics_lib.zero()}


def server_examples() -> SourceFn:
    """Give the server examples of its own, `Population.held`.

    The function that is returned raises a ValueError, while tracing, where there are none.
    """

    def source(population):
        if (size := populations.num_held(population)) == 0:
            raise ValueError(
                "the server has no examples of its own: set `server.data_fraction` (in Python: "
                "`Population.held`)."
            )
        order = jnp.arange(size, dtype=jnp.int32)
        own_id = _own_id(population)
        return ClientData(population.held, order, jnp.int32(0), jnp.int32(size), own_id)

    return source


def examples_of(client_id: int) -> SourceFn:
    """Take one client's examples, for a mask that knows no other client.

    Raises:
      ValueError: `client_id` is negative; while tracing, if there is no such client.
    """
    if client_id < 0:
        raise ValueError(f"client_id must not be negative, got {client_id}.")

    def source(population):
        num_clients = population.offsets.shape[0] - 1
        if client_id >= num_clients:
            raise ValueError(f"client_id must be less than {num_clients}, got {client_id}.")
        return client_data(population, jnp.int32(client_id))

    return Source(source, reads=(client_id,))


def all_examples() -> Source:
    """Take the examples of all clients, which no server has: the bound of what data can tell."""

    def source(population):
        end = population.offsets[-1]
        own_id = _own_id(population)
        return ClientData(population.examples, population.order, jnp.int32(0), end, own_id)

    return Source(source, reads="everyone")


def _own_id(population: Population) -> jax.Array:
    """Give the server an id that no client has."""
    return jnp.int32(population.offsets.shape[0] - 1)
