"""Which parts there are, read from the text of modules and from package metadata.

Nothing that is listed is imported: a name, a summary and the names of variants stand as literals
in a module's text, and an installed package lists its parts as entry points.
"""

import ast
import functools
import importlib.metadata
import importlib.util
import pathlib
import re
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from fedjaxprune.errors import ConfigError


class Kind(NamedTuple):
    """One kind of part.

    Attributes:
      place: module, or package of modules, that holds the built-in ones.
      context: names of the arguments of a part's `build` besides its settings; the first
        `num_positional` of them are given by position.
      fallback: built-in part that stands for names that nobody offers, and its setting that takes
        such a name.
      is_component: a plain function is what `build` would return, not a `build`.
    """

    place: str
    context: tuple[str, ...] = ()
    num_positional: int = 0
    fallback: tuple[str, str] | None = None
    is_component: bool = False


# Entry points are in the group ``fedjaxprune.<kind>s``, such as ``fedjaxprune.methods``.
KINDS: dict[str, Kind] = {
    "method": Kind("fedjaxprune.methods", ("task",), num_positional=1),
    "model": Kind("fedjaxprune.models", ("input_shape", "num_classes")),
    "dataset": Kind("fedjaxprune.data.sources", fallback=("tfds", "tfds_name")),
    "partition": Kind(
        "fedjaxprune.data.partitions", ("rng", "labels", "num_clients", "keys"), num_positional=2
    ),
    "sampling": Kind("fedjaxprune.federated.sampling", ("num_clients", "cohort_size", "sizes")),
    "optimizer": Kind("fedjaxprune.federated.optimizers"),
    "correction": Kind("fedjaxprune.federated.corrections", ("batcher", "optimizer_settings")),
    "uplink": Kind("fedjaxprune.federated.uplinks"),
    "downlink": Kind("fedjaxprune.federated.downlinks"),
    "aggregator": Kind("fedjaxprune.federated.aggregators"),
    "attack": Kind("fedjaxprune.federated.attacks", ("num_classes",)),
    "hardware": Kind("fedjaxprune.costs.hardware", ("num_clients", "rng")),
    "server_optimizer": Kind("fedjaxprune.federated.server_optimizers"),
    "tracker": Kind("fedjaxprune.experiment.tracking", is_component=True),
    "consensus": Kind("fedjaxprune.pruning.structured.voting", is_component=True),
}


class Origin(NamedTuple):
    """Whose code a part is.

    Attributes:
      source: a built-in, an installed package, a file, or a value given in Python.
      package: name of the installed package.
      version: its version.
      path: of the file.
      sha256: checksum of the file.
    """

    source: Literal["built-in", "package", "file", "value"]
    package: str = ""
    version: str = ""
    path: str = ""
    sha256: str = ""


class Listed(NamedTuple):
    """What a list says of a part.

    Attributes:
      summary: one line.
      origin: whose it is.
      variants: of a method, by name: what each sets, such as ``"max_penalty = 0.0"``.
    """

    summary: str
    origin: Origin
    variants: Mapping[str, str] = MappingProxyType({})


class Place(NamedTuple):
    """Where a built-in stands: the module, the name in it, and what its text says."""

    module: str
    listed: Listed


def names(kind: str) -> dict[str, Listed]:
    """List the parts of a kind by name, built-in ones first; imports none of them."""
    found = {name: place.listed for name, place in built_in(kind).items()}
    for name, points in entry_points(kind).items():
        if name not in found:
            found[name] = Listed(_summary(points[0]), origin(points[0]))
    return found


def built_in(kind: str) -> Mapping[str, Place]:
    """Find the built-in parts of a kind in the text of its modules, which is read once."""
    return _built_in(KINDS[kind].place, kind == "method")


@functools.cache
def _built_in(place: str, is_method: bool) -> Mapping[str, Place]:
    found: dict[str, Place] = {}
    for module, file in _modules(place):
        text = file.read_text(encoding="utf-8")
        if ("METHOD" if is_method else "PARTS") not in text:
            continue
        listed = _declared(text, is_method)
        found |= {name or module.rpartition(".")[2]: Place(module, o) for name, o in listed.items()}
    return MappingProxyType(found)


def entry_points(kind: str) -> dict[str, list[importlib.metadata.EntryPoint]]:
    """Find the parts that installed packages offer; a name that two offer has two entries."""
    found: dict[str, list[importlib.metadata.EntryPoint]] = {}
    group = f"fedjaxprune.{kind.removesuffix('s')}s"
    for point in sorted(_installed(tuple(sys.path)).select(group=group)):
        found.setdefault(point.name, []).append(point)
    return dict(sorted(found.items()))


@functools.lru_cache(maxsize=4)
def _installed(path: tuple[str, ...]) -> Any:
    """Read the metadata of all packages, once for each value of ``sys.path``."""
    del path
    return importlib.metadata.entry_points()


def origin(point: importlib.metadata.EntryPoint) -> Origin:
    """Say which package an entry point is of."""
    if point.dist is None:
        return Origin("package", package=point.module.partition(".")[0])
    return Origin("package", package=point.dist.name, version=point.dist.version)


def top_names(file: pathlib.Path) -> list[str]:
    """List the public names that a file assigns or defines, in its order."""
    return [
        name for name in _assigned(ast.parse(file.read_text(encoding="utf-8"))) if name[0] != "_"
    ]


def mentions(kind: str, text: str) -> bool:
    """Tell whether a text stands anywhere in the modules of a kind's built-in parts."""
    folders = {file.parent for _, file in _modules(KINDS[kind].place)}
    files = (file for folder in folders for file in folder.rglob("*.py"))
    return any(text in file.read_text(encoding="utf-8") for file in files)


def split_variant(name: str) -> tuple[str, str]:
    """Take the name of a method apart from that of its variant, which may be empty."""
    if name.endswith(".py"):
        return name, ""
    head, colon, tail = name.rpartition(":")
    tail, _, variant = tail.partition("/")
    return head + colon + tail, variant


def check_kind(kind: str) -> Kind:
    """Look up a kind."""
    if kind not in KINDS:
        raise ConfigError(f"the kind must be one of {', '.join(KINDS)}, got {kind!r}.")
    return KINDS[kind]


def _modules(place: str) -> list[tuple[str, pathlib.Path]]:
    """List a module, or the public modules of a package, with their files."""
    top, _, rest = place.partition(".")
    spec = sys.modules[top].__spec__ if top in sys.modules else importlib.util.find_spec(top)
    for root in (spec and spec.submodule_search_locations) or ():
        path = pathlib.Path(root, *rest.split("."))
        if path.with_suffix(".py").is_file():
            return [(place, path.with_suffix(".py"))]
        if path.is_dir():
            inside = ((one, one / "__init__.py" if one.is_dir() else one) for one in path.iterdir())
            return sorted(
                (f"{place}.{one.stem}", file)
                for one, file in inside
                if one.stem[0] not in "_." and file.suffix == ".py" and file.is_file()
            )
    return []


def _declared(text: str, is_method: bool) -> Mapping[str, Listed]:
    """Read what a module's text declares; a method has no name here, as its file has it."""
    piece = _piece(text, "METHOD" if is_method else "PARTS")
    tree = next((one for one in map(_parse, (piece, text)) if one.body), _parse(""))
    if not is_method:
        return _table(tree)
    found = _keys(_keyword(_assigned(tree).get("METHOD"), "variants"))
    variants = {name: in_words(_literal(node)) for name, node in found.items()}
    return {"": Listed(_first_sentence(tree), Origin("built-in"), variants)}


def _piece(text: str, name: str) -> str:
    """Cut a module down to its doc-string and the statement that sets `name`; "" if unusual."""
    statement = re.search(rf"^{name}\b[^=\n]*=.*\n(?:[ )}}\]].*\n|\n)*", text, re.MULTILINE)
    end = text.find('"""', 3)
    return f"{text[: end + 3]}\n{statement[0]}" if statement and text.startswith('"""') else ""


def _parse(text: str) -> ast.Module:
    """Parse a module; a broken one is empty, and its import says what is wrong."""
    try:
        return ast.parse(text)
    except SyntaxError:
        return ast.Module(body=[], type_ignores=[])


def _assigned(tree: ast.Module) -> dict[str, ast.AST]:
    """Give what stands at the top of a module by name: assigned values, functions, classes."""
    found: dict[str, ast.AST] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.AnnAssign) and node.value and isinstance(node.target, ast.Name):
            found[node.target.id] = node.value
        elif isinstance(node, ast.Assign):
            found |= {one.id: node.value for one in node.targets if isinstance(one, ast.Name)}
    return found


def _first_sentence(tree: ast.Module) -> str:
    return (ast.get_docstring(tree) or "").partition("\n")[0]


def in_words(settings: Mapping[str, Any]) -> str:
    """Say what settings are: ``"client.correction = scaffold, sparsity = 0.5"``."""
    return ", ".join(f"{name} = {value}" for name, value in settings.items())


def _literal(node: ast.AST) -> Mapping[str, Any]:
    """Evaluate the settings of a variant, where they stand as literals."""
    return {
        name: value.value if isinstance(value, ast.Constant) else ast.unparse(value)
        for name, value in _keys(node).items()
    }


def _table(tree: ast.Module) -> dict[str, Listed]:
    """Read a module's ``PARTS``; a part without a summary has its module's first line."""
    found = {}
    for name, value in _keys(_assigned(tree).get("PARTS")).items():
        summary = _keyword(value, "summary")
        text = summary.value if isinstance(summary, ast.Constant) else ""
        found[name] = Listed(str(text) or _first_sentence(tree), Origin("built-in"))
    return found


def _keyword(call: ast.AST | None, name: str) -> ast.AST | None:
    keywords = call.keywords if isinstance(call, ast.Call) else []
    return next((one.value for one in keywords if one.arg == name), None)


def _keys(node: ast.AST | None) -> dict[str, ast.AST]:
    """Give the entries of a dict literal whose keys are literal texts."""
    pairs = zip(node.keys, node.values, strict=True) if isinstance(node, ast.Dict) else ()
    return {str(k.value): value for k, value in pairs if isinstance(k, ast.Constant)}


def _summary(point: importlib.metadata.EntryPoint) -> str:
    """Read the first line of an entry point's module, or else its package's summary."""
    if point.dist is None:
        return ""
    stem = point.module.replace(".", "/")
    for inside in (f"{stem}.py", f"{stem}/__init__.py"):
        file: Any = point.dist.locate_file(inside)
        try:
            if text := _first_sentence(_parse(file.read_text(encoding="utf-8"))):
                return text
        except (OSError, ValueError):
            continue
    metadata: Any = point.dist.metadata
    return metadata.get("Summary", "")
