"""Set JAX up for the command: compiled code is kept between runs, other packages' logs are not."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator

from fedjaxprune.experiment.execution import chunk_size


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Keep compiled code in ``JAX_COMPILATION_CACHE_DIR``, or else in the user's cache folder.

    Imports JAX.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        with contextlib.suppress(OSError):
            cache = chunk_size.folder() / "jax"
            cache.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(cache))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Error (reading|writing) persistent")
        yield
