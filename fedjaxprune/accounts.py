"""What the ledger is told and what it says: counts of what was sent, and bits."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax


class Payload(NamedTuple):
    """What an uplink sends of one leaf, in counts; from it the ledger knows the message's length.

    Attributes:
      num_values: entries that are sent.
      positions: how the receiver knows which: they are all that may travel (`known`), they follow
        from the message's seed (`seed`), or their positions are `sent`.
      level_bits: bits of a quantised value; 0 for values as they are.
      num_scales: float32 numbers that say what the levels mean.
    """

    num_values: int
    positions: Literal["known", "seed", "sent"] = "known"
    level_bits: int = 0
    num_scales: int = 0


class Sent(NamedTuple):
    """What a round's messages were, as far as their length depends on it.

    Attributes:
      round: ``[]`` int32, the round's index.
      client_ids: ``[C]`` int32.
      stale: ``[C]`` bool, clients that held other masks than those in force.
      packed_masks: tuple of ``[ceil(size / 8)]`` uint8, the masks in force of the prunable leaves
        as `masks.pack` gives them, anything where nobody was stale; () where nothing is pruned.
      personal_kept: ``[C, L]`` int32, live entries of the personal masks; () where there are none.
      fields: ``[C]`` bool by field of the messages: whether it travelled. A field that may stay
        away in some rounds (dense gradients) travels where any of it is not zero.
      like: by field of the messages, its tree with leaves ``[0, ...]``: their shapes and types.
      reports: by name, ``[C, ...]`` that the simulator was told and that does not travel.
    """

    round: jax.Array
    client_ids: jax.Array
    stale: jax.Array
    packed_masks: Any
    personal_kept: Any
    fields: Mapping[str, jax.Array]
    like: Mapping[str, Any]
    reports: Mapping[str, Any]


class LinkBits(NamedTuple):
    """Bits in one direction, by kind; together they are the messages' length.

    Attributes:
      values: weights, deltas, gradients, quantised or not, with their scales.
      positions: which weights they are, where the receiver cannot know; seeds.
      masks: masks.
      statistics: what is not trained (BatchNorm statistics).
      framing: names, shapes, checksums, and the client's number of examples.
    """

    values: int
    positions: int
    masks: int
    statistics: int
    framing: int


class ClientBits(NamedTuple):
    """What each of some clients sent and received in a round.

    Attributes:
      uplink_bits: sent by each.
      downlink_bits: received by each.
      client_ids: whom it is about, ascending.
    """

    uplink_bits: int
    downlink_bits: int
    client_ids: tuple[int, ...]


class ModelledBits(NamedTuple):
    """What a published formula charges for a round, all clients together.

    Attributes:
      uplink: from the clients.
      downlink: to the clients.
    """

    uplink: int
    downlink: int


class Traffic(NamedTuple):
    """Bits of one round, in Python integers.

    Attributes:
      uplink_bits: length of all messages from the clients.
      downlink_bits: length of all messages to the clients, those that dropped out afterwards too.
      uplink: `uplink_bits` by kind.
      downlink: `downlink_bits` by kind.
      clients: the same by client; clients with the same bits share an entry.
      modelled: by name, what published formulas charge instead.
    """

    uplink_bits: int
    downlink_bits: int
    uplink: LinkBits
    downlink: LinkBits
    clients: tuple[ClientBits, ...]
    modelled: Mapping[str, ModelledBits]
