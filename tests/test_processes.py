"""Runs of several processes: they agree with one, stop together, and end if one is gone."""

import collections
import contextlib
import json
import random
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import fedjaxprune as fjp
from fedjaxprune import registry
from fedjaxprune.errors import ConfigError
from fedjaxprune.experiment.execution import channel as channels
from fedjaxprune.experiment.execution import joining, meeting, stopping
from fedjaxprune.experiment.execution import processes as processes_lib
from fedjaxprune.experiment.execution.channel import Channel
from fedjaxprune.experiment.folder import failure, layout, record
from tests import processes, several, stub

HEARTBEAT_S = 0.5


def meet(number, *, callers=None, wait_s=20.0):
    """Let threads meet as processes do; give what each found, or the error that it raised."""
    place = meeting.Place("127.0.0.1", several.free_port())
    callers = callers or [meeting.Caller(one, number, {"jax": "1"}) for one in range(number)]
    found: list[Any] = [None] * len(callers)

    def work(index):
        try:
            found[index] = meeting.meet(place, callers[index], wait_s=wait_s)
        except ConfigError as error:
            found[index] = error

    threads = [threading.Thread(target=work, args=(one,)) for one in range(len(callers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@contextlib.contextmanager
def opened(number) -> Iterator[list[Channel]]:
    found = [
        Channel(links, process=one, heartbeat_s=HEARTBEAT_S)
        for one, links in enumerate(meet(number))
    ]
    try:
        yield found
    finally:
        for one in found:
            one.close()


def on_all(channels_, work):
    """Call a function with each channel, in threads, and give what they return."""
    found: list[Any] = [None] * len(channels_)

    def call(index):
        found[index] = work(channels_[index])

    threads = [threading.Thread(target=call, args=(one,)) for one in range(len(channels_))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


def test_processes_share_and_gather():
    with opened(3) as team:
        assert on_all(team, lambda one: one.share(b"0" if one.process == 0 else b"")) == [b"0"] * 3
        first, *others = on_all(team, lambda one: one.gather(b"%d" % one.process))
        assert (first, others) == ([b"0", b"1", b"2"], [[], []])
        large = bytes(3 * 2**20)
        assert on_all(team, lambda one: one.share(large)) == [large] * 3


def test_who_is_gone_is_known_to_all():
    with opened(3) as team:
        team[2].close()
        for one in team[:2]:
            assert one.lost.wait(5)
            assert one.loss is not None
            assert one.loss[:2] == (2, channels.ENDED)
        with pytest.raises(channels.ProcessLost, match=r"process 2 on .* ended"):
            team[1].share()


def test_who_is_silent_is_given_up(monkeypatch):
    with opened(2) as team:
        heard = []
        team[0].watch(heard.append)
        link = team[1]._links[0]
        monkeypatch.setattr(link, "beat", lambda: None)
        begin = time.monotonic()
        assert team[0].lost.wait(10)
        assert time.monotonic() - begin >= 0.7 * HEARTBEAT_S  # the last beat came before
        assert (heard[0].process, heard[0].how) == (1, channels.SILENT)


def test_an_error_is_told_to_all():
    with opened(3) as team:
        team[1].tell("failed", words="failed: the disk is full", status=2)
        assert team[2].lost.wait(5)
        assert team[2].loss is not None
        assert team[2].loss.sentence.endswith("failed: the disk is full")
        assert (team[2].loss.process, team[2].loss.status) == (1, 2)


@pytest.mark.parametrize(
    ("second", "sentence"),
    [
        (meeting.Caller(1, 3, {"jax": "1"}), "was started with --num-processes 3 and process 0"),
        (meeting.Caller(1, 2, {"jax": "2"}), "has jax 2 and process 0 has 1"),
    ],
)
def test_processes_that_do_not_fit_are_refused(second, sentence):
    first = meeting.Caller(0, 2, {"jax": "1"})
    found = meet(2, callers=[first, second])
    assert all(sentence in str(one) for one in found), found


def test_processes_that_do_not_come_are_named():
    (error,) = meet(1, callers=[meeting.Caller(0, 3, {})], wait_s=0.2)
    assert "2 of 3 processes did not come" in str(error)
    assert "--process-id 1, 2" in str(error)
    (error,) = meet(1, callers=[meeting.Caller(1, 2, {})], wait_s=0.2)
    assert "process 1 could not reach process 0" in str(error)


def test_a_process_that_was_ended_while_it_waited_may_come_again():
    place = meeting.Place("127.0.0.1", several.free_port())
    found: list[Any] = [None] * 3

    def come(one):
        found[one] = meeting.meet(place, meeting.Caller(one, 3, {}), wait_s=20.0)

    threads = [threading.Thread(target=come, args=(one,)) for one in range(3)]
    threads[0].start()
    time.sleep(0.1)
    with socket.create_connection(place) as early:
        gone = channels.Link(early, process=0, host="")
        gone.send("fedjaxprune", process=1, number=3, host="a", versions={})
        time.sleep(0.1)
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join()
    assert [sorted(links) for links in found] == [[1, 2], [0], [0]]
    assert found[0][1].host != "a"
    for links in found:
        for link in links.values():
            link.close()


@pytest.mark.parametrize("text", ["host", "host:", ":80", "host:0", "host:70000", "host:a", 8000])
def test_a_coordinator_is_a_host_and_a_port(text: Any):
    with pytest.raises(ConfigError, match="coordinator must be HOST:PORT"):
        meeting.place_of(text)


def test_a_membership_is_checked():
    assert joining.membership(None, None, None, 20.0) is None
    given: Any
    for given, sentence in {
        (None, 2, None, 20.0): "num_processes needs a coordinator",
        ("a:1", "2", 0, 20.0): "num_processes must be a whole number, got '2'",
        ("a:1", 2, 0.0, 20.0): "process_id must be a whole number, got 0.0",
        ("a:1", 2, 0, "20"): "heartbeat must be a number of seconds, got '20'",
        ("a:1", None, 0, 20.0): "needs num_processes and process_id",
        ("a:1", 2, 2, 20.0): r"process_id must be in \[0, 1\], got 2",
        ("a:1", 2, 0, 0.1): "heartbeat must be between 1 and 3600 seconds",
    }.items():
        with pytest.raises(ConfigError, match=sentence):
            joining.join(joining.membership(*given))


SLURM = {
    "SLURM_JOB_ID": "4096", "SLURM_STEP_NODELIST": "node[07-09]", "SLURM_NTASKS": "3",
    "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_NODES": "3",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "4096.0;tcp://10.0.0.7:34911", "OMPI_COMM_WORLD_SIZE": "3",
    "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}  # fmt: skip


@pytest.mark.parametrize(
    ("variables", "where"), [(SLURM, "node07:61440"), (OPEN_MPI, "10.0.0.7:61441")]
)
def test_a_cluster_says_where_processes_are(monkeypatch, variables, where):
    found = []
    monkeypatch.setattr(joining, "_join", found.append)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    joining.join(joining.membership("auto", None, None, 20.0))
    assert found == [joining.Membership(where, 3, 2, 20.0, (0,))]


def test_where_no_cluster_says_it_a_coordinator_is_asked_for():
    with pytest.raises(ConfigError, match="neither SLURM, Open MPI, Kubernetes nor a TPU pod"):
        joining.join(joining.membership("auto", None, None, 20.0))


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack(">IQ", 2, 2**40) + b"{}",
        b"\0" * 12,
        struct.pack(">IQ", 3, 0) + b"[1]",
        struct.pack(">IQ", 10**5, 0) + b"[" * 10**5,
    ],
    ids=range(6),
)
def test_a_stranger_at_the_port_is_ignored(sent):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(sent)
        theirs.shutdown(socket.SHUT_WR)
        assert meeting._greeting(channels.Link(ours, process=-1, host="")) is None


@pytest.mark.parametrize("who", [0, 1, 2])
def test_all_stop_after_the_same_round(who):
    rng = random.Random(who)
    asked = threading.Event()
    with opened(3) as team:
        stops = [
            stopping.together(one, asked.is_set if one.process == who else lambda: False)
            for one in team
        ]
        barrier = threading.Barrier(3)

        def work(one):
            for number in range(1, 1000):
                barrier.wait(20)  # as the collectives of a round
                time.sleep(0.002 * rng.random())
                if number == 5:
                    asked.set()
                if stops[one.process]():
                    return number
            return None

        ends = on_all(team, work)
        assert ends[0] is not None
        assert ends == [ends[0]] * 3


def test_a_difference_between_processes_is_named():
    with opened(2) as team:

        def check(one):
            own = processes_lib.Processes(one.process, 2, one)
            values = {"seed": one.process, "same": 1}
            with pytest.raises(ConfigError) as found:
                processes_lib.check_same(own, values, advice="give the same")
            return str(found.value)

        sentence = "process 1 has seed 1 and process 0 has 0: give the same."
        assert on_all(team, check) == [sentence] * 2


def test_a_finished_run_has_not_failed_because_another_process_does(tmp_path, monkeypatch):
    left = threading.Event()

    def leave(sentence, mark, status):
        mark()
        left.set()

    monkeypatch.setattr(processes_lib.last_words, "leave", leave)
    for name in ("_GRACE_S", "_LEAVING_S"):
        monkeypatch.setattr(processes_lib, name, 0.01)
    for name in (layout.CONFIG, layout.SUMMARY):
        (tmp_path / name).touch()
    with opened(2) as team:
        own = processes_lib.Processes(0, 2, team[0])
        with (
            contextlib.suppress(channels.ProcessLost),
            processes_lib.at_work(own, lambda: tmp_path),
        ):
            team[1].tell("failed", words="failed: it sees no such folder", status=2)
            assert left.wait(10)
        assert team[0].loss is not None
    assert failure.read(tmp_path) is None


# Runs of processes of their own.


def test_two_processes_give_the_bits_of_one_with_two_devices(tmp_path):
    several.run(tmp_path / "two", number=2, devices=2)
    changes = {"data.num_clients": 8, "federation": {"num_rounds": 6, "cohort_size": 4}}
    settings = stub.settings(**changes, **{"client.steps": 1, "execution.devices": 2})
    settings.pop("federation.num_rounds")
    settings.pop("client.epochs")
    saves = {"checkpoints.every": 2, "evaluation.every": 2}
    fjp.run({**settings, **saves}, folder=tmp_path / "one")
    several.assert_same(tmp_path / "two", tmp_path / "one")


def test_each_process_holds_its_share_of_examples_and_rows(tmp_path):
    folder, everybody = tmp_path / "two", several.People()
    several.in_processes([several.FED, str(folder)], number=2, function="holding")
    fjp.run(several.FED, data=everybody, folder=tmp_path / "one")
    several.assert_same(folder, tmp_path / "one")
    each = [json.loads((tmp_path / f"two-{one}.json").read_text()) for one in range(2)]
    # Of the four clients of a cohort a process fetches two at most, and nobody but these.
    asked = [ids for held in each for ids in held["asked"]]
    assert max(map(len, asked)) == 2
    beside = collections.Counter(id for ids in asked for id in ids)
    beside.subtract(id for ids in everybody.asked for id in ids)
    assert {id for id, times in beside.items() if times} == {0}  # looked at when the run begins
    # There is room for the two largest clients, in each round.
    assert {size for held in each for size in held["example_bytes"]} == {(11 + 10) * 20}
    # Of the rows of ten clients each process has five.
    *arrays, is_written = several.saved_rows(tmp_path / "one", 4)
    assert {held["row_bytes"] for held in each} == {sum(array.nbytes for array in arrays) // 2}
    for process, held in enumerate(each):
        assert held["rows"] == [i for i in np.flatnonzero(is_written) if i % 2 == process]


@pytest.mark.slow
@pytest.mark.parametrize("client_rows", ["host", "disk"])
def test_fed_processes_agree_and_a_run_continues_on_any_number(client_rows, tmp_path):
    settings = several.small(
        "--cohort-size", "4", "--chunk-size", "1", "--uplink", "top_k", "--error-feedback",
        "--server-optimizer", "fedavgm", "--dropout-rate", "0.1", "--num-rounds", "8",
        "--checkpoints.every", "1",
    )  # fmt: skip
    several.run(tmp_path / "resident", number=1, devices=4, settings=settings)
    settings += ["--examples", "host", "--client-rows", client_rows]
    one = several.run(tmp_path / "1", number=1, devices=4, settings=settings)
    assert processes.lines(one) == processes.lines(tmp_path / "resident")
    for number in (2, 4):
        folder = several.run(tmp_path / str(number), number=number, devices=4, settings=settings)
        several.assert_same(folder, one)
    for name, number in {"2": 4, "4": 1, "1": 2}.items():
        several.cut(tmp_path / name, 6, aside=tmp_path / f"aside-{name}")
        several.resume(tmp_path / name, number=number)
    for number in (1, 2):
        several.assert_same(tmp_path / "4", tmp_path / str(number))


@pytest.mark.slow
def test_all_methods_agree_where_processes_are_fed(tmp_path):
    settings = [several.settings_of(name) for name in registry.names("method")]
    where = {"examples": "host", "client_rows": "host"}  # in one process as on the device
    settings = [{**one, "execution": {**one["execution"], **where}} for one in settings]
    for number in (1, 2):
        several.in_processes([settings, str(tmp_path / str(number))], number=number)
    for index in range(len(settings)):
        several.assert_same(tmp_path / "2" / str(index), tmp_path / "1" / str(index))


@pytest.mark.slow
def test_processes_and_devices_agree_and_a_run_continues_on_any_number(tmp_path):
    settings = several.small(
        "--cohort-size", "4", "--chunk-size", "1", "--uplink", "top_k", "--error-feedback",
        "--server-optimizer", "fedavgm", "--dropout-rate", "0.1", "--num-rounds", "8",
    )  # fmt: skip
    one = several.run(tmp_path / "1", number=1, devices=4, settings=settings)
    for number in (2, 4):
        folder = several.run(tmp_path / str(number), number=number, devices=4, settings=settings)
        several.assert_same(folder, one)
    for name, number in {"2": 4, "4": 1, "1": 2}.items():
        folder = tmp_path / name
        lines = record.read(folder).lines
        several.cut(folder, 5, aside=tmp_path / f"aside-{name}")
        several.resume(folder, number=number)
        assert len(lines) == len(record.read(folder).lines)
    for number in (1, 2):
        several.assert_same(tmp_path / "4", tmp_path / str(number))


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 4])
def test_all_methods_agree_with_one_process(tmp_path, number):
    settings = [several.settings_of(name) for name in registry.names("method")]
    for each in (1, number):
        several.in_processes([settings, str(tmp_path / str(each))], number=each)
    for index in range(len(settings)):
        several.assert_same(tmp_path / str(number) / str(index), tmp_path / "1" / str(index))


LONG = several.small(
    "--cohort-size", "4", "--chunk-size", "1", "--num-rounds", "400", "--checkpoints.every", "7",
    "--uplink", "top_k", "--error-feedback", "--server-optimizer", "fedavgm",
)  # fmt: skip


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """Run many rounds in one process, on three devices."""
    return several.run(
        tmp_path_factory.mktemp("long") / "whole", number=1, devices=3, settings=LONG
    )


def survivors(started, victim):
    """Wait for the ends of all others; give what they said, and how long it took."""
    begin = time.monotonic()
    said = [one.communicate(timeout=120)[1] for one in started if one is not victim]
    assert [one.returncode for one in started if one is not victim] == [75] * (len(started) - 1)
    return said, time.monotonic() - begin


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1, 2])
def test_killed_at_any_time_a_run_says_who_is_gone_and_continues(long, tmp_path, who):
    rng = random.Random(who)
    folder = tmp_path / "run"
    for _ in range(10):
        args = processes.arguments([*LONG, "--devices", "3"], folder)
        started = several.commands([*args, "--heartbeat", "20"], number=3)
        reached = len(record.look(folder).lines) if folder.exists() else 0
        processes.wait_for_round(started[0], folder, reached + rng.randint(1, 30))
        time.sleep(0.02 * rng.random())
        started[who].kill()
        said, seconds = survivors(started, started[who])
        assert seconds < 20
        for one in said:
            last = one.splitlines()[-1]
            assert last.startswith(f"stopped: process {who} on ")
            assert "--resume" in last
        mark = failure.read(folder)
        assert mark is not None
        assert mark.error.startswith(f"process {who} on ")
        started[who].communicate()
    several.resume(folder, number=2)
    several.assert_same(folder, long)


@pytest.mark.slow
def test_a_process_that_hangs_is_given_up_within_the_heartbeat(tmp_path):
    folder = tmp_path / "run"
    args = ["run", *LONG, "--num-rounds", "1000000", "--devices", "2", "--folder", str(folder)]
    started = several.commands([*args, "--heartbeat", "5"], number=2)
    processes.wait_for_round(started[0], folder, 5)
    started[1].send_signal(signal.SIGSTOP)
    (said,), seconds = survivors(started, started[1])
    assert 5 <= seconds < 30
    assert "was not heard from for 5 s" in said.splitlines()[-1]
    started[1].send_signal(signal.SIGCONT)
    started[1].communicate(timeout=60)
    assert started[1].returncode == 75


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1])
def test_sigterm_at_one_process_stops_all_after_the_same_round(tmp_path, who):
    folder = tmp_path / "run"
    args = ["run", *LONG, "--num-rounds", "1000000", "--devices", "2", "--folder", str(folder)]
    started = several.commands(args, number=2)
    processes.wait_for_round(started[0], folder, 5)
    started[who].send_signal(signal.SIGTERM)
    for one in started:
        _, err = one.communicate(timeout=120)
        assert one.returncode == 143
        assert err.startswith("stopped by SIGTERM; continue with `fedjaxprune run --resume ")
    number = len(record.read(folder).lines)
    assert (folder / "checkpoints" / str(number)).is_dir()
    assert not (folder / failure.FAILED).exists()
