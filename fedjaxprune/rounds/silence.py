"""Clients that took part in a round and have nothing to say.

A client that sets the field `traffic.SILENT` of its message sends one bit and nothing else: to the
server it counts as absent. It keeps its state and its uplink's memory as they were, so nothing is
lost of what error feedback owes. Its work counts in the record of arithmetic.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from fedjaxprune import trees
from fedjaxprune.rounds.traffic import NUM_UPLOADED, SUMMARY
from fedjaxprune.traffic import SILENT, SILENT_EXAMPLES, FieldLength, Sent
from fedjaxprune.types import Message, State


def keep_still(message: Message, after: State, before: State) -> tuple[Message, State]:
    """Let a client that is silent weigh nothing, send nothing, and keep its state.

    Args:
      message: what would arrive.
      after: the client's states after its work.
      before: the same before it.
    """
    if SILENT not in message.fields:
        return message, after
    is_silent = message.fields[SILENT]
    counts = message.fields[NUM_UPLOADED]
    sent = jnp.where(is_silent, jnp.zeros_like(counts), counts)
    weight = jnp.where(is_silent, jnp.zeros_like(message.weight), message.weight)
    seen = message.fields["metrics"]["loss"].weight
    summary = {
        **message.fields[SUMMARY],
        SILENT_EXAMPLES: jnp.where(is_silent, seen, jnp.zeros_like(seen)),
    }
    fields = {**message.fields, NUM_UPLOADED: sent, SUMMARY: summary}
    return Message(fields, weight), trees.tree_where(is_silent, before, after)


def leave_out(sent: Sent, summary: Mapping[str, Any]) -> Sent:
    """Say of the messages of a round that silent clients send none but the one that says so.

    Args:
      sent: the messages.
      summary: what was noted of the clients' messages (`traffic.summarize_message`), gathered.
    """
    if SILENT not in summary["clients"]:
        return sent
    speaks = ~summary["clients"][SILENT]

    def of_others(field: FieldLength) -> FieldLength:
        clients = speaks if isinstance(field.clients, tuple) else field.clients & speaks
        return field._replace(clients=clients)

    up = {
        message: {
            name: field if name == SILENT else of_others(field) for name, field in fields.items()
        }
        for message, fields in sent.up.items()
    }
    reports = {**sent.reports, SILENT_EXAMPLES: summary[SILENT_EXAMPLES]}
    return sent._replace(up=up, reports=reports)
