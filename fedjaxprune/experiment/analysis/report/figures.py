"""The pictures of the page, as plotly has them."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go

from fedjaxprune.experiment.analysis import compare
from fedjaxprune.experiment.analysis.compare import Comparison, Group
from fedjaxprune.experiment.analysis.report import frame, series
from fedjaxprune.experiment.folder.load import Run
from fedjaxprune.experiment.folder.record import RoundRecord

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


def pictures(compared: Comparison) -> list[Picture]:
    """Draw everything that the records have numbers for."""
    groups = compared.groups
    made = [
        _curves(groups, "accuracy", "Test accuracy", "test accuracy, %", 100.0),
        _curves(groups, "loss", "Test loss", "cross-entropy, nats", 1.0),
        _front(compared) if len(groups) > 1 else None,
        _rounds(
            groups,
            "sparsity",
            "Sparsity",
            "Pruned share of the prunable weights.",
            "sparsity, %",
            lambda line: 100 * line.sparsity,
        ),
        _choice(groups, "layers", "Sparsity by layer", "After every round.", _layers),
        _rounds(
            groups,
            "churn",
            "Mask churn",
            "Share of the prunable mask bits that a round flipped.",
            "flipped, %",
            series.churn,
        ),
        _rounds(
            groups,
            "coverage",
            "Coverage",
            "How many clients trained a prunable weight in a round, on average.",
            "clients",
            lambda line: line.mean_coverage,
        ),
        _traffic(groups),
        _choice(
            groups,
            "clients",
            "Accuracy over clients",
            "The test accuracies of the classes, weighted as each client's own examples are: "
            "the median, the middle half and all of the clients.",
            _spread,
        ),
        _choice(
            groups,
            "participation",
            "Participation",
            "How many clients sent something in how many rounds.",
            _participation,
        ),
        _rounds(
            groups,
            "cohorts",
            "Clients in a round",
            "Clients whose messages counted.",
            "clients",
            lambda line: line.num_participating - line.num_rejected,
        ),
    ]
    return [picture for picture in made if picture is not None]


def _curves(
    groups: Sequence[Group], field: str, title: str, axis: str, scale: float
) -> Picture | None:
    """Draw what was tested against rounds, bytes and FLOPs."""
    variants = []
    for x, text in AXES.items():
        figure = frame.empty(x=text, y=axis)
        lines = [series.merged(members, x=x, y=field) for members in groups]
        frame.curves(figure, groups, lines, scale=scale, shape="linear")
        if x == "rounds":
            frame.mark_stages(figure, groups)
        if figure.data:
            variants.append(({"mib": "bytes", "flops": "FLOPs"}.get(x, x), figure))
    over = any(len(compare.counted(members)) > 1 for members in groups)
    note = "Mean over seeds; the band is one deviation." if over else ""
    return Picture(field, title, note, variants) if variants else None


def _rounds(
    groups: Sequence[Group],
    key: str,
    title: str,
    note: str,
    axis: str,
    read: Callable[[RoundRecord], float | None],
) -> Picture | None:
    """Draw a number of every round."""
    figure = frame.empty(x="rounds", y=axis)
    lines = [series.by_round(members, read) for members in groups]
    frame.curves(figure, groups, lines, scale=1.0, shape="hv")
    if not figure.data:
        return None
    figure.update_yaxes(rangemode="tozero")
    if key == "cohorts":
        frame.whole(figure.update_yaxes, max(np.max(line.mean) for line in lines))
    frame.mark_stages(figure, groups)
    return Picture(key, title, note, [("", figure)])


def _choice(
    groups: Sequence[Group],
    key: str,
    title: str,
    note: str,
    draw: Callable[[Run], go.Figure | None],
) -> Picture | None:
    """Draw something of one run of each group, of which one group is shown."""
    variants = []
    for members in groups:
        figure = draw(compare.counted(members)[0])
        if figure is not None:
            if key != "participation":
                frame.mark_stages(figure, [members])
            variants.append((members.label, figure))
    if any(len(compare.counted(members)) > 1 for members in groups):
        note += " Of each configuration its first seed."
    return Picture(key, title, note, variants) if variants else None


def _layers(run: Run) -> go.Figure | None:
    found = series.layers(run)
    if found is None:
        return None
    paths, edges, table = found
    suffix = "/kernel"
    if all(path.endswith(suffix) for path in paths):
        paths = [path.removesuffix(suffix) for path in paths]
    figure = frame.empty(x="rounds", y="", height=140 + 16 * max(len(paths), 6))
    figure.add_heatmap(
        x=frame.thin(edges),
        y=paths,
        z=frame.thin(table),
        zmin=0,
        zmax=100,
        colorscale="Cividis",
        colorbar={"title": {"text": "%", "side": "top"}, "thickness": 12, "outlinewidth": 0},
        hovertemplate="%{y}<br>around round %{x:.0f}<br>%{z:.2f} % pruned<extra></extra>",
    )
    figure.update_yaxes(autorange="reversed", title=None)
    frame.whole(figure.update_xaxes, len(run.lines))
    return figure


def _traffic(groups: Sequence[Group]) -> Picture | None:
    """Draw bits by kind: totals side by side, and for each group how they grew."""
    totals: list[tuple[str, dict[str, float]]] = []
    variants = []
    for members in groups:
        run = compare.counted(members)[0]
        sent = series.traffic(run)
        if not sent:
            continue
        totals.append((members.label, {name: float(row[-1]) for name, row in sent.items()}))
        figure = frame.empty(x="rounds", y="MiB sent until then")
        for number, (name, row) in enumerate(sent.items()):
            colour = frame.LIGHT[number % len(frame.LIGHT)]
            figure.add_scatter(
                x=np.arange(1, len(row) + 1, dtype=np.int32),
                y=frame.thin(row),
                name=name,
                stackgroup="all",
                mode="lines",
                line={
                    "color": colour,
                    "width": 1.5,
                    "dash": frame.DASHES[number % len(frame.DASHES)],
                },
                fillcolor=frame.faint(colour),
                hovertemplate="%{y:.4~g} MiB at round %{x}",
            )
        frame.whole(figure.update_xaxes, len(run.lines))
        frame.mark_stages(figure, [members])
        variants.append((members.label, figure))
    if len(totals) > 1:
        figure = frame.empty(x="MiB sent", y="", barmode="stack")  # its height: see page.js
        kinds = dict.fromkeys(name for _, total in totals for name in total)
        for number, kind in enumerate(kinds):
            figure.add_bar(
                y=[label for label, _ in totals],
                x=[total.get(kind, 0.0) for _, total in totals],
                name=kind,
                orientation="h",
                marker={
                    "color": frame.LIGHT[number % len(frame.LIGHT)],
                    "pattern": {"shape": ("", "/", ".", "x", "-", "\\")[number % 6], "size": 6},
                },
                hovertemplate="%{x:.4~g} MiB",
            )
        figure.update_yaxes(autorange="reversed", title=None)
        variants.insert(0, ("all together", figure))
    note = "The length of all messages, by what they carry and which way they go."
    return Picture("traffic", "Bytes by kind", note, variants) if variants else None


def _spread(run: Run) -> go.Figure | None:
    found = series.spread(run)
    if found is None:
        return None
    rounds, rows = found
    figure = frame.empty(x="rounds", y="accuracy, %")
    frame.whole(figure.update_xaxes, rounds[-1])
    colour = frame.LIGHT[0]
    for low, high, name in (
        ("lowest", "highest", "all clients"),
        ("lower_quartile", "upper_quartile", "middle half"),
    ):
        figure.add_scatter(
            x=np.r_[rounds, rounds[::-1]],
            y=frame.thin(np.r_[rows[high], rows[low][::-1]]),
            fill="toself",
            fillcolor=frame.faint(colour),
            mode="lines",
            line={"width": 0.5, "color": colour},
            hoverinfo="skip",
            name=name,
        )
    figure.add_scatter(
        x=rounds,
        y=frame.thin(rows["median"]),
        name="median client",
        mode="lines",
        line={"color": colour, "width": 2},
        customdata=frame.thin(np.stack([rows["lowest"], rows["highest"]], axis=1)),
        hovertemplate="%{y:.4~g} (from %{customdata[0]:.4~g} to %{customdata[1]:.4~g}) "
        "at round %{x}",
    )
    return figure


def _participation(run: Run) -> go.Figure | None:
    counts = series.participation(run)
    if counts is None:
        return None
    figure = frame.empty(x="rounds in which a client sent something", y="clients")
    figure.add_bar(
        x=list(counts),
        y=list(counts.values()),
        marker={"color": frame.LIGHT[0]},
        hovertemplate="%{y} clients in %{x} rounds<extra></extra>",
    )
    frame.whole(figure.update_xaxes, max(counts) - min(counts))
    frame.whole(figure.update_yaxes, max(counts.values()))
    figure.update_yaxes(rangemode="tozero")
    return figure


def _front(compared: Comparison) -> Picture | None:
    """Draw accuracy against what it cost, with the front that nobody beats in both."""
    variants = []
    for name, axis, read in (
        ("bytes", AXES["mib"], lambda m: m.up + m.down),
        ("FLOPs", AXES["flops"], lambda m: m.flops),
    ):
        figure = frame.empty(x=axis, y="accuracy, mean of the last tests, %")
        points, num_drawn = [], 0
        for number, (members, measures) in enumerate(
            zip(compared.groups, compared.measures, strict=True)
        ):
            costs = [read(one) for one in measures]
            finals = [100 * one.accuracy for one in measures]
            cost, final = compare.mean(costs), compare.mean(finals)
            if math.isnan(cost) or math.isnan(final):
                continue
            num_drawn += 1
            is_done = compare.counted(members)[0].state == "finished"
            if is_done:
                points.append((cost, final))
            figure.add_scatter(
                x=[cost],
                y=[final],
                name=members.label if is_done else f"{members.label} (not finished)",
                mode="markers",
                marker={
                    "color": frame.LIGHT[number % len(frame.LIGHT)],
                    "symbol": frame.SYMBOLS[number % len(frame.SYMBOLS)]
                    + ("" if is_done else "-open"),
                    "size": 12,
                },
                error_y=frame.bar(finals),
                error_x=frame.bar(costs),
                hovertemplate="%{y:.4~g} % for %{x:.5~g}",
            )
        if len(points) > 1:
            best = front(points)
            figure.add_scatter(
                x=[cost for cost, _ in best],
                y=[final for _, final in best],
                name="Pareto front",
                mode="lines",
                line={"color": frame.LIGHT[-1], "dash": "dot", "width": 1.5, "shape": "hv"},
                hoverinfo="skip",
            )
        if num_drawn > 1:
            variants.append((name, figure))
    note = "Above and to the left is better; what lies below the front is beaten in both."
    return Picture("front", "Accuracy for its price", note, variants) if variants else None


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Choose the points ``(cost, accuracy)`` that no other one beats or equals in both."""
    best: list[tuple[float, float]] = []
    for cost, final in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or final > best[-1][1]:
            best.append((cost, final))
    return best
