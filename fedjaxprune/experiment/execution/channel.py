"""Short messages between the processes of a run, over TCP, and which of them is gone.

Process 0 listens, and every other process has one connection to it. Each side sends a beat every
few seconds, so a process that dies is noticed at once (its connections are closed by the system)
and one that hangs after the time of a heartbeat. Imports no JAX: process 0 says on this channel
where JAX's own service listens, and a run that ends early ends by it, before JAX's service aborts
the process.
"""

import contextlib
import json
import math
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fedjaxprune.errors import FedJaxPruneError
from fedjaxprune.experiment.execution.last_words import LOST

HEARTBEAT_S = 20.0  # that a process may be silent
_HEAD = struct.Struct(">IQ")  # of a message: the lengths of its facts, as JSON, and of its bytes
_MOST_FACTS = 2**20  # bytes of facts
_BLOCK = 2**20  # bytes that are received at once
_BEATS = 5  # in the time of a heartbeat
_PATIENCE_S = 1.0  # until the others are not told that a process is gone
ENDED, SILENT, FAILED, STOPPED = "ended", "silent", "failed", "stopped"  # how a process is lost

Handler = Callable[[int, Mapping[str, Any]], object]  # takes who sent a message, and its facts


class Loss(NamedTuple):
    """A process that takes part no more.

    Attributes:
      process: which one.
      how: `ENDED` without a word, `SILENT` for the time of a heartbeat, `FAILED` with an error, or
        `STOPPED` by its user or the system.
      sentence: says so, without a full stop.
      status: with which the others end; that of a run that may be continued, or of an error.
    """

    process: int
    how: str
    sentence: str
    status: int = LOST


class ProcessLost(FedJaxPruneError):
    """Another process of the run is gone, so that this one cannot continue."""


class Message(NamedTuple):
    """What is sent: a kind, a few facts, and bytes."""

    kind: str
    facts: dict[str, Any]
    data: bytes


class Link:
    """A connection to another process."""

    def __init__(self, connection: socket.socket, *, process: int, host: str) -> None:
        """Note whose connection it is."""
        self.process, self.host = process, host
        self.heard = time.monotonic()  # when something was last received
        self._connection = connection
        self._sending = threading.Lock()

    def send(self, kind: str, data: bytes = b"", **facts: Any) -> None:
        """Send a message; an OSError if the other process is gone."""
        with self._sending:
            self._send(kind, data, facts)

    def send_soon(self, kind: str, **facts: Any) -> None:
        """Send a message, unless something that is being sent takes longer."""
        if self._sending.acquire(timeout=_PATIENCE_S):
            try:
                self._send(kind, b"", facts)
            finally:
                self._sending.release()

    def beat(self) -> None:
        """Send a beat, unless something else is being sent."""
        if self._sending.acquire(blocking=False):
            try:
                self._send("beat", b"", {})
            finally:
                self._sending.release()

    def _send(self, kind: str, data: bytes, facts: Mapping[str, Any]) -> None:
        said = json.dumps({"kind": kind, **facts}).encode()
        self._connection.sendall(_HEAD.pack(len(said), len(data)) + said)
        if data:
            self._connection.sendall(data)

    def receive(self, *, most_bytes: float = math.inf) -> Message | None:
        """Wait for a message; None if the connection ended or what came is no message."""
        try:
            length, size = _HEAD.unpack(self._read(_HEAD.size))
            if length > _MOST_FACTS or size > most_bytes:
                return None
            facts = json.loads(self._read(length))
            return Message(facts.pop("kind"), facts, self._read(size))
        except (OSError, EOFError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
            return None  # of a stranger it may be any JSON

    def _read(self, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            found = self._connection.recv(min(_BLOCK, size - len(parts)))
            if not found:
                raise EOFError
            self.heard = time.monotonic()
            parts += found
        return bytes(parts)

    def is_open(self) -> bool:
        """Tell whether the other process, which has sent nothing, has not ended the connection."""
        waits = self._connection.gettimeout()
        self._connection.settimeout(0.0)
        try:
            return bool(self._connection.recv(1, socket.MSG_PEEK))
        except OSError as error:
            return isinstance(error, BlockingIOError)
        finally:
            self._connection.settimeout(waits)

    def set_timeout(self, seconds: float | None) -> None:
        """Let what waits for the other process wait so long at most."""
        self._connection.settimeout(seconds)

    def close(self) -> None:
        """End the connection."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


class Channel:
    """What one process has to do with the others: of process 0 all links, of the others one."""

    def __init__(self, links: Mapping[int, Link], *, process: int, heartbeat_s: float) -> None:
        """Begin to listen and to send beats."""
        self.process, self.number = process, len(links) + 1
        self.loss: Loss | None = None  # the first process that is gone
        self.lost = threading.Event()  # set once there is one
        self.handlers: dict[str, Handler] = {}
        self._links, self._heartbeat_s = dict(links), heartbeat_s
        self._values: dict[int, queue.Queue[bytes | None]] = {one: queue.Queue() for one in links}
        self._on_loss: Callable[[Loss], object] | None = None
        self._deciding = threading.Lock()
        self._closed = threading.Event()
        self._ticked = time.monotonic()  # when this process last sent beats
        for link in links.values():
            link.set_timeout(None)
            link.heard = time.monotonic()
            threading.Thread(target=self._listen, args=(link,), daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()

    def share(self, data: bytes = b"") -> bytes:
        """Give all processes the bytes of process 0.

        Raises:
          ProcessLost: another process is gone.
        """
        if self.process > 0:
            return self._take(0)
        self.tell("value", data)
        return data

    def gather(self, data: bytes) -> list[bytes]:
        """Give process 0 the bytes of all, in their order; the others receive none.

        Raises:
          ProcessLost: another process is gone.
        """
        if self.process > 0:
            self.tell("value", data)
            return []
        return [data, *(self._take(one) for one in sorted(self._links))]

    def tell(self, kind: str, data: bytes = b"", **facts: Any) -> None:
        """Send a message on all links; one that cannot be sent is of a process that is gone."""
        for link in self._links.values():
            try:
                link.send(kind, data, **facts)
            except OSError:
                self._lose(self._ended(link))

    def watch(self, on_loss: Callable[[Loss], object] | None) -> None:
        """Call `on_loss`, in another thread, once a process is gone; at once if one is already."""
        with self._deciding:
            self._on_loss, loss = on_loss, self.loss
        if loss is not None and on_loss is not None:
            on_loss(loss)

    def close(self) -> None:
        """End all connections."""
        self._closed.set()
        for link in self._links.values():
            link.close()

    def _take(self, process: int) -> bytes:
        value = self._values[process].get()
        if value is None:
            self._values[process].put(None)
            assert self.loss is not None
            raise ProcessLost(f"{self.loss.sentence}.")
        return value

    def _listen(self, link: Link) -> None:
        while (message := link.receive()) is not None:
            kind, facts, data = message
            if kind == "value":
                self._values[link.process].put(data)
            elif kind in (FAILED, STOPPED):
                sentence = f"{self._who(link)} {facts['words']}"
                self._lose(Loss(link.process, kind, sentence, facts["status"]))
            elif kind == "lost":
                self._lose(Loss(**facts))
            elif kind in self.handlers:
                self.handlers[kind](link.process, facts)
        self._lose(self._ended(link))

    def _beat(self) -> None:
        while not self._closed.wait(self._heartbeat_s / _BEATS):
            now = time.monotonic()
            stood_still, self._ticked = self._stands_still(), now
            for link in self._links.values():
                link.heard = now if stood_still else link.heard
                try:
                    link.beat()
                except OSError:
                    self._lose(self._ended(link))
                if now - link.heard > self._heartbeat_s:
                    why = f"was not heard from for {self._heartbeat_s:g} s"
                    self._lose(Loss(link.process, SILENT, f"{self._who(link)} {why}"))

    def _stands_still(self) -> bool:
        """Tell whether this very process was held up, so that it knows nothing of the others."""
        return time.monotonic() - self._ticked > self._heartbeat_s / 2

    def _who(self, link: Link) -> str:
        return f"process {link.process} on {link.host}"

    def _ended(self, link: Link) -> Loss:
        if self._stands_still():
            why = "was held up for too long, and the others ended"
            return Loss(self.process, SILENT, f"process {self.process} {why}")
        return Loss(link.process, ENDED, f"{self._who(link)} ended without an error message")

    def _lose(self, loss: Loss) -> None:
        """Note the first process that is gone, and let all others know."""
        with self._deciding:
            if self.loss is not None or self._closed.is_set():
                return
            self.loss, on_loss = loss, self._on_loss
        if self.process == 0:
            for link in self._links.values():
                if link.process != loss.process or loss.how == SILENT:
                    with contextlib.suppress(OSError):
                        link.send_soon("lost", **loss._asdict())
        self.lost.set()
        for values in self._values.values():
            values.put(None)
        if on_loss is not None:
            on_loss(loss)
