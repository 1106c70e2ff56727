"""Trackers follow a run and cannot end it."""

import sys
import types

import pytest

from fedjaxprune.errors import ConfigError
from fedjaxprune.experiment.config import resolve
from fedjaxprune.experiment.run.listener import Listener
from fedjaxprune.experiment.tracking import tracker
from tests.folders import line, rising

CONFIG = resolve.resolve({"method": "fedavg"})


class Told:
    """A report that remembers."""

    def __init__(self):
        self.warned, self.rounds = [], []
        self.report = Listener(
            round=lambda line: self.rounds.append(line["round"]),
            warn=self.warned.append,
        )


def play(openers, folder, lines, *, done=0):
    told = Told()
    following = tracker.follow(told.report, openers, folder=folder, config=CONFIG)
    with following as report:
        report.start({}, lines[:done])
        for one in lines[done:]:
            report.round(one)
    return told


def test_a_function_of_a_line_is_a_tracker(tmp_path, monkeypatch):
    (tmp_path / "mine_of_tests.py").write_text(
        "def track(line):\n    LINES.append(line)\nLINES = []"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    lines = rising([0.1, 0.2])
    told = play(tracker.find(["mine_of_tests:track"]), tmp_path, lines)
    seen = sys.modules["mine_of_tests"].LINES
    assert seen == lines
    assert (told.warned, told.rounds) == ([], [1, 2])


@pytest.mark.parametrize("moment", ["open", "round", "close"])
def test_a_tracker_that_raises_is_told_of_once_and_the_run_goes_on(tmp_path, moment):
    seen, other = [], []

    def fail(*args):
        raise OSError("no network\nat all")

    def opener(folder, config, num_rounds):
        return tracker.Opened(
            track=fail if moment == "round" else seen.append,
            close=fail if moment == "close" else lambda: None,
        )

    openers = {
        "bad": fail if moment == "open" else opener,
        "good": lambda *args: tracker.Opened(track=other.append, close=lambda: other.append("end")),
    }
    told = play(openers, tmp_path, rising([0.1, 0.2, 0.3]))
    assert told.rounds == [1, 2, 3]
    assert told.warned == [
        "the tracker 'bad' failed and is left out from here on (OSError: no network); "
        "the run continues."
    ]
    assert len(seen) == (3 if moment == "close" else 0)
    assert [one if one == "end" else one["round"] for one in other] == [1, 2, 3, "end"]


def test_an_error_of_the_run_itself_closes_trackers_and_goes_on(tmp_path):
    closed = []
    opener = {"one": lambda *args: tracker.Opened(print, lambda: closed.append(True))}
    following = tracker.follow(Told().report, opener, folder=tmp_path, config=CONFIG)

    def run():
        with following as report:
            report.start({}, [])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    assert closed == [True]


def test_numbers_of_a_line_have_names():
    found = tracker.scalars(line(3, accuracy=0.5))
    assert found["test/accuracy"] == 0.5
    assert found["mask/sparsity_by_layer/a/kernel"] == 0.75
    assert found["traffic/up/values"] <= found["traffic/up/total_bits"]
    assert found["compute/training_flops/dense_forward"] > 0
    assert not {"round", "stage", "traffic/by_client"} & set(found)
    assert "test/accuracy" not in tracker.scalars(line(3))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tensorbord", ["track must be one of tensorboard, wandb, mlflow", "'tensorboard'?"]),
        ("nowhere_at_all:track", ["nowhere_at_all", "cannot be imported", "ModuleNotFoundError"]),
        ("nowhere.py:track", ["track: 'nowhere.py:track' cannot be read"]),
        ("json:nothing", ["track: 'json:nothing' does not exist"]),
        ("json:__name__", ["of type str, not a tracker", "a Part or a function"]),
        (":f", ["package.module:NAME, got ':f'"]),
    ],
)
def test_a_tracker_that_cannot_be_found_is_one_sentence(name, words):
    with pytest.raises(ConfigError) as caught:
        tracker.find([name])
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(tracker.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"tensorboardX: install .*fedjaxprune\[tensorboard\]"):
        tracker.find(["tensorboard"])


@pytest.mark.filterwarnings("default")  # of the two packages
def test_tensorboard_reads_what_was_written(tmp_path):
    pytest.importorskip("tensorboardX", reason="no tensorboardX here")
    pytest.importorskip("tensorboard", reason="no tensorboard here to read event files")
    from tensorboard.backend.event_processing import event_accumulator

    lines = rising([0.1, 0.2, 0.3, 0.4])
    openers = tracker.find(["tensorboard"])
    assert play(openers, tmp_path, lines[:3]).warned == []
    # Interrupted, and gone on with from round 2: what the first part had after that is gone.
    changed = [{**one, "test": {**one["test"], "accuracy": 0.9}} for one in lines]
    assert play(openers, tmp_path, changed, done=2).warned == []
    reader = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    reader.Reload()
    found = {event.step: event.value for event in reader.Scalars("test/accuracy")}
    assert found == {1: pytest.approx(0.1), 2: pytest.approx(0.2), 3: pytest.approx(0.9),
                     4: pytest.approx(0.9)}  # fmt: skip
    assert "mask/sparsity_by_layer/b/kernel" in reader.Tags()["scalars"]


def test_wandb_and_mlflow_are_called_as_they_want(tmp_path, monkeypatch):
    """Against stand-ins: neither package is needed by the suite."""
    calls = []

    def note(name):
        return lambda *args, **options: calls.append((name, args, options))

    def init(**options):
        calls.append(("init", (), options))
        return types.SimpleNamespace(log=note("log"), finish=note("finish"))

    def start_run(**options):
        calls.append(("start_run", (), options))
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r"))

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    mlflow = types.SimpleNamespace(
        start_run=start_run, log_params=note("log_params"), log_metrics=note("log_metrics"),
        end_run=note("end_run"),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setattr(tracker.importlib.util, "find_spec", lambda name: True)
    openers = tracker.find(["wandb", "mlflow"])
    assert play(openers, tmp_path / "a", rising([0.1])).warned == []
    names = [name for name, _, _ in calls]
    assert names == ["init", "start_run", "log_params", "log", "log_metrics", "finish", "end_run"]
    assert calls[0][2]["name"] == "a"
    assert calls[0][2]["config"]["method"]["name"] == "fedavg"
    assert calls[2][1][0]["method.name"] == "fedavg"
    assert calls[3][1][0]["test/accuracy"] == 0.1
    assert calls[3][2] == {"step": 1}
    assert calls[4][2] == {"step": 1, "run_id": "r"}
