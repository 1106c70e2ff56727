"""End a run by SIGTERM or SIGHUP, as schedulers and closed terminals send them, and lose no round.

Once rounds run, the run ends after the present one, with a checkpoint. Before that (data are read,
code is compiled) nothing would be lost, and the process ends at once.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

_NAMES = ("SIGTERM", "SIGHUP")
_PATIENCE_S = 1.0  # until a process that compiles, and hears no signal, is ended


class Stopped(BaseException):
    """A signal that came before any round would be lost.

    Attributes:
      number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Watch(NamedTuple):
    """What is known of signals.

    Attributes:
      came: gives the number of the signal that came, or None.
      begin: call it before anything is run; raises `Stopped` if a signal came already.
      stop: call it after each round: whether to save a checkpoint and end the run.
      heard: call it when another process of the run ends it after this round: it had a signal.
    """

    came: Callable[[], int | None]
    begin: Callable[[], None]
    stop: Callable[[], bool]
    heard: Callable[[], None]


@contextlib.contextmanager
def watched(*, last_words: Callable[[int], str]) -> Iterator[Watch]:
    """Watch for signals in the main thread; do nothing in another one, or where others watch.

    Args:
      last_words: ``number -> sentence`` for stderr, if the process is ended while it compiles.
    """
    came: list[int] = []
    has_rounds = False

    def handle(number: int, frame: object) -> None:
        del frame
        came.append(number)
        _let_go_of_terminal()
        if len(came) == 1 and not has_rounds:
            raise Stopped(number)

    def begin() -> None:
        nonlocal has_rounds
        has_rounds = False
        if came:
            raise Stopped(came[0])

    def stop() -> bool:
        nonlocal has_rounds
        has_rounds = True
        return bool(came)

    def heard() -> None:
        if not came:
            came.append(signal.SIGTERM)

    def end_while_compiling(number: int) -> None:
        """Python hears of a signal only once XLA has compiled, which may take minutes."""
        time.sleep(_PATIENCE_S)
        if not came and not has_rounds:
            with contextlib.suppress(OSError):
                shown = b"\x1b[?25h\r\n" if os.isatty(2) else b""  # a bar hides the cursor
                os.write(2, shown + last_words(number).encode() + b"\n")
            os._exit(status(number))

    with _handlers(handle, end_while_compiling):
        yield Watch(lambda: came[0] if came else None, begin, stop, heard)


def status(number: int) -> int:
    """Give the exit status of a process that ends on a signal."""
    return 128 + number


@contextlib.contextmanager
def _handlers(
    handle: Callable[[int, object], None], while_deaf: Callable[[int], None]
) -> Iterator[None]:
    """Install handlers where nobody has, and a thread that hears signals during native code."""
    is_main = threading.current_thread() is threading.main_thread()
    known = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    ours = [one for one in known if is_main and signal.getsignal(one) is signal.SIG_DFL]
    if not ours:
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def listen() -> None:
        while found := os.read(reader, 1):
            if found[0] in ours:
                while_deaf(found[0])
        os.close(reader)

    threading.Thread(target=listen, daemon=True).start()
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for one in ours:
        signal.signal(one, handle)
    try:
        yield
    finally:
        for one in ours:
            signal.signal(one, signal.SIG_DFL)
        signal.set_wakeup_fd(before)
        os.close(writer)  # ends the thread


def _let_go_of_terminal() -> None:
    """Write to nowhere from here on if the terminal is gone, as writing to it would be an error."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            number = stream.fileno()
            try:
                os.write(number, b"")
            except OSError:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, number)
                os.close(nowhere)
