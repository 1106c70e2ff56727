"""The configuration of a run: one flat, frozen, validated record.

YAML files and the command line have the same names. This module and `validation`, which makes a
config of what users give, import neither JAX nor anything that does, so that ``--help`` and a
misspelt option answer at once. Names that stand for functions become functions in `catalog`.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from fedjaxprune.errors import FedJaxPruneError
from fedjaxprune.experiment import explore_settings, gate_settings, mask_settings, methods
from fedjaxprune.experiment.fields import field as _field

UserError = FedJaxPruneError

# Bounds of the machine's numbers, int32 and float32; a setting's own bounds are narrower or none.
INT_MAX, FLOAT_MAX = 2**31 - 1, 1e30
Count = Annotated[int, Field(ge=1, le=INT_MAX)]
NotNegative = Annotated[float, Field(ge=0, le=FLOAT_MAX)]
Positive = Annotated[float, Field(gt=0, le=FLOAT_MAX)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


def _at_most(limit: float, other: str) -> Callable[[dict[str, Any]], Any]:
    """Make a default that is a number, or the setting `other` where that is smaller."""
    return lambda before: min(limit, before[other])


class Settings(pydantic.BaseModel):
    """Everything that decides a run, each setting by itself; the defaults are a demonstration."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    algorithm: methods.Name = _field("feddip", "Federated method.", group="Method")
    sparsity: Fraction = _field(
        methods.default_sparsity,
        "Pruned fraction of the prunable weights. feddip's cubic curve leads to it at the end of "
        "the run; masks follow the curve every prune_every rounds, so the last revision may stop "
        "a little short of it, and so do those of gradual_magnitude. fedtiny, autoflip and the "
        "methods of fixed masks hold it throughout, fedtiny as a fraction of all kernels; mpfl and "
        "the controls by filter take it of each layer's filters; the others have none.",
        group="Method",
        unit="fraction",
        default_text="0.92, 0.3 for autoflip, 0.5 for methods by filter",
    )
    initial_sparsity: Fraction = _field(
        _at_most(0.5, "sparsity"),
        "Sparsity of the first masks (feddip, gradual_magnitude); at most the sparsity.",
        group="Method",
        unit="fraction",
        default_text="0.5, or the sparsity if that is less",
    )
    max_penalty: NotNegative = _field(
        1e-3,
        "Where the staircase of the penalty on the layers' norms leads (feddip): 20 steps over the "
        "run, in a run of fewer rounds one a round.",
        group="Method",
        unit="loss per norm",
    )
    feddip_mode: Literal["masked", "regrow", "dense"] = _field(
        "masked",
        "What feddip ranks: the masked aggregate (published code), the aggregate before masking "
        "(pruned weights may regrow), or a dense server model.",
        group="Method",
    )
    server_share: float | None = _field(
        None,
        "Share of each class's training examples that the server holds back for itself; unset: 5 "
        "examples of each class if the method needs any (fedtiny, magnitude_masks, snip_masks), "
        "else none.",
        group="Data",
        unit="fraction",
        gt=0,
        lt=1,
    )
    pretrain_epochs: Count = _field(
        3,
        "Passes over the examples that a start is made from (fedtiny, magnitude_masks, "
        "one_client_masks, pooled_masks), or in an exchange of mpfl and the controls by filter.",
        group="Method",
        unit="epochs",
    )
    pool_size: int | None = _field(
        None,
        "Candidates among which clients choose; unset: a tenth of 1 / density, so that they cost "
        "as much as a tenth of the dense model (fedtiny).",
        group="Method",
        unit="candidates",
        ge=1,
        le=10_000,
    )
    fedtiny_selection: Literal["adaptive", "vanilla"] = _field(
        "adaptive",
        "Whether clients compare candidates under their own BatchNorm statistics or under the "
        "server's (fedtiny).",
        group="Method",
    )
    development_share: float = _field(
        0.1,
        "Share of a client's examples that it compares candidates on (fedtiny), or that tells an "
        "explorer when to stop (explore_watch).",
        group="Method",
        unit="fraction",
        gt=0,
        le=1,
    )
    explore_epochs: int = explore_settings.EPOCHS
    explore_patience: int = explore_settings.PATIENCE
    explore_watch: explore_settings.Watch = explore_settings.WATCH
    explorers: int | None = explore_settings.EXPLORERS
    explorer_weights: explore_settings.Weights = explore_settings.WEIGHTS
    explore_start: explore_settings.Start = explore_settings.START
    guidance_scale: explore_settings.Scale = explore_settings.SCALE
    agreement: explore_settings.Agreement = explore_settings.AGREEMENT
    refresh_every: int | None = explore_settings.REFRESH
    channel_threshold: float | None = explore_settings.CHANNELS
    layer_sparsity: mask_settings.LayerSparsity = mask_settings.LAYER_SPARSITY
    mask_client: int = mask_settings.MASK_CLIENT
    mask_start: mask_settings.MaskStart | None = mask_settings.MASK_START
    mask_iterations: int = mask_settings.ITERATIONS
    consensus: mask_settings.Consensus = mask_settings.CONSENSUS
    filter_factor: float | None = mask_settings.FILTER_FACTOR
    votes: mask_settings.Votes = mask_settings.VOTES
    start_rounds: int = mask_settings.START_ROUNDS
    drops: mask_settings.Drops = mask_settings.DROPS
    swap_fraction: Fraction = _field(
        0.3,
        "Share of a layer's weights that change places in the first readjustments (fedtiny).",
        group="Method",
        unit="fraction",
    )
    proximal_mu: NotNegative = _field(
        0.01,
        "Weight of the proximal term (fedprox).",
        group="Method",
        unit="loss per squared distance",
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
        min_length=1,
    )
    partition: Literal["iid", "stratified", "shards", "dirichlet"] = _field(
        "iid", "How the examples are dealt to the clients.", group="Data"
    )
    classes_per_client: Count = _field(
        2, "Classes that each client holds (shards).", group="Data", unit="classes"
    )
    alpha: Positive = _field(
        0.5,
        "Concentration of the label distribution; smaller is more skewed (dirichlet).",
        group="Data",
        unit="no unit",
    )
    min_client_size: Count = _field(
        10, "Fewest examples that a client may hold (dirichlet).", group="Data", unit="examples"
    )
    augment: bool = _field(
        False, "Crop and flip training images at random, inside the round.", group="Data"
    )
    normalize: bool = _field(
        True,
        "Subtract the data set's mean and divide by its deviation; else just scale to [0, 1].",
        group="Data",
    )

    model: methods.Network = _field(
        methods.default_network,
        "Network.",
        group="Model",
        default_text="mlp, or resnet8 or gated_resnet8 for a method that needs such a one",
    )
    norm: Literal["batch", "group"] = _field(
        "batch", "Normalization layers (resnets, vgg*_bn, gated networks).", group="Model"
    )
    compute_dtype: Literal["float32", "bfloat16"] = _field(
        "float32",
        "Type that clients train in, forward and backward; bfloat16 is for hardware that has it. "
        "Weights, what is sent, aggregation, statistics and tests stay float32.",
        group="Model",
    )
    gate_density: float = gate_settings.DENSITY
    gate_warm_up: float = gate_settings.WARM_UP
    gate_gradient: gate_settings.Gradient = gate_settings.GRADIENT
    gate_upload: gate_settings.Upload = gate_settings.UPLOAD
    gates: gate_settings.Owner = gate_settings.OWNER
    weight_threshold: float = gate_settings.THRESHOLD

    num_clients: Count = _field(20, "Population.", group="Federation", unit="clients")
    cohort_size: Count = _field(
        _at_most(10, "num_clients"),
        "Clients that take part in a round; at most the population.",
        group="Federation",
        unit="clients",
        default_text="10, or all if there are fewer",
    )
    participation: Literal["uniform", "weighted"] = _field(
        "uniform", "Draw the cohort uniformly or by the clients' sizes.", group="Federation"
    )
    dropout_probability: Fraction = _field(
        0.0,
        "Probability that a drawn client drops out of the round.",
        group="Federation",
        unit="probability",
    )
    rounds: Count = _field(100, "Exchanges with the server.", group="Federation", unit="rounds")
    prune_every: Count = _field(
        methods.default_period,
        "Rounds from one revision of the masks to the next (feddip, fedtiny, gradual_magnitude).",
        group="Method",
        unit="rounds",
        default_text="5 (fedtiny: 10), or less in a run of fewer rounds",
    )
    prune_until: int | None = mask_settings.UNTIL
    drift: Literal["none", "scaffold", "fednova"] = _field(
        "none",
        "Remedy against client drift, under any method's masks: control variates, or averaging per "
        "local step.",
        group="Federation",
    )
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
        "fedavg", "The server's optimizer.", group="Federation"
    )
    server_learning_rate: float | None = _field(
        None,
        "The server's step size; unset: 1 for fedavg and fedavgm (fedadam and fedyogi need one).",
        group="Federation",
        unit="factor",
        gt=0,
        le=FLOAT_MAX,
    )
    server_momentum: Fraction = _field(
        0.9, "The server's momentum (fedavgm).", group="Federation", unit="factor"
    )

    local_epochs: Count = _field(
        2, "Passes of a client over its data in a round.", group="Local training", unit="epochs"
    )
    local_steps: int | None = _field(
        None,
        "Steps of a client in a round; if set, it replaces local_epochs.",
        group="Local training",
        unit="steps",
        ge=1,
        le=INT_MAX,
    )
    batch_size: Count = _field(
        16, "Examples of one local step.", group="Local training", unit="examples"
    )
    optimizer: explore_settings.Optimizer = explore_settings.OPTIMIZER
    learning_rate: Positive = _field(
        0.1, "The clients' step size in the first round.", group="Local training", unit="factor"
    )
    learning_rate_decay: float = _field(
        0.998,
        "Factor on the learning rate from round to round.",
        group="Local training",
        unit="factor per round",
        gt=0,
        le=1,
    )
    momentum: Fraction = _field(
        0.0, "The clients' momentum, afresh in every round.", group="Local training", unit="factor"
    )
    weight_decay: NotNegative = _field(
        0.0,
        "Multiple of the weights added to their gradient.",
        group="Local training",
        unit="factor",
    )

    uplink: Literal["identity", "top_k", "random_k", "sign", "quantize"] = _field(
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
        8, "Bits of a sent value (quantize).", group="Uplink", unit="bits", ge=1, le=16
    )
    error_feedback: bool = _field(
        False, "Keep what was not sent for the client's next round.", group="Uplink"
    )

    seed: int = _field(
        0, "Seed of every random choice.", group="Run", unit="no unit", ge=0, lt=2**32
    )
    chunk_size: Literal["auto"] | Count = _field(
        "auto",
        "Clients that a device trains at once; auto measures which number is fastest, unless the "
        "run is too short for that, and keeps what it measured for other runs.",
        group="Run",
        unit="clients",
    )
    devices: int = _field(
        0,
        "Devices that share the cohort of a round; 0: all there are (a CPU counts as one a core), "
        "at most the cohort.",
        group="Run",
        unit="devices",
        ge=0,
        le=INT_MAX,
    )
    eval_every: Count = _field(
        1,
        "Rounds from one test to the next; the last is always tested.",
        group="Run",
        unit="rounds",
    )
    eval_from: Count = _field(
        1, "First round tested; the last always is.", group="Run", unit="round"
    )
    checkpoint_every: Count = _field(
        10,
        "Rounds from one checkpoint to the next; the last is always saved.",
        group="Run",
        unit="rounds",
    )
    keep_checkpoints: Count = _field(
        3, "Newest checkpoints that are kept.", group="Run", unit="checkpoints"
    )
    out: str | None = _field(
        None, "Run folder; unset: runs/ALGORITHM-DATASET-TIME.", group="Run", min_length=1
    )

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _refuse_truth_as_number(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        """Refuse YAML's true and false where a number belongs, which Python takes for 1 and 0."""
        is_flag = cls.model_fields[info.field_name or ""].annotation is bool
        if isinstance(value, bool) and not is_flag:
            raise ValueError("true and false are no numbers")
        return value


class RunConfig(Settings):
    """A config whose settings fit one another."""

    @pydantic.model_validator(mode="after")
    def _check_together(self) -> "RunConfig":
        """Check what one setting alone cannot tell."""
        if self.cohort_size > self.num_clients:
            raise ValueError(
                f"cohort_size must be at most num_clients ({self.num_clients}), "
                f"got {self.cohort_size}."
            )
        if complaint := methods.complaint(self):
            raise ValueError(complaint)
        if self.local_steps is not None and self.local_steps * self.batch_size > INT_MAX:
            raise ValueError(
                f"local_steps must be at most {INT_MAX // self.batch_size} with batch_size "
                f"{self.batch_size}, got {self.local_steps}."
            )
        coarse = self.uplink == "quantize" and self.uplink_bits_per_value < 3
        if self.error_feedback and coarse:
            raise ValueError(
                "uplink_bits_per_value must be at least 3 with error_feedback, whose residual "
                f"grows without bound under coarser rounding, got {self.uplink_bits_per_value}."
            )
        if self.server in ("fedadam", "fedyogi") and self.server_learning_rate is None:
            raise ValueError(
                f"server_learning_rate must be set for the server {self.server!r}: a number "
                "greater than 0, such as 0.01, got none."
            )
        return self
