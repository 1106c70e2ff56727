"""The suite is strict: no implicit dtype or rank promotion; warnings are errors."""

import os
import pathlib

# Most of the suite's time is compiling; what optimizations may change, the laws do not depend on.
# `JAX_DISABLE_MOST_OPTIMIZATIONS=0 pytest` tests the code as it runs in production.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

# Where JAX_COMPILATION_CACHE_DIR names a folder, everything that was compiled is kept there.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)  # for the sharded cohorts; all else uses the first
jax.devices()  # from here on their number is fixed, whatever a run asks for
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def tfds_data_dir() -> pathlib.Path:
    """Find prepared TFDS data: ``TFDS_DATA_DIR``, else ``shared/data/tfds`` beside the checkout."""
    beside = pathlib.Path(__file__).parents[2] / "shared" / "data" / "tfds"
    folder = pathlib.Path(os.environ.get("TFDS_DATA_DIR", beside))
    if not (folder / "fashion_mnist").is_dir():
        pytest.skip(f"no prepared fashion_mnist in {folder}; set TFDS_DATA_DIR to run this case")
    return folder


@pytest.fixture(scope="module", autouse=True)
def _programs_are_freed():
    """Let go of what a module compiled: a process may not hold thousands of programs."""
    yield
    jax.clear_caches()
