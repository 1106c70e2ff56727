"""See that the processes of a run agree: on its settings, its data and how they compute."""

import zlib
from typing import Any

from fedjaxprune.experiment.config import identity
from fedjaxprune.experiment.config.sections import RunConfig, plain
from fedjaxprune.experiment.execution.processes import Processes, check_same


def check_settings(processes: Processes, config: RunConfig) -> None:
    """See that all processes were given the same settings.

    Raises:
      ConfigError: on all processes, and names the setting.
    """
    values = identity.flat(plain(config))
    values.pop(identity.DATA_DIR, None)  # it may lie elsewhere on another machine
    check_same(processes, values, advice="give all processes the same settings")


def check_parts(processes: Processes, parts: Any) -> None:
    """See that all processes have the same network and data, and compute in the same way.

    Raises:
      ConfigError: on all processes, and says what differs.
    """
    from fedjaxprune.experiment.execution import environment
    from fedjaxprune.experiment.folder import network

    here = environment.here()
    here.pop(environment.PROCESSOR)
    checksum = zlib.crc32(network.to_text(parts.network).encode())
    values = {"the checksum of network and data": checksum, **here}
    advice = "give all processes the same data, code and options of JAX"
    check_same(processes, values, advice=advice)
