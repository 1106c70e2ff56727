"""The examples and the README's own lines run, at toy size."""

import importlib.util
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
QUICK = {"hidden_sizes": (8,), "devices": 1, "chunk_size": 1}  # to compile
TOY = {
    "compose_your_own": {"num_rounds": 11, "num_clients": 6, "cohort_size": 2},
    "error_feedback_top_k": {"num_rounds": 2, "num_clients": 6, "cohort_size": 2, **QUICK},
    "personal_masks": {"num_rounds": 2, "num_clients": 6, "cohort_size": 2},
}


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.usual("compose_your_own")
@pytest.mark.parametrize("name", sorted(TOY))
def test_an_example_runs(name, capsys):
    results = load(name).main(**TOY[name])
    assert results
    assert "test accuracy" in capsys.readouterr().out


def test_every_example_is_tested_and_short():
    files = sorted((ROOT / "examples").glob("*.py"))
    assert [file.stem for file in files] == sorted(TOY)
    assert all(len(file.read_text().splitlines()) < 150 for file in files)


def test_the_readme_s_python_runs(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # for the run folders
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        small = block.replace("num_rounds=100", "num_rounds=2, **quick")
        exec(compile(small, "README.md", "exec"), {"__name__": "readme", "quick": QUICK})
    assert "accuracy" in capsys.readouterr().out
