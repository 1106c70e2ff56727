"""What decides a run's bits besides its config: settings of JAX and XLA, and the processor."""

import os
from collections.abc import Mapping

from fedjaxprune.experiment.execution import devices

# Options of JAX that change random numbers, types, rounding or the program that XLA makes.
_OPTIONS = (
    "jax_enable_x64",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_threefry_gpu_kernel_lowering",
    "jax_random_seed_offset",
    "jax_default_matmul_precision",
    "jax_allow_f16_reductions",
    "jax_softmax_custom_jvp",
    "jax_disable_jit",
    "jax_disable_most_optimizations",
    "jax_optimization_level",
    "jax_exec_time_optimization_effort",
    "jax_memory_fitting_level",
    "jax_memory_fitting_effort",
    "jax_compiler_enable_remat_pass",
    "jax_use_shardy_partitioner",
    "jax_use_direct_linearize",
    "jax_enable_pgle",
)
_VARIABLES = ("LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG")
_FLAGS = "XLA_FLAGS"
# The number of devices is in the config; dumps change nothing.
_HARMLESS = ("--xla_dump", "--xla_force_host_platform_device_count")
PROCESSOR = "processor"


def here() -> dict[str, str]:
    """List what this process computes with; the devices must be made already."""
    import jax

    known = jax.config.values  # an attribute, where there is one, heeds contexts, too
    found = {name: getattr(jax.config, name, known[name]) for name in _OPTIONS if name in known}
    number = devices.num_cores()
    cores = f"{number} core{'s' * (number > 1)} of {devices.processor()}"
    return {
        **{name: str(value) for name, value in found.items()},
        **{name: os.environ.get(name, "") for name in _VARIABLES},
        _FLAGS: _flags(os.environ.get(_FLAGS, "")),
        PROCESSOR: cores if jax.default_backend() == "cpu" else jax.devices()[0].device_kind,
    }


def _flags(text: str) -> str:
    """Sort flags, of which the last of a name counts, and leave the harmless ones out."""
    last = {flag.partition("=")[0]: flag for flag in text.split()}
    return " ".join(sorted(flag for flag in last.values() if not flag.startswith(_HARMLESS)))


def differences(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Say in which settings that both name a run differs from this process, one phrase each."""
    return [
        f"{name} was {then[name] or 'not set'} then and is {value or 'not set'} now"
        for name, value in now.items()
        if name != PROCESSOR and then.get(name, value) != value
    ]


def other_processor(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Say whether the processor is another one, as `differences` says what else is."""
    old, new = then.get(PROCESSOR), now.get(PROCESSOR)
    is_known = old is not None and new is not None
    return [f"the processor was {old} then and is {new} now"] if is_known and old != new else []
