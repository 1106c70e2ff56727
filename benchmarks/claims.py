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
_TINY = "fedtiny-resnet8{}-swap-fraction-0.0-sparsity-{{}}"
_START = _TINY.format("")
_ONE_CLIENT = (
    "one-client-masks-resnet8-layer-sparsity-uniform-but-first-mask-start-trained-sparsity-{}"
)
_DYNAMIC = "adaptive-dynamic-pruning{}-gated-resnet8-gate-density-{}"
_GATED = "squeeze-excitation{}-gated-resnet8"
_BY_FILTER = "-lenet5-drops-channels-sparsity-{}"
_MPFL = "mpfl-lenet5-drops-channels-consensus-top-k-sparsity-{}"  # at equal sparsity
_CONTROL = "{}-lenet5-layer-sparsity-whole-model-sparsity-{{}}"

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
            _CONTROL.format("random-masks"),
            _WEIGHTS,
        ),
        *_each(
            "AutoFLIP, magnitude masks",
            "autoflip-lenet5-sparsity-{}",
            _CONTROL.format("magnitude-masks"),
            _WEIGHTS,
        ),
        *_each(
            "AutoFLIP, SNIP over clients",
            "autoflip-lenet5-sparsity-{}",
            _CONTROL.format("snip-masks-of-clients"),
            _WEIGHTS,
        ),
        Claim("an explored start, none", "", "explored-start-lenet5", "fedavg-lenet5"),
        *_each("MPFL, pooled data", _MPFL, f"pooled-filters{_BY_FILTER}", _FILTERS),
        *_each("MPFL, random filters", _MPFL, f"random-filters{_BY_FILTER}", _FILTERS),
        *_each(
            "MPFL, averaged weights",
            _MPFL,
            f"averaged-filters{_BY_FILTER}",
            _FILTERS,
        ),
        Claim("SCAFFOLD, FedAvg", "", "scaffold-lenet5", "fedavg-lenet5"),
        *_each("FedTiny, FedAvg", "fedtiny-resnet8-sparsity-{}", "fedavg-resnet8", _WEIGHTS),
        Claim("open gates, no gates", "", "squeeze-excitation-gated-resnet8", "fedavg-resnet8"),
        *_each(
            "dynamic pruning, open gates",
            _DYNAMIC.format("", "{}"),
            _GATED.format(""),
            (0.45, 0.22),
        ),
        *_each(
            "channels by lot, open gates",
            "random-channels-gated-resnet8-gate-density-{}",
            _GATED.format(""),
            (0.45, 0.22),
        ),
    ),
    "cifar10": (
        Claim(
            "FedDIP, gradual magnitude pruning",
            "0.9",
            "feddip-sparsity-0.9",
            "gradual-magnitude-sparsity-0.9",
        ),
        Claim("FedDIP, FedAvg", "0.9", "feddip-sparsity-0.9", "fedavg"),
        Claim(
            "AutoFLIP, random masks", "0.9", "autoflip-sparsity-0.9", "random-masks-sparsity-0.9"
        ),
        Claim(
            "MPFL, random filters",
            "0.5",
            "mpfl-drops-channels-sparsity-0.5",
            "random-filters-drops-channels-sparsity-0.5",
        ),
    ),
    "claims": (
        *_each(
            "AutoFLIP, random masks",
            "autoflip-lenet5-sparsity-{}",
            "random-masks-lenet5-sparsity-{}",
            (0.3, 0.5),
        ),
        *_each("FedTiny's start, one client's mask", _START, _ONE_CLIENT, _STARTS),
        *_each(
            "FedTiny's start, chosen under the server's statistics",
            _START,
            _TINY.format("-fedtiny-selection-vanilla"),
            _STARTS,
        ),
        Claim("dynamic pruning, open gates", "0.65", _DYNAMIC.format("", 0.65), _GATED.format("")),
        Claim(
            "channels by lot, open gates",
            "0.65",
            "random-channels-gated-resnet8-gate-density-0.65",
            _GATED.format(""),
        ),
        Claim(
            "dynamic pruning, open gates, 160 rounds",
            "0.65",
            _DYNAMIC.format("-rounds-160", 0.65),
            _GATED.format("-rounds-160"),
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
