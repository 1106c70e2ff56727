"""Put the page together: tables and configs as HTML, pictures for plotly, all in one file."""

import base64
import contextlib
import errno
import functools
import gzip
import html
import importlib.resources
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import plotly.offline

from fedjaxprune import __version__
from fedjaxprune.experiment.analysis import compare, tables
from fedjaxprune.experiment.analysis.compare import Comparison, Group
from fedjaxprune.experiment.analysis.report import figures, frame
from fedjaxprune.experiment.config.flat import files, identity
from fedjaxprune.experiment.config.flat.sections import UserError
from fedjaxprune.experiment.folder import load
from fedjaxprune.experiment.folder.load import Run

_TALL = 450  # pixels from which a picture gets the whole width
_SIGNS = {"finished": "✓", "running": "…", "failed": "✕", "broken off": "‖"}


def make(
    found: Sequence[Run], *, budget: float | None, target: float | None
) -> tuple[str, list[str]]:
    """Write the page about runs.

    Args:
      found: the runs.
      budget: MiB at which accuracies are compared; None for the smallest total of a run.
      target: accuracy to which costs are counted; None for what all reach.

    Returns:
      The page, and notes on runs that are left out.

    Raises:
      UserError: the runs cannot be compared.
    """
    groups, notes = compare.group(found)
    compared = compare.compare(groups, budget=budget, target=target)
    drawn = figures.pictures(compared)
    title = f"{groups[0].runs[0].config['dataset']}: " + (
        groups[0].label if len(groups) == 1 else f"{len(groups)} configurations"
    )
    body = [
        _states(groups),
        f"<h2>{'Comparison' if len(groups) > 1 else 'Result'}</h2>",
        _table(compared),
        '<h2>Pictures</h2><div class="pictures">',
        *(_place(number, picture) for number, picture in enumerate(drawn)),
        "</div><h2>Configurations</h2>",
        *(_configuration(members, groups) for members in groups),
    ]
    data = {
        "palette": {"light": frame.LIGHT, "dark": frame.DARK},
        "pictures": [
            {
                "key": picture.key,
                "names": [name for name, _ in picture.variants],
                "variants": [figure.to_json() for _, figure in picture.variants],
            }
            for picture in drawn
        ],
    }
    parts = {
        "TITLE": html.escape(title),
        "STYLE": _file("page.css"),
        "BODY": "\n".join(body),
        "FOOT": f"Made with fedjaxprune {__version__} from the run folders.",
        "PICTURES": _pack(json.dumps(data)),
        "LIBRARY": _library(),
        "SCRIPT": _file("page.js"),
    }
    page = _file("page.html").split("@")
    known = [parts.get(part) for part in page]  # odd places hold names
    text = "".join(
        part if value is None else value for part, value in zip(page, known, strict=True)
    )
    return text, notes


def write(path: pathlib.Path, text: str) -> None:
    """Write the page in one step.

    Raises:
      UserError: it cannot be written there.
    """
    draft = None
    try:
        if not path.name or path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        draft = path.with_name(f".{path.name[:200]}.new")
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    except (OSError, ValueError) as error:  # a ValueError: of a name that no file can have
        if draft is not None:
            with contextlib.suppress(OSError, ValueError):
                draft.unlink(missing_ok=True)
        why = getattr(error, "strerror", None) or error
        raise UserError(
            f"out: cannot write {str(path)!r} ({why}); name a file in a folder that exists and "
            "can be written to."
        ) from None


def _file(name: str) -> str:
    """Read a part of the page that ships with the package."""
    folder = importlib.resources.files("fedjaxprune.experiment.analysis.report")
    return folder.joinpath(name).read_text(encoding="utf-8")


def _pack(text: str) -> str:
    """Pack a text for the page, which unpacks it; the library alone is two thirds air."""
    return base64.b64encode(gzip.compress(text.encode(), compresslevel=9, mtime=0)).decode()


@functools.cache
def _library() -> str:
    """Pack the plotting library, once.

    It is one function, which browsers read twice unless it stands in brackets (0.2 s).
    """
    text = plotly.offline.get_plotlyjs()
    head, begin, rest = text.partition(", () => {\n")
    body, end, tail = rest.rpartition("}));")
    if begin and end and not tail.strip():
        text = f"{head}, (() => {{\n{body}}})));\n"
    return _pack(text)


def _states(groups: Sequence[Group]) -> str:
    """List runs that are not finished, and say how many there are."""
    found = [run for members in groups for run in members.runs]
    open_ = [run for run in found if run.state != "finished"]
    count = f"{len(found)} run{'s' if len(found) > 1 else ''}"
    state = "finished" if not open_ else f"{len(found) - len(open_)} finished"
    if len(found) == 1:
        state = load.standing(found[0])
    items = [
        f'<li class="{"failed" if run.state == "failed" else ""}">{_SIGNS[run.state]} '
        f"{html.escape(run.name)}: {html.escape(load.standing(run))}</li>"
        for run in (found if len(found) == 1 else open_)
    ]
    first = "" if len(found) == 1 else f"<p>{count}, {state}.</p>"
    return f"{first}<ul class='states'>{''.join(items)}</ul>" if items else first


def _table(compared: Comparison) -> str:
    """Write the comparison as a table; of one configuration, as a list of numbers."""
    head, *body = tables.rows(compared)
    text = html.escape(tables.comma_separated(compared), quote=True)
    button = f'<p><button id="csv" type="button" data-text="{text}">download the table</button></p>'
    if len(body) == 1:
        rows = "".join(
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
            for name, value in zip(head, body[0], strict=True)
        )
        return f'<div class="scroll tall"><table>{rows}</table></div>{button}'
    names = "".join(f"<th{_kind(name)}>{html.escape(name)}</th>" for name in head)
    rows = "".join(
        "<tr>"
        + "".join(
            f"<td{_kind(name)}>{html.escape(value)}</td>"
            for name, value in zip(head, row, strict=True)
        )
        + "</tr>"
        for row in body
    )
    over = any(len(measures) > 1 for measures in compared.measures)
    note = '<p class="note">Mean ± deviation over seeds.</p>' if over else ""
    return (
        f'<div class="scroll many"><table><thead><tr>{names}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>{note}{button}"
    )


def _kind(column: str) -> str:
    """Tell columns of words from those of numbers."""
    return " class=words" if column == tables.OPEN else ""


def _place(number: int, picture: figures.Picture) -> str:
    """Make the place of a picture."""
    note = f'<p class="note">{html.escape(picture.note)}</p>' if picture.note else ""
    tall = any((figure.layout.height or 0) > _TALL for _, figure in picture.variants)
    wide = " wide" if tall else ""
    return (
        f'<section class="picture{wide}"><h3>{html.escape(picture.title)}</h3>{note}'
        f'<div class="choices"></div><div class="plot" data-number="{number}"></div></section>'
    )


def _configuration(members: Group, groups: Sequence[Group]) -> str:
    """Write the command and the config of a group, and list its runs."""
    first = members.runs[0]
    others = [group.runs[0].config for group in groups]
    shown = {name: value for name, value in first.config.items() if name != "out"}
    rows = "".join(
        f'<div class="{"differs" if _differs(name, others) else ""}"><dt>{html.escape(name)}</dt>'
        f"<dd>{html.escape(_text(value))}</dd></div>"
        for name, value in shown.items()
        if name != identity.SEED
    )
    items = "".join(
        f'<li class="{"failed" if run.state == "failed" else ""}">{_SIGNS[run.state]} '
        f"seed {html.escape(str(run.config.get(identity.SEED)))}: {html.escape(str(run.folder))}, "
        f"{html.escape(load.standing(run))}</li>"
        for run in members.runs
    )
    versions = ", ".join(f"{name} {version}" for name, version in first.versions.items())
    is_open = " open" if len(groups) == 1 else ""
    return (
        f"<details{is_open}><summary>{html.escape(members.label)}</summary>"
        f"<p class='note'>A command that makes the same run"
        f"{' (first seed)' if len(members.runs) > 1 else ''}:</p>"
        f"<pre>{html.escape(files.command(first.config))}</pre>"
        f"<ul class='states'>{items}</ul><div class='config'><dl>{rows}</dl></div>"
        f"<p class='note'>{html.escape(versions)}</p></details>"
    )


def _differs(name: str, configs: Sequence[dict[str, Any]]) -> bool:
    """Tell whether a setting that matters differs among configurations."""
    values = {repr(c.get(name)) for c in configs if identity.matters(name, c)}
    return len(values) > 1


def _text(value: Any) -> str:
    words = {True: "yes", False: "no"}
    if value is None:
        return "none"
    return words[value] if isinstance(value, bool) else str(value)
