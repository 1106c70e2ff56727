"""Laws of a downlink, which are read off the history of any method under a protocol with one."""

from typing import Any

import jax
import numpy as np

from fedjaxprune import trees as tree_lib
from fedjaxprune.testing import laws
from fedjaxprune.testing.history import History, Step
from fedjaxprune.traffic import DOWNLINK
from fedjaxprune.types import Downlink, Masks
from fedjaxprune.wire import format as wire_format
from fedjaxprune.wire import messages


def clients_see_what_is_sent(history: History) -> None:
    """What a client is sent, put into what it holds, is what clients of the round train from.

    It is charged as long as it is. Levels are checked for their length alone, since a message does
    not say what they stand for.
    """
    downlink = _downlink(history)
    held: dict[int, Any] = {}
    for step in _shown(history):
        seen, received = step.after.downlink.seen, step.after.downlink.received
        whole = laws.charged(history, step, step.metrics)
        rest = laws.charged(history, step, _without_params(step))
        for client, here in zip(*step.members, strict=True):
            due = _due(downlink, step, client)
            message = _message(downlink, seen, received, due)
            data = wire_format.encode(message)
            written = 8 * (len(data) - wire_format.frame_bytes(len(message)))
            charge = whole[client][1] - rest[client][1]
            what = f"client {client} is sent {written} bits of parameters, and charged {charge}"
            laws.law(written == charge, step, what)
            if downlink.payload(1).level_bits:
                continue
            copy = _put(held.get(client), data, received, due)
            what = f"client {client} does not see what it is sent"
            laws.same(step, copy, jax.device_get(seen), what)
            if here:
                held[client] = copy


def nothing_is_sent_twice(history: History) -> None:
    """A client that took part in the round before is sent what changed in this one, and no more.

    Only a downlink with versions keeps it.
    """
    downlink = _downlink(history)
    before: Step | None = None
    for step in _shown(history):
        last, before = before, step
        if last is None or last.index + 1 != step.index:  # else what was sent may be replaced
            continue
        seen, old = step.after.downlink.seen, last.after.downlink.seen
        changed = jax.tree.map(lambda a, b: np.asarray(a) != np.asarray(b), seen, old)
        present = {client for client, here in zip(*last.members, strict=True) if here}
        for client in present & set(step.members.client_ids):
            due = _due(downlink, step, client)
            what = f"client {client} is sent entries that it holds, or not all that changed"
            received = step.after.downlink.received
            wanted = jax.tree.map(np.logical_and, changed, jax.device_get(received))
            laws.same(step, due, wanted, what)


def _downlink(history: History) -> Downlink:
    downlink = history.scenario.task.protocol.downlink
    assert downlink is not None, "the protocol has no downlink."
    return downlink


def _shown(history: History) -> list[Step]:
    """Give the rounds that count and in which clients see parameters through the downlink."""
    return [
        step
        for step in history.steps
        if DOWNLINK in step.metrics.sent.down
        and int(step.metrics.num_participating) > int(step.metrics.num_rejected)
    ]


def _due(downlink: Downlink, step: Step, client: int) -> Masks:
    """Mark what a client has to be sent, by what its row says that it holds."""
    shown = step.after.downlink
    received = jax.device_get(shown.received)
    if downlink.due is None:
        return received
    due = jax.device_get(downlink.due(shown, step.rows_before.held["params"][client]))
    return jax.tree.map(np.logical_and, due, received)


def _message(downlink: Downlink, seen: Any, received: Masks, due: Masks) -> dict[str, Any]:
    """Make the part of a message that brings a client the parameters."""
    if downlink.due is not None:
        return messages.pairs("params", seen, received, chosen=due)
    message: dict[str, Any] = messages.values("params", seen, received)
    for name, part in message.items():
        num_kept = part.values.size if part.known is None else int(np.sum(part.known))
        payload = downlink.payload(num_kept)
        if payload.level_bits:
            blank = np.zeros(part.values.shape, np.uint16)
            scales = np.zeros(payload.num_scales, np.float32)
            message[name] = wire_format.levels(
                blank, bits=payload.level_bits, scales=scales, known=part.known
            )
    return message


def _put(held: Any, data: bytes, received: Masks, due: Masks) -> Any:
    """Put what arrives in the place of what a client holds; what it does not receive is zero."""
    known = {
        f"params/{path}": np.asarray(mask)
        for path, mask in tree_lib.items(received)
        if not np.all(mask)
    }
    arrived: dict[str, Any] = {**wire_format.decode(data, known=known)}

    def leaf(path: str, mask: Any, due: Any, old: Any) -> np.ndarray:
        new = arrived.get(f"params/{path}", old)
        return np.where(mask, np.where(due, new, old), np.zeros_like(old))

    blank = jax.tree.map(lambda mask: np.zeros(mask.shape, np.float32), received)
    return tree_lib.map_with_path(leaf, received, due, blank if held is None else held)


def _without_params(step: Step) -> Any:
    """Take the parameters out of what the server's messages were."""
    sent = step.metrics.sent
    fields = {name: one for name, one in sent.down[DOWNLINK].items() if name != "params"}
    return step.metrics._replace(sent=sent._replace(down={**sent.down, DOWNLINK: fields}))
