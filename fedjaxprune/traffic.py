"""What the ledger reads and what it returns: counts of what was sent, and bits."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:  # reading a record needs no JAX
    import jax

BITS_PER_MIB = 8 * 2**20

# How a field of a message travels: all of it, its entries under the masks in training, pairs of
# index and value among the entries that those masks rule out (one for each entry that is not zero),
# the places of such entries without their values, bits in a coding of counts, in a message of their
# own that comes first, or not at all.
Send = Literal["whole", "masked", "pairs", "places", "bits", "nothing"]


# Reports ``[C, T, L]`` int32 of stages from which no delta travels: entries per leaf of the T
# models that each client trained, passed its examples through, or differentiated.
TRAINED, EVALUATED, BACKPROPAGATED = "trained", "evaluated", "backpropagated"
# A report ``[C, L]`` int32 of a stage whose clients receive more than they train with: entries per
# leaf that the loss sees.
SEEN = "seen"
# Among a client's metrics, the mean over examples of whether the gradient of all weights was wanted
# of them, pruned ones included: ``[]``, or ``[L]`` where it differs by leaf.
DENSE_GRADIENT = "dense_gradient"
# Among a client's metrics, of how many examples it took the gradient of all weights once more,
# beside its local steps: ``[]``, of weight 1 a client.
EXTRA_GRADIENT = "extra_gradient"
# A field of a client's message in training, ``[]`` bool: True of a client that sends this bit and
# nothing else. It is sent as "bits", and a client that sends the rest does not send it.
SILENT = "silent"
# A report ``[C]`` float32: examples that each silent client passed over, of which no metrics tell.
SILENT_EXAMPLES = "silent_examples"
# The server's message whose field `params` is the downlink's business.
DOWNLINK = "downlink"


class Payload(NamedTuple):
    """What an uplink or a downlink sends of one leaf, in counts, from which the length follows.

    Attributes:
      num_values: entries that are sent.
      indices: how the receiver knows which: they are all that may travel (`implied`), they follow
        from the message's seed (`from_seed`), or they are sent (`explicit`).
      level_bits: bits of a quantized value; 0 for values as they are.
      num_scales: float32 numbers that say what the levels mean.
    """

    num_values: int
    indices: Literal["implied", "from_seed", "explicit"] = "implied"
    level_bits: int = 0
    num_scales: int = 0


class FieldLength(NamedTuple):
    """What of one field of a message travels, as far as the length depends on it.

    ``L`` counts the leaves of the field's own tree. The default is all of it, to or from everybody.

    Attributes:
      template: the tree with leaves ``[0, ...]``, their shapes and types (`trees.shape_only`); ()
        for what the state tells: `model_state` like the model's, `masks` the prunable leaves,
        anything else like the parameters.
      clients: ``[C]`` bool, to or from whom it travels; () for all.
      live_counts: ``[L]`` or ``[C, L]`` int32, entries under masks that the receiver knows, which
        alone may travel; () where there are no such masks.
      sent_counts: ``[L]`` or ``[C, L]`` int32, entries that travel with their indices, which are
        numbered among those; a leaf without any stays away. () where all travel. Of a mask it is
        how many entries are live, and every leaf travels. Of booleans under `live_counts` the
        positions of those that are True travel alone.
    """

    template: Any = ()
    clients: Any = ()
    live_counts: Any = ()
    sent_counts: Any = ()


class Sent(NamedTuple):
    """What a round's messages were, as far as their length depends on it.

    A message is a mapping from names to fields. It travels where any of its fields does.

    Attributes:
      round: ``[]`` int32, the round's index.
      client_ids: ``[C]`` int32; below 0 for padding.
      num_masks: ``[C]`` int32, masks that each slot has to be sent: one where a client holds other
        masks than those in force.
      packed_masks: tuple of ``[ceil(size / 8)]`` uint8, the masks in force of the prunable leaves
        as `masks.pack` gives them, anything where they are not sent; () where they never travel or
        are fields of a message.
      down: the server's messages by name, but for the masks in force. What the field `params` of
        the message `DOWNLINK` takes is the downlink's business.
      up: the clients' messages by name. What the field `delta` takes is the uplink's business.
      reports: by name, ``[C, ...]`` that the simulator is given and that does not travel.
    """

    round: "jax.Array"
    client_ids: "jax.Array"
    num_masks: "jax.Array"
    packed_masks: Any
    down: Mapping[str, Mapping[str, FieldLength]]
    up: Mapping[str, Mapping[str, FieldLength]]
    reports: Mapping[str, Any]


class LinkBits(NamedTuple):
    """Bits in one direction, by kind; together they are the messages' length.

    Attributes:
      values: weights, deltas, gradients, quantized or not, with their scales.
      indices: which weights they are, where the receiver cannot know; seeds.
      masks: masks.
      statistics: what is not trained (BatchNorm statistics).
      framing: names, shapes, checksums, and the client's number of examples.
    """

    values: int
    indices: int
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


class PublishedBits(NamedTuple):
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
      published: by name, what published formulas charge instead.
    """

    uplink_bits: int
    downlink_bits: int
    uplink: LinkBits
    downlink: LinkBits
    clients: tuple[ClientBits, ...]
    published: Mapping[str, PublishedBits]
