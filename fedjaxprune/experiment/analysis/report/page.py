"""Put the page together: tables and configs as HTML, pictures for plotly, all in one file."""

import base64
import errno
import functools
import gzip
import importlib.resources
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import plotly.offline

from fedjaxprune import __version__
from fedjaxprune.errors import ConfigError
from fedjaxprune.experiment.analysis import compare, headline, tables
from fedjaxprune.experiment.analysis import groups as groups_lib
from fedjaxprune.experiment.analysis.compare import Comparison
from fedjaxprune.experiment.analysis.groups import Group
from fedjaxprune.experiment.analysis.report import figures, frame
from fedjaxprune.experiment.config import identity
from fedjaxprune.experiment.folder import layout, load

_TALL = 450  # pixels from which a picture gets the whole width
_SIGNS = {"finished": "✓", "running": "…", "failed": "✕", "interrupted": "‖"}


def of_folders(
    folders: Iterable[str | pathlib.Path],
    path: pathlib.Path,
    *,
    at_mib: float | None = None,
    to_accuracy: float | None = None,
) -> list[str]:
    """Write the page about runs, which are as for `compare.of_folders`, and return its notes."""
    compared, notes = compare.of_folders(folders, at_mib=at_mib, to_accuracy=to_accuracy)
    write(path, make(compared, notes))
    return notes


def make(compared: Comparison, notes: Sequence[str] = ()) -> str:
    """Make the page about runs."""
    groups = compared.groups
    drawn, remarks = figures.pictures(compared)
    dataset = groups_lib.dataset_of(groups[0].runs[0])
    what = groups[0].label if len(groups) == 1 else f"{len(groups)} configurations"
    body = [
        _states(groups),
        f"<h2>{'Comparison' if len(groups) > 1 else 'Result'}</h2>",
        *(f'<p class="note">{escape(_begun(note))}</p>' for note in notes),
        _table(compared),
        '<h2>Pictures</h2><div class="pictures">',
        *(_place(number, picture) for number, picture in enumerate(drawn)),
        "</div>",
        _list("remarks", remarks),
        "<h2>Configurations</h2>",
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
    said = headline.sentence(compared).replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")
    said = said.replace(" %", "\N{NO-BREAK SPACE}%")
    parts = {
        "TITLE": escape(f"{dataset}: {what}"),
        "HEADLINE": escape(_begun(said)),
        "STYLE": _file("page.css"),
        "BODY": "\n".join(body),
        "FOOT": f"Made with fedjaxprune {__version__} from the run folders.",
        "PICTURES": _pack(json.dumps(data)),
        "LIBRARY": _library(),
        "SCRIPT": _file("page.js"),
    }
    return "".join(parts.get(part, part) for part in _file("page.html").split("@"))


def write(path: pathlib.Path, text: str) -> None:
    """Write the page in one step; what is no text (of a folder's name) is shown as ``?``."""
    try:
        if not path.name or path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        layout.replace(path, text.encode(errors="replace").decode())
    except (OSError, ValueError) as error:  # a ValueError: of a name that no file can have
        why = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"--out: cannot write {str(path)!r} ({why}); name a file in a folder that exists and "
            "can be written to."
        ) from None


def _file(name: str) -> str:
    """Read a part of the page that ships with the package."""
    folder = importlib.resources.files("fedjaxprune.experiment.analysis.report")
    return folder.joinpath(name).read_text(encoding="utf-8")


def _pack(text: str) -> str:
    """Pack a text for the page, which unpacks it; the library shrinks to a third."""
    return base64.b64encode(gzip.compress(text.encode(), compresslevel=9, mtime=0)).decode()


@functools.cache
def _library() -> str:
    """Pack the plotting library, once.

    It is one function, which browsers parse twice unless it is in parentheses (0.2 s).
    """
    text = plotly.offline.get_plotlyjs()
    head, begin, rest = text.partition(", () => {\n")
    body, end, tail = rest.rpartition("}));")
    if begin and end and not tail.strip():
        text = f"{head}, (() => {{\n{body}}})));\n"
    return _pack(text)


def _begun(sentence: str) -> str:
    """Begin a sentence with a capital letter."""
    return sentence[:1].upper() + sentence[1:]


def _list(kind: str, items: Sequence[str]) -> str:
    texts = "".join(f"<li>{escape(item)}</li>" for item in items)
    return f'<ul class="{kind}">{texts}</ul>' if texts else ""


def _state(run: load.RunData, text: str) -> str:
    kind = "failed" if run.state == "failed" else ""
    return f'<li class="{kind}">{_SIGNS[run.state]} {escape(text)}</li>'


def _states(groups: Sequence[Group]) -> str:
    """List runs that are not finished, and say how many there are."""
    found = [run for members in groups for run in members.runs]
    listed = [run for run in found if run.state != "finished"] if len(found) > 1 else found
    items = "".join(_state(run, f"{run.name}: {load.standing(run)}") for run in listed)
    state = f"{len(found) - len(listed)} finished" if listed else "finished"
    first = "" if len(found) == 1 else f"<p>{len(found)} runs, {state}.</p>"
    return f"{first}<ul class='states'>{items}</ul>" if items else first


def _table(compared: Comparison) -> str:
    """Write the comparison as tables; of one configuration, as a list of numbers."""
    text = escape(tables.comma_separated(compared))
    end = _list("note", [_begun(note) for note in compared.notes]) + (
        f'<p><button id="csv" type="button" data-text="{text}">download all numbers</button></p>'
    )
    if len(compared.groups) == 1:
        head, body = tables.rows(compared, tables.everything(compared), is_short=False)
        rows = "".join(
            f"<tr><th scope=row>{escape(name)}</th><td>{escape(value)}</td></tr>"
            for name, value in zip(head, body, strict=True)
        )
        return f'<div class="scroll tall"><table>{rows}</table></div>{end}'
    made = []
    for title, several in tables.columns(compared).items():
        shown = [column for column in several if column.short]
        head, *body = tables.rows(compared, shown, is_short=bool(made))
        # Columns of words are not aligned as numbers are.
        kinds = [" class=words" if name == tables.OPEN else "" for name in head]
        rows = "".join(_row("td", kinds, row) for row in body)
        made.append(
            f'<div class="scroll many" tabindex="0" role="region" aria-label="{title}"><table>'
            f"<caption>{title.capitalize()}</caption><thead>{_row('th scope=col', kinds, head)}"
            f"</thead><tbody>{rows}</tbody></table></div>"
        )
    if any(len(measures) > 1 for measures in compared.measures):
        made.append('<p class="note">Mean ± deviation over seeds.</p>')
    return "".join(made) + end


def _row(tag: str, kinds: Sequence[str], texts: Sequence[str]) -> str:
    end = f"</{tag[:2]}>"
    cells = (f"<{tag}{kind}>{escape(text)}{end}" for kind, text in zip(kinds, texts, strict=True))
    return f"<tr>{''.join(cells)}</tr>"


def _place(number: int, picture: frame.Picture) -> str:
    """Make the place of a picture."""
    note = f'<p class="note">{escape(picture.note)}</p>' if picture.note else ""
    is_tall = any((figure.layout.height or 0) > _TALL for _, figure in picture.variants)
    wide = " wide" if is_tall else ""
    return (
        f'<section class="picture{wide}"><h3>{escape(picture.title)}</h3>{note}'
        f'<div class="choices"></div><div class="plot" data-number="{number}"></div></section>'
    )


def _configuration(members: Group, groups: Sequence[Group]) -> str:
    """Write the command and the config of a group, and list its runs."""
    first = members.runs[0]
    differing = groups_lib.differing(groups)
    rows = "".join(
        f'<div class="{"differs" if path in differing else ""}"><dt>{escape(path)}</dt>'
        f"<dd>{escape(_text(value))}</dd></div>"
        for path, value in identity.flat(first.config).items()
        if path != identity.SEED
    )
    items = "".join(
        _state(run, f"seed {groups_lib.seed(run)}: {run.folder}, {load.standing(run)}")
        for run in members.runs
    )
    made_by = [f"{name} {version}" for name, version in first.versions.items()]
    made_by += [
        f"{path} by {origin.get('package') or origin.get('path') or 'a value given in Python'} "
        f"{origin.get('version') or origin.get('sha256', '')[:8]}".rstrip()
        for path, origin in first.parts.items()
        if isinstance(origin, dict)
    ]
    is_open = " open" if len(groups) == 1 else ""
    which = " (first seed)" if len(members.runs) > 1 else ""
    command = first.command and (
        f"<p class='note'>A command that makes the same run{which}:</p>"
        f"<pre tabindex='0'>{escape(first.command)}</pre>"
    )
    return (
        f"<details{is_open}><summary>{escape(members.label)}</summary>{command}"
        f"<ul class='states'>{items}</ul><div class='config'><dl>{rows}</dl></div>"
        f"<p class='note'>{escape(', '.join(made_by))}</p></details>"
    )


def _text(value: Any) -> str:
    if value is None:
        return "none"
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)
