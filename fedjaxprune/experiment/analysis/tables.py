"""A comparison as text: for the terminal, in Markdown, and as CSV."""

import csv
import io
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rich.table import Table

from fedjaxprune.experiment.analysis import compare
from fedjaxprune.experiment.analysis.compare import Comparison, Measures

RUN, SEEDS, OPEN, BY_SEED = "run", "seeds", "not finished", "by seed, %"


class Column(NamedTuple):
    """A number of every run, and how it is written.

    Attributes:
      title: with the unit.
      read: takes it from a run's measures, in that unit.
      digits: after the point.
    """

    title: str
    read: Callable[[Measures], float]
    digits: int


def columns(compared: Comparison) -> dict[str, list[Column]]:
    """List the columns by table: what came out, and what it cost."""
    budget, target = f"{compared.budget:,.4g} MiB", f"{100 * compared.target:.4g} %"
    return {
        "outcome": [
            Column("sparsity, %", lambda m: 100 * m.sparsity, 2),
            Column("accuracy, %", lambda m: 100 * m.accuracy, 2),
            Column(f"at {budget}, %", lambda m: 100 * m.accuracy_at, 2),
            Column(f"MiB to {target}", lambda m: m.mib_to, 2),
            Column(f"rounds to {target}", lambda m: m.rounds_to, 0),
        ],
        "costs": [
            Column("up, MiB", lambda m: m.up, 2),
            Column("down, MiB", lambda m: m.down, 2),
            Column("values up, MiB", lambda m: m.values_up, 2),
            Column("values down, MiB", lambda m: m.values_down, 2),
            Column("masks, MiB", lambda m: m.masks, 2),
            Column("GFLOP", lambda m: m.flops / 1e9, 1),
        ],
    }


def cell(column: Column, measures: Sequence[Measures]) -> str:
    """Write the mean over the seeds, with the deviation where they differ.

    Where not all seeds have reached something, how many have stands behind.
    """
    values = [column.read(one) for one in measures]
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "-"
    text = f"{compare.mean(known):,.{column.digits}f}"
    if max(known) > min(known):
        text += f" ± {compare.deviation(known):,.{column.digits}f}"
    return text if len(known) == len(values) else f"{text} ({len(known)} of {len(values)})"


def _by_seed(measures: Sequence[Measures]) -> str:
    return " ".join(f"{100 * one.accuracy:.2f}" for one in measures)


def terminal(compared: Comparison) -> list[Table]:
    """Lay the tables out for a terminal."""
    tables = []
    for title, several in columns(compared).items():
        grid = Table(title=title, title_justify="left")
        grid.add_column(RUN, overflow="fold")
        grid.add_column(SEEDS, justify="right")
        for column in several:
            grid.add_column(column.title, justify="right")
        for members, measures in zip(compared.groups, compared.measures, strict=True):
            mark = " *" if compare.states(members) else ""
            cells = [cell(column, measures) for column in several]
            grid.add_row(members.label + mark, str(len(measures)), *cells)
        tables.append(grid)
    return tables


def rows(compared: Comparison) -> list[list[str]]:
    """Make one table of texts with everything, its head first."""
    several = [column for part in columns(compared).values() for column in part]
    made = [[RUN, SEEDS, OPEN, *(column.title for column in several), BY_SEED]]
    for members, measures in zip(compared.groups, compared.measures, strict=True):
        cells = [cell(column, measures) for column in several]
        seeds = str(len(measures))
        state = compare.states(members)
        made.append([members.label, seeds, state, *cells, _by_seed(measures)])
    if not any(row[2] for row in made[1:]):
        made = [[*row[:2], *row[3:]] for row in made]
    return made


def markdown(compared: Comparison) -> str:
    """Write everything as one table in Markdown."""
    head, *body = [[text.replace("|", "\\|") for text in row] for row in rows(compared)]
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def comma_separated(compared: Comparison) -> str:
    """Write everything as CSV: every number as a mean and a deviation of its own."""
    several = [column for part in columns(compared).values() for column in part]
    titles = [t for column in several for t in (column.title, f"{column.title} (deviation)")]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([RUN, SEEDS, *titles, OPEN])
    for members, measures in zip(compared.groups, compared.measures, strict=True):
        numbers = []
        for column in several:
            values = [column.read(one) for one in measures]
            numbers += [compare.mean(values), compare.deviation(values)]
        texts = ["" if math.isnan(number) else f"{number:.10g}" for number in numbers]
        writer.writerow([members.label, len(measures), *texts, compare.states(members)])
    return file.getvalue()
