"""The benchmarks go on without rivals that are not there, and say what they cannot use."""

import argparse
import sys

import pytest

from benchmarks import __main__ as everything
from benchmarks import accelerator, cifar10_cohort, collectives, harness, local_training

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


def test_collectives_are_counted_with_their_bytes():
    text = """
  %all-gather.1 = f32[4,32,10]{2,1,0} all-gather(%x), channel_id=1, dimensions={0}
  %permute = (f32[64,32]{1,0:T(8,128)}, f32[]) collective-permute(%y), source_target_pairs={{0,1}}
  %second = u8[3]{0} collective-permute-start(%z)
  ROOT %fusion = f32[7]{0} fusion(%all-gather.1), kind=kLoop
"""
    assert collectives.count(text) == {
        "all-gather": (1, 5120),
        "collective-permute": (2, 8192 + 4 + 3),
    }
    assert [collectives.predicted(n, 10) for n in (1, 2, 3, 4, 8)] == [0, 40, 120, 80, 120]


def test_an_accelerator_tries_ways_only_where_they_differ():
    tried = list(accelerator.plan(["cnn"], chunks=(1, 4), is_cpu=False))
    assert tried[0] == ("cnn", 1, "patches")
    assert sorted(way for _, chunk, way in tried if chunk == 4) == [
        "grouped",
        "patches",
        "sequential",
    ]
    assert len(list(accelerator.plan(["cnn"], chunks=(1, 4), is_cpu=True))) == 2
    full = accelerator.Row("cnn", 64, "grouped", None, None, None, 2**30)
    assert accelerator.line(full).endswith("does not fit in memory  peak 1,024 MiB")
