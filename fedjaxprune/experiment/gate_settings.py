"""The settings of gated networks, and of what is compared with them; fields of the config."""

import functools
from typing import Literal

from fedjaxprune.experiment import fields

Gradient = Literal["strict", "plain"]
Upload = Literal["salient", "touched", "dense"]
Owner = Literal["global", "personal"]


_method = functools.partial(fields.field, group="Method")

DENSITY = fields.field(
    0.7,
    "Channels that every gate keeps for an example (gated networks).",
    group="Model",
    unit="fraction",
    gt=0,
    le=1,
)
WARM_UP = _method(
    0.0,
    "Part of the rounds in which all channels are open; a line leads from there to gate_density, "
    "which is reached after half of the rounds (adaptive_dynamic_pruning, random_channels).",
    unit="fraction",
    ge=0,
    le=0.5,
)
GRADIENT = _method(
    "strict",
    "Whether momentum and weight decay move what no example of a batch kept "
    "(adaptive_dynamic_pruning, random_channels).",
)
UPLOAD = _method(
    "salient",
    "What a client sends: channels kept most often and their salient inputs, all that any example "
    "kept, or everything (adaptive_dynamic_pruning, random_channels).",
)
OWNER = _method(
    "global",
    "Whose the gates are: everybody's, or each client's own, which never travel and which the test "
    "does not see (adaptive_dynamic_pruning, random_channels).",
)
THRESHOLD = _method(
    1e-3,
    "Largest magnitude that becomes zero after a local epoch (feddp_threshold).",
    unit="magnitude",
    ge=0,
    le=1e30,
)
