"""A comparison in one sentence, which says no more than its seeds can show."""

import math
import statistics
from collections.abc import Sequence

from fedjaxprune.experiment.analysis import compare, groups
from fedjaxprune.experiment.analysis.compare import Comparison, Measures
from fedjaxprune.experiment.analysis.groups import Group

_MOST = 3  # groups that are named besides the one that they are compared with
# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; the last stands for all more.
_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def sentence(compared: Comparison) -> str:
    """Say what a comparison shows; runs that are not finished are not part of it.

    Groups are compared with the one that prunes least, the first of them if there are several.
    """
    pairs = zip(compared.groups, compared.measures, strict=True)
    finished = [(members, own) for members, own in pairs if groups.is_finished(members)]
    entries = [(one, own) for one, own in finished if compare.known(m.final for m in own)]
    if not finished:
        return "No run is finished."
    if not entries:
        return f"No run has a finite {compared.score.name}."
    several, measures = zip(*entries, strict=True)
    names = _names(several)
    if len(entries) == 1:
        return _alone(compared, names[0], measures[0])
    order = list(range(len(entries)))
    base = min(order, key=lambda n: compare.mean([m.sparsity for m in measures[n]]))
    order.remove(base)
    clauses = [_clause(compared, measures[n], measures[base]) for n in order[:_MOST]]
    text = f"{names[order[0]]} needs {clauses[0][0]} of {names[base]}'s bytes{clauses[0][1]}"
    for n, (share, scored) in zip(order[1:], clauses[1:], strict=False):
        text += f"; {names[n]} {share}{scored}"
    if len(order) > _MOST:
        text += f"; {len(order) - _MOST} more are in the table"
    seeds = [len(own) for own in measures]
    caveats = []
    if min(seeds) == 1:
        caveats.append("one seed" if max(seeds) == 1 else "few seeds")
    if len({len(run.lines) for members in several for run in groups.counted(members)}) > 1:
        caveats.append("different numbers of rounds")
    if groups.networks_differ(several):
        caveats.append("different networks")
    return text + (f" ({', '.join(caveats)})" if caveats else "") + "."


def _names(several: Sequence[Group]) -> list[str]:
    """Name groups by their methods where that is enough."""
    methods = [groups.name_of(members.runs[0]) for members in several]
    pairs = zip(methods, several, strict=True)
    return [name if methods.count(name) == 1 else members.label for name, members in pairs]


def _alone(compared: Comparison, name: str, own: Sequence[Measures]) -> str:
    """Describe one group."""
    finals = [one.final for one in own]
    text = f"{name} reaches {compared.score.text(compare.mean(finals), 1)} {compared.score.name}"
    if not compared.score.unit:
        text = f"{name} reaches an error of {compared.score.text(compare.mean(finals))}"
    if (n := len(finals)) > 1:
        half = _quantile(n) * statistics.stdev(finals) / math.sqrt(n)
        text += f" (± {compared.score.scale * half:.2g} at 95 %, {n} seeds)"
    sparsity = 100 * compare.mean([one.sparsity for one in own])
    share = compare.mean([(one.up + one.down) / one.dense for one in own])
    text += f" at {sparsity:.3g} % sparsity" if sparsity else ""
    return text + ("" if math.isnan(share) else f", with {_share(share)} of dense bytes") + "."


def _clause(
    compared: Comparison, other: Sequence[Measures], base: Sequence[Measures]
) -> tuple[str, str]:
    """Give a group's share of the base's bytes, and how its score differs."""
    bytes_of = [compare.mean([m.up + m.down for m in own]) for own in (other, base)]
    share = _share(bytes_of[0] / bytes_of[1]) if bytes_of[1] else "-"
    finals = [compare.known(m.final for m in own) for own in (other, base)]
    change = compared.score.scale * (statistics.fmean(finals[0]) - statistics.fmean(finals[1]))
    unit = "points" if compared.score.unit else compared.score.name
    fewest = min(map(len, finals))
    if fewest < 2:
        return share, f", {_signed(change)} {unit}"
    variance = sum(statistics.variance(values) / len(values) for values in finals)
    half = _quantile(fewest) * compared.score.scale * math.sqrt(variance)
    text = f"{_signed(change)} ± {_digits(half)} {unit}"
    if abs(change) <= half:
        text = f"no clear difference in {compared.score.name} ({text})"
    return share, f", {text}"


def _quantile(num_values: int) -> float:
    """Give what makes half a 95 % interval of a standard error."""
    return _QUANTILES[min(num_values - 1, len(_QUANTILES)) - 1]


def _share(ratio: float) -> str:
    return f"{100 * ratio:.{1 if ratio < 0.095 else 0}f} %"


def _digits(number: float) -> str:
    return f"{number:.1f}" if number >= 0.05 or not number else f"{number:.1g}"


def _signed(change: float) -> str:
    return ("\N{MINUS SIGN}" if change < 0 else "+") + _digits(abs(change))
