"""End a process whose run cannot continue: one sentence, the folder's mark, an exit status.

The main thread may wait for ever in a collective with a process that is gone, so another thread
ends this one. JAX's coordination service would abort it from C++ at about the same time: while the
run is at work, an abort waits until this module has ended the process, for a while.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

LOST = 75  # exit status where another process is gone; EX_TEMPFAIL of sysexits.h: run it again
_SENDING_S = 0.2  # that what was sent last has to arrive


def leave(sentence: str, mark: Callable[[], object], status: int) -> None:
    """End this process with a sentence on stderr, after `mark`, whatever other threads say."""
    with contextlib.suppress(OSError):
        stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        with contextlib.suppress(Exception):
            mark()
        shown = b"\x1b[?25h\r\n" if os.isatty(stderr) else b""  # a bar hides the cursor
        os.write(stderr, shown + sentence.encode() + b"\n")
    time.sleep(_SENDING_S)
    os._exit(status)


@contextlib.contextmanager
def without_stdout() -> Iterator[None]:
    """Keep what native code writes from stdout."""
    sys.stdout.flush()
    try:
        kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    except OSError:
        yield
        return
    os.dup2(nowhere, 1)
    os.close(nowhere)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


@contextlib.contextmanager
def before_aborts(wait_s: float) -> Iterator[None]:
    """Let native code that aborts wait so long; a thread that ends the process is faster."""
    waits = threading.Event()
    handler_type = ctypes.CFUNCTYPE(None, ctypes.c_int)

    def hold(number: int) -> None:
        del number
        waits.wait(wait_s)

    held = handler_type(hold)
    try:
        set_handler = ctypes.CDLL(None).signal
    except (OSError, TypeError, AttributeError):  # no POSIX
        yield
        return
    set_handler.argtypes, set_handler.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    before = set_handler(signal.SIGABRT, ctypes.cast(held, ctypes.c_void_p))
    try:
        yield
    finally:
        set_handler(signal.SIGABRT, before)
