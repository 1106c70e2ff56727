"""The pictures of the page, as plotly has them, and remarks on what is too constant for one."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go

from fedjaxprune.experiment.analysis import compare
from fedjaxprune.experiment.analysis import groups as groups_lib
from fedjaxprune.experiment.analysis.compare import Comparison
from fedjaxprune.experiment.analysis.groups import Group
from fedjaxprune.experiment.analysis.report import costs, frame, series
from fedjaxprune.experiment.folder import load
from fedjaxprune.experiment.folder.load import RunData

FEW_LAYERS = 12  # that a sentence can list


class _Series(NamedTuple):
    """A number of every round, with `key`, `title` and `note` as of a `frame.Picture`."""

    key: str
    title: str
    note: str
    axis: str  # its text
    read: Callable[[RunData], np.ndarray]  # gives it for a run, ``[rounds]``


SPARSITY = _Series(
    "sparsity",
    "Sparsity",
    "Pruned share of the prunable weights.",
    "sparsity, %",
    lambda run: 100 * load.column(run, "mask.sparsity"),
)
CHANGES = _Series(
    "changes",
    "Mask changes",
    "Share of the prunable mask entries that a round changed.",
    "changed, %",
    lambda run: 100 * (1 - load.column(run, "mask.unchanged_fraction")),
)
COVERAGE = _Series(
    "coverage",
    "Clients per weight",
    "How many clients trained a prunable weight in a round, on average.",
    "clients",
    lambda run: load.column(run, "mask.clients_per_weight"),
)
COHORTS = _Series(
    "cohorts",
    "Clients in a round",
    "Clients whose messages counted.",
    "clients",
    lambda run: load.column(run, "clients.participating") - load.column(run, "clients.rejected"),
)


def pictures(compared: Comparison) -> tuple[list[frame.Picture], list[str]]:
    """Draw what the records have numbers for; a series that is constant has a remark instead."""
    groups, score = compared.groups, compared.score
    loss = "cross-entropy, nats" if score is compare.ACCURACY else "mean squared error"
    unit = f", {score.unit}" if score.unit else ""
    made = [
        _curves(compared, "score", f"Test {score.name}", f"test {score.name}{unit}", score.scale),
        _curves(compared, "loss", "Test loss", loss, 1.0),
        costs.against_score(compared),
        _rounds(groups, SPARSITY),
        _choice(groups, "layers", "Sparsity by layer", "After every round.", _layers),
        _rounds(groups, CHANGES),
        _rounds(groups, COVERAGE),
        costs.traffic(groups),
        _choice(
            groups,
            "clients",
            "Accuracy over clients",
            "A client's accuracy is that of the test's classes, weighted by its own examples: "
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
        _rounds(groups, COHORTS),
    ]
    remarks = [remark for picture in made for remark in picture.remarks]
    return [picture for picture in made if picture.variants], remarks


def _curves(compared: Comparison, field: str, title: str, axis: str, scale: float) -> frame.Picture:
    """Draw what was tested against rounds, bytes, FLOPs and, where it is modeled, time."""
    groups, variants = compared.groups, []
    for x, text in frame.AXES.items():
        figure = frame.empty(x=text, y=axis)
        lines = [series.merged(members, compared.score, x=x, y=field) for members in groups]
        frame.curves(figure, groups, lines, scale=scale, shape="linear")
        if x == "rounds":
            frame.mark_stages(figure, groups)
        if figure.data:
            variants.append((frame.NAMES[x], figure))
    note = "Mean over seeds; the band is one deviation." if _has_seeds(groups) else ""
    return frame.Picture(field, title, note, variants)


def _has_seeds(groups: Sequence[Group]) -> bool:
    return any(len(groups_lib.counted(members)) > 1 for members in groups)


def _rounds(groups: Sequence[Group], drawn: _Series) -> frame.Picture:
    """Draw a number of every round, unless it is constant for every group."""
    lines = [series.by_round(members, drawn.read) for members in groups]
    figure = frame.empty(x="rounds", y=drawn.axis)
    frame.curves(figure, groups, lines, scale=1.0, shape="hv")
    picture = frame.Picture(drawn.key, drawn.title, drawn.note, [])
    if not figure.data:
        return picture
    known = [n for n, line in enumerate(lines) if not np.isnan(line.mean).all()]
    values = {groups[n].label: series.constant(lines[n]) for n in known}
    if None not in values.values():
        unit = " %" if drawn.axis.endswith("%") else ""
        texts = {label: f"{value:.4g}{unit}" for label, value in values.items()}
        remark = f"{drawn.title}: {next(iter(texts.values()))} in every round."
        if len(set(texts.values())) > 1:
            each = "; ".join(f"{label} {text}" for label, text in texts.items())
            remark = f"{drawn.title}, constant: {each}."
        return picture._replace(remarks=(remark,))
    figure.update_yaxes(rangemode="tozero")
    if drawn is COHORTS:
        frame.whole(figure.update_yaxes, max(np.nanmax(line.mean) for line in lines))
    frame.mark_stages(figure, groups)
    return picture._replace(variants=[("", figure)])


def _choice(
    groups: Sequence[Group],
    key: str,
    title: str,
    note: str,
    draw: Callable[[RunData], go.Figure | str | None],
) -> frame.Picture:
    """Draw something of one run of each group, of which one group is shown.

    A text in a figure's place says that there is nothing to draw and why.
    """
    variants, said = [], {}
    for members in groups:
        figure = draw(groups_lib.counted(members)[0])
        if isinstance(figure, str):
            said.setdefault(figure, []).append(members.label)
        elif figure is not None:
            if key != "participation":
                frame.mark_stages(figure, [members])
            variants.append((members.label, figure))
    remarks = []
    for text, labels in said.items():
        whose = f" ({'; '.join(labels)})" if len(groups) > 1 else ""
        remarks.append(f"{title}: {text}{whose}.")
    if _has_seeds(groups):
        note += " For each configuration, its first seed."
    return frame.Picture(key, title, note, variants, tuple(remarks))


def _layers(run: RunData) -> go.Figure | str | None:
    found = series.layers(run)
    if found is None:
        return None
    paths, edges, table = found
    if not np.any(table):
        return "nothing is pruned"
    if all(path.endswith("/kernel") for path in paths):
        paths = [path.removesuffix("/kernel") for path in paths]
    if table.shape[1] == 1:
        return _constant_layers(dict(zip(paths, table[:, 0].tolist(), strict=True)))
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


def _constant_layers(values: dict[str, float]) -> str:
    """Say the sparsity of layers in which it is constant: of each, or of many the extremes."""
    texts = {path: f"{value:.4g} %" for path, value in values.items()}
    if len(set(texts.values())) == 1:
        return f"{next(iter(texts.values()))} in every layer and round"
    if len(texts) > FEW_LAYERS:
        least, most = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
        return f"in every round, from {texts[least]} in {least} to {texts[most]} in {most}"
    return f"in every round, {', '.join(f'{path} {text}' for path, text in texts.items())}"


def _spread(run: RunData) -> go.Figure | str | None:
    found = series.spread(run)
    if found is None:
        return None
    rounds, rows = found
    if np.all(rows["highest"] - rows["lowest"] < 1e-9):
        return "the same for all clients"
    figure = frame.empty(x="rounds", y="accuracy, %")
    frame.whole(figure.update_xaxes, rounds[-1])
    color = frame.LIGHT[0]
    for low, high, name in (
        ("lowest", "highest", "all clients"),
        ("lower_quartile", "upper_quartile", "middle half"),
    ):
        line = {"width": 0.5, "color": color}
        frame.band(figure, rounds, rows[low], rows[high], color, line=line, name=name)
    figure.add_scatter(
        x=rounds,
        y=frame.thin(rows["median"]),
        name="median client",
        mode="lines",
        line={"color": color, "width": 2},
        customdata=frame.thin(np.stack([rows["lowest"], rows["highest"]], axis=1)),
        hovertemplate="%{y:.4~g} (from %{customdata[0]:.4~g} to %{customdata[1]:.4~g}) "
        "at round %{x}",
    )
    return figure


def _participation(run: RunData) -> go.Figure | str | None:
    counts = series.participation(run)
    if counts is None:
        return None
    if len(counts) == 1:
        ((times, number),) = counts.items()
        return f"each of {number} clients sent something in {times} round{'s' * (times != 1)}"
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
