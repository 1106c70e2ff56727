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

pytestmark = pytest.mark.xdist_group("conventions")  # who parses all files once
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
    "live_weights",
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
    "live_weights": {"types", "trees"},
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


def name_of(file):
    return str(file.relative_to(PACKAGE))


def test_imports_run_downwards():
    wrong = {}
    for file in FILES:
        rooms, own = imported_rooms(file) - {"__version__"}, room(file)
        may_not = {"cli"} if own in TOP else rooms - BELOW.get(own, set())
        wrong[name_of(file)] = (rooms & may_not) - {own}
    assert {name: rooms for name, rooms in wrong.items() if rooms} == {}


def test_imports_no_library_that_is_not_for_it():
    wrong = {}
    for file in FILES:
        forbidden = FORBIDDEN.get(room(file), set()) | (
            {"flax"} if room(file) != "models" else set()
        )
        wrong[name_of(file)] = forbidden & {path.split(".")[0] for path in imports(file)}
    assert {name: libraries for name, libraries in wrong.items() if libraries} == {}


def test_a_private_module_is_imported_in_its_folder_alone():
    wrong = []
    for file in FILES:
        folder = list(file.relative_to(PACKAGE.parent).parts[:-1])
        for path in imports(file):
            parts = path.split(".")
            private = [i for i, part in enumerate(parts) if part[0] == "_" and part[:2] != "__"]
            if parts[0] == "fedjaxprune" and private and folder != parts[: private[0]]:
                wrong.append(f"{name_of(file)} imports {path}")
    assert wrong == []


def test_nothing_below_the_command_prints():
    for file in FILES:
        if room(file) != "cli":
            called = [n.func for n in ast.walk(tree(file)) if isinstance(n, ast.Call)]
            assert "print" not in [f.id for f in called if isinstance(f, ast.Name)], file.name


def test_modules_stay_short():
    lengths = {str(file): len(file.read_text().splitlines()) for file in FILES}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_functions_of_rounds_and_methods_stay_short():
    for file in (one for one in FILES if room(one) in ("rounds", "methods")):
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.FunctionDef):
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


def broken_customs(file, node):
    """Say which customs a public function does not keep."""
    first = (ast.get_docstring(node) or "").splitlines()
    if not first:
        yield "it has no doc-string"
    elif not first[0].endswith((".", ":", "`")):
        yield "the first line of its doc-string is not one sentence"
    positional = [argument.arg for argument in node.args.args]
    if "key" in positional[1:]:
        yield "the key does not come first"
    if room(file) in LIBRARY and node.args.kwarg is not None:
        yield "options are passed through"
    if room(file) in LIBRARY and node.args.defaults:
        yield "an option with a default is not keyword-only"
    flags = [d.value for d in node.args.kw_defaults if isinstance(d, ast.Constant)]
    if any(isinstance(flag, bool) for flag in flags):
        yield "an option is a boolean by default"
    defaults = dict(zip([a.arg for a in node.args.kwonlyargs], node.args.kw_defaults, strict=True))
    if defaults.get("seed") is not None:
        yield "it has a seed by default"


def test_public_functions_keep_the_customs():
    wrong = [
        f"{name_of(file)}: {node.name}: {sentence}"
        for file in FILES
        for node in tree(file).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
        for sentence in broken_customs(file, node)
    ]
    assert wrong == []


BAD = """
def plain(values, key, seed=0): pass
def optional(*, flag=True, seed=1, **options):
    \"\"\"Say this without an end\"\"\"
"""


def test_a_broken_custom_is_noticed():
    plain, optional = ast.parse(BAD).body
    file = PACKAGE / "pruning" / "bad.py"
    assert list(broken_customs(file, plain)) == [
        "it has no doc-string",
        "the key does not come first",
        "an option with a default is not keyword-only",
    ]
    assert list(broken_customs(file, optional)) == [
        "the first line of its doc-string is not one sentence",
        "options are passed through",
        "an option is a boolean by default",
        "it has a seed by default",
    ]


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
