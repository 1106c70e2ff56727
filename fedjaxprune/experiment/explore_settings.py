"""The settings of methods that explore before they train; fields of the config.

Like `config`, this imports neither JAX nor anything that does.
"""

from typing import Literal

from fedjaxprune.experiment.fields import field as _field

Watch = Literal["epoch", "last_step", "validation"]
Weights = Literal["clients", "examples"]
Scale = Literal["min_max", "ranks", "robust", "plain"]
Agreement = Literal["none", "scaled", "majority"]
Start = Literal["initial", "explored"]
Optimizer = Literal["sgd", "adam"]


EPOCHS = _field(
    150,
    "Most passes of an explorer over its data (autoflip, explored_start).",
    unit="epochs",
    ge=1,
    le=2**31 - 1,
    group="Method",
)
PATIENCE = _field(
    40,
    "Passes without an improvement after which an explorer stops (autoflip, explored_start).",
    unit="epochs",
    ge=1,
    le=2**31 - 1,
    group="Method",
)
WATCH = _field(
    "epoch",
    "Whose improvement that is: the mean loss of a pass, the loss of its last batch, or the loss "
    "on a development_share of the client's examples, which it then does not train on (autoflip, "
    "explored_start).",
    group="Method",
)
EXPLORERS = _field(
    None,
    "Clients that explore; at most the population; unset: all (autoflip, explored_start).",
    unit="clients",
    ge=1,
    le=2**31 - 1,
    group="Method",
)
WEIGHTS = _field(
    "clients", "Whether explorers count equally or by their examples (autoflip).", group="Method"
)
SCALE = _field(
    "min_max",
    "What makes the guidance of different layers comparable: stretching to [0, 1], ranks, median "
    "and interquartile range, or nothing (autoflip).",
    group="Method",
)
AGREEMENT = _field(
    "none",
    "Whether the share of clients that vote for a weight multiplies its guidance, or must be a "
    "half at least (autoflip).",
    group="Method",
)
REFRESH = _field(
    None,
    "Rounds from one revision of the mask by guidance to the next; unset: none (autoflip).",
    unit="rounds",
    ge=1,
    le=2**31 - 1,
    group="Method",
)
CHANNELS = _field(
    None,
    "Share of its incoming weights that a channel must keep, else it is pruned altogether, at most "
    "half of a layer; unset: single weights only (autoflip).",
    unit="fraction",
    ge=0,
    le=1,
    group="Method",
)
START = _field(
    "initial",
    "Weights that training starts from: the initial ones, or the mean of the explored ones "
    "(autoflip).",
    group="Method",
)
OPTIMIZER = _field(
    "sgd",
    "The clients' optimizer, afresh in every round; adam takes no momentum setting.",
    group="Local training",
)
