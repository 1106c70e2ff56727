"""Runs of one process that share what is built of a config, and so what is traced and compiled."""

import json
from collections.abc import Callable

from fedjaxprune.experiment.config import files, sections
from fedjaxprune.experiment.config.sections import RunConfig
from fedjaxprune.experiment.execution import chunk_size
from fedjaxprune.experiment.execution.processes import ALONE, Processes
from fedjaxprune.experiment.run.loop import RunParts

_KEPT: dict[str, RunParts] = {}


def _key(config: RunConfig, *, is_resumed: bool) -> str | None:
    """Tell a config and the code of its parts; None where a part is a value."""
    code = files.whose_code(config)
    if any(one.get("source") == "value" for one in code.values()):
        return None
    return json.dumps([sections.plain(config), code, is_resumed])


def remembering(build: Callable[..., RunParts]) -> Callable[..., RunParts]:
    """Let ``build.build`` keep what it built for the next run of the same config."""

    def build_once(
        config: RunConfig, *, warn: chunk_size.WarnFn | None = None, processes: Processes = ALONE
    ) -> RunParts:
        key = _key(config, is_resumed=warn is None)
        if key is None or processes.number > 1:
            return build(config, warn=warn, processes=processes)
        if key not in _KEPT:
            made = _KEPT[key] = build(config, warn=warn)
            if resumed := _key(made.config, is_resumed=True):
                _KEPT[resumed] = made  # a run folder has devices, chunk size and clients
        return _KEPT[key]

    return build_once
