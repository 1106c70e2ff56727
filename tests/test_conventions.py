"""Conventions are tests, not pleas: packages, argument order, keyword-only options, doc-strings."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "fedjaxprune"
FILES = sorted(PACKAGE.rglob("*.py"))
LIBRARY = ("pruning", "federated", "rounds", "methods")

# Which packages a package may import from: downwards only.
GROUND = {
    "types",
    "traffic",
    "trees",
    "masks",
    "metrics",
    "topk",
    "settings",
    "registry",
    "errors",
    "method",
}
BELOW = {
    "errors": set(),
    "settings": {"errors"},
    "registry": {"errors", "settings", "method"},
    "traffic": set(),
    "types": {"traffic", "settings"},
    "method": {"types"},
    "trees": {"types"},
    "masks": {"types", "trees"},
    "metrics": {"types", "trees"},
    "topk": {"types", "trees"},
    "wire": GROUND,
    "structure": GROUND | {"kernels"},
    "kernels": GROUND | {"structure"},
    "models": GROUND | {"structure", "kernels"},
    "data": GROUND,
    "pruning": GROUND | {"structure"},
    "federated": GROUND | {"models", "structure"},
    "costs": GROUND | {"wire", "structure"},
    "rounds": GROUND | {"pruning", "federated", "costs", "models", "structure", "data", "wire"},
    "methods": GROUND | {"pruning", "federated", "costs", "models", "structure", "data", "rounds"},
}
TOP = ("experiment", "cli")


def room(file):
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            parts = node.module.split(".")
            if parts[0] == "fedjaxprune":
                yield from ([parts[1]] if len(parts) > 1 else [n.name for n in node.names])
        elif isinstance(node, ast.Import):
            for name in node.names:
                parts = name.name.split(".")
                if parts[0] == "fedjaxprune" and len(parts) > 1:
                    yield parts[1]


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_run_downwards(file):
    rooms = set(imported_rooms(ast.parse(file.read_text()))) - {"__version__"}
    if room(file) in TOP:
        assert "cli" not in rooms or room(file) == "cli" or "experiment" in file.parts
        return
    assert rooms <= BELOW.get(room(file), set()) | {room(file)}


def test_nothing_below_imports_the_experiment_or_the_command():
    for file in FILES:
        if room(file) not in TOP:
            assert not {*TOP} & {*imported_rooms(ast.parse(file.read_text()))}, file.name


def test_only_models_import_flax():
    for file in FILES:
        names = {
            (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name) or ""
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
        }
        if any(name.split(".")[0] == "flax" for name in names):
            assert room(file) == "models", file.name


def test_modules_stay_short():
    lengths = {str(file): len(file.read_text().splitlines()) for file in FILES}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def public_functions():
    for file in FILES:
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                yield pytest.param(file, node, id=f"{file.relative_to(PACKAGE)}:{node.name}")


@pytest.mark.parametrize(("file", "node"), list(public_functions()))
def test_a_public_function_keeps_the_customs(file, node):
    first = (ast.get_docstring(node) or "").splitlines()
    assert first, "it has a doc-string"
    assert first[0].endswith((".", ":", "`")), "whose first line is one sentence"
    positional = [argument.arg for argument in node.args.args]
    if "key" in positional:
        assert positional.index("key") == 0, "the key comes first"
    if room(file) in LIBRARY:
        assert node.args.kwarg is None, "options are not passed through"
        assert not node.args.defaults, "an option with a default is keyword-only"
    flags = [d for d in node.args.kw_defaults if isinstance(d, ast.Constant) and d.value in (0, 1)]
    assert not [flag for flag in flags if isinstance(flag.value, bool)], "no boolean by default"
    defaults = dict(zip([a.arg for a in node.args.kwonlyargs], node.args.kw_defaults, strict=True))
    assert defaults.get("seed") is None, "no seed by default"
