"""What the runs of ``benchmarks.methods`` say of the papers' claims: rows paired by seed.

``python -m benchmarks.methods --table [--sweep SWEEP]`` writes it below the table. Runs of a seed
have the same examples at the same clients and the same initial weights, so that a difference within
a seed may deviate less than the rows do.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from fedjaxprune.experiment.analysis import compare

if TYPE_CHECKING:
    from benchmarks.methods import Point, Row


class Claim(NamedTuple):
    """Two rows of one sweep.

    Attributes:
      words: what the first is, and what it is held against.
      knob: where both stand; empty where there is none.
      row: its name.
      against: the other's.
    """

    words: str
    knob: str
    row: str
    against: str


def _each(words: str, row: str, against: str, values: Sequence[float]) -> tuple[Claim, ...]:
    """Hold a row against another at each value of a knob, which stands in the names as ``{}``."""
    return tuple(Claim(words, str(v), row.format(v), against.format(v)) for v in values)


_WEIGHTS = (0.8, 0.9, 0.95, 0.99)
_FILTERS = (0.5, 0.8, 0.9)
_STARTS = (0.9, 0.95, 0.99)
_START = "fedtiny-resnet8-sparsity-{}"
_DYNAMIC = "adaptive-dynamic-pruning-gated-resnet8"
_LOT = "adaptive-dynamic-pruning-random-channels-gated-resnet8"
_GATED = "adaptive-dynamic-pruning-squeeze-excitation-gated-resnet8"
_AT_40 = f"{_GATED}-num-rounds-40"
_MPFL = "mpfl-lenet5-sparsity-{}-consensus-top-k"  # at equal sparsity

CLAIMS: Mapping[str, tuple[Claim, ...]] = {
    "all": (
        *_each(
            "FedDIP, gradual magnitude pruning",
            "feddip-lenet5-sparsity-{}",
            "gradual-magnitude-lenet5-sparsity-{}",
            _WEIGHTS,
        ),
        *_each(
            "FedDIP, without its penalty",
            "feddip-lenet5-sparsity-{}",
            "feddip-without-penalty-lenet5-sparsity-{}",
            _WEIGHTS,
        ),
        *_each(
            "AutoFLIP, random masks",
            "autoflip-lenet5-sparsity-{}",
            "random-masks-lenet5-sparsity-{}",
            _WEIGHTS,
        ),
        *_each(
            "AutoFLIP, magnitude masks",
            "autoflip-lenet5-sparsity-{}",
            "magnitude-masks-lenet5-sparsity-{}",
            _WEIGHTS,
        ),
        *_each(
            "AutoFLIP, SNIP over clients",
            "autoflip-lenet5-sparsity-{}",
            "snip-of-clients-lenet5-sparsity-{}",
            _WEIGHTS,
        ),
        Claim("an explored start, none", "", "autoflip-explored-start-lenet5", "fedavg-lenet5"),
        *_each("MPFL, pooled data", _MPFL, "pooled-filters-lenet5-sparsity-{}", _FILTERS),
        *_each("MPFL, random filters", _MPFL, "random-filters-lenet5-sparsity-{}", _FILTERS),
        *_each(
            "MPFL, averaged weights",
            _MPFL,
            "averaged-filters-lenet5-sparsity-{}",
            _FILTERS,
        ),
        Claim("SCAFFOLD, FedAvg", "", "fedavg-scaffold-lenet5", "fedavg-lenet5"),
        *_each("FedTiny, FedAvg", "fedtiny-resnet8-sparsity-{}", "fedavg-resnet8", _WEIGHTS),
        Claim("open gates, no gates", "", _GATED, "fedavg-resnet8"),
        *_each(
            "dynamic pruning, open gates",
            f"{_DYNAMIC}-density-{{}}",
            _GATED,
            (0.45, 0.22),
        ),
        *_each(
            "channels by lot, open gates",
            f"{_LOT}-density-{{}}",
            _GATED,
            (0.45, 0.22),
        ),
    ),
    "cifar10": (
        Claim(
            "FedDIP, gradual magnitude pruning",
            "0.9",
            "feddip-cnn",
            "gradual-magnitude-cnn",
        ),
        Claim("FedDIP, FedAvg", "0.9", "feddip-cnn", "fedavg-cnn"),
        Claim("AutoFLIP, random masks", "0.9", "autoflip-cnn", "random-masks-cnn"),
        Claim(
            "MPFL, random filters",
            "0.5",
            "mpfl-cnn",
            "random-filters-cnn",
        ),
    ),
    "claims": (
        *_each(
            "AutoFLIP, random masks",
            "autoflip-lenet5-sparsity-{}",
            "random-masks-lenet5-sparsity-{}",
            (0.3, 0.5),
        ),
        *_each(
            "FedTiny's start, one client's mask",
            _START,
            "magnitude-masks-one-client-resnet8-sparsity-{}",
            _STARTS,
        ),
        *_each(
            "FedTiny's start, chosen under the server's statistics",
            _START,
            "fedtiny-vanilla-selection-resnet8-sparsity-{}",
            _STARTS,
        ),
        Claim("dynamic pruning, open gates", "0.65", f"{_DYNAMIC}-num-rounds-40", _AT_40),
        Claim("channels by lot, open gates", "0.65", _LOT, _AT_40),
        Claim(
            "dynamic pruning, open gates, 160 rounds",
            "0.65",
            f"{_DYNAMIC}-num-rounds-160",
            f"{_GATED}-num-rounds-160",
        ),
    ),
}

NOTES = """\
Differences in points of accuracy, paired by seed: mean ± deviation. Then what each side took, the
claimant first: MiB of the whole run, both ways; of these before training; 10^9 FLOPs of the
clients' training; of these before training; FLOPs of a prediction as a share of those with all
gates open.
"""


def table(rows: Sequence["Row"], claims: Sequence[Claim], titles: Mapping[str, str]) -> str:
    """Write the claims of which both rows have runs as a Markdown table; empty if there are none.

    Args:
      rows: of a sweep.
      claims: about them.
      titles: of the partitions, by name.
    """
    by_name = {row.name: row for row in rows}
    partitions = rows[0].partitions
    head = ["claim", "knob", *(f"{titles[one]}, points" for one in partitions)]
    head += ["MiB", "before training", "GFLOPs", "before training", "of a prediction, %"]
    lines = [head, ["---"] * len(head)]
    for claim in claims:
        row, against = by_name[claim.row], by_name[claim.against]
        both = [one for one in partitions if one in row.points and one in against.points]
        if not both:
            continue
        pairs = {one: (row.points[one], against.points[one]) for one in partitions if one in both}
        cells = [claim.words, claim.knob]
        cells += [
            _difference(*pairs[one], num_seeds=row.num_seeds) if one in pairs else "-"
            for one in partitions
        ]
        first = pairs[both[0]]
        cells.append(" / ".join([f"{point.up + point.down:.2f}" for point in first]))
        cells.append(" / ".join([f"{point.one_off:.2f}" for point in first]))
        cells.append(" / ".join([f"{point.flops / 1e9:,.0f}" for point in first]))
        cells.append(" / ".join([f"{point.one_off_flops / 1e9:,.0f}" for point in first]))
        shares = [point.open_share for point in first]
        known = any(not math.isnan(share) for share in shares)
        cells.append(" / ".join([f"{100 * share:.1f}" for share in shares]) if known else "")
        lines.append(cells)
    if len(lines) == 2:
        return ""
    return NOTES + "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _difference(point: "Point", other: "Point", *, num_seeds: int) -> str:
    """Write what one has more than the other, over the seeds that both have, if not all do."""
    seeds = sorted(set(point.accuracies) & set(other.accuracies))
    values = [100 * (point.accuracies[seed] - other.accuracies[seed]) for seed in seeds]
    if not values:
        return "-"
    text = f"{compare.mean(values):+.2f}"
    if len(values) > 1:
        text += f" ± {compare.deviation(values):.2f}"
    return text if len(values) == num_seeds else f"{text} ({len(values)} of {num_seeds})"
