"""The vocabulary: type aliases and the protocol tuples that the rest of the package uses.

Letters in shapes: ``N`` population, ``C`` cohort, ``E`` examples of all, ``B`` batch, ``L`` leaves
of the parameters, ``T`` models. Tuples of functions are components, tuples of arrays state or data.
"""

from fedjaxprune.types.aliases import (
    Delta,
    Examples,
    Key,
    Masks,
    Metrics,
    Params,
    PrunableFn,
    Schedule,
    State,
)
from fedjaxprune.types.data import (
    Batch,
    Batcher,
    ClientData,
    Model,
    Population,
    Whole,
    client_data,
    count_examples,
)
from fedjaxprune.types.messages import (
    Aggregator,
    Broadcast,
    Client,
    CohortAggregator,
    Correction,
    Downlink,
    FieldSpec,
    Message,
    Uplink,
)
from fedjaxprune.types.pruning import (
    Pruner,
    PrunerInputs,
    Sight,
    WeightView,
)
from fedjaxprune.types.rounds import (
    Algorithm,
    ClientState,
    Cohort,
    CohortRule,
    FormulaFn,
    ReadRule,
    RoundFn,
    RoundMetrics,
    RoundState,
    Stage,
)

__all__ = [
    "Aggregator",
    "Algorithm",
    "Batch",
    "Batcher",
    "Broadcast",
    "Client",
    "ClientData",
    "ClientState",
    "Cohort",
    "CohortAggregator",
    "CohortRule",
    "Correction",
    "Delta",
    "Downlink",
    "Examples",
    "FieldSpec",
    "FormulaFn",
    "Key",
    "Masks",
    "Message",
    "Metrics",
    "Model",
    "Params",
    "Population",
    "PrunableFn",
    "Pruner",
    "PrunerInputs",
    "ReadRule",
    "RoundFn",
    "RoundMetrics",
    "RoundState",
    "Schedule",
    "Sight",
    "Stage",
    "State",
    "Uplink",
    "WeightView",
    "Whole",
    "client_data",
    "count_examples",
]
