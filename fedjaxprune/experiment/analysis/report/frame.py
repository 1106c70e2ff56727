"""What all pictures have in common: colors, curves with bands, marks of stages and of ends.

The colors differ also for people who cannot tell red from green (after Okabe and Ito), and every
curve has its own dash or symbol as well. The dark page uses other colors.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go

from fedjaxprune.experiment.analysis import compare
from fedjaxprune.experiment.analysis import groups as groups_lib
from fedjaxprune.experiment.analysis.groups import Group
from fedjaxprune.experiment.analysis.report import series

# For a light page, and in the same places for a dark one.
LIGHT = ("#0072B2", "#C44E00", "#008F68", "#B0578D", "#8A6500", "#2D8FC4", "#666666")
DARK = ("#4DA6E0", "#FF8C42", "#2FC99B", "#E59BC8", "#F0C13A", "#8FD0F5", "#B5B5B5")
DASHES = ("solid", "dash", "dot", "dashdot")
# One more than colors: the eighth run differs from the first in its symbol, too.
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "hexagon", "x")
FEW = 40  # points of a curve that get markers
MANY = 10  # ticks that an axis has room for
AXES = {
    "rounds": "rounds",
    "mib": "MiB sent, both ways, all clients",
    "flops": "training FLOPs",
    "seconds": "modeled time of the clients' devices, s",
}
NAMES = {"rounds": "rounds", "mib": "bytes", "flops": "FLOPs", "seconds": "modeled time"}


class Picture(NamedTuple):
    """One picture of the page."""

    key: str  # names its file when it is downloaded
    title: str  # above it
    note: str  # below the title: what is drawn
    variants: list[tuple[str, go.Figure]]  # by name, of which one is shown; without, no picture
    remarks: tuple[str, ...] = ()  # what is said of numbers that are too constant to be drawn


def nth(values: Sequence[str], number: int) -> str:
    """Choose from colors, dashes or symbols, which repeat."""
    return values[number % len(values)]


def faint(color: str) -> str:
    """Make a see-through form of a color, for bands."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.2)"


def empty(*, x: str, y: str, **layout: Any) -> go.Figure:
    """Begin a picture; the page sets its fonts and colors."""
    figure = go.Figure(layout={"template": "none", "uirevision": "kept", **layout})
    figure.update_xaxes(title={"text": x, "standoff": 8}, automargin=True)
    figure.update_yaxes(title={"text": y, "standoff": 8}, automargin=True)
    if x == "rounds":
        figure.update_xaxes(tickformat=",d", minallowed=0, dtick=None)
    return figure


def whole(axes: Callable[..., Any], highest: float) -> None:
    """Keep the ticks of an axis that counts to whole numbers, where there are few of them."""
    if highest <= MANY:
        axes(dtick=1)


def thin(values: np.ndarray) -> np.ndarray:
    """Make values as short in the page as a screen can show: four bytes each."""
    with np.errstate(over="ignore"):  # of a record that somebody made up
        return np.asarray(values, np.float32)


def band(
    figure: go.Figure, x: np.ndarray, low: np.ndarray, high: np.ndarray, color: str, **extra: Any
) -> None:
    """Fill what lies between two curves."""
    figure.add_scatter(
        x=np.r_[x, x[::-1]],
        y=thin(np.r_[high, low[::-1]]),
        fill="toself",
        fillcolor=faint(color),
        mode="lines",
        hoverinfo="skip",
        **extra,
    )


def curves(
    figure: go.Figure,
    groups: Sequence[Group],
    lines: Sequence[series.Line],
    *,
    scale: float,
    shape: str,
) -> None:
    """Draw a curve for every group, with its band over seeds and a mark if it ended early.

    Groups of which nothing is known are left out.
    """
    drawn = [
        (number, members, line)
        for number, (members, line) in enumerate(zip(groups, lines, strict=True))
        if len(line.x) and not np.isnan(line.x).any() and not np.isnan(line.mean).all()
    ]
    end = max((float(line.x[-1]) for _, _, line in drawn), default=math.inf)
    if figure.layout.xaxis.tickformat == ",d":
        whole(figure.update_xaxes, end)
    for number, members, line in drawn:
        color, mean, known = nth(LIGHT, number), scale * line.mean, ~np.isnan(line.mean)
        x, deviation, hover = thin(line.x), None, "%{y:.5~g} at %{x:.6~g}"
        own: dict[str, Any] = {"legendgroup": members.label, "showlegend": False}
        if line.deviation is not None:
            deviation, hover = scale * line.deviation, "%{y:.5~g} ± %{customdata:.3~g} at %{x:.6~g}"
            low, high = (mean - deviation)[known], (mean + deviation)[known]
            band(figure, x[known], low, high, color, line={"width": 0}, **own)
        figure.add_scatter(
            x=x,
            y=thin(mean),
            name=members.label,
            legendgroup=members.label,
            mode="lines+markers" if len(x) <= FEW else "lines",
            line={"color": color, "dash": nth(DASHES, number), "width": 2, "shape": shape},
            marker={"color": color, "symbol": nth(SYMBOLS, number), "size": 6},
            customdata=None if deviation is None else thin(deviation),
            hovertemplate=hover,
        )
        ends = [run for run in groups_lib.counted(members) if run.state != "finished"]
        if ends:
            failed = next((run.failure for run in ends if run.failure), None)
            figure.add_scatter(
                x=x[known][-1:],
                y=thin(mean[known][-1:]),
                mode="markers+text",
                marker={"color": color, "symbol": "x" if failed else "circle-open", "size": 12},
                text=[f"failed in round {failed.round}" if failed else ends[0].state],
                textposition="top left" if line.x[known][-1] > end / 2 else "top right",
                textfont={"size": 12},
                cliponaxis=False,
                hoverinfo="skip",
                **own,
            )


def mark_stages(figure: go.Figure, groups: Sequence[Group]) -> None:
    """Mark where stages begin, once for each round, and say whose they are if not everybody's.

    The line of one group alone has the color and the dashes of its curve.
    """
    found: dict[int, dict[str, list[int]]] = {}
    for number, members in enumerate(groups):
        for mark in series.stages(groups_lib.counted(members)[0]):
            found.setdefault(mark.round, {}).setdefault(mark.stage, []).append(number)
    length = max(len(run.lines) for members in groups for run in groups_lib.counted(members))
    for row, (begin, stages) in enumerate(sorted(found.items())):
        numbers = [number for several in stages.values() for number in several]
        hover = [f"{s}: {'; '.join(groups[n].label for n in ns)}" for s, ns in stages.items()]
        own = numbers[0] if len(groups) > 1 == len(numbers) else None
        color, dash = ("#888888", "dot") if own is None else (nth(LIGHT, own), nth(DASHES, own))
        figure.add_vline(
            x=begin - 0.5,
            line={"width": 1, "dash": dash, "color": color},
            annotation={
                "text": " / ".join(f"{stage}{_whose(n, groups)}" for stage, n in stages.items()),
                "hovertext": "<br>".join(hover) if len(groups) > 1 else None,
                "font": {"size": 11} | ({} if own is None else {"color": color}),
                "yanchor": "bottom",
                "xanchor": "left" if begin - 0.5 <= length / 2 else "right",
                "yshift": 14 * (row % 4),  # pixels: pictures differ in height
            },
        )
    if found:
        figure.update_layout(margin={"t": 42 + 16 * min(len(found), 4)})


def _whose(numbers: Sequence[int], groups: Sequence[Group]) -> str:
    """Name groups behind a stage's name: by methods if that is enough; nothing if it is all."""
    if len(numbers) == len(groups):
        return ""
    names = [groups_lib.name_of(members.runs[0]) for members in groups]
    whose = list(dict.fromkeys(names[number] for number in numbers))
    if sum(map(names.count, whose)) > len(numbers):  # not all groups of these methods
        whose = [groups[number].label for number in numbers]
    return f" ({'; '.join(whose) if len(whose) <= 3 else f'{len(numbers)} configurations'})"


def bar(values: Sequence[float]) -> dict[str, Any]:
    """Make an error bar of the deviation over seeds, where there is one."""
    deviation = compare.deviation(values)
    visible = not math.isnan(deviation) and deviation > 0
    return {"type": "constant", "value": deviation if visible else 0, "visible": visible}
