"""Write docs/reference/methods.md from what the methods say of themselves.

    python docs/make_methods.py            # write the page
    python docs/make_methods.py --check    # fail if the page is not up to date

A section has the doc-string of a method's file, its settings, needs, variants and a command. The
table of all methods is ``docs/notes/_overview.md``. A file ``docs/notes/NAME.md``, if there is
one, follows: details and longer examples.
"""

import difflib
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence

from fedjaxprune import registry
from fedjaxprune.experiment.config import describe

PAGE = pathlib.Path(__file__).with_name("reference") / "methods.md"
NOTES = pathlib.Path(__file__).with_name("notes")
OVERVIEW = NOTES / "_overview.md"
HEAD = """\
# Methods

One section for each built-in method: the idea, where we follow the paper or its code, where we
differ, and the settings. `fedjaxprune describe NAME` shows the same in a terminal. This page is
made by `python docs/make_methods.py` from `fedjaxprune/methods/` and `docs/notes/`; edit these.

A variant is a method with some settings changed. Settings that you give win over its own.

"""
# Baselines first, then the methods of papers, then controls; a method that is not here comes after.
ORDER = ("fedavg", "feddip", "fedtiny", "autoflip", "mpfl", "adaptive_dynamic_pruning")


def main() -> None:
    """Write the page, or compare it."""
    text = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(text, encoding="utf-8")
        return
    before = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    if before != text:
        lines = difflib.unified_diff(before.splitlines(), text.splitlines(), lineterm="", n=0)
        sys.exit(
            "docs/reference/methods.md is not up to date: run `python docs/make_methods.py`.\n"
            + "\n".join(lines)
        )


def page() -> str:
    """Make the page."""
    names = [
        name for name, one in registry.names("method").items() if one.origin.source == "built-in"
    ]
    names.sort(key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
    contents = "".join(f"- [`{name}`](#{name})\n" for name in names)
    return f"{HEAD}{contents}\n{overview(names)}\n" + "\n".join(section(name) for name in names)


def overview(names: Sequence[str]) -> str:
    """Read the table of all methods, whose rows are kept by hand, in the order of the page."""
    rows = OVERVIEW.read_text(encoding="utf-8").splitlines()
    found = {match[1]: row for row in rows if (match := re.match(r"\| `(\w+)` \|", row))}
    if found.keys() != set(names):
        sys.exit(f"{OVERVIEW} must have a row for each method: {found.keys() ^ set(names)}.")
    head = [row for row in rows if row and row not in found.values()]
    return (
        "\n".join(["\n\n".join(head[:2]) + "\n", *head[2:], *(found[one] for one in names)]) + "\n"
    )


def section(name: str) -> str:
    """Make the section of one method."""
    said = describe.describe(f"method/{name}")
    text, _, references = said.text.partition("References:")
    parts = [f"## {name}", f"**{said.summary.rstrip('.')}.**", markdown(text.strip())]
    if references:
        parts.append("**References.** " + markdown(" ".join(references.split())))
    if said.paper:
        code = re.search(r"code (\S+)", said.paper)
        parts.append(f"Public code: <{code[1]}>" if code else "")
    facts = [f"Default network `{said.default_model}`"] + [f"needs {one}" for one in said.needs]
    parts.append(f"{'; '.join(facts)}.")
    parts += ["\n".join(settings(said)), "\n".join(variants(said))]
    note = NOTES / f"{name}.md"
    if note.exists():
        parts.append(note.read_text(encoding="utf-8").strip())
    else:
        parts.append(f"```bash\nfedjaxprune run --method {name}\n```")
    return "\n\n".join(part for part in parts if part) + "\n"


def settings(said: describe.Description) -> Iterator[str]:
    """Make the table of a method's own settings."""
    if not said.settings:
        return
    yield from ("| setting | values | unit | default | meaning |", "|---|---|---|---|---|")
    for row in said.settings:
        values = f"{row.type.removesuffix(' | none')} {row.bounds}".strip().replace("|", "\\|")
        cells = (f"`{row.name}`", values, row.unit, str(row.default), row.meaning)
        yield f"| {' | '.join(cells)} |"


def variants(said: describe.Description) -> Iterator[str]:
    """Make the table of a method's variants."""
    if not said.variants:
        return
    yield from ("| variant | sets |", "|---|---|")
    for name, changed in said.variants.items():
        yield f"| `{name}` | {', '.join(f'`{k}: {v}`' for k, v in changed.items()) or 'nothing'} |"


def markdown(text: str) -> str:
    """Turn a doc-string's markup into Markdown."""
    text = re.sub(
        r"`([^`<]+?)\s*<(https?://[^>]+)>`_", lambda m: f"[{' '.join(m[1].split())}]({m[2]})", text
    )
    return text.replace("``", "`")


if __name__ == "__main__":
    main()
