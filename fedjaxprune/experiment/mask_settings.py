"""Settings of masks: those fixed before training (MPFL, the controls), and how long others move.

They stand in `config` by name. Like it, this imports neither JAX nor anything that does.
"""

import functools
from typing import Literal

from fedjaxprune.experiment import fields

LayerSparsity = Literal["uniform", "uniform_but_first", "erk", "whole_model"]
MaskStart = Literal["initial", "trained"]
Consensus = Literal[
    "ascending", "top_k", "majority", "unanimous", "anybody", "histogram", "code_dynamic"
]
Votes = Literal["clients", "examples"]
Drops = Literal["filters", "channels"]

_method = functools.partial(fields.field, group="Method")

LAYER_SPARSITY = _method(
    "uniform",
    "Live share of layers under fixed masks: all alike, all alike but for the first convolution, "
    "which is kept whole, more of small ones, or one pool.",
)
MASK_START = _method(
    None,
    "Weights that training starts from under masks by magnitude: the initial ones, or those "
    "trained for the mask, which one client sends up; unset: the server's where it trains them, "
    "else the initial ones (magnitude_masks, one_client_masks, pooled_masks).",
)
MASK_CLIENT = _method(
    0,
    "Client whose data decide the mask (one_client_masks).",
    unit="client",
    ge=0,
    le=2**31 - 1,
)
UNTIL = _method(
    None,
    "Last round in which masks may be revised; unset: 100, or the last round (fedtiny).",
    unit="rounds",
    ge=1,
    le=2**31 - 1,
)
ITERATIONS = _method(
    9,
    "Exchanges that prune filters, each an equal share of the sparsity further; one that does not "
    "comes before them (mpfl, pooled_filters, averaged_filters).",
    unit="exchanges",
    ge=1,
    le=10_000,
)
CONSENSUS = _method(
    "ascending",
    "How votes become one mask (mpfl): the lowest threshold that prunes enough, just as many as "
    "wanted, more than half, all, any, the percentile of the votes, or the public code's rule.",
)
FILTER_FACTOR = _method(
    None,
    "Share of the filters left that a ranking prunes in an exchange; unset: as many as are wanted "
    "by then (mpfl, pooled_filters, averaged_filters).",
    unit="fraction",
    gt=0,
    lt=1,
)
VOTES = _method("clients", "Whether every client has one vote, or every example (mpfl).")
START_ROUNDS = _method(
    0,
    "Rounds of dense FedAvg that lead to the weights which are pruned and rewound to (mpfl and the "
    "controls by filter).",
    unit="rounds",
    ge=0,
    le=2**31 - 1,
)
DROPS = _method(
    "filters",
    "What training leaves out (mpfl and the controls by filter): pruned filters, or also the "
    "weights that read their channels.",
)
