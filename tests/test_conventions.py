"""Conventions are tests: imports, lengths, argument order, keyword-only options, doc-strings."""

import ast
import functools
import os
import pathlib
import re
import subprocess
import sys

import pytest

from fedjaxprune import registry
from fedjaxprune.experiment.config import sections
from tests import oldest, write_api

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
    "permutations",
    "settings",
    "registry",
    "errors",
    "method",
    "namespace",
}
BELOW = {
    "__init__": {"namespace"},
    "namespace": set(),
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
    "permutations": {"types"},
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
TOP = ("experiment", "cli", "testing")


FORBIDDEN = {  # libraries that a package does not import
    "methods": {"flax", "tensorflow_datasets", "orbax"},
    "experiment": {"click"},
}


def room(file):
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


@functools.cache
def tree(file):
    return ast.parse(file.read_text())


@functools.cache
def imports(file):
    """List the path of everything that a file imports."""
    found = []
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.ImportFrom) and node.module:
            found += (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Import):
            found += (name.name for name in node.names)
    return found


def imported_rooms(file):
    paths = [path.split(".") for path in imports(file)]
    return {parts[1] for parts in paths if parts[0] == "fedjaxprune" and len(parts) > 1}


EACH_FILE = pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))


@EACH_FILE
def test_imports_run_downwards(file):
    rooms = imported_rooms(file) - {"__version__"}
    if room(file) in TOP:
        assert "cli" not in rooms or room(file) == "cli"
        return
    assert rooms <= BELOW.get(room(file), set()) | {room(file)}


@EACH_FILE
def test_imports_no_library_that_is_not_for_it(file):
    libraries = {path.split(".")[0] for path in imports(file)}
    assert not libraries & FORBIDDEN.get(room(file), set())
    assert "flax" not in libraries or room(file) == "models"


@EACH_FILE
def test_a_private_module_is_imported_in_its_folder_alone(file):
    for path in imports(file):
        parts = path.split(".")
        private = [i for i, part in enumerate(parts) if part[0] == "_" and part[:2] != "__"]
        if parts[0] == "fedjaxprune" and private:
            assert list(file.relative_to(PACKAGE.parent).parts[:-1]) == parts[: private[0]]


def test_nothing_below_the_command_prints():
    for file in FILES:
        if room(file) != "cli":
            called = [n.func for n in ast.walk(tree(file)) if isinstance(n, ast.Call)]
            assert "print" not in [f.id for f in called if isinstance(f, ast.Name)], file.name


def test_modules_stay_short():
    lengths = {str(file): len(file.read_text().splitlines()) for file in FILES}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_functions_of_rounds_and_methods_stay_short():
    for file in FILES:
        for node in ast.walk(tree(file)):
            if room(file) in ("rounds", "methods") and isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 100, f"{file.name}: {node.name}"
                given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                assert len(given) <= 8, f"{file.name}: {node.name}"


def test_the_public_names_are_written_down():
    assert write_api.lines() == write_api.FILE.read_text().splitlines(), "see tests/write_api.py"


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, time; t = time.process_time(); import fedjaxprune as fjp; dir(fjp);"
        "print(time.process_time() - t, 'jax' in sys.modules, 'pydantic' in sys.modules)"
    )
    path = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    run = subprocess.run([sys.executable, "-c", code], env=path, capture_output=True, check=True)
    took, *loaded = run.stdout.decode().split()
    assert float(took) < 0.1
    assert loaded == ["False", "False"]


def public_functions():
    for file in FILES:
        for node in tree(file).body:
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


def test_a_method_is_named_in_its_own_file_alone():
    """But for the default; a word that names a server optimizer, too, may do that."""
    files = {one.stem for one in (PACKAGE / "methods").iterdir()}
    methods = files - {"__init__", "__pycache__", "presets"}
    assert set(registry.names("method")) <= methods
    words = re.compile(rf"\b({'|'.join(sorted(methods))})\b")
    found = []
    for file in FILES:
        name = str(file.relative_to(PACKAGE))
        if not name.startswith(("methods/", "federated/corrections/")):
            for line in file.read_text().splitlines():
                is_other = "server_optimizer" in name + line
                others = registry.names("server_optimizer") if is_other else ()
                found += [(name, line.strip()) for one in words.findall(line) if one not in others]
    [(name, line)] = found
    assert name == "experiment/config/sections.py"
    assert line.startswith(f'method: Any = part("method", "{sections.PLACES["method"].default}", ')


def test_every_requirement_has_one_lower_bound():
    assert {"jax==0.10", "hypothesis==6.100", "mlflow==2.22"} <= set(oldest.read())
    project: dict = {"name": "p", "optional-dependencies": {"all": ["p[x]"], "x": ["a>=2"]}}
    assert oldest.constraints({**project, "dependencies": ["a>=2,<3", "b>=1.0.1"]}) == [
        "a==2", "b==1.0.1",
    ]  # fmt: skip
    for wrong in (["a"], ["a>=2,!=3"], ["a>=1"]):
        with pytest.raises(ValueError, match=r"^'?a.*lower bound"):
            oldest.constraints({**project, "dependencies": wrong})
