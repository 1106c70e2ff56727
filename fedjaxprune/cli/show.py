"""Commands that run nothing: ``list``, ``describe``, ``validate`` and ``schema``."""

import json
import re
import textwrap

import click

from fedjaxprune import registry
from fedjaxprune.errors import ConfigError, near_miss
from fedjaxprune.experiment.config import describe as describing
from fedjaxprune.experiment.config import files, resolve

PRESETS = "preset"
_NUMBERED = re.compile(r"([a-z_]*[a-z])\d\w*")
_LONG = ("method", "model", "dataset")  # kinds that are listed part by part
_WIDTH, _NAMES = 100, 26  # columns: of all, and of the names that have a text beside them


@click.command(name="list")
@click.argument("kind", required=False)
def list_(kind: str | None) -> None:
    """List the parts of a KIND, or all parts and presets in short; imports none of them.

    Parts of installed packages are in the list, too. `fedjaxprune describe NAME` says more.
    """
    kinds = [*registry.KINDS, PRESETS]
    wanted = kind.replace("-", "_").removesuffix("s") if kind else None
    if wanted and wanted not in kinds:
        raise ConfigError(
            f"the kind must be one of {', '.join(kinds)}, got {kind!r}{near_miss(wanted, kinds)}"
        )
    formatter = click.HelpFormatter(max_width=_WIDTH)
    formatter.width = _WIDTH
    is_short = wanted is None
    for one in (*_LONG, PRESETS) if is_short else [wanted]:
        formatter.write(f"{one}:\n")
        with formatter.indentation():
            rows = (_presets if one == PRESETS else _parts)(one, is_short=is_short)
            if is_short:
                rows = {name: _on_one_line(text) for name, text in _families(rows).items()}
            if rows:
                formatter.write_dl([*rows.items()], col_max=_NAMES)
    if is_short:
        formatter.write("others; `fedjaxprune list KIND` says what they are:\n")
        with formatter.indentation():
            others = (one for one in registry.KINDS if one not in _LONG)
            formatter.write_dl([(one, ", ".join(registry.names(one))) for one in others])
    click.echo(formatter.getvalue(), nl=False)


def _families(rows: dict[str, str]) -> dict[str, str]:
    """Put names that differ from a number on, such as resnet8 and resnet20, in one row."""
    stems: dict[str, list[str]] = {}
    for name in rows:
        found = _NUMBERED.fullmatch(name)
        stems.setdefault(f"{found[1]}..." if found else name, []).append(name)
    return {
        stem if len(names) > 1 else names[0]: rows[names[0]]
        if len(names) == 1
        else ", ".join(names)
        for stem, names in stems.items()
    }


def _on_one_line(text: str) -> str:
    """Cut a text down to what fits beside a name."""
    return textwrap.shorten(text, _WIDTH - _NAMES - 4, placeholder=" ...")


def _parts(kind: str, *, is_short: bool) -> dict[str, str]:
    """Give the parts' summaries, and what their variants set, or in short their names."""
    rows = {}
    for name, listed in registry.names(kind).items():
        of = listed.origin
        whose = "" if of.source == "built-in" else f"  (from {of.package} {of.version})"
        rows[name] = listed.summary.rstrip(".") + whose
        if is_short and listed.variants:
            rows[f"{name}/..."] = ", ".join(listed.variants)
            continue
        rows |= {f"{name}/{one}": f"the same with {text}" for one, text in listed.variants.items()}
    if fallback := registry.KINDS[kind].fallback:
        rows["..."] = f"any other name: {fallback[0]} with this {fallback[1]}"
    return rows


def _presets(kind: str, *, is_short: bool) -> dict[str, str]:
    """Give the presets' first lines, or what of them comes before a comma, colon or bracket."""
    del kind  # there is one of presets
    texts = files.preset_texts().items()
    lines = {name: text.splitlines()[0].lstrip("# ").rstrip(".") for name, text in texts}
    return {n: re.split(r"[,:(]", x)[0].rstrip() for n, x in lines.items()} if is_short else lines


@click.command()
@click.argument("name")
def describe(name: str) -> None:
    """Describe a part: what it is, its settings, needs and variants, and a command.

    NAME is a method, model, data set or other part of `fedjaxprune list`, KIND/NAME, FILE.py:NAME
    or MODULE:NAME.
    """
    click.echo(str(describing.describe(name)))


@click.command()
@click.argument("file")
def validate(file: str) -> None:
    """Check a preset, the YAML file of a run, or that of a sweep, without running anything."""
    from fedjaxprune.experiment.sweeps import plan

    if plan.is_sweep(files.load_source(file)):
        members = plan.read(file, folder=None).members
        click.echo(f"ok: {file} is a sweep of {len(members)} runs.")
        return
    parts = resolve.resolve(files.read_source(file)).parts
    method, model, dataset = parts.method.name, parts.model.name, parts.dataset.name
    click.echo(f"ok: {file} runs {method} with {model} on {dataset}.")


@click.command()
def schema() -> None:
    """Write the JSON schema of configurations with the parts that are installed, for editors."""
    from fedjaxprune.experiment.config import json_schema

    click.echo(json.dumps(json_schema.schema(), indent=2))
