"""What hostile clients do, to try aggregators on.

An attack goes around any client, or around some clients of every cohort. It changes the averaged
fields of a message (`FIELDS`), after a correction of drift and before masks and uplink, so that a
hostile client keeps to the protocol: it sends what the masks allow, as the uplink allows. Attacks
that need what the others send change the messages as they arrive, where all are at hand.

The metrics that hostile clients report, their control variates and their votes are honest, and so
is what clients do in exchanges other than training rounds.
"""

import fractions
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjaxprune import masks as masks_lib
from fedjaxprune.registry import Part, call
from fedjaxprune.settings import FLOAT_MAX, Positive, Settings, setting
from fedjaxprune.types import (
    Aggregator,
    Client,
    ClientData,
    CohortAggregator,
    Message,
    State,
)

FIELDS = ("delta", "model_state", "grads")  # of a message, where there are such


class Attack(NamedTuple):
    """What a hostile client does; where a function is None, it does as the others.

    Attributes:
      poison: ``data -> data`` that it trains on.
      forge: ``tree -> tree``, what it sends in the place of the floating-point leaves of an honest
        field of `FIELDS`.
      collude: ``(values [C, ...], hostile [C] bool, honest [C] bool) -> values``, for these leaves
        of all clients; those absent are neither.
    """

    poison: Callable[[ClientData], ClientData] | None = None
    forge: Callable[[Any], Any] | None = None
    collude: Callable[[Any, jax.Array, jax.Array], Any] | None = None


class Attackers(NamedTuple):
    """An attack, and the clients of the population that carry it out.

    Attributes:
      attack: what they do.
      client_ids: who they are.
    """

    attack: Attack
    client_ids: Sequence[int]

    def check(self, num_clients: int) -> None:
        """Refuse attackers of whom some, or all, are no clients of the population.

        Raises:
          ValueError: an id is not an integer from 0 to ``num_clients - 1``, comes twice, or there
            is none.
        """
        numbers = int | np.integer
        ids = [i for i in self.client_ids if isinstance(i, numbers) and not isinstance(i, bool)]
        if len(ids) != len(self.client_ids) or not ids or len(set(ids)) < len(ids):
            raise ValueError(
                "client_ids of attackers must be different client numbers, at least one, got "
                f"{tuple(self.client_ids)}."
            )
        if min(ids) < 0 or max(ids) >= num_clients:
            wrong = next(one for one in ids if not 0 <= one < num_clients)
            raise ValueError(
                f"client_ids of attackers must be less than the number of clients ({num_clients}) "
                f"and not negative, got {wrong}."
            )

    def are_among(self, client_ids: jax.Array) -> jax.Array:
        """Mark the hostile ones of a cohort's clients, ``[C]`` bool."""
        return jnp.isin(client_ids, jnp.asarray(self.client_ids, jnp.int32))


class MarkedState(NamedTuple):
    """A client's state with its side.

    Attributes:
      is_hostile: ``[]`` bool.
      inner: state of the wrapped client.
    """

    is_hostile: jax.Array
    inner: State


def sign_flip() -> Attack:
    """Send the opposite of every value."""
    return scaling(factor=-1.0)


def scaling(*, factor: float) -> Attack:
    """Send every value times a factor (model replacement).

    References:
      Bagdasaryan et al., `How to backdoor federated learning <https://arxiv.org/abs/1807.00459>`_,
      2018.
    """
    return Attack(forge=lambda tree: jax.tree.map(lambda leaf: leaf * factor, tree))


def nan() -> Attack:
    """Send NaN everywhere; a round leaves such messages out and counts them as rejected."""
    return Attack(forge=lambda tree: jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), tree))


def label_flip(*, num_classes: int) -> Attack:
    """Train on class ``num_classes - 1 - c`` in the place of class `c`.

    Labels below 0, which mark positions without one, stay.

    Raises:
      ValueError: if there are no two classes; while tracing, if the labels are not integers.
    """
    if num_classes < 2:
        raise ValueError(
            f"attacks.label_flip needs at least 2 classes, and the data have {num_classes}."
        )

    def poison(data):
        labels = data.examples["labels"]
        if not jnp.issubdtype(labels.dtype, jnp.integer):
            raise ValueError(
                f"attacks.label_flip needs integer classes, and the labels are {labels.dtype}."
            )
        flipped = jnp.where(labels < 0, labels, num_classes - 1 - labels)
        return data._replace(examples={**data.examples, "labels": flipped})

    return Attack(poison=poison)


def little_is_enough(*, deviations: float | None) -> Attack:
    """Send the honest mean less a few standard deviations of each coordinate.

    Args:
      deviations: how many. None takes the largest number for which, under a normal distribution,
        enough honest clients lie further out for a majority with the hostile ones (the paper's
        algorithm 3); it is 0 where these are few.

    References:
      Baruch et al., `A little is enough: circumventing defenses for distributed learning
      <https://arxiv.org/abs/1902.06156>`_, 2019.
    """

    def collude(values, hostile, honest):
        reach = _largest_deviation(hostile, honest) if deviations is None else deviations

        def leaf(value):
            mean = _mean(value, honest)
            deviation = jnp.sqrt(_mean(jnp.square(value - mean[None]), honest))
            forged = mean - jnp.asarray(reach, value.dtype) * deviation
            return jnp.where(_along(hostile, value), forged[None], value)

        return jax.tree.map(leaf, values)

    return Attack(collude=collude)


def inner_product(*, strength: float) -> Attack:
    """Send the honest mean times ``-strength``, so that the aggregate points the wrong way.

    References:
      Xie et al., `Fall of empires: breaking Byzantine-tolerant SGD by inner product manipulation
      <https://arxiv.org/abs/1903.03936>`_, 2020.
    """

    def collude(values, hostile, honest):
        def leaf(value):
            forged = _mean(value, honest) * -strength
            return jnp.where(_along(hostile, value), forged[None], value)

        return jax.tree.map(leaf, values)

    return Attack(collude=collude)


def hostile(client: Client, attack: Attack) -> Client:
    """Make a client that always attacks, as far as it can alone (`Attack.collude` is left out)."""

    def update_fn(key, broadcast, state, data):
        data = data if attack.poison is None else attack.poison(data)
        message, state = client.update(key, broadcast, state, data)
        return _forged(message, attack), state

    return client._replace(update=update_fn)


def among(client: Client, attack: Attack) -> Client:
    """Make a client that attacks if its `MarkedState` says so; by default it does not."""

    def init_fn(params):
        return MarkedState(is_hostile=jnp.bool_(False), inner=client.init(params))

    def update_fn(key, broadcast, state, data):
        if attack.poison is not None:
            poisoned = attack.poison(data)
            data = jax.tree.map(
                lambda new, old: new if new is old else jnp.where(state.is_hostile, new, old),
                poisoned,
                data,
            )
        honest, inner = client.update(key, broadcast, state.inner, data)
        forged = _forged(honest, attack)
        fields = {
            name: jax.tree.map(
                lambda new, old: jnp.where(state.is_hostile, new, old), tree, honest.fields[name]
            )
            if name in FIELDS
            else tree
            for name, tree in forged.fields.items()
        }
        return Message(fields=fields, weight=honest.weight), state._replace(inner=inner)

    return Client(init=init_fn, update=update_fn)


def together(
    aggregator: Aggregator | CohortAggregator, attack: Attack, is_hostile: jax.Array
) -> CohortAggregator:
    """Let hostile clients of a cohort ``[C]`` change their values before they are aggregated.

    What a personal mask switches off stays zero. A streaming aggregator is given all messages one
    after the other.
    """

    def reduce_fn(values, masks, weights):
        present = weights > 0
        if (collude := attack.collude) is not None:
            sides = (is_hostile & present, ~is_hostile & present)
            forged = _on_floats(lambda leaves: collude(leaves, *sides), values)
            is_alike = jax.tree.map(jnp.shape, masks) == jax.tree.map(jnp.shape, values)
            values = masks_lib.apply(masks, forged) if is_alike else forged
        if isinstance(aggregator, CohortAggregator):
            return aggregator.reduce(values, masks, weights)
        return _streamed(aggregator, values, masks, weights)

    return CohortAggregator(reduce=reduce_fn)


def choose(rng: np.random.Generator, *, num_clients: int, fraction: float) -> tuple[int, ...]:
    """Draw the hostile clients of a population: ``floor(fraction * num_clients)``, in decimals.

    Raises:
      ValueError: if `fraction` is outside (0, 1), or that is nobody.
    """
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"fraction must lie in (0, 1), got {fraction}.")
    number = int(fractions.Fraction(repr(float(fraction))) * num_clients)
    if number == 0:
        raise ValueError(f"a fraction of {fraction} of {num_clients} clients is nobody.")
    return tuple(int(one) for one in np.sort(rng.choice(num_clients, number, replace=False)))


def _streamed(aggregator: Aggregator, values: Any, masks: Any, weights: jax.Array) -> Any:
    """Aggregate messages ``[C, ...]`` one after the other."""
    zero = aggregator.init(jax.tree.map(lambda leaf: jnp.zeros_like(leaf[0]), values))
    total, _ = jax.lax.scan(
        lambda total, row: (aggregator.add(total, *row), None), zero, (values, masks, weights)
    )
    return aggregator.finish(total)


def _forged(message: Message, attack: Attack) -> Message:
    """Put what the attack makes of them in the place of the averaged fields."""
    if attack.forge is None:
        return message
    names = [name for name in FIELDS if name in message.fields]
    forged = {name: _on_floats(attack.forge, message.fields[name]) for name in names}
    return message._replace(fields={**message.fields, **forged})


def _on_floats(function: Callable[[list[Any]], list[Any]], tree: Any) -> Any:
    """Change the floating-point leaves of a tree, all together; counts and flags stay."""
    leaves, structure = jax.tree.flatten(tree)
    places = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    for place, leaf in zip(places, function([leaves[i] for i in places]), strict=True):
        leaves[place] = leaf
    return jax.tree.unflatten(structure, leaves)


def _largest_deviation(hostile: jax.Array, honest: jax.Array) -> jax.Array:
    """Give the paper's z, ``[]`` float32, for as many hostile and honest clients as there are."""
    num_hostile, num_honest = (jnp.sum(marks, dtype=jnp.int32) for marks in (hostile, honest))
    num_needed = (num_hostile + num_honest) // 2 + 1 - num_hostile
    inside = jnp.clip(num_honest - num_needed, 0, num_honest - 1).astype(jnp.float32)
    share = inside / jnp.maximum(num_honest, 1).astype(jnp.float32)
    return jax.scipy.stats.norm.ppf(jnp.maximum(share, 0.5))


def _mean(value: jax.Array, marks: jax.Array) -> jax.Array:
    """Average a leaf ``[C, ...]`` over the marked clients; zero without any."""
    marks = _along(marks, value)
    number = jnp.maximum(jnp.sum(marks, dtype=jnp.int32), 1).astype(value.dtype)
    return jnp.sum(jnp.where(marks, value, jnp.zeros_like(value)), axis=0) / number


def _along(marks: jax.Array, leaf: jax.Array) -> jax.Array:
    """Give ``[C]`` the number of axes of a leaf ``[C, ...]``."""
    return marks.reshape(-1, *[1] * (leaf.ndim - 1))


class ScalingSettings(Settings):
    """Settings of `scaling`."""

    factor: float = setting(
        10.0,
        "Factor on every value that a hostile client sends.",
        unit="factor",
        ge=-FLOAT_MAX,
        le=FLOAT_MAX,
    )


class LittleIsEnoughSettings(Settings):
    """Settings of `little_is_enough`."""

    deviations: float | None = setting(
        None,
        "Distance from the honest mean of each coordinate.",
        unit="standard deviations",
        unset="the most that hides among the honest, as published",
        ge=-FLOAT_MAX,
        le=FLOAT_MAX,
    )


class InnerProductSettings(Settings):
    """Settings of `inner_product`."""

    strength: Positive = setting(
        10.0, "Length of what is sent, by that of the honest mean.", unit="factor"
    )


def _none() -> None:
    """Leave all clients honest."""


PARTS = {
    "none": Part(call(_none), summary="all clients are honest"),
    "sign_flip": Part(call(sign_flip), summary="the opposite of every value"),
    "scaling": Part(call(scaling), ScalingSettings, summary="every value times a factor"),
    "nan": Part(call(nan), summary="NaN everywhere"),
    "label_flip": Part(call(label_flip), summary="training on the mirrored classes"),
    "little_is_enough": Part(
        call(little_is_enough),
        LittleIsEnoughSettings,
        summary="the honest mean less a few deviations (Baruch et al., 2019, arXiv 1902.06156)",
    ),
    "inner_product": Part(
        call(inner_product),
        InnerProductSettings,
        summary="against the honest mean (Xie et al., 2020, arXiv 1903.03936)",
    ),
}
