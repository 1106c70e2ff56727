"""Pictures of what runs cost: bytes by kind, and the score against bytes and FLOPs."""

import math
from collections.abc import Sequence

import numpy as np

from fedjaxprune.experiment.analysis import compare
from fedjaxprune.experiment.analysis import groups as groups_lib
from fedjaxprune.experiment.analysis.compare import Comparison
from fedjaxprune.experiment.analysis.groups import Group
from fedjaxprune.experiment.analysis.report import frame, series


def traffic(groups: Sequence[Group]) -> frame.Picture:
    """Draw bytes by kind: totals side by side, and for each group how they grew."""
    totals: list[tuple[str, dict[str, float]]] = []
    variants = []
    for members in groups:
        run = groups_lib.counted(members)[0]
        sent = series.traffic(run)
        if not sent:
            continue
        totals.append((members.label, {name: float(row[-1]) for name, row in sent.items()}))
        figure = frame.empty(x="rounds", y="MiB sent so far")
        for number, (name, row) in enumerate(sent.items()):
            color, dash = frame.nth(frame.LIGHT, number), frame.nth(frame.DASHES, number)
            figure.add_scatter(
                x=np.arange(1, len(row) + 1, dtype=np.int32),
                y=frame.thin(row),
                name=name,
                stackgroup="all",
                mode="lines",
                line={"color": color, "width": 1.5, "dash": dash},
                fillcolor=frame.faint(color),
                hovertemplate="%{y:.4~g} MiB at round %{x}",
            )
        frame.whole(figure.update_xaxes, len(run.lines))
        frame.mark_stages(figure, [members])
        variants.append((members.label, figure))
    if len(totals) > 1:
        figure = frame.empty(x="MiB sent", y="", barmode="stack")  # its height: see page.js
        kinds = dict.fromkeys(name for _, total in totals for name in total)
        for number, kind in enumerate(kinds):
            pattern = {"shape": frame.nth(("", "/", ".", "x", "-", "\\"), number), "size": 6}
            figure.add_bar(
                y=[label for label, _ in totals],
                x=[total.get(kind, 0.0) for _, total in totals],
                name=kind,
                orientation="h",
                marker={"color": frame.nth(frame.LIGHT, number), "pattern": pattern},
                hovertemplate="%{x:.4~g} MiB",
            )
        figure.update_yaxes(autorange="reversed", title=None)
        variants.insert(0, ("totals", figure))
    note = "Length of all messages, by content and direction."
    return frame.Picture("traffic", "Bytes by kind", note, variants)


def against_score(compared: Comparison) -> frame.Picture:
    """Draw the score against what it cost, with the Pareto front."""
    variants = []
    score, sign = compared.score, 1 if compared.score.is_better_if_higher else -1
    unit = f", {score.unit}" if score.unit else ""
    for x, read in (
        ("mib", lambda m: m.up + m.down),
        ("flops", lambda m: m.flops),
        ("seconds", lambda m: m.seconds),
    ):
        name, axis = frame.NAMES[x], frame.AXES[x]
        figure = frame.empty(x=axis, y=f"{score.name} at the end{unit}")
        points, num_drawn = [], 0
        for number, members in enumerate(compared.groups):
            measures = compared.measures[number]
            costs = [read(one) for one in measures]
            finals = [score.scale * one.final for one in measures]
            cost, final = compare.mean(costs), compare.mean(finals)
            if math.isnan(cost) or math.isnan(final):
                continue
            num_drawn += 1
            label, symbol = members.label, frame.nth(frame.SYMBOLS, number)
            if groups_lib.is_finished(members):
                points.append((cost, sign * final))
            else:
                label, symbol = f"{label} (not finished)", f"{symbol}-open"
            figure.add_scatter(
                x=[cost],
                y=[final],
                name=label,
                mode="markers",
                marker={"color": frame.nth(frame.LIGHT, number), "symbol": symbol, "size": 12},
                error_y=frame.bar(finals),
                error_x=frame.bar(costs),
                hovertemplate=f"%{{y:.4~g}} {score.unit} for %{{x:.5~g}}",
            )
        if len(points) > 1:
            best = front(points)
            figure.add_scatter(
                x=[cost for cost, _ in best],
                y=[sign * final for _, final in best],
                name="Pareto front",
                mode="lines",
                line={"color": frame.LIGHT[-1], "dash": "dot", "width": 1.5, "shape": "hv"},
                hoverinfo="skip",
            )
        if num_drawn > 1:
            variants.append((name, figure))
    note = (
        f"{'Above' if sign > 0 else 'Below'} and to the left is better; for a point off the front, "
        "another one is at least as good in both."
    )
    return frame.Picture("front", f"{score.name.capitalize()} against cost", note, variants)


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Choose the points ``(cost, score)`` that no other one beats or equals in both."""
    best: list[tuple[float, float]] = []
    for cost, final in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or final > best[-1][1]:
            best.append((cost, final))
    return best
