"""The sections of a run's configuration: shared settings, and where the parts are named.

A part, such as the method or the clients' optimizer, has settings of its own. `resolve` looks the
parts up and makes a type in which their settings stand in the place of a part's name.
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import pydantic

from fedjaxprune.registry import Found
from fedjaxprune.settings import (
    INT_MAX,
    Count,
    Epochs,
    NonNegative,
    Positive,
    Probability,
    Rounds,
    Settings,
    nested,
    setting,
)

SCHEMA = 2
_FEWEST_BITS = 3  # of a value that is rounded, where errors are fed back


def part(kind: str, default: str | None, meaning: str, *, unset: str = "") -> Any:
    """Declare a place where the config names a part."""
    extra: dict[str, Any] = {"kind": kind, "unit": "", "unset": unset}
    return pydantic.Field(default, description=meaning, json_schema_extra=extra)


class Data(Settings):
    """The examples, and which client holds which."""

    dataset: Any = part("dataset", "digits", "Data set: a name, a file, a folder of images.")
    partition: Any = part("partition", "iid", "How the examples are split among the clients.")
    num_clients: Count | None = setting(
        None,
        "Clients in all.",
        unit="clients",
        unset="20, or one for each key where the partition is by key",
    )
    normalize: bool = setting(
        True,
        "Subtract the data set's mean and divide by its standard deviation; else images are scaled "
        "to [0, 1].",
    )
    augment: bool = setting(False, "Crop and flip training images at random.")


class Federation(Settings):
    """Rounds, and who takes part in them."""

    num_rounds: Rounds = setting(100, "Rounds of training.", unit="rounds")
    cohort_size: Count | None = setting(
        None, "Clients that are drawn for a round.", unit="clients", unset="10, or all if fewer"
    )
    sampling: Any = part("sampling", "uniform", "How the clients of a round are drawn.")
    dropout_rate: Probability = setting(
        0.0, "Probability that a drawn client drops out.", unit="probability"
    )
    control: Literal["none", "shuffle", "reinitialize"] = setting(
        "none",
        "Control that trains under the final masks: at random places in each layer, or from new "
        "weights.",
    )
    attack: Any = part(
        "attack", "none", "What hostile clients do in training rounds, to try aggregators on."
    )
    hostile_fraction: float | None = setting(
        None,
        "Fraction of the clients that are hostile; the seed says which.",
        unit="fraction",
        unset="0.2 under an attack, else none",
        gt=0,
        lt=1,
    )


class Client(Settings):
    """What a client computes in a round."""

    epochs: Epochs = setting(2, "Passes of a client over its data in a round.", unit="epochs")
    steps: Count | None = setting(
        None, "Local steps of a client in a round.", unit="steps", unset="epochs counts"
    )
    batch_size: Count = setting(16, "Examples of one local step.", unit="examples")
    optimizer: Any = part("optimizer", "sgd", "The clients' optimizer, fresh in every round.")
    learning_rate_decay: float = setting(
        0.998, "Factor on the learning rate per round.", unit="factor per round", gt=0, le=1
    )
    proximal_mu: NonNegative = setting(
        0.0,
        "Weight of half the squared distance to the global weights (FedProx).",
        unit="loss per squared distance",
    )
    correction: Any = part("correction", "none", "Correction of client drift.")
    hardware: Any = part(
        "hardware", "none", "What the clients' devices can do, for modeled times of rounds."
    )

    @pydantic.model_validator(mode="after")
    def _check_work(self) -> "Client":
        if self.steps is not None and "epochs" in self.model_fields_set:
            raise ValueError(
                f"epochs must be left out where steps are set (here {self.steps}; none unsets "
                f"them), got {self.epochs}."
            )
        return self


class Server(Settings):
    """What the server does with the messages."""

    optimizer: Any = part("server_optimizer", "fedavg", "The server's optimizer.")
    aggregator: Any = part(
        "aggregator", "weighted_mean", "How the server combines the clients' deltas."
    )
    clip: Positive | None = setting(
        None,
        "Largest Euclidean norm of a client's delta; a longer one is shortened to it.",
        unit="norm",
        unset="deltas keep their norm",
    )
    max_weight: Positive | None = setting(
        None,
        "Most examples that a client counts for in means.",
        unit="examples",
        unset="as many as it has",
    )
    data_fraction: float | None = setting(
        None,
        "Share of each class's training examples that the server keeps for itself.",
        unit="fraction",
        unset="5 examples of each class if the method needs any, else none",
        gt=0,
        lt=1,
    )


class Uplink(Settings):
    """What every uplink has besides its own settings."""

    error_feedback: bool = setting(False, "Keep what was not sent for the client's next round.")
    whole_below: int = setting(
        0,
        "Tensors of fewer entries, such as biases, are sent whole.",
        unit="entries",
        ge=0,
        le=INT_MAX,
    )

    @pydantic.model_validator(mode="after")
    def _check_bits(self) -> "Uplink":
        bits = getattr(self, "bits", None)
        if self.error_feedback and isinstance(bits, int) and bits < _FEWEST_BITS:
            raise ValueError(
                f"bits must be at least {_FEWEST_BITS} with error_feedback, whose residual grows "
                f"without bound under coarser rounding, got {bits}."
            )
        return self


class Evaluation(Settings):
    """When the test set is evaluated."""

    every: Rounds = setting(
        1, "Rounds from one test to the next; the last round is always tested.", unit="rounds"
    )
    start: Rounds = setting(1, "First round that is tested.", unit="round")


class Checkpoints(Settings):
    """When checkpoints are saved."""

    every: Rounds = setting(
        10, "Rounds from one checkpoint to the next; the last round is always saved.", unit="rounds"
    )
    keep: Count = setting(3, "Newest checkpoints that are kept.", unit="checkpoints")


class Execution(Settings):
    """How the machine is used."""

    devices: Literal["auto"] | Count = setting(
        "auto",
        "Devices that share the clients of a round; auto: all, of a CPU one a core.",
        unit="devices",
    )
    model_devices: Count = setting(
        1,
        "Devices of these that share one copy of the model.",
        unit="devices",
    )
    chunk_size: Literal["auto"] | Count = setting(
        "auto",
        "Clients that a device trains at once; auto measures it in longer runs.",
        unit="clients",
    )
    convolutions: Literal["auto", "grouped", "patches", "sequential"] = setting(
        "auto",
        "How a GPU or TPU convolves many clients.",
    )
    examples: Literal["auto", "device", "host"] = setting(
        "auto",
        "Where clients' examples are.",
    )
    client_rows: Literal["auto", "device", "host", "disk"] = setting(
        "auto",
        "Where what clients remember is kept.",
    )
    compute_dtype: Literal["float32", "bfloat16"] = setting(
        "float32",
        "Type that clients train in; all else stays float32.",
    )


class Parts(NamedTuple):
    """The parts that a config names, as the registry found them."""

    method: Found
    model: Found
    dataset: Found
    partition: Found
    sampling: Found
    optimizer: Found
    correction: Found
    server_optimizer: Found
    aggregator: Found
    attack: Found
    hardware: Found
    uplink: Found
    downlink: Found


class RunConfig(Settings):
    """Everything that decides a run; made by `resolve.resolve`, which fills in types of parts."""

    method: Any = part("method", "feddip", "Federated method; `fedjaxprune list method`.")
    model: Any = part("model", None, "Network.", unset="what the method is usually run with")
    data: Data = Data()
    federation: Federation = Federation()
    client: Client = Client()
    server: Server = Server()
    uplink: Any = part("uplink", "identity", "What a client sends of its delta.")
    downlink: Any = part("downlink", "identity", "What clients see of the parameters.")
    evaluation: Evaluation = Evaluation()
    checkpoints: Checkpoints = Checkpoints()
    execution: Execution = Execution()
    seed: int = setting(0, "Seed of every random choice.", unit="no unit", ge=0, lt=2**32)

    _parts: Parts = pydantic.PrivateAttr()

    @property
    def parts(self) -> Parts:
        """The parts themselves, each with its `build`."""
        return self._parts

    @pydantic.model_validator(mode="after")
    def _check_together(self) -> "RunConfig":
        """Check what one section alone cannot tell."""
        size, clients = self.federation.cohort_size, self.data.num_clients
        if size is not None and clients is not None and size > clients:
            raise ValueError(
                f"federation.cohort_size must be at most data.num_clients ({clients}), got {size}."
            )
        steps, batch = self.client.steps, self.client.batch_size
        if steps is not None and steps * batch > INT_MAX:
            raise ValueError(
                f"client.steps must be at most {INT_MAX // batch} with client.batch_size {batch}, "
                f"got {steps}."
            )
        if self.federation.hostile_fraction is not None and self.federation.attack.name == "none":
            raise ValueError(
                "federation.hostile_fraction needs a federation.attack other than 'none', got "
                f"{self.federation.hostile_fraction}."
            )
        return self


class Place(NamedTuple):
    """Where a config names a part: its path, kind, and the name by default."""

    path: str
    kind: str
    default: str | None


def _places(kind: type[Settings], prefix: str = "") -> Iterator[Place]:
    for name, field in kind.model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and "kind" in extra:
            yield Place(prefix + name, str(extra["kind"]), field.default)
        elif inner := nested(field.annotation):
            yield from _places(inner, f"{prefix}{name}.")


PLACES: dict[str, Place] = {place.path: place for place in _places(RunConfig)}


def plain(config: RunConfig) -> dict[str, Any]:
    """Give a config as nested dicts of plain values; a part's section begins with its name."""

    def ordered(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        first = {"name": value["name"]} if "name" in value else {}
        return {name: ordered(one) for name, one in (first | value).items()}

    values = config.model_dump(mode="json")
    if config.client.steps is not None:
        del values["client"]["epochs"]  # steps count
    return ordered(values)
