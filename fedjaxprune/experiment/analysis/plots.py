"""The picture of a run: accuracy against rounds, and against what went over the wire."""

import itertools
import pathlib
from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fedjaxprune.experiment.folder.record import Line, value
from fedjaxprune.traffic import BITS_PER_MIB


def accuracy(lines: Sequence[Line], path: pathlib.Path, *, title: str) -> None:
    """Draw test accuracy against rounds (with sparsity) and against MiB sent; write a PNG file.

    A regression has its loss drawn.
    """
    ways = ("traffic.up.total_bits", "traffic.down.total_bits")
    sent = itertools.accumulate(sum(value(line, way) for way in ways) for line in lines)
    is_regression = all(value(line, "test.accuracy") is None for line in lines)
    field, scale = ("test.loss", 1) if is_regression else ("test.accuracy", 100)
    name = "test loss" if is_regression else "test accuracy"
    tested = [
        (line["round"], mib / BITS_PER_MIB, scale * value(line, field))
        for line, mib in zip(lines, sent, strict=True)
        if value(line, field) is not None
    ]
    rounds = [point[0] for point in tested]
    mebibytes = [point[1] for point in tested]
    percents = [point[2] for point in tested]
    marker = "." if len(tested) <= 40 else ""

    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    left, right = figure.subplots(1, 2, sharey=True)
    left.plot(rounds, percents, marker=marker, label=name)
    if not is_regression:
        left.step(
            [line["round"] for line in lines],
            [100 * value(line, "mask.sparsity") for line in lines],
            where="post",
            color="tab:gray",
            linestyle="--",
            label="sparsity",
        )
        left.set_ylim(0, 100)
    unit = "" if is_regression else ", per cent"
    left.set(xlabel="rounds", ylabel=f"{name}{unit}", title="against rounds")
    left.legend(loc="lower right")
    right.plot(mebibytes, percents, marker=marker)
    right.set(
        xlabel="MiB sent, both ways, all clients",
        ylabel=f"{name}{unit}",
        title="against traffic",
    )
    right.yaxis.set_tick_params(labelleft=True)
    right.set_xlim(left=0)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    # Written beside and moved: a picture is whole or not there.
    draft = path.with_name(f".{path.name}.new.png")
    figure.savefig(draft)
    draft.replace(path)
