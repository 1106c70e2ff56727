"""Sweeps that run: failures, interruptions, processes side by side."""

import itertools
import pathlib
import signal

import jax
import pytest
import yaml
from jax.experimental.compilation_cache import compilation_cache

from fedjaxprune.cli.main import main
from fedjaxprune.errors import ConfigError
from fedjaxprune.experiment.execution import signals
from fedjaxprune.experiment.folder import layout, load, lock
from fedjaxprune.experiment.run import launch, loop
from fedjaxprune.experiment.sweeps import execute
from tests import stub

pytestmark = pytest.mark.usefixtures("built_once")
TINY = stub.settings(**{"federation.num_rounds": 2, "data.num_clients": 4, "checkpoints.every": 2})


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def apart(cache, tmp_path, monkeypatch):
    """Work in an empty folder, leave the user's cache alone, and put JAX back as it was."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.chdir(tmp_path)
    before = jax.config.values["jax_compilation_cache_dir"]
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


def call(capsys, *args):
    status = 0
    try:
        main([str(arg) for arg in args])
    except SystemExit as stop:
        status = int(stop.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


def write(**changes):
    pathlib.Path("mine.yaml").write_text(yaml.safe_dump({**TINY, **changes}, sort_keys=False))


def test_a_failing_member_does_not_stop_the_others_and_is_named_at_the_end(capsys, monkeypatch):
    begun, failing = [], {}
    start, resume = launch.start, launch.resume

    def note(config, *, folder, **options):
        begun.append(config.seed)
        if config.seed in failing:
            raise failing[config.seed]
        return start(config, folder=folder, **options)

    def again(folder, *args, **options):
        begun.append(folder.name)
        return resume(folder, *args, **options)

    monkeypatch.setattr(launch, "start", note)
    monkeypatch.setattr(launch, "resume", again)
    failing |= {0: ValueError("it does not\nwork"), 2: ConfigError("there is not enough memory.")}
    write(seed=[0, 1, 2])
    status, out, err = call(capsys, "sweep", "mine.yaml")
    assert status == 1
    assert begun == [0, 1, 2]
    said = err.splitlines()[-1]
    assert said.startswith("error: 2 of 3 runs failed: ")
    assert "seed-0 (ValueError: it does not); " in said
    assert said.endswith("seed-2 (there is not enough memory.)")
    assert "results: runs/mine" in out

    # The next time the two are tried again, and the one that was interrupted goes on.
    begun.clear()
    failing.clear()
    (done,) = pathlib.Path("runs/mine").iterdir()
    (done / layout.SUMMARY).unlink()
    status, out, err = call(capsys, "sweep", "mine.yaml")
    assert (status, err) == (0, "")
    assert begun == [0, done.name, 2]
    begun.clear()
    assert call(capsys, "sweep", "mine.yaml")[0] == 0
    assert begun == []

    # A run that another process is at work on has not failed.
    (done / layout.SUMMARY).unlink()
    with lock.hold(done):
        status, _, err = call(capsys, "sweep", "mine.yaml")
    assert status == 1
    said = err.splitlines()
    assert said[0] == f"left out: {done.name}: another process is running it"
    assert said[-1].startswith("error: 1 of 3 runs left to another process, such as another sweep")
    assert "failed" not in err


def test_an_interrupted_sweep_says_how_it_goes_on(capsys, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "start", interrupt)
    write()
    status, _, err = call(capsys, "sweep", "mine.yaml")
    assert status == 130
    assert err.endswith("continue the sweep with `fedjaxprune sweep mine.yaml`.\n")


@pytest.mark.parametrize(("seeds", "status"), [([0], 0), ([0, 1], 143)])
def test_a_signal_after_the_last_round_ends_only_a_sweep_with_runs_left(
    capsys, monkeypatch, seeds, status
):
    one_by_one = execute.one_by_one

    def end(sweep, *args, **options):
        one_by_one(sweep._replace(members=sweep.members[:1]), *args, **options)
        raise signals.Stopped(signal.SIGTERM)

    monkeypatch.setattr(execute, "one_by_one", end)
    write(seed=seeds)
    found, out, err = call(capsys, "sweep", "mine.yaml")
    assert found == status
    if len(seeds) == 1:
        assert err == ""
        assert "results: runs/mine" in out
    else:
        assert err.endswith(
            "stopped by SIGTERM; continue the sweep with `fedjaxprune sweep mine.yaml`.\n"
        )


def test_processes_side_by_side_make_the_same_folders(capsys):
    write(seed=[0, 1])
    for jobs, folder in ((1, "one"), (2, "two")):
        status, _, err = call(capsys, "sweep", "mine.yaml", "--folder", folder, "--jobs", jobs)
        assert (status, err) == (0, "")
    one, two = (load.read_all([name])[0] for name in ("one", "two"))
    assert [run.config for run in one] == [run.config for run in two]
    for run, other in zip(one, two, strict=True):
        lines = [[{**line, "time_s": 0} for line in those.lines] for those in (run, other)]
        assert lines[0] == lines[1]


@pytest.mark.slow
def test_a_process_of_a_sweep_says_why_it_failed(capsys):
    write(model=["mlp", "lenet5"])  # which reads images
    status, _, err = call(capsys, "sweep", "mine.yaml", "--folder", "made", "--jobs", "2")
    assert status == 1
    assert "1 of 2 runs failed" in err.splitlines()[-1]
    assert "does not fit the data set" in err


@pytest.mark.slow
def test_a_tracker_follows_every_member(capsys):
    pathlib.Path("follower_of_tests.py").write_text(
        "import pathlib\n"
        "def track(line):\n"
        "    with pathlib.Path('told').open('a') as file:\n"
        "        print(line['round'], file=file)\n"
    )
    write(seed=[0, 1])
    assert call(capsys, "sweep", "mine.yaml", "--track", "follower_of_tests:track")[0] == 0
    assert pathlib.Path("told").read_text() == "1\n2\n" * 2


def test_an_error_in_round_three_leaves_a_mark_and_two_rounds(capsys, monkeypatch):
    compiled = loop._compiled

    def third_fails(advance, parts, where):
        step, times = compiled(advance, parts, where), itertools.count(1)

        def call_step(*args):
            if next(times) == 3:
                raise RuntimeError("the device is gone\nforever")
            return step(*args)

        return call_step

    monkeypatch.setattr(loop, "_compiled", third_fails)
    write(**{"federation.num_rounds": 5})
    with pytest.raises(RuntimeError, match="the device is gone"):
        main(["run", "mine.yaml", "--folder", "run"])
    capsys.readouterr()
    run = load.read("run")
    assert load.standing(run) == "failed in round 3: RuntimeError: the device is gone"
    assert len(run.lines) == 2
    assert call(capsys, "compare", "run")[0] == 0


def test_a_folder_of_another_run_is_refused_with_the_setting_that_differs(capsys):
    write(seed=[0])
    assert call(capsys, "sweep", "mine.yaml", "--folder", "made")[0] == 0
    (folder,) = pathlib.Path("made").iterdir()
    write(**{"seed": [0], "federation.num_rounds": 5})
    status, _, err = call(capsys, "sweep", "mine.yaml", "--folder", "made")
    assert status == 2
    assert f"the folder 'made/{folder.name}' holds another run" in err
    assert "federation.num_rounds is 2 there and 5 in mine.yaml" in err
