"""How the processes of a run find each other: process 0 listens, the others call it.

What cannot work is refused in one sentence: processes that disagree on their number, that have the
same number, or that run other versions.
"""

import contextlib
import socket
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from fedjaxprune.errors import ConfigError
from fedjaxprune.experiment.execution.channel import Link

_SIGN = "fedjaxprune"  # begins what a process says first
_GREETING_S = 10.0  # that a connection has to say it
_AGAIN_S = 0.2  # until process 0 is called again


class Place(NamedTuple):
    """Where process 0 listens."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def place_of(text: str) -> Place:
    """Read ``HOST:PORT``."""
    host, colon, port = text.rpartition(":") if isinstance(text, str) else ("", "", "")
    if not colon or not host.strip("[]") or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(
            f"coordinator must be HOST:PORT, with the port in [1, 65535], or auto, got {text!r}."
        )
    return Place(host.strip("[]"), int(port))


class Caller(NamedTuple):
    """What a process says of itself first.

    Attributes:
      process: which one it is, from 0.
      number: how many there are.
      versions: of what it runs, which must be the same on all.
    """

    process: int
    number: int
    versions: Mapping[str, str]


def meet(place: Place, own: Caller, *, wait_s: float) -> dict[int, Link]:
    """Connect process 0 with all others; return this process's links by the other's number.

    Raises:
      ConfigError: the processes do not fit together, or did not all come within `wait_s`.
    """
    deadline = time.monotonic() + wait_s
    if own.process > 0:
        return {0: _call(place, own, deadline, wait_s)}
    links: dict[int, Link] = {}
    try:
        with _listener(place) as server:
            while len(links) < own.number - 1:
                link = _accepted(server, own, links, deadline)
                if link is None:
                    missing = sorted({*range(1, own.number)} - set(links))
                    named = ", ".join(map(str, missing))
                    raise ConfigError(
                        f"{len(missing)} of {own.number} processes did not come to {place} within "
                        f"{wait_s:g} s: --process-id {named}."
                    )
                if link.process in links:
                    links[link.process].close()
                links[link.process] = link
    except BaseException as error:
        for link in links.values():
            with contextlib.suppress(OSError):
                is_known = isinstance(error, ConfigError)
                link.send("refused", why=str(error) if is_known else "process 0 was stopped.")
            link.close()
        raise
    for link in links.values():
        with contextlib.suppress(OSError):  # one that is gone is missed by the channel
            link.send("welcome", host=socket.gethostname())
    return links


def _listener(place: Place) -> socket.socket:
    """Listen on the interfaces that others reach: the loopback alone if that is what was given."""
    try:
        found = socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)
        family, address = found[0][0], found[0][4]
        is_loopback = str(address[0]).startswith("127.") or address[0] == "::1"
        bound = str(address[0]) if is_loopback else ""
        return socket.create_server((bound, place.port), family=family)
    except OSError as error:
        raise ConfigError(
            f"process 0 cannot listen at {place} ({error.strerror or error}): give another "
            "coordinator, of this machine."
        ) from None


def _accepted(
    server: socket.socket, own: Caller, links: Mapping[int, Link], deadline: float
) -> Link | None:
    """Wait for the next process; None once it is too late."""
    while (left := deadline - time.monotonic()) > 0:
        server.settimeout(left)
        try:
            connection, address = server.accept()
        except TimeoutError:
            return None
        link = Link(connection, process=-1, host=str(address[0]))
        link.set_timeout(_GREETING_S)
        facts = _greeting(link)
        if facts is None:  # somebody else
            link.close()
            continue
        link.process, link.host = facts["process"], facts["host"]
        if why := _mismatch(own, facts, link.host):
            with contextlib.suppress(OSError):
                link.send("refused", why=why)
            link.close()
            raise ConfigError(why)
        other = links.get(link.process)
        is_taken = other is not None and other.is_open()  # else it was ended while it waited
        if is_taken or not 0 < link.process < own.number:
            others = socket.gethostname() if other is None else other.host
            with contextlib.suppress(OSError):
                link.send(
                    "refused",
                    why=f"two processes have --process-id {link.process} (on {others} and "
                    f"{link.host}): give each its own, from 0 to {own.number - 1}.",
                )
            link.close()
            continue
        return link
    return None


def _greeting(link: Link) -> dict[str, Any] | None:
    """Read what a process says of itself; None if it is none of ours."""
    said = link.receive(most_bytes=0)
    kinds = {"process": int, "number": int, "host": str, "versions": dict}
    if said is None or said.kind != _SIGN:
        return None
    is_whole = all(isinstance(said.facts.get(name), kind) for name, kind in kinds.items())
    return said.facts if is_whole else None


def _mismatch(own: Caller, facts: Mapping[str, Any], host: str) -> str:
    """Say why a process does not belong to this one; empty if it does."""
    who = f"process {facts['process']} on {host}"
    if facts["number"] != own.number:
        return (
            f"{who} was started with --num-processes {facts['number']} and process 0 with "
            f"{own.number}: give all the same."
        )
    theirs = facts["versions"]
    for name in sorted({*own.versions, *theirs}):
        here, there = own.versions.get(name), theirs.get(name)
        if here != there:
            return f"{who} has {name} {there} and process 0 has {here}: install the same on all."
    return ""


def _call(place: Place, own: Caller, deadline: float, wait_s: float) -> Link:
    """Call process 0 until it answers."""
    while True:
        left = deadline - time.monotonic()
        link = None
        with contextlib.suppress(OSError):
            connection = socket.create_connection(
                (place.host, place.port), timeout=max(0.1, min(left, 5.0))
            )
            link = Link(connection, process=0, host=place.host)
            link.set_timeout(max(0.1, left))  # until all the others have come
            link.send(
                _SIGN,
                process=own.process,
                number=own.number,
                host=socket.gethostname(),
                versions=dict(own.versions),
            )
            answer = link.receive()
            if answer is not None and answer.kind == "welcome":
                link.host = str(answer.facts.get("host"))
                return link
            if answer is not None and answer.kind == "refused":
                link.close()
                raise ConfigError(str(answer.facts.get("why")))
        if link is not None:
            link.close()
        if left <= 0:
            raise ConfigError(
                f"process {own.process} could not reach process 0 at {place} within {wait_s:g} s: "
                "see that it runs, and that its port is open."
            )
        time.sleep(min(_AGAIN_S, max(0.0, left)))
