"""The picture of a run: accuracy against rounds, and against what went over the wire."""

import itertools
import pathlib
from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fedjaxprune.experiment.folder.record import RoundRecord

BITS_PER_MIB = 8 * 2**20


def accuracy(lines: Sequence[RoundRecord], path: pathlib.Path, *, title: str) -> None:
    """Draw test accuracy against rounds (with sparsity) and against MiB sent; write a PNG file."""
    sent = itertools.accumulate(line.uplink_bits + line.downlink_bits for line in lines)
    tested = [
        (line.round, mib / BITS_PER_MIB, 100 * line.test_accuracy)
        for line, mib in zip(lines, sent, strict=True)
        if line.test_accuracy is not None
    ]
    rounds = [point[0] for point in tested]
    mebibytes = [point[1] for point in tested]
    percents = [point[2] for point in tested]
    marker = "." if len(tested) <= 40 else ""

    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    left, right = figure.subplots(1, 2, sharey=True)
    left.plot(rounds, percents, marker=marker, label="test accuracy")
    left.step(
        [line.round for line in lines],
        [100 * line.sparsity for line in lines],
        where="post",
        color="tab:gray",
        linestyle="--",
        label="sparsity",
    )
    left.set(xlabel="rounds", ylabel="per cent", title="against rounds", ylim=(0, 100))
    left.legend(loc="lower right")
    right.plot(mebibytes, percents, marker=marker)
    right.set(
        xlabel="MiB sent, both ways, all clients",
        ylabel="test accuracy, per cent",
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
