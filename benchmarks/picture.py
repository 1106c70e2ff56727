"""The picture of ``benchmarks.methods``: accuracy against bytes."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Colours that colour-blind people tell apart (Okabe and Ito), one a family; a marker a method.
_COLOURS = {
    "black": "fedavg fedavg/fedprox fedavg/scaffold fedavg/fednova feddip/without_pruning "
    "autoflip/explored_start",
    "#0072B2": "feddip feddip/without_penalty gradual_magnitude",
    "#D55E00": "autoflip feddp_threshold fedtiny fedtiny/vanilla_selection",
    "#009E73": "random_masks magnitude_masks magnitude_masks/one_client magnitude_masks/pooled "
    "snip snip/of_clients",
    "#CC79A7": "mpfl random_filters pooled_filters averaged_filters",
    "#56B4E9": "adaptive_dynamic_pruning/squeeze_excitation adaptive_dynamic_pruning "
    "adaptive_dynamic_pruning/random_channels",
    "#E69F00": "feddst fedsgc fedmef fedrts fedfit prunefl rigl rigl/static rigl/set",
    "#F0E442": "dpf top_kast sr_ste wanda flpqsu prunetrain feddip_prunetrain",
    "#999999": "ssfl grasp snip/iterative synflow force_masks",
}
_MARKERS = "osD^vPX*h"
_NEAR = 27.0  # points below the best that the lower panels show


class Place(NamedTuple):
    """Where a row lies.

    Attributes:
      method: by name.
      variant: what tells it from other rows of the method, beside the knob; empty for the usual.
      points: by partition ``(MiB, accuracy, deviation)``, accuracies in per cent.
    """

    method: str
    variant: str
    points: Mapping[str, tuple[float, float, float]]


def look(method: str) -> tuple[str, str]:
    """Choose a method's colour and marker, which no other has together."""
    for colour, names in _COLOURS.items():
        if method in names.split():
            return colour, _MARKERS[names.split().index(method)]
    raise ValueError(f"no colour is set for {method!r}.")


def draw(rows: Sequence[Place], titles: Mapping[str, str], path: pathlib.Path) -> None:
    """Draw accuracy against the MiB of a whole run, two panels a partition; write an SVG file.

    The lower panels show what comes near the best. The ground is white, so that it reads on dark
    pages, too.

    Args:
      rows: of one sweep; points of a method and variant are joined.
      titles: of the partitions, by name.
      path: of the file.
    """
    partitions = [name for name in titles if any(name in row.points for row in rows)]
    if not partitions:
        return
    figure = Figure(figsize=(5.5 * max(2, len(partitions)), 11), layout="constrained")
    figure.set_facecolor("white")
    FigureCanvasSVG(figure)
    panels = figure.subplots(2, len(partitions), sharex=True, sharey="row", squeeze=False)
    best = max(point[1] for row in rows for point in row.points.values())
    for column, partition in enumerate(partitions):
        for axes in panels[:, column]:
            _draw(axes, rows, partition)
        panels[0, column].set_title(titles[partition])
        panels[1, column].set_xlabel("MiB sent, both ways, all clients")
        panels[1, column].set_ylim(best - _NEAR, best + 1.5)
    for axes in panels[:, 0]:
        axes.set_ylabel("test accuracy of the last ten rounds, per cent")
    known = [axes.get_legend_handles_labels() for axes in panels[0]]
    figure.legend(
        *max(known, key=lambda one: len(one[1])), loc="outside lower center", ncols=4, fontsize=8
    )
    figure.savefig(path, metadata={"Date": None})


def _draw(axes: Axes, rows: Sequence[Place], partition: str) -> None:
    lines: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for row in rows:
        if partition in row.points:
            key = (row.method, row.variant)
            lines.setdefault(key, []).append(row.points[partition])
    for (method, variant), places in lines.items():
        colour, marker = look(method)
        mib, accuracy, deviation = zip(*sorted(places), strict=True)
        axes.errorbar(
            mib,
            accuracy,
            yerr=[0.0 if math.isnan(one) else one for one in deviation],
            elinewidth=0.5,
            color=colour,
            marker=marker,
            markerfacecolor="white" if variant else colour,
            markersize=5,
            linewidth=0.8,
            linestyle=":" if variant else "-",
            label=f"{method}, {variant}" if variant else method,
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.grid(alpha=0.3)
