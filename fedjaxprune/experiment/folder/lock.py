"""One process a run folder: a lock on its config, which a killed process lets go of by itself."""

import contextlib
import pathlib
import time
from collections.abc import Iterator

from fedjaxprune.errors import RunFolderError
from fedjaxprune.experiment.folder.layout import CONFIG

try:
    import fcntl
except ImportError:  # no POSIX: two processes in one folder go unnoticed
    fcntl = None


@contextlib.contextmanager
def hold(folder: pathlib.Path) -> Iterator[None]:
    """Keep other processes from working in the same folder."""
    with (folder / CONFIG).open("rb") as file:
        if fcntl is not None:
            for last in (False, False, True):
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:
                    if last:
                        raise RunFolderError(
                            f"another process is running in {str(folder)!r}; wait for its end."
                        ) from None
                    time.sleep(0.05)  # somebody may just be looking whether it runs
        yield


def is_held(folder: pathlib.Path) -> bool:
    """Tell whether a process is running in `folder`."""
    if fcntl is None:
        return False
    try:
        with (folder / CONFIG).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    return False
