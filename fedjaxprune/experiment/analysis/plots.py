"""The picture of a run: accuracy against rounds, and against what went over the wire."""

import io
import itertools
import pathlib
from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fedjaxprune.experiment import reading
from fedjaxprune.experiment.folder.record import Line, value
from fedjaxprune.traffic import BITS_PER_MIB


def accuracy(lines: Sequence[Line], path: pathlib.Path, *, title: str) -> None:
    """Draw test accuracy against rounds (with sparsity) and against MiB sent; write a PNG file.

    A regression has its loss drawn.
    """
    ways = ("traffic.up.total_bits", "traffic.down.total_bits")
    sent = itertools.accumulate(sum(value(line, way) for way in ways) for line in lines)
    is_regression = all(value(line, "test.accuracy") is None for line in lines)
    field, scale, unit = "test.accuracy", 100, ", per cent"
    if is_regression:
        field, scale, unit = "test.loss", 1, ""
    name = field.replace(".", " ")
    tested = [
        (line["round"], mib / BITS_PER_MIB, scale * value(line, field))
        for line, mib in zip(lines, sent, strict=True)
        if value(line, field) is not None
    ]
    rounds, mebibytes, scores = zip(*tested, strict=True) if tested else ((), (), ())
    marker = "." if len(tested) <= 40 else ""

    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    left, right = figure.subplots(1, 2, sharey=True)
    left.plot(rounds, scores, marker=marker, label=name)
    if not is_regression:
        every = [line["round"] for line in lines]
        sparsity = [100 * value(line, "mask.sparsity") for line in lines]
        left.step(every, sparsity, "--", where="post", color="tab:gray", label="sparsity")
        left.set_ylim(0, 100)
    left.set(xlabel="rounds", ylabel=f"{name}{unit}", title="against rounds")
    left.legend(loc="lower right")
    right.plot(mebibytes, scores, marker=marker)
    right.set(
        xlabel="MiB sent, both ways, all clients", ylabel=f"{name}{unit}", title="against traffic"
    )
    right.yaxis.set_tick_params(labelleft=True)
    right.set_xlim(left=0)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    # Written beside and moved: a picture is whole or not there.
    draft = path.with_name(f".{path.name}.new.png")
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    reading.write_new(draft, drawn.getvalue())
    draft.replace(path)
