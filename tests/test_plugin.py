"""A package outside the project: installed by pip, named as a file, and given as values."""

import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import yaml

pytestmark = pytest.mark.xdist_group("plugin")  # the package is installed once
ROOT = pathlib.Path(__file__).parent.parent
PLUGIN = ROOT / "examples" / "plugin"
DATA = "--dataset blobs --partition by_key"
TINY = "--num-rounds 3 --epochs 1 --chunk-size 1 --devices 1"

# What a user types, in one process: each line's exit status and output are written as JSON.
COMMANDS = """
import contextlib, io, json, pathlib, shlex, sys
from fedjaxprune.cli import main
lines = json.loads(sys.argv[1])
for line in lines:
    if line.startswith("python "):
        exec(compile(pathlib.Path(line.removeprefix("python ")).read_text(), line, "exec"), {})
        continue
    out, status = io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            main.main(shlex.split(line))
        except SystemExit as error:
            status = error.code or 0
    print("RESULT", json.dumps([line, status, out.getvalue()]), flush=True)
"""
STOP = """
def stop(line):
    if line["round"] == 2:
        raise KeyboardInterrupt
"""
BLANK = """
from fedjaxprune.experiment.analysis import plots
plots.accuracy = lambda *given, **options: None  # to draw takes a third of a small run
"""
SWEEP = """
folder: runs
data: {dataset: {name: blobs}, partition: {name: by_key}}
model: small_perceptron
client.epochs: 1
federation.num_rounds: 3
execution: {chunk_size: 1, devices: 1}
cases:
  - method: {name: sparse_evolution, sparsity: 0.5, prune_every: 2}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Install the package for a process that looks there, and work in a folder of its own."""
    if missing := [n for n in ("pip", "setuptools") if importlib.util.find_spec(n) is None]:
        pytest.skip(f"{' and '.join(missing)} not installed")
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(PLUGIN, folder / "source")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation"]
    options = ["--quiet", "--target", str(folder / "installed"), str(folder / "source")]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(folder / "source")
    (folder / "stop.py").write_text(STOP)
    (folder / "sweep.yaml").write_text(SWEEP)
    own = (PLUGIN / "fedprune_lab" / "evolution.py").read_text()
    (folder / "own.py").write_text(own)
    return folder


def play(place, *lines):
    """Run commands in one process that has the package: status and output by line."""
    paths = [str(place / "installed"), str(ROOT)]
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(lines)],
        cwd=place,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(x[7:]) for x in done.stdout.splitlines() if x.startswith("RESULT")]
    return {line: (status, text) for line, status, text in results}


def words(text):
    return " ".join(text.split())


def parts_of(folder):
    return yaml.safe_load((folder / "config.yaml").read_text())["parts"]


def lines_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "time_s"} for row in rows]


def swept(place):
    folders = [path.parent for path in (place / "runs").glob("*/metrics.jsonl")]
    return [one for one in folders if "own_dataset" not in one.name]


@pytest.fixture(scope="module")
def ran(place):
    """Run what a user would: by name, stopped and resumed; a sweep; by file; by values."""
    text = (PLUGIN / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code is not None
    short = code[1].replace('"num_rounds": 20', '"num_rounds": 3')
    (place / "values.py").write_text(short.replace("**own)", "**own, chunk_size=1, devices=1)"))
    method = "--sparsity 0.5 --prune-every 2"
    own = f"run --method ./own.py:METHOD {method} --model small_perceptron {DATA} {TINY} "
    edit = 'import pathlib\np = pathlib.Path("own.py")\np.write_text(p.read_text() + "# mine\\n")\n'
    (place / "edit.py").write_text(edit)
    (place / "elsewhere").mkdir()
    (place / "blank.py").write_text(BLANK)
    (place / "away.py").write_text("import os\nos.chdir('elsewhere')\n")
    (place / "elsewhere" / "back.py").write_text("import os\nos.chdir('..')\n")
    return play(
        place,
        "python blank.py",
        f"run --method sparse_evolution {method} {DATA} {TINY} --folder a --track stop:stop",
        "run --resume a",
        "sweep sweep.yaml",
        own + "--folder own --track stop:stop",
        "python edit.py",
        "python away.py",
        "run --resume ../own",  # which was started with ./own.py
        "python back.py",
        "export a",
        "python values.py",
    )


def result(ran, start):
    return next(found for line, found in ran.items() if line.startswith(start))


def test_an_installed_method_model_and_data_set_run_resume_and_are_swept(place, ran):
    status, text = result(ran, "run --method sparse_evolution")
    assert status == 130, text
    assert "sparse_evolution on blobs with small_perceptron: 3 rounds" in text
    status, text = ran["run --resume a"]
    assert status == 0, text
    assert "other code" not in text
    assert "7 of 16 prunable" in text
    package = {"package": "fedprune-lab", "version": "0.1"}
    for path in ("method", "model", "data.dataset"):
        assert package.items() <= parts_of(place / "a")[path].items()
    status, text = ran["sweep sweep.yaml"]
    assert status == 0, text
    (same,) = swept(place)
    assert lines_of(same) == lines_of(place / "a")  # never stopped, to the same bits


def test_a_file_is_the_same_method_and_a_changed_one_is_said(place, ran):
    status, text = result(ran, "run --method ./own.py:METHOD")
    assert status == 130, text
    status, text = ran["run --resume ../own"]
    assert status == 0, text
    assert re.search(
        r"the run was made with other code: method was a file with checksum (\w{8}) then and is a "
        r"file with checksum (?!\1)\w{8} now\.",
        words(text),
    )
    assert lines_of(place / "own") == lines_of(place / "a")
    origin = parts_of(place / "own")["method"]
    assert origin["path"] == str(place / "own.py")
    assert len(origin["sha256"]) == 64


def test_values_are_run_in_a_few_lines(place, ran):
    del ran
    assert len((place / "values.py").read_text().splitlines()) < 15
    folders = [p.parent for p in (place / "runs").glob("*/config.yaml") if "own_dataset" in str(p)]
    assert len(folders) == 2
    parts = [parts_of(folder) for folder in folders]
    assert all(one["data.dataset"]["source"] == "value" for one in parts)
    assert all(one["model"]["source"] == "value" for one in parts)


LOOK = """
import sys
import fedjaxprune as fjp
run = fjp.load("a")
assert run.state == "finished"
assert run.record["mask.sparsity"][-1] == 9 / 16  # a layer keeps whole weights
strange = {"jax", "flax", "fedprune_lab", "own"} & set(sys.modules)
assert not strange, strange
assert not [name for name in sys.modules if name.startswith("fedjaxprune_file_")]
"""


def test_looking_at_runs_imports_nobodys_code(place, ran):
    status, text = ran["export a"]
    assert status == 0, text
    (place / "look.py").write_text(LOOK)
    folders = f"a own {' '.join(map(str, swept(place)))}"
    looked = play(
        place,
        "list method",
        "list model",
        f"compare {folders}",
        f"report {folders} --out page.html",
        "python look.py",
    )
    assert [status for status, _ in looked.values()] == [0, 0, 0, 0], looked
    assert re.search(r"sparse_evolution .*fedprune-lab 0.1", words(looked["list method"][1]))
    assert "small_perceptron" in looked["list model"][1]
    page = (place / "page.html").read_text()
    assert "sparse_evolution" in page


def test_what_is_installed_once_is_used_by_one_worker(request):
    """A plugin of pytest that passes over groups would double the time of this suite."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        pytest.skip("one process, as with -n0, needs no groups")
    assert request.node.nodeid.endswith("@plugin")
