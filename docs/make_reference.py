"""Write the generated pages of the reference: names, parts, settings and commands.

    python docs/make_reference.py FOLDER

A page for every public module lists every name that ``tests/api.txt`` lists, with the signature as
the source has it and its doc-string. A page for every kind of part lists the settings that
`fedjaxprune describe` shows. Names in single backticks become links where they are public.
"""

import ast
import importlib
import inspect
import pathlib
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import click
from sphinx.ext.napoleon import Config
from sphinx.ext.napoleon.docstring import GoogleDocstring

from fedjaxprune import registry
from fedjaxprune.cli import main as command
from fedjaxprune.experiment.config import describe
from fedjaxprune.experiment.config.sections import PLACES, RunConfig, Uplink
from fedjaxprune.settings import Row, Settings, describe_settings, nested

NAMES = pathlib.Path(__file__).parents[1] / "tests/api.txt"
TOP = "fedjaxprune"
NAPOLEON = Config(napoleon_use_ivar=True, napoleon_use_rtype=False, napoleon_use_param=True)
LITERAL = re.compile(r"``.+?``", re.DOTALL)
NAMED = re.compile(r"(?<![:`\w])`([A-Za-z_][\w.]*)`(?![`_])")


class Entry(NamedTuple):
    """A public name.

    Attributes:
      path: by which users import it, with dots.
      value: what it is.
      module: the public module that lists it.
    """

    path: str
    value: Any
    module: str


def write(folder: pathlib.Path) -> None:
    """Write all generated pages into subfolders of `folder`; a page that is the same is kept."""
    found = entries()
    pages = {f"api/{one}.rst": page for one, page in module_pages(found).items()}
    pages |= {f"parts/{one}.md": page for one, page in part_pages().items()}
    pages |= {"parts/settings.md": settings_page(), "parts/command_line.md": command_page()}
    for sub in ("api", "parts"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
        for old in (folder / sub).iterdir():
            if f"{sub}/{old.name}" not in pages:
                old.unlink()
    for name, text in pages.items():
        place = folder / name
        if not place.exists() or place.read_text(encoding="utf-8") != text:
            place.write_text(text, encoding="utf-8")


def entries() -> list[Entry]:
    """Find the value of every public name."""
    found = []
    for line in NAMES.read_text(encoding="utf-8").splitlines():
        path = line.partition("(")[0]
        parent, _, name = path.rpartition(".")
        try:
            value = getattr(importlib.import_module(parent), name)
        except (ImportError, AttributeError):
            sys.exit(f"{path} of tests/api.txt is not there: run `python -m tests.write_api`.")
        found.append(Entry(path, value, parent))
    return found


# Modules.


def module_pages(found: Sequence[Entry]) -> dict[str, str]:
    """Make a page for every public module, by its path."""
    modules = {one.path: one.value for one in found if isinstance(one.value, types.ModuleType)}
    modules = {TOP: importlib.import_module(TOP), **modules}
    links = Links(found)
    pages = {}
    for path, module in modules.items():
        inside = [one for one in found if one.module == path]
        pages[path] = module_page(path, module, inside, links)
    return pages


def module_page(path: str, module: Any, inside: Sequence[Entry], links: "Links") -> str:
    """Make the page of one module: its doc-string, its modules, its names."""
    children = [one for one in inside if isinstance(one.value, types.ModuleType)]
    names = [one for one in inside if one not in children]
    title = path.removeprefix(f"{TOP}.")
    lines = [heading(title, "="), "", f".. py:module:: {path}", ""]
    lines += [docs(inspect.getdoc(module) or "", path, links), ""]
    if children:
        lines += [".. toctree::", "   :maxdepth: 1", ""]
        lines += [f"   {one.path.rpartition('.')[2]} <{one.path}>" for one in children] + [""]
    for one in names:
        lines += [entry(one, links), ""]
    return "\n".join(lines)


def entry(one: Entry, links: "Links") -> str:
    """Make the entry of one name."""
    if inspect.isfunction(one.value):
        return function(one.path, one.value, links)
    is_ours = isinstance(one.value, type) and one.value.__module__.startswith(TOP)
    return class_of(one, links) if is_ours else data(one, links)


def function(
    path: str, value: Any, links: "Links", *, kind: str = "function", module: str = ""
) -> str:
    """Make the entry of a function, whose signature is that of its source."""
    value = inspect.unwrap(value)
    module = module or path.rpartition(".")[0]
    text = inspect.getdoc(value) or ""
    name = path.rpartition(".")[2]
    return directive(kind, f"{name}{signature(value, links)}", docs(text, module, links))


def class_of(one: Entry, links: "Links") -> str:
    """Make the entry of a class: its fields or settings, then its methods."""
    value, path = one.value, one.path
    module = path.rpartition(".")[0]
    body = [docs(own_doc(value), module, links), ""]
    if issubclass(value, Settings):
        call, rows = "(**settings)", describe_settings(value)
        body += [table(rows), ""] if rows else []
    elif issubclass(value, Exception):
        call = ""
    elif hasattr(value, "_fields") or hasattr(value, "__dataclass_fields__"):
        call = fields(value, links)
    else:
        call = signature(value.__init__, links)
        call = str(inspect.signature(value)) if call == "(...)" else call
    for name, member in vars(value).items():
        if name.startswith("_") or hasattr(value, "_fields") or issubclass(value, Settings):
            continue
        if inspect.isfunction(member):
            body += [function(name, member, links, kind="method", module=module), ""]
        elif isinstance(member, property) or hasattr(member, "func"):
            text = inspect.getdoc(member) or ""
            body += [directive("property", name, docs(text, module, links)), ""]
    kind = "exception" if issubclass(value, Exception) else "class"
    name = path.rpartition(".")[2]
    return directive(kind, f"{name}{call}", "\n".join(body))


def data(one: Entry, links: "Links") -> str:
    """Make the entry of a value or of an alias of a type, with the comment of its source."""
    source, comment = assigned(one)
    text = docs(comment, one.module, links) if comment else ""
    if source:
        code = textwrap.indent(source, "   ")
        text += f"\n\n.. code-block:: python\n\n{code}"
    elif not text:
        text = docs((inspect.getdoc(one.value) or "").partition("\n\n")[0], one.module, links)
    return directive("data", one.path.rpartition(".")[2], text.strip("\n"))


def assigned(one: Entry) -> tuple[str, str]:
    """Give the assignment of a name in the source of its module, and the comment with it."""
    name = one.path.rpartition(".")[2]
    module = importlib.import_module(one.module)
    for place in _sources(module, name):
        lines = place.splitlines()
        for node in ast.parse(place).body:
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            if not any(isinstance(target, ast.Name) and target.id == name for target in targets):
                continue
            first, last = node.lineno - 1, node.end_lineno or node.lineno
            code = "\n".join(lines[first:last])
            before = []
            while first > 0 and lines[first - 1].startswith("#"):
                first -= 1
                before.insert(0, lines[first].lstrip("# "))
            code, _, behind = code.partition("  # ")
            return code, " ".join(before) or behind
    return "", ""


def _sources(module: Any, name: str) -> Iterator[str]:
    """Read the module, then the modules from which it takes the name."""
    seen, waiting = set(), [module]
    while waiting:
        one = waiting.pop(0)
        if one.__name__ in seen or not getattr(one, "__file__", None):
            continue
        seen.add(one.__name__)
        text = pathlib.Path(one.__file__).read_text(encoding="utf-8")
        yield text
        for node in ast.walk(ast.parse(text)):
            is_import = isinstance(node, ast.ImportFrom) and (node.module or "").startswith(TOP)
            if is_import and any((each.asname or each.name) == name for each in node.names):
                waiting.append(importlib.import_module(node.module))


def signature(value: Any, links: "Links") -> str:
    """Give the parameters and the result as the source has them, types as links."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(value))).body[0]
    except (OSError, TypeError, SyntaxError):
        return "(...)"
    if not isinstance(tree, ast.FunctionDef):
        return str(inspect.signature(value))
    own = tree.args
    for group in (own.posonlyargs, own.args):
        if group and group[0].arg in ("self", "cls"):
            del group[0]
    linked = _Linked(value.__module__, links)
    for one in (*own.posonlyargs, *own.args, *own.kwonlyargs, own.vararg, own.kwarg):
        if one is not None and one.annotation is not None:
            one.annotation = linked.visit(one.annotation)
    result = f" -> {ast.unparse(linked.visit(tree.returns))}" if tree.returns else ""
    return f"({ast.unparse(own)}){result}"


def fields(value: Any, links: "Links") -> str:
    """Give the fields of a named tuple or a data class as its call has them."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(value))).body[0]
    except (OSError, TypeError, SyntaxError):
        return "(" + ", ".join(value._fields) + ")"
    listed, linked = [], _Linked(value.__module__, links)
    for node in getattr(tree, "body", []):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            default = f" = {ast.unparse(node.value)}" if node.value else ""
            kind = ast.unparse(linked.visit(node.annotation))
            listed.append(f"{node.target.id}: {kind}{default}")
    return f"({', '.join(listed)})"


class _Linked(ast.NodeTransformer):
    """Write public types in an annotation by their full path, of which Sphinx shows the end."""

    def __init__(self, module: str, links: "Links") -> None:
        """Read the annotations of a module."""
        self.module, self.links = importlib.import_module(module), links

    def visit_Name(self, node: ast.Name) -> ast.AST:
        """Link a name."""
        return self._link(node)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        """Link a name in a module."""
        return self._link(node)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        """Read a type that the source has in quotes."""
        if not isinstance(node.value, str):
            return node
        return self.visit(ast.parse(node.value, mode="eval").body)

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        """Leave the values of a `Literal` as they are."""
        return node if ast.unparse(node.value) == "Literal" else self.generic_visit(node)

    def _link(self, node: Any) -> ast.AST:
        words = ast.unparse(node).split(".")
        value: Any = self.module
        for word in words:
            value = getattr(value, word, None)
        path = self.links.of_value(words[-1], value, self.module.__name__)
        return ast.parse(f"~{path}", mode="eval").body if path else node


def own_doc(value: type) -> str:
    """Give the doc-string that a class has itself."""
    text = vars(value).get("__doc__") or ""
    return "" if text.startswith(f"{value.__name__}(") else inspect.cleandoc(text)


class Links:
    """Public names by what doc-strings call them."""

    def __init__(self, found: Sequence[Entry]) -> None:
        """Index names by each of their endings."""
        self.paths = {one.path for one in found}
        self.modules = {one.path for one in found if isinstance(one.value, types.ModuleType)}
        self.values = {one.path: one.value for one in found}
        self.by_end: dict[str, set[str]] = {}
        for path in self.paths:
            words = path.split(".")
            for start in range(1, len(words)):
                self.by_end.setdefault(".".join(words[start:]), set()).add(path)

    def find(self, name: str, module: str) -> str:
        """Give the path of a public name seen from a module; empty without a clear one."""
        for path in (f"{module}.{name}", name, f"{TOP}.{name}"):
            if path in self.paths and (path not in self.modules or "." in name):
                return path
        ends = self.by_end.get(name, set())
        types_first = [path for path in ends if path.startswith(f"{TOP}.types.")]
        chosen = types_first if "." not in name else sorted(ends - self.modules)
        return chosen[0] if len(chosen) == 1 else ""

    def of_value(self, name: str, value: Any, module: str) -> str:
        """Give the path by which a value of this name is public; empty if it is not."""
        same = [one for one in self.by_end.get(name, ()) if self.values[one] is value]
        wanted = (f"{module}.{name}", f"{TOP}.types.{name}", f"{TOP}.{name}")
        return next((one for one in (*wanted, *sorted(same, key=len)) if one in same), "")


def docs(text: str, module: str, links: Links) -> str:
    """Turn a doc-string into reStructuredText, with links to public names."""
    text = re.sub(r"`__?(?=[\s.,;:)]|$)", "`__", text)  # anonymous targets: titles may repeat
    pieces, end = [], 0
    for literal in LITERAL.finditer(text):
        pieces += [_linked(text[end : literal.start()], module, links), literal[0]]
        end = literal.end()
    text = "".join([*pieces, _linked(text[end:], module, links)])
    lines = GoogleDocstring(text, NAPOLEON, what="function").lines()
    # The attributes of a tuple are what its call takes.
    return "\n".join(re.sub(r"^:ivar ", ":param ", line) for line in lines).rstrip()


def _linked(text: str, module: str, links: Links) -> str:
    def one(match: re.Match[str]) -> str:
        path = links.find(match[1], module)
        return f":py:obj:`{match[1]} <{path}>`" if path else match[0]

    return re.sub(r"(?<!`)\|", r"\|", NAMED.sub(one, text))


def heading(text: str, mark: str) -> str:
    """Underline a heading."""
    return f"{text}\n{mark * len(text)}"


def directive(kind: str, head: str, body: str) -> str:
    """Make a directive of Sphinx's Python domain."""
    head = " ".join(head.split())
    return f".. py:{kind}:: {head}\n\n{textwrap.indent(body.strip(), '   ')}\n"


def table(rows: Sequence[Row]) -> str:
    """Make a table of settings in reStructuredText."""
    lines = [".. list-table::", "   :header-rows: 1", "   :widths: auto", ""]
    for cells in (("setting", "values", "unit", "default", "meaning"), *map(_cells, rows)):
        plain = [re.sub(r"([|*])", r"\\\1", cell) for cell in cells]
        lines += [f"   {'* -' if at == 0 else '  -'} {cell}" for at, cell in enumerate(plain)]
    return "\n".join(lines)


def _cells(row: Row, code: str = "``") -> tuple[str, ...]:
    values = f"{row.type.removesuffix(' | none')} {row.bounds}".strip()
    return (f"{code}{row.name}{code}", values, row.unit, str(row.default), row.meaning)


# Parts and settings.


def part_pages() -> dict[str, str]:
    """Make a page for every kind of part but methods, which have a longer one."""
    kinds = [kind for kind in registry.KINDS if kind != "method"]
    return {kind: part_page(kind) for kind in kinds}


def part_page(kind: str) -> str:
    """List the built-in parts of a kind, each with its settings."""
    words = kind.replace("_", " ")
    places = [f"`{path}`" for path, place in PLACES.items() if place.kind == kind]
    lines = [f"# Parts: {words}", ""]
    if places:
        lines += [f"The setting {' or '.join(places)} names one of these.", ""]
    if kind == "uplink":
        lines += ["Every uplink also has these settings.", ""]
        lines += [*rows_of(describe_settings(Uplink)), ""]
    if kind == "tracker":
        lines += ["The option `--track` names one of these.", ""]
    for name, listed in registry.names(kind).items():
        if listed.origin.source != "built-in":
            continue
        said = describe.describe(f"{kind}/{name}")
        lines += [f"## {name}", "", sentence(said.summary), ""]
        lines += [*rows_of(said.settings), ""] if said.settings else []
        lines += [f"```console\n{said.command}\n```", ""] if said.command else []
    return "\n".join(lines)


def sentence(text: str) -> str:
    """Begin with a capital, unless the first word is a name, and end with a period."""
    first = text.partition(" ")[0]
    start = text[:1].upper() if first.isalpha() else text[:1]
    return f"{start}{text[1:].rstrip('.')}."


def rows_of(rows: Sequence[Row], prefix: str = "") -> Iterator[str]:
    """Make a table of settings in Markdown."""
    yield "| setting | values | unit | default | meaning |"
    yield "|---|---|---|---|---|"
    for row in rows:
        cells = _cells(row._replace(name=prefix + row.name), "`")
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def settings_page() -> str:
    """List the settings that every run has, by section."""
    lines = [
        "# Shared settings",
        "",
        "Every run has these settings. The settings of a part, such as a method or an uplink, come",
        "with the part. [Configuration](../configuration.md) says how settings are given.",
        "",
        *_sections(RunConfig, "", "parts and seed"),
    ]
    return "\n".join(lines) + "\n"


def _sections(kind: type[Settings], prefix: str, title: str) -> Iterator[str]:
    inner, rows, parts = [], {row.name: row for row in describe_settings(kind)}, []
    plain = []
    for name, field in kind.model_fields.items():
        path = prefix + name
        if path in PLACES:
            extra: Mapping[str, Any] = typing.cast(Any, field.json_schema_extra) or {}
            parts.append((path, PLACES[path].kind, field.default or extra["unset"], field))
        elif section := nested(field.annotation):
            inner.append((section, f"{path}.", name))
        else:
            plain.append(rows[name])
    yield from (f"## {title}", "")
    if parts:
        yield from ("| part | kind | default | meaning |", "|---|---|---|---|")
        for path, name, default, field in parts:
            page = "../methods.md" if name == "method" else f"{name}.md"
            shown = name.replace("_", " ")
            yield f"| `{path}` | [{shown}]({page}) | {default} | {field.description} |"
        yield ""
    if plain:
        yield from rows_of(plain, prefix)
        yield ""
    for section, start, name in inner:
        yield from _sections(section, start, name)


def command_page() -> str:
    """Show the help of every command."""
    lines = ["# Command line", "", "Each command explains itself with `--help`.", ""]
    for name, one in command.cli.commands.items():
        context = click.Context(one, info_name=f"fedjaxprune {name}", max_content_width=90)
        text = one.get_help(context)
        lines += [f"## {name}", "", "```text", text.rstrip(), "```", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    write(pathlib.Path(sys.argv[1]))
