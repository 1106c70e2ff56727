"""The configuration of a run: one flat, frozen, validated record.

YAML files and the command line have the same names. This module imports neither JAX nor anything
that does, so that ``--help`` and a misspelt option answer at once. Names that stand for functions
become functions in `catalog`.
"""

import difflib
import typing
from collections.abc import Mapping
from typing import Any, Literal

import annotated_types
import pydantic
from pydantic import Field

AlgorithmName = Literal[
    "fedavg", "fedprox", "feddip", "feddip_without_penalty", "feddip_without_pruning"
]
MIN_PENALTY = 5e-4  # first step of FedDIP's penalty, as algorithms.feddip has it
ModelName = Literal["mlp", "lenet5", "cnn", "resnet18", "resnet20", "resnet32"]


class UserError(ValueError):
    """Say in one sentence what the user gave and what is allowed; the command prints just that."""


def _field(default: Any, description: str, *, group: str, unit: str = "", **limits: Any) -> Any:
    """Describe one setting; `unit` and `group` are for the help."""
    return Field(
        default,
        description=description,
        json_schema_extra={"group": group, "unit": unit},
        **limits,
    )


class RunConfig(pydantic.BaseModel):
    """Everything that decides a run; the defaults are the embedded demonstration."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    algorithm: AlgorithmName = _field("feddip", "Federated method.", group="Method")
    sparsity: float = _field(
        0.92,
        "Pruned fraction of the prunable weights at the end (feddip).",
        group="Method",
        unit="fraction",
        ge=0,
        lt=1,
    )
    initial_sparsity: float = _field(
        0.5,
        "Sparsity of the first masks (feddip); at most the sparsity.",
        group="Method",
        unit="fraction",
        ge=0,
        lt=1,
    )
    prune_every: int = _field(
        5,
        "Rounds from one revision of the masks to the next (feddip).",
        group="Method",
        unit="rounds",
        ge=1,
    )
    max_penalty: float = _field(
        1e-3,
        "Largest weight of the penalty on the layers' norms (feddip).",
        group="Method",
        unit="loss per norm",
        ge=0,
    )
    feddip_mode: Literal["masked", "regrow", "dense"] = _field(
        "masked",
        "What feddip ranks: the masked aggregate (published code), the aggregate before masking "
        "(pruned weights may regrow), or a dense server model.",
        group="Method",
    )
    proximal_mu: float = _field(
        0.01,
        "Weight of the proximal term (fedprox).",
        group="Method",
        unit="loss per squared distance",
        ge=0,
    )

    dataset: str = _field(
        "digits",
        "Data set: digits needs no download; any TFDS image-classification set by its own name.",
        group="Data",
        min_length=1,
    )
    data_dir: str | None = _field(
        None,
        "Folder of prepared TFDS data; unset: TFDS_DATA_DIR, else ~/tensorflow_datasets.",
        group="Data",
    )
    partition: Literal["iid", "stratified", "shards", "dirichlet"] = _field(
        "iid", "How the examples are dealt to the clients.", group="Data"
    )
    classes_per_client: int = _field(
        2, "Classes that each client holds (shards).", group="Data", unit="classes", ge=1
    )
    alpha: float = _field(
        0.5,
        "Concentration of the label distribution; smaller is more skewed (dirichlet).",
        group="Data",
        gt=0,
    )
    min_client_size: int = _field(
        10,
        "Fewest examples that a client may hold (dirichlet).",
        group="Data",
        unit="examples",
        ge=1,
    )
    augment: bool = _field(
        False, "Crop and flip training images at random, inside the round.", group="Data"
    )
    normalise: bool = _field(
        True,
        "Subtract the data set's mean and divide by its deviation; else just scale to [0, 1].",
        group="Data",
    )

    model: ModelName = _field("mlp", "Network.", group="Model")
    norm: Literal["batch", "group"] = _field(
        "batch", "Normalisation layers (resnets).", group="Model"
    )

    num_clients: int = _field(20, "Population.", group="Federation", unit="clients", ge=1)
    cohort_size: int = _field(
        10,
        "Clients that take part in a round; at most the population.",
        group="Federation",
        unit="clients",
        ge=1,
    )
    participation: Literal["uniform", "weighted"] = _field(
        "uniform", "Draw the cohort uniformly or by the clients' sizes.", group="Federation"
    )
    dropout_probability: float = _field(
        0.0,
        "Probability that a drawn client drops out of the round.",
        group="Federation",
        unit="probability",
        ge=0,
        lt=1,
    )
    rounds: int = _field(100, "Exchanges with the server.", group="Federation", unit="rounds", ge=1)
    aggregator: Literal["weighted_mean", "median", "trimmed_mean"] = _field(
        "weighted_mean", "How the server joins the clients' deltas.", group="Federation"
    )
    trim_fraction: float = _field(
        0.1,
        "Fraction of values cut off at each end (trimmed_mean).",
        group="Federation",
        unit="fraction",
        ge=0,
        lt=0.5,
    )
    server: Literal["fedavg", "fedavgm", "fedadam", "fedyogi"] = _field(
        "fedavg", "The server's optimiser.", group="Federation"
    )
    server_learning_rate: float | None = _field(
        None,
        "The server's step size; unset: 1 for fedavg and fedavgm (fedadam and fedyogi need one).",
        group="Federation",
        gt=0,
    )
    server_momentum: float = _field(
        0.9, "The server's momentum (fedavgm).", group="Federation", ge=0, lt=1
    )

    local_epochs: int = _field(
        2,
        "Passes of a client over its data in a round.",
        group="Local training",
        unit="epochs",
        ge=1,
    )
    local_steps: int | None = _field(
        None,
        "Steps of a client in a round; if set, it replaces local_epochs.",
        group="Local training",
        unit="steps",
        ge=1,
    )
    batch_size: int = _field(
        16, "Examples of one local step.", group="Local training", unit="examples", ge=1
    )
    learning_rate: float = _field(
        0.1, "The clients' step size in the first round.", group="Local training", gt=0
    )
    learning_rate_decay: float = _field(
        0.998,
        "Factor on the learning rate from round to round.",
        group="Local training",
        unit="per round",
        gt=0,
        le=1,
    )
    momentum: float = _field(
        0.0, "The clients' momentum, afresh in every round.", group="Local training", ge=0, lt=1
    )
    weight_decay: float = _field(
        0.0, "Multiple of the weights added to their gradient.", group="Local training", ge=0
    )

    uplink: Literal["identity", "top_k", "random_k", "sign", "quantise"] = _field(
        "identity", "What a client sends of its delta.", group="Uplink"
    )
    uplink_fraction: float = _field(
        0.1,
        "Fraction of the entries sent (top_k, random_k).",
        group="Uplink",
        unit="fraction",
        gt=0,
        le=1,
    )
    uplink_bits_per_value: int = _field(
        8, "Bits of a sent value (quantise).", group="Uplink", unit="bits", ge=1, le=16
    )
    error_feedback: bool = _field(
        False, "Keep what was not sent for the client's next round.", group="Uplink"
    )

    seed: int = _field(0, "Seed of every random choice.", group="Run", ge=0, lt=2**32)
    chunk_size: int = _field(
        0,
        "Clients trained at once; 0: one on CPU, the whole cohort elsewhere.",
        group="Run",
        unit="clients",
        ge=0,
    )
    eval_every: int = _field(
        1,
        "Rounds from one test to the next; the last is always tested.",
        group="Run",
        unit="rounds",
        ge=1,
    )
    checkpoint_every: int = _field(
        10,
        "Rounds from one checkpoint to the next; the last is always saved.",
        group="Run",
        unit="rounds",
        ge=1,
    )
    keep_checkpoints: int = _field(
        3, "Newest checkpoints that are kept.", group="Run", unit="checkpoints", ge=1
    )
    out: str | None = _field(
        None, "Run folder; unset: runs/ALGORITHM-DATASET-TIME.", group="Run", min_length=1
    )

    @pydantic.model_validator(mode="after")
    def _check_together(self) -> "RunConfig":
        """Check what one field alone cannot tell."""
        if self.cohort_size > self.num_clients:
            raise ValueError(
                f"cohort_size must be at most num_clients ({self.num_clients}), "
                f"got {self.cohort_size}."
            )
        pruned = self.algorithm in ("feddip", "feddip_without_penalty")
        if self.algorithm == "feddip" and 0.0 < self.max_penalty < MIN_PENALTY:
            raise ValueError(
                f"max_penalty must be 0 or at least {MIN_PENALTY}, where FedDIP's staircase "
                f"starts, got {self.max_penalty}."
            )
        if pruned and self.initial_sparsity > self.sparsity:
            raise ValueError(
                f"initial_sparsity must be at most sparsity ({self.sparsity}), "
                f"got {self.initial_sparsity}."
            )
        if self.server in ("fedadam", "fedyogi") and self.server_learning_rate is None:
            raise ValueError(
                f"server_learning_rate must be set for the server {self.server!r}: a number "
                "greater than 0, such as 0.01, got none."
            )
        return self


def alternatives(name: str) -> list[str]:
    """List the values of a setting that is one of a few names; empty for any other."""
    annotation = _bare(RunConfig.model_fields[name].annotation)
    return list(typing.get_args(annotation)) if typing.get_origin(annotation) is Literal else []


def is_flag(name: str) -> bool:
    """Tell whether a setting is true or false."""
    return RunConfig.model_fields[name].annotation is bool


def is_optional(name: str) -> bool:
    """Tell whether a setting may be unset."""
    return type(None) in typing.get_args(RunConfig.model_fields[name].annotation)


def allowed(name: str) -> str:
    """Say what a setting may be: ``"a number in [0, 1)"``, ``"one of iid, shards"``."""
    field = RunConfig.model_fields[name]
    if names := alternatives(name):
        return "one of " + ", ".join(names)
    kinds = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}
    text = " ".join([kinds[_bare(field.annotation)], limits(name)]).rstrip()
    return text + (", or none" if is_optional(name) else "")


def _bare(annotation: Any) -> Any:
    """Strip ``| None``."""
    kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
    is_union = type(None) in typing.get_args(annotation)
    return kinds[0] if is_union else annotation


def limits(name: str) -> str:
    """Say between what a number lies: ``"in [0, 1)"``, ``"at least 1"``; empty for no number."""
    low = high = None
    for limit in RunConfig.model_fields[name].metadata:
        match limit:
            case annotated_types.Ge(ge=bound):
                low = ("[", bound, "at least")
            case annotated_types.Gt(gt=bound):
                low = ("(", bound, "greater than")
            case annotated_types.Le(le=bound):
                high = ("]", bound, "at most")
            case annotated_types.Lt(lt=bound):
                high = (")", bound, "less than")
    if low and high:
        return f"in {low[0]}{low[1]}, {high[1]}{high[0]}"
    one = low or high
    return f"{one[2]} {one[1]}" if one else ""


def near_miss(given: Any, names: Any) -> str:
    """Suggest the closest of `names` as ``"; did you mean 'x'?"``, or nothing."""
    text = str(given).lower().replace("-", "_")
    close = difflib.get_close_matches(text, [str(name) for name in names], n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else "."


def validate(values: Mapping[str, Any], *, sources: Mapping[str, str] | None = None) -> RunConfig:
    """Make a config of `values`; the defaults fill what is missing.

    Args:
      values: settings by name.
      sources: where each came from (``"--rounds"``, a file), for the message.

    Raises:
      UserError: one sentence with the setting, what was given and what is allowed.
    """
    try:
        return RunConfig(**values)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise UserError(_sentence(first, sources or {})) from None


def _sentence(error: Any, sources: Mapping[str, str]) -> str:
    """Turn pydantic's first complaint into one sentence."""
    if not error["loc"]:
        return str(error["ctx"]["error"])
    name = str(error["loc"][0])
    source = f" (from {sources[name]})" if name in sources else ""
    if error["type"] == "extra_forbidden":
        names = list(RunConfig.model_fields)
        hint = near_miss(name, names)
        return f"unknown setting {name!r}{source}: `fedjaxprune run --help` lists them all{hint}"
    given = error["input"]
    hint = near_miss(given, alternatives(name)) if alternatives(name) else "."
    return f"{name} must be {allowed(name)}, got {given!r}{source}{hint}"
