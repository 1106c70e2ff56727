"""The suite is strict: no implicit dtype or rank promotion; warnings are errors."""

import collections
import gc
import importlib.metadata
import os
import pathlib
import threading
from typing import Any

# Most of the suite's time is compiling; what optimizations may change, the laws do not depend on.
# `JAX_DISABLE_MOST_OPTIMIZATIONS=0 pytest` tests the code as it runs in production.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

# Programs are small: to split each into 32 pieces and compile them apart takes longer.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_cpu_parallel_codegen_split_count=1"
).strip()

# Two thirds of the compile time of XLA before JAX 0.11 on CPUs is one way to emit fusions; later
# versions do not know the option, and need it less.
if int(importlib.metadata.version("jaxlib").split(".")[1]) < 11:
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

# Nobody reads where in the source an operation of a program comes from; to note it for each takes
# a tenth of the time of tracing and lowering.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

# What was compiled is kept for the next run: in the user's cache, or where this names a folder.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    os.path.expanduser(os.environ.get("XDG_CACHE_HOME", "~/.cache") + "/fedjaxprune-tests"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import pytest
from jax._src.interpreters import mlir
from matplotlib.figure import Figure
from PIL import Image

from fedjaxprune.experiment.analysis import plots
from fedjaxprune.experiment.run import build
from tests import built

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


class _Blank(Figure):
    """A picture that is written as one pixel: to draw it takes a third of a small run."""

    def savefig(self, fname: Any, **options: Any) -> None:
        Image.new("L", (1, 1)).save(fname, format=options["format"])


@pytest.fixture(scope="session", autouse=True)
def _pictures_are_blank():
    """Draw no picture of a run in this process, but in tests with `pictures`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "Figure", _Blank)
        yield


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the pictures of the runs of a test."""
    monkeypatch.setattr(plots, "Figure", Figure)


@pytest.fixture(scope="module")
def built_once():
    """Build each config once; whatever a run does with what was built, it does anew.

    A sweep does not let go of what JAX has traced and compiled, which the next test would repeat.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "build", built.remembering(build.build))
        patch.setattr(jax, "clear_caches", lambda: None)
        yield


# JAX before 0.12 makes a context of MLIR for every program that it lowers, and loads all dialects
# into it, which takes longer than to lower a small program. A thread keeps its own for some.
NUM_SHARED = 100
_kept = threading.local()
_make_context = getattr(mlir, "make_ir_context", None)  # JAX's own, which it may rename


def _shared_context() -> Any:
    """Give a context that so many programs of a thread share, and then another one."""
    assert _make_context is not None
    if not getattr(_kept, "num_left", 0):
        _kept.context, _kept.num_left = _make_context(), NUM_SHARED
    _kept.num_left -= 1
    return _kept.context


if _make_context is not None:
    mlir.make_ir_context = _shared_context

MAX_PROGRAMS = 3000  # of about three mappings of memory each, of which Linux allows 65,530
_compiled: list[str] = []
_clear_caches = jax.clear_caches


def _count(event: str, duration: float, **rest: Any) -> None:
    del duration, rest
    if event == "/jax/core/compile/backend_compile_duration":
        _compiled.append(event)


jax.monitoring.register_event_duration_secs_listener(_count)  # pyright: ignore[reportArgumentType]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark as slow the cases of a test that are not among those it names as usual."""
    ids = collections.defaultdict(set)
    for item in items:
        if isinstance(item, pytest.Function) and (usual := item.get_closest_marker("usual")):
            ids[item.location[0], item.originalname, usual.args].add(item.callspec.id)
            if item.callspec.id not in usual.args:
                item.add_marker(pytest.mark.slow)
    for (file, name, named), found in ids.items():
        if not {*named} <= found and not any("[" in arg for arg in config.args):
            raise pytest.UsageError(f"{file}: {name} has no cases {sorted({*named} - found)}")


def pytest_collection_finish() -> None:
    """Search less often for what can be freed: JAX keeps millions of objects while tracing."""
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)


@pytest.fixture(autouse=True)
def _programs_are_freed():
    """Let go of what was compiled: a process may not hold many thousands of programs."""
    yield
    if len(_compiled) > MAX_PROGRAMS:
        _clear_caches()
        _compiled.clear()
