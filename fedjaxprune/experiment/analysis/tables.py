"""A comparison as text: for the terminal, in Markdown, and as CSV."""

import csv
import io
import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from fedjaxprune.experiment.analysis import compare, groups
from fedjaxprune.experiment.analysis.compare import Comparison, Measures

_LABEL, _SHORT = 16, 8  # characters: least of a label, most of a column that is never wrapped
_MARKDOWN = re.compile(r"[\\|<\[\]`]")  # what is more than text in Markdown
RUN, SEEDS, OPEN, BY_SEED = "run", "seeds", "not finished", "last test by seed"


class Column(NamedTuple):
    """A number of every run, and how it is written."""

    title: str  # with the unit
    short: str  # the title in a terminal; empty if it is in the files and not shown
    read: Callable[[Measures], float]  # takes it from a run's measures, in that unit
    digits: int  # after the point


def columns(compared: Comparison) -> dict[str, list[Column]]:
    """List the columns by table: what came out, and what it cost."""
    score = compared.score
    budget = f"{compared.budget:,.4g} MiB"
    target = "-" if math.isnan(compared.target) else score.text(compared.target, 0)
    unit = f", {score.unit}" if score.unit else ""
    name, averaged = score.name, num_averaged(compared)

    def scored(title: str, short: str, field: str) -> Column:
        read = operator.attrgetter(field)
        return Column(title + unit, short, lambda m: score.scale * read(m), 2 if unit else 4)

    relative = [
        scored(f"{name} at {budget}", f"at {budget}\n{score.unit}", "at_budget"),
        Column(f"MiB to {target}", f"MiB\nto {target}", lambda m: m.mib_to, 2),
        Column(f"rounds to {target}", f"rounds\nto {target}", lambda m: m.rounds_to, 0),
    ]
    timed = [
        Column("modeled time, s", "modeled\ntime, s", lambda m: m.seconds, 2),
        Column("modeled time if all overlaps, s", "", lambda m: m.overlapped_seconds, 2),
    ]
    return {
        f"{name} on the test set": [
            Column("sparsity, %", "sparsity\n%", lambda m: 100 * m.sparsity, 2),
            scored(f"{name} of the last test", f"last test\n{score.unit}", "last"),
            scored(f"mean of the last {averaged}", f"mean of last\n{averaged}{unit}", "mean_last"),
            *(relative if compared.is_relative else ()),
        ],
        "costs, summed over rounds and clients": [
            Column("up, MiB", "up\nMiB", lambda m: m.up, 2),
            Column("down, MiB", "down\nMiB", lambda m: m.down, 2),
            Column(
                "both, % of dense",
                "both, %\nof dense",
                lambda m: 100 * (m.up + m.down) / m.dense,
                1,
            ),
            Column("values up, MiB", "", lambda m: m.values_up, 2),
            Column("values down, MiB", "", lambda m: m.values_down, 2),
            Column("masks, MiB", "", lambda m: m.masks, 2),
            Column("training, GFLOP", "training\nGFLOP", lambda m: m.flops / 1e9, 1),
            Column(
                "training, % of dense",
                "GFLOP, %\nof dense",
                lambda m: 100 * m.flops / m.dense_flops if m.dense_flops else math.nan,
                1,
            ),
            *(
                timed
                if any(compare.known(m.seconds for m in one) for one in compared.measures)
                else ()
            ),
        ],
    }


def num_averaged(compared: Comparison) -> str:
    """Say how many tests the mean of the last ones is of."""
    numbers = sorted({m.num_averaged for several in compared.measures for m in several})
    low, high = numbers[0], numbers[-1]
    return f"{low} to {high} tests" if high > low else f"{low} test{'s' if low != 1 else ''}"


def cell(column: Column, measures: Sequence[Measures]) -> str:
    """Write the mean over the seeds, with the deviation where they differ.

    Where not all seeds have a value, the cell ends with how many have.
    """
    known = compare.known(column.read(one) for one in measures)
    if not known:
        return "-"
    text = f"{compare.mean(known):,.{column.digits}f}"
    if max(known) > min(known):
        text += f" ± {compare.deviation(known):,.{column.digits}f}"
    return text if len(known) == len(measures) else f"{text} ({len(known)} of {len(measures)})"


def terminal(compared: Comparison, *, width: int) -> list[Table]:
    """Lay the tables out for a terminal of `width` columns; 80 are enough."""
    marks = [" *" if groups.states(members) else "" for members in compared.groups]
    labels = [one.label + mark for one, mark in zip(compared.groups, marks, strict=True)]
    made = []
    for title, several in columns(compared).items():
        shown = [column for column in several if column.short]
        texts = [[cell(column, own) for own in compared.measures] for column in shown]
        widths = [
            max(map(len, [*column.short.split("\n"), *cells]))
            for column, cells in zip(shown, texts, strict=True)
        ]
        left = width - sum(widths) - len(SEEDS) - 2 * (len(shown) + 2)
        grid = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        grid.pad_edge = False
        label_width = min(max(map(len, labels)), max(left, _LABEL))
        grid.add_column(RUN, overflow="fold", width=label_width)
        grid.add_column(SEEDS, justify="right", width=len(SEEDS))
        for column, needed in zip(shown, widths, strict=True):
            grid.add_column(column.short, justify="right", no_wrap=needed <= _SHORT)
        for number, (label, own) in enumerate(zip(labels, compared.measures, strict=True)):
            cells = (label, str(len(own)), *(each[number] for each in texts))
            grid.add_row(*map(Text, cells))  # a label may look like markup
        made.append(grid)
    return made


def rows(compared: Comparison, several: Sequence[Column], *, is_short: bool) -> list[list[str]]:
    """Make one table of texts, its head first.

    A short one leaves out which runs are not finished and what each seed reached; others have
    columns for these if there is any such.
    """
    made = [[RUN, SEEDS, OPEN, *(column.title for column in several), BY_SEED]]
    for members, measures in zip(compared.groups, compared.measures, strict=True):
        cells = [cell(column, measures) for column in several]
        finals = [f"{compared.score.scale * one.last:.4g}" for one in measures]
        by_seed = " ".join(finals) if len(finals) > 1 else ""
        made.append([members.label, str(len(finals)), groups.states(members), *cells, by_seed])
    optional = (2, len(made[0]) - 1)
    left_out = [n for n in optional if is_short or not any(row[n] for row in made[1:])]
    return [[text for n, text in enumerate(row) if n not in left_out] for row in made]


def everything(compared: Comparison) -> list[Column]:
    """List all columns."""
    return [column for part in columns(compared).values() for column in part]


def markdown(compared: Comparison) -> str:
    """Write everything as one table in Markdown."""
    table = rows(compared, everything(compared), is_short=False)
    head, *body = [[_MARKDOWN.sub(r"\\\g<0>", text) for text in row] for row in table]
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def comma_separated(compared: Comparison) -> str:
    """Write everything as CSV: every number as a mean and a deviation of its own."""
    several = everything(compared)
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
        words = [_word(members.label), len(measures), *texts, _word(groups.states(members))]
        writer.writerow(words)
    return file.getvalue()


def _word(text: str) -> str:
    """Keep a spreadsheet from reading a text as a formula."""
    return f"'{text}" if text[:1] in tuple("=+-@\t\r") else text
