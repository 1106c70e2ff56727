"""What a run prints: its progress, and the table at its end."""

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from fedjaxprune.experiment.folder import load
from fedjaxprune.experiment.tracking import progress
from tests.folders import changed, line, rising, write


@pytest.fixture(autouse=True)
def _plain_configs(monkeypatch):
    """Take nested dicts for configs: a `RunConfig` needs all parts to be found."""
    monkeypatch.setattr(progress, "plain", lambda config: config.values)


def config_of(run: load.RunData) -> Any:
    def as_object(value):
        if not isinstance(value, dict):
            return value
        return SimpleNamespace(**{name: as_object(one) for name, one in value.items()})

    made = as_object(run.config)
    made.values = run.config
    return made


def shown(folder, *, width=100, is_terminal=False, details=False):
    """Report a finished run again; give what is printed, and the warnings."""
    run = load.read(folder)
    out, err = io.StringIO(), io.StringIO()
    console = Console(file=out, width=width, force_terminal=is_terminal, color_system=None)
    with progress.report(console, Console(file=err, width=width), details=details) as listener:
        listener.begin(config_of(run), folder)
        listener.start(run.header, [])
        for one in run.lines:
            listener.round(one)
        listener.finish(config_of(run), folder, run.summary)
    return out.getvalue(), err.getvalue()


def rows_of(run, *, details=False):
    first, second = progress.table(run.summary, config_of(run), details=details).columns
    return dict(zip(map(str, first.cells), map(str, second.cells), strict=True))


def feddip(folder, lines, **arguments):
    return write(folder, lines, {"method": {"name": "feddip", "sparsity": 0.9}}, **arguments)


def test_the_first_line_says_what_is_run(tmp_path):
    out, err = shown(feddip(tmp_path / "a", rising([0.1, 0.2])))
    first, where, second, *_ = out.splitlines()
    assert first == "feddip on digits with mlp: 100 rounds, 3 of 6 clients in each"
    assert (where, second, err) == (f"folder: {tmp_path / 'a'}", "compiling the first round", "")


def test_rounds_are_counted_by_stage_and_preparatory_ones_are_named(tmp_path):
    before = [line(1, stage="select", stage_round=1)]
    lines = [line(n + 1, accuracy=0.5, stage_round=n) for n in range(1, 11)]
    out, _ = shown(feddip(tmp_path / "a", [*before, *lines]))
    said = [row for row in out.splitlines() if "round " in row and "loss" in row]
    assert said[0].startswith("select: round 1/1: loss 1.000, accuracy -, sparsity 50.00 %")
    assert said[1].startswith("round 1/10: loss 1.000, accuracy 50.00 %")
    assert said[-1].startswith("round 10/10: ")
    assert "11" not in said[-1]


def test_a_long_run_prints_about_twenty_lines(tmp_path):
    out, _ = shown(feddip(tmp_path / "a", rising([0.5] * 500)))
    assert 15 <= out.count("loss 1.000") <= 22


def test_a_resumed_run_says_after_which_round(tmp_path):
    run = load.read(feddip(tmp_path / "a", rising([0.5, 0.6, 0.7])))
    out = io.StringIO()
    with progress.report(
        Console(file=out, width=100), Console(file=out), details=False
    ) as listener:
        listener.start(run.header, run.lines[:2])
        listener.round(run.lines[2])
    assert out.getvalue().splitlines()[0] == "resuming after round 2/3"


def test_a_bar_fits_a_terminal_of_80_columns(tmp_path):
    folder = feddip(tmp_path / "a", rising([0.5] * 999))
    out, _ = shown(folder, width=80, is_terminal=True)
    assert "round 999/999: loss 1.000, accuracy 50.00 %, sparsity 50.00 %" in out
    assert "…" not in out


def test_messages_that_are_left_out_are_warned_of_once(tmp_path):
    lines = [changed(one, {"clients.rejected": 1}) for one in rising([0.5, 0.5])]
    lines += [changed(line(n, accuracy=0.5), {"clients.rejected": 2, "train.loss": None})
              for n in (3, 4)]  # fmt: skip
    out, err = shown(feddip(tmp_path / "a", lines), width=300)
    some, all_ = err.splitlines()
    assert some.startswith("warning: in round 1 the messages of 1 of 2 clients were not finite")
    assert all_.startswith("warning: in round 3 no client's message was finite")
    assert "loss not finite" in out
    assert "messages left out (not finite) *" in out


def test_the_table_at_the_end_has_about_eight_rows(tmp_path):
    run = load.read(feddip(tmp_path / "a", rising([0.5, 0.6])))
    assert rows_of(run) == {
        "test accuracy, last": "60.00 %",
        "test accuracy, mean of the last 2 tests": "55.00 %",
        "sparsity": "50.00 % (90.00 % asked for)",
        "live weights": "500 of 1,000 prunable",
        "sent up *": "2.00 MiB (50.0 % of dense)",
        "sent down *": "2.00 MiB (50.0 % of dense)",
        "training FLOPs, modeled *": "6e+09 (25.0 % of dense)",
        "time": "2.0 s",
    }
    out, _ = shown(tmp_path / "a")
    assert "* summed over rounds and clients" in out
    assert out.splitlines()[-1] == f"results: {tmp_path / 'a'}"


def test_details_have_the_rest(tmp_path):
    more = {
        "compute.inference_flops": {"gated": 5, "open": 8, "without_gates": 10},
        "traffic.published": {"paper": {"up_bits": 2**23, "down_bits": 2**23}},
    }
    lines = [changed(one, more) for one in rising([0.5, 0.6])]
    run = load.read(feddip(tmp_path / "a", [line(1, stage="select"), *lines[1:]]))
    rows = rows_of(run, details=True)
    assert rows["rounds"] == "1 select, 1 train"
    assert rows["sent down: masks *"] == "0.50 MiB"
    assert rows["sent in stage select *"] == "2.00 MiB"
    assert rows["sent by the formula of paper *"] == "2.00 MiB"
    assert rows["inference FLOPs of an example, gated"] == ("5 (50.0 % of a network without gates)")
    assert rows["weight gradient FLOPs *"] == "2e+09"


def test_a_regression_shows_its_error(tmp_path):
    changes = {"test.accuracy": None, "test.error": 0.25, "clients.accuracy": ...}
    lines = [changed(one, changes) for one in rising([0.5])]
    folder = write(tmp_path / "a", lines)
    rows = rows_of(load.read(folder))
    assert rows["test error, last (mean absolute)"] == "0.25"
    assert rows["sparsity"] == "50.00 %"  # no sparsity was asked for
    assert not any("accuracy" in name for name in rows)
    assert "error 0.25, sparsity" in shown(folder)[0]
