"""The command ``fedjaxprune list``."""

import click

from fedjaxprune import registry
from fedjaxprune.errors import ConfigError, near_miss
from fedjaxprune.experiment.config import files

PRESETS = "preset"
_WIDTH, _NAMES = 100, 26  # columns: of all, and of the names that have a text beside them


@click.command(name="list")
@click.argument("kind", required=False)
def list_(kind: str | None) -> None:
    """List the parts of a KIND, or all parts and presets; imports none of them.

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
    for one in [wanted] if wanted else kinds:
        formatter.write(f"{one}:\n")
        formatter.indent()
        if rows := _presets() if one == PRESETS else _parts(one):
            formatter.write_dl([*rows.items()], col_max=_NAMES)
        formatter.dedent()
    click.echo(formatter.getvalue(), nl=False)


def _parts(kind: str) -> dict[str, str]:
    rows = {}
    for name, listed in registry.names(kind).items():
        of = listed.origin
        is_foreign = of.source != "built-in"
        whose = f"  (from {of.package} {of.version})" if is_foreign else ""
        rows[name] = listed.summary.rstrip(".") + whose
        rows |= {f"{name}/{one}": f"the same with {text}" for one, text in listed.variants.items()}
    if fallback := registry.KINDS[kind].fallback:
        rows["..."] = f"any other name: {fallback[0]} with this {fallback[1]}"
    return rows


def _presets() -> dict[str, str]:
    texts = files.preset_texts().items()
    return {name: text.splitlines()[0].lstrip("# ").rstrip(".") for name, text in texts}
