"""Which runs are repetitions of one configuration, and in which settings two runs differ.

Works on nested dicts of plain values, as a run folder has them, and imports no part.
"""

from collections.abc import Mapping
from typing import Any

SEED = "seed"
DATA_DIR = "data.dataset.data_dir"  # where the data lie says nothing about a run
# Settings that leave a run's numbers as they are (up to rounding, for devices and chunks).
NEUTRAL = (
    "evaluation",
    "checkpoints",
    "execution.devices",
    "execution.model_devices",
    "execution.chunk_size",
    "execution.convolutions",
    "execution.examples",
    "execution.client_rows",
    DATA_DIR,
)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Give nested settings by full path."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        path = f"{prefix}{name}"
        found |= flat(value, f"{path}.") if isinstance(value, Mapping) else {path: value}
    return found


def matters(path: str) -> bool:
    """Tell whether a setting, other than the seed, can change a run's numbers."""
    return path != SEED and not any(path == one or path.startswith(f"{one}.") for one in NEUTRAL)


def configuration(values: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the settings by full path that tell one configuration from another."""
    return {path: value for path, value in flat(values).items() if matters(path)}


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """List the settings by full path in which two configs differ; None where one has no such."""
    first, second = flat(one), flat(other)
    return [
        (path, first.get(path), second.get(path))
        for path in dict.fromkeys([*first, *second])
        if first.get(path) != second.get(path)
    ]
