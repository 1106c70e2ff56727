"""Runs that signals, kills and full disks interrupt: they are resumed to the same bits."""

import math
import os
import pathlib
import random
import select
import signal
import subprocess
import sys
import time

import pytest
import yaml

from fedjaxprune.experiment.execution import signals
from fedjaxprune.experiment.folder import failure, layout, record
from tests import processes, stub
from tests.processes import lines, small


def test_before_any_round_a_signal_ends_at_once_and_then_after_the_round():
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name)
        with pytest.raises(signals.Stopped), signals.watched(last_words=str):
            signal.raise_signal(number)
        with signals.watched(last_words=str) as watch:
            assert not watch.stop()
            signal.raise_signal(number)
            assert watch.stop()
            assert watch.came() == number
            with pytest.raises(signals.Stopped):
                watch.begin()
        assert signal.getsignal(number) is signal.SIG_DFL
        assert signal.set_wakeup_fd(-1) == -1


def test_signals_that_others_handle_or_ignore_are_left_alone():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with signals.watched(last_words=str) as watch:
            signal.raise_signal(signal.SIGHUP)
            assert watch.came() is None
    finally:
        signal.signal(signal.SIGHUP, before)


# The command, in processes of its own.


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Give these processes one folder for compiled code, which a full disk may damage."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
        yield folder


# Residuals, a server with a state, and clients that drop out: rounds of a few milliseconds.
LONG = small(
    "--num-rounds", "300", "--checkpoints.every", "7", "--uplink", "top_k", "--error-feedback",
    "--server-optimizer", "fedavgm", "--dropout-rate", "0.1",
)  # fmt: skip


@pytest.fixture(scope="module")
def long(cache, tmp_path_factory):
    """Run many rounds without a stop, twice, and measure a start with compiled code."""
    place = tmp_path_factory.mktemp("long")
    processes.completed(LONG, place / "first")
    before = time.monotonic()
    whole = processes.completed(LONG, place / "whole")
    return whole, time.monotonic() - before


@pytest.mark.slow
def test_sigterm_ends_a_run_after_its_round_with_a_checkpoint(cache, tmp_path):
    settings = small("--num-rounds", "1000000", "--checkpoints.every", "1000000")
    folder = tmp_path / "run"
    process = processes.command("run", *settings, "--folder", str(folder))
    processes.wait_for_round(process, folder, 5)
    said = processes.stopped(process, signal.SIGTERM)
    assert process.returncode == 143
    assert said == f"stopped by SIGTERM; continue with `fedjaxprune run --resume {folder}`.\n"
    number = len(lines(folder))
    assert os.listdir(folder / layout.CHECKPOINTS) == [str(number)]
    assert not (folder / failure.FAILED).exists()


# What waits for a compiler hears no signal in Python.
STUCK = """
import hashlib
from fedjaxprune.experiment.folder import record

def compile_for_minutes(*anything):
    print("compiling", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # the most that it takes

record.cut = compile_for_minutes
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_ends_a_run_that_compiles(cache, tmp_path, name):
    number, folder = getattr(signal, name), tmp_path / "run"
    process = processes.python(
        STUCK + processes.COMMAND, "run", *small("--num-rounds", "7", "--folder", str(folder))
    )
    assert process.stdout is not None
    while process.stdout.readline() != "compiling\n":
        assert process.poll() is None
    said = processes.stopped(process, number)
    assert process.returncode == 128 + number
    assert said == f"stopped by {name}; continue with `fedjaxprune run --resume {folder}`.\n"


@pytest.mark.slow
def test_a_run_outlives_its_terminal_by_one_round(cache, tmp_path):
    folder = tmp_path / "run"
    settings = small("--num-rounds", "1000000", "--folder", str(folder))
    master, slave = os.openpty()
    log_in = f"import os; os.login_tty({slave})\n"
    process = subprocess.Popen(
        [sys.executable, "-c", log_in + processes.COMMAND, "run", *settings],
        env={**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[1])},
        pass_fds=[slave],
    )
    os.close(slave)
    deadline = time.monotonic() + 120
    while len(record.look(folder).lines) < 5 and time.monotonic() < deadline:
        if select.select([master], [], [], 0.1)[0]:
            os.read(master, 65536)
    os.close(master)
    assert process.wait(timeout=60) == 129
    number = len(lines(folder))
    assert str(number) in os.listdir(folder / layout.CHECKPOINTS)
    assert not (folder / failure.FAILED).exists()


@pytest.mark.slow
def test_a_sweep_ends_by_a_signal_and_continues(cache, tmp_path):
    file = tmp_path / "mine.yaml"
    values = {**stub.settings(), "federation.num_rounds": 6000, "checkpoints.every": 6000}
    file.write_text(yaml.safe_dump({**values, "seed": [0, 1], "folder": str(tmp_path / "many")}))
    for jobs in ("1", "2"):
        process = processes.command("sweep", str(file), "--jobs", jobs)
        deadline, found = time.monotonic() + 300, []
        while len(found) < int(jobs) or any(path.stat().st_size < 9999 for path in found):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
            found = list((tmp_path / "many").glob("*/metrics.jsonl"))
        said = processes.stopped(process, signal.SIGTERM)
        assert process.returncode == 143
        assert said.endswith(
            f"stopped by SIGTERM; continue the sweep with `fedjaxprune sweep {file}`.\n"
        )
        for path in (tmp_path / "many").iterdir():
            assert str(len(lines(path))) in os.listdir(path / layout.CHECKPOINTS)
    process = processes.command("sweep", str(file))
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0
    # A sweep of two processes gives each a share of the cores, which is said where a run changes.
    assert all("the processor was " in line for line in err.splitlines()), err


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_runs_killed_at_random_times_resume_to_the_same_bits(long, tmp_path, seed):
    rng, folder = random.Random(seed), tmp_path / "run"
    for _ in range(5):
        process = processes.command(*processes.arguments(LONG, folder))
        wait(rng, process, folder, long[1])
        processes.stopped(process)
    processes.assert_resumes(LONG, folder, long[0], warning="starts again at round 1")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_runs_stopped_at_random_times_resume_to_the_same_bits(long, tmp_path, seed):
    rng, folder = random.Random(100 + seed), tmp_path / "run"
    for _ in range(5):
        process = processes.command(*processes.arguments(LONG, folder))
        wait(rng, process, folder, long[1])
        number = rng.choice([signal.SIGTERM, signal.SIGHUP])
        said = processes.stopped(process, number)
        early = process.returncode == -number  # Python itself was starting
        assert early or process.returncode in (128 + number, 0), said
        if (folder / layout.CONFIG).exists() and (number := len(lines(folder))):
            assert str(number) in os.listdir(folder / layout.CHECKPOINTS)
    processes.assert_resumes(LONG, folder, long[0])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_runs_on_a_full_disk_resume_to_the_same_bits(long, tmp_path, seed):
    """No file can grow beyond a random size: a record, checkpoint, draft or cached program."""
    rng, folder = random.Random(200 + seed), tmp_path / "run"
    largest = (long[0] / layout.METRICS).stat().st_size
    for _ in range(5):
        limit = int(math.exp(rng.uniform(math.log(100), math.log(largest))))
        process = processes.python(
            f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
            + processes.COMMAND,
            *processes.arguments(LONG, folder),
        )
        _, said = process.communicate(timeout=300)
        assert process.returncode in (0, 2), said
        if process.returncode:
            assert said.splitlines()[-1].startswith("error: cannot "), said
            assert "File too large" in said
    processes.assert_resumes(LONG, folder, long[0], warning="starts again at round 1")


def wait(
    rng: random.Random, process: subprocess.Popen, folder: pathlib.Path, start_s: float
) -> None:
    """Wait until some moment before the first round of a process, or some rounds later."""
    if rng.random() < 0.4:
        time.sleep(rng.uniform(0, start_s))
    else:
        processes.wait_for_round(process, folder, len(record.look(folder).lines) + 1)
        time.sleep(rng.uniform(0, 0.3))
