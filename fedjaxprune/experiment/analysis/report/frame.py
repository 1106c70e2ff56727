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
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "hexagon")
FEW = 40  # points of a curve that get markers
MANY = 10  # ticks that an axis has room for


AXES = {"rounds": "rounds", "mib": "MiB sent, both ways, all clients", "flops": "training FLOPs"}


class Picture(NamedTuple):
    """One picture of the page.

    Attributes:
      key: names its file when it is downloaded.
      title: above it.
      note: below the title: what is drawn.
      variants: ``(name, figure)``, of which one is shown.
    """

    key: str
    title: str
    note: str
    variants: list[tuple[str, go.Figure]]


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
    return np.asarray(values, np.float32)


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
    end = max((float(line.x[-1]) for _, _, line in drawn), default=0.0)
    for number, members, line in drawn:
        _curve(figure, number, members, line, scale, shape, end)


def _curve(
    figure: go.Figure,
    number: int,
    members: Group,
    line: series.Line,
    scale: float,
    shape: str,
    end: float,
) -> None:
    color, dash = LIGHT[number % len(LIGHT)], DASHES[number % len(DASHES)]
    symbol = SYMBOLS[number % len(SYMBOLS)]
    mean, known = scale * line.mean, ~np.isnan(line.mean)
    if line.deviation is not None:
        low, high = mean - scale * line.deviation, mean + scale * line.deviation
        figure.add_scatter(
            x=thin(np.r_[line.x[known], line.x[known][::-1]]),
            y=thin(np.r_[high[known], low[known][::-1]]),
            fill="toself",
            fillcolor=faint(color),
            line={"width": 0},
            mode="lines",
            hoverinfo="skip",
            legendgroup=members.label,
            showlegend=False,
        )
    figure.add_scatter(
        x=thin(line.x),
        y=thin(mean),
        name=members.label,
        legendgroup=members.label,
        mode="lines+markers" if len(line.x) <= FEW else "lines",
        line={"color": color, "dash": dash, "width": 2, "shape": shape},
        marker={"color": color, "symbol": symbol, "size": 6},
        customdata=None if line.deviation is None else thin(scale * line.deviation),
        hovertemplate="%{y:.5~g}"
        + ("" if line.deviation is None else " ± %{customdata:.3~g}")
        + " at %{x:.6~g}",
    )
    if figure.layout.xaxis.tickformat == ",d":
        whole(figure.update_xaxes, end)
    ends = [run for run in groups_lib.counted(members) if run.state != "finished"]
    if ends and known.any():
        failed = next((run.failure for run in ends if run.failure), None)
        text = f"failed in round {failed.round}" if failed else ends[0].state
        figure.add_scatter(
            x=thin(line.x[known][-1:]),
            y=thin(mean[known][-1:]),
            mode="markers+text",
            marker={"color": color, "symbol": "x" if failed else "circle-open", "size": 12},
            text=[text],
            textposition="top left" if line.x[known][-1] > end / 2 else "top right",
            textfont={"size": 12},
            cliponaxis=False,
            hoverinfo="skip",
            legendgroup=members.label,
            showlegend=False,
        )


def mark_stages(figure: go.Figure, groups: Sequence[Group]) -> None:
    """Mark where stages begin, once for each round; the text shown on hover says whose they are."""
    found: dict[int, dict[str, list[str]]] = {}
    for members in groups:
        for mark in series.stages(groups_lib.counted(members)[0]):
            found.setdefault(mark.round, {}).setdefault(mark.stage, []).append(members.label)
    for row, (begin, stages) in enumerate(sorted(found.items())):
        whose = [f"{stage}: {', '.join(labels)}" for stage, labels in stages.items()]
        figure.add_vline(
            x=begin - 0.5,
            line={"width": 1, "dash": "dot", "color": "#888888"},
            annotation={
                "text": " / ".join(stages),
                "hovertext": "<br>".join(whose) if len(groups) > 1 else None,
                "font": {"size": 11},
                "yanchor": "bottom",
                "xanchor": "left",
                "yshift": 14 * (row % 4),  # pixels: pictures differ in height
            },
        )
    if found:
        figure.update_layout(margin={"t": 42 + 16 * min(len(found), 4)})


def bar(values: Sequence[float]) -> dict[str, Any]:
    """Make an error bar of the deviation over seeds, where there is one."""
    deviation = compare.deviation(values)
    visible = not math.isnan(deviation) and deviation > 0
    return {"type": "constant", "value": deviation if visible else 0, "visible": visible}
