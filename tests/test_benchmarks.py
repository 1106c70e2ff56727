"""The benchmarks go on without rivals that are not there, and say what they cannot use."""

import argparse
import sys

import pytest

from benchmarks import __main__ as everything
from benchmarks import cifar10_cohort, harness, local_training

OPTIONS = argparse.Namespace(quick=True, threads=1, pfl_python=sys.executable)


def against(name):
    """Name the rivals that a quick run asks for."""
    words = everything.command(name, OPTIONS)
    return [words[i + 1] for i, word in enumerate(words) if word == "--against"]


def test_a_quick_run_goes_on_without_pytorch(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert local_training.TORCH in against("lenet5")
    assert local_training.rivals_among(against("lenet5")) == [local_training.LOOP]
    assert "PyTorch is not installed" in capsys.readouterr().out
    assert local_training.TORCH not in local_training.rivals_among(None)


def test_unknown_names_and_interpreters_are_refused_in_a_sentence(tmp_path):
    with pytest.raises(SystemExit, match="must be one of PyTorch loop, Python loop"):
        local_training.rivals_among(["pytorch"])
    with pytest.raises(SystemExit, match="cannot be run: No such file"):
        cifar10_cohort.make_rival(str(tmp_path / "python"), 1, 1)


@pytest.mark.parametrize("name", everything.CASES)
def test_every_case_knows_its_own_name_and_targets(name):
    assert everything.targets(name)
    assert everything.ours(name) not in everything.targets(name)
    assert "--quick" in everything.command(name, OPTIONS)


def test_results_go_where_they_are_wanted(tmp_path):
    path = tmp_path / "new" / "result.json"
    harness.write(path, {"cases": {}})
    assert path.read_text() == '{\n  "cases": {}\n}\n'


@pytest.mark.parametrize(
    ("took", "patience_s", "calls", "timed"),
    [
        (0.1, 12.0, 5, 3),  # two to get warm
        (2.0, 12.0, 4, 3),
        (5.5, 12.0, 2, 2),  # its first time counts
        (30.0, 12.0, 2, 2),
        (30.0, float("inf"), 3, 3),
    ],
)
def test_long_work_is_timed_less_often_and_short_work_warmed_longer(took, patience_s, calls, timed):
    called = []

    def seconds():
        called.append(took)
        return took

    contender = harness.Contender(run=lambda: None, amount=took, compile_s=None, seconds=seconds)
    timings = harness.compete({"one": contender}, repeats=3, patience_s=patience_s)
    assert len(called) == calls
    assert timings["one"].rates == (1.0,) * timed
