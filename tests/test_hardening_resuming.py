"""Runs that are resumed elsewhere, or from what is left: nothing changes in silence."""

import errno
import json
import os
import pathlib
import random
import shutil
import signal
import threading

import jax
import numpy as np
import pytest
import yaml

import fedjaxprune as fjp
from fedjaxprune.errors import FedJaxPruneError, RunFolderError
from fedjaxprune.experiment import reading
from fedjaxprune.experiment.config import resolve
from fedjaxprune.experiment.execution import environment, signals
from fedjaxprune.experiment.exporting import restore
from fedjaxprune.experiment.folder import (
    checkpoints,
    declared,
    environments,
    failure,
    layout,
    load,
    network,
)
from fedjaxprune.experiment.run import launch
from tests import damage, stub
from tests.processes import lines

pytestmark = pytest.mark.usefixtures("built_once")


def contents(folder: pathlib.Path) -> dict[pathlib.Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


SYNCED: list[str] = []
HANDLERS: list[object] = []


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Run eight rounds, save every other one, and note what is synced and who handles signals."""
    folder, fsync = tmp_path_factory.mktemp("runs") / "whole", os.fsync

    def note(descriptor):
        SYNCED.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def look(line):
        HANDLERS.append(signal.getsignal(signal.SIGTERM))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", note)
        fjp.run(settings(), folder=folder, listener=fjp.Listener(round=look))
    return folder


@pytest.fixture
def unfinished(whole, tmp_path):
    """Give a run that seems interrupted after its last round."""
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / layout.SUMMARY).unlink()
    return tmp_path / "run"


def settings(**changes):
    return stub.settings(**{"federation.num_rounds": 8, "checkpoints.every": 2, **changes})


# What decides the bits.


def test_the_environment_is_on_record(whole):
    stored = layout.stored(whole)
    assert stored.environment == environment.here()
    assert stored.environment["jax_enable_x64"] == "False"
    assert stored.environment["jax_default_prng_impl"] == "threefry2x32"
    assert yaml.safe_load((whole / "config.yaml").read_text())["environment"] == stored.environment


OPTIONS = {
    "jax_enable_x64": True,
    "jax_default_prng_impl": "rbg",
    "jax_threefry_partitionable": False,
    "jax_random_seed_offset": 7,
    "jax_default_matmul_precision": "highest",
    "jax_disable_jit": True,
    "jax_disable_most_optimizations": not jax.config.values["jax_disable_most_optimizations"],
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_is_not_resumed_under_other_options_of_jax(unfinished, name):
    before, now = contents(unfinished), jax.config.values[name]
    jax.config.update(name, OPTIONS[name])
    try:
        with pytest.raises(RunFolderError, match=rf"other bits.*{name} was .*--allow environment"):
            fjp.resume(unfinished)
    finally:
        jax.config.update(name, now)
    assert contents(unfinished) == before


@pytest.mark.parametrize("name", ["XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE"])
def test_a_run_is_not_resumed_under_other_flags(unfinished, monkeypatch, name):
    before = contents(unfinished)
    monkeypatch.setenv(name, "--xla_some_flag=true")
    with pytest.raises(RunFolderError, match=rf"{name} was .* then and is --xla_some_flag"):
        fjp.resume(unfinished)
    assert contents(unfinished) == before


def test_flags_that_change_no_bit_are_no_difference(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    plain = environment.here()
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/x --xla_force_host_platform_device_count=3")
    assert environment.here() == plain
    found = []
    for flags in ("--b=1 --a --b=2", " --a  --b=2 --xla_dump_to=/x"):
        monkeypatch.setenv("XLA_FLAGS", flags)
        found.append(environment.here()["XLA_FLAGS"])
    assert found == ["--a --b=2"] * 2


class Begun(Exception):
    pass


@pytest.fixture
def warnings(unfinished, monkeypatch):
    """Resume a run up to the moment when its parts are built, and give what was said."""

    def build(*anything):
        raise Begun

    def resume(**options):
        said = []
        with pytest.raises(Begun):
            fjp.resume(unfinished, listener=fjp.Listener(warn=said.append), **options)
        return said

    monkeypatch.setattr(launch, "_build", build)
    return resume


def test_another_environment_is_allowed_on_demand_and_said(warnings):
    assert warnings(allow=["environment"]) == []
    with jax.default_matmul_precision("highest"):
        assert warnings(allow=["environment"]) == [
            "the bits may differ from here on: jax_default_matmul_precision was None then and is "
            "highest now."
        ]


def test_another_processor_is_said_and_does_no_harm(warnings, monkeypatch):
    monkeypatch.setattr(environment.devices, "processor", lambda: "another one")
    (said,) = warnings()
    assert said.startswith("the bits may differ from here on: the processor was ")


def test_every_environment_is_on_record_and_noted_in_a_comparison(unfinished, monkeypatch):
    def build(*anything):
        raise Begun

    first = environment.here()
    shutil.rmtree(unfinished / layout.CHECKPOINTS / "8")
    rows = (unfinished / layout.METRICS).read_text().splitlines(keepends=True)
    (unfinished / layout.METRICS).write_text("".join(rows[:8]))
    with jax.default_matmul_precision("highest"):
        fjp.resume(unfinished, allow=["environment"], listener=fjp.Listener(warn=str))
        second = environment.here()
        assert environments.read(unfinished) == [environments.Change(7, second)]
        monkeypatch.setattr(launch, "_build", build)
        with pytest.raises(Begun):  # the environment is that of the last rounds now
            fjp.resume(unfinished)
    with pytest.raises(RunFolderError, match=r"precision was highest then and is None now"):
        fjp.resume(unfinished)
    assert load.read_all([unfinished])[1] == [
        f"{str(unfinished)!r} was computed in another environment from round 7 on: "
        "jax_default_matmul_precision was None then and is highest now."
    ]
    # Rounds that are run again forget the environment in which they were run before.
    environments.note(unfinished, first, second, 9)
    assert [one.round for one in environments.read(unfinished)] == [7]
    environments.note(unfinished, first, first, 9)
    assert [one.round for one in environments.read(unfinished)] == [7, 9]
    assert len(load.read_all([unfinished])[1]) == 1  # there is no ninth round
    environments.note(unfinished, first, first, 5)
    assert environments.read(unfinished) == []
    (unfinished / layout.ENVIRONMENTS).write_text('[{"round": "a", "environment": {}}]')
    with pytest.raises(RunFolderError, match=r"environments\.json' cannot be read: it is damaged"):
        load.read(unfinished)


def test_a_run_is_not_resumed_on_other_data(unfinished, warnings):
    path = unfinished / layout.NETWORK
    then = json.loads(path.read_text())
    assert warnings() == []

    def same(**changes):
        path.write_text(json.dumps({**then, **changes}))
        network.check_same(known, unfinished)

    known = network.read(unfinished)
    same()
    for name in ("data_checksum", "population_checksum"):
        with pytest.raises(RunFolderError, match="the data are not those of the run"):
            same(**{name: 1})
    del then["population_checksum"]  # of an older version
    same()
    with pytest.raises(RunFolderError, match=r"network\.json' cannot be read"):
        same(population_checksum="a")


def test_a_folder_without_an_environment_is_resumed(unfinished, warnings):
    path = unfinished / layout.CONFIG
    head, _, _ = path.read_text().partition("environment:\n")
    path.write_text(head)
    assert warnings() == []


def test_huge_arrays_and_odd_settings_of_a_stranger_are_one_sentence(unfinished):
    damage.SPECIAL["arrays of 2^34 entries in chunks"](unfinished, random.Random(0))
    said: list[str] = []
    with pytest.raises(RunFolderError, match=r"no checkpoint .* can be read"):
        restore.from_folder(unfinished, warn=said.append)
    assert all(
        one.endswith("(its arrays are not those that its description lists).") for one in said
    )
    assert len(said) == 3
    with pytest.raises(ValueError, match=r"bytes cannot hold arrays of 1,099,511,627,776 bytes"):
        declared.check_room(unfinished / layout.CHECKPOINTS, 2**40)
    text = (unfinished / layout.CONFIG).read_text()
    for new, sentence in {
        "scale: [1, {}]": r"model\.scale must be a number, got \[1, \{\}\] \(from .*yaml\)\.",
        "scales: 0.1": r"unknown setting 'model\.scales' \(from .*\); did you mean model\.scale\?",
    }.items():
        (unfinished / layout.CONFIG).write_text(text.replace("scale: 0.1", new))
        with pytest.raises(FedJaxPruneError, match=sentence) as caught:
            fjp.export(unfinished)
        assert "\n" not in str(caught.value)


# Checkpoints that do not fit, and records that would be cut.


def test_a_checkpoint_that_does_not_fit_is_not_damaged(whole, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(whole / layout.CHECKPOINTS, folder)
    before = contents(folder)
    with checkpoints.open_manager(folder, keep=3) as manager:
        for leaf in (np.zeros((4, 4), np.float64), np.zeros((4, 5), np.float32)):
            like = {"state": {"params": {"dense": {"kernel": leaf}}}}
            with pytest.raises(RunFolderError, match=r"round 8 in .* is whole and does not fit"):
                checkpoints.restore(
                    manager,
                    like,
                    usable=lambda step: True,
                    aside=tmp_path / "aside",
                    warn=pytest.fail,
                )
    assert contents(folder) == before
    assert not (tmp_path / "aside").exists()


def test_a_record_without_its_checkpoints_is_not_emptied(unfinished, whole):
    shutil.rmtree(unfinished / layout.CHECKPOINTS)
    before = contents(unfinished)
    with pytest.raises(
        RunFolderError, match=r"8 rounds on record and no checkpoint: .*--allow restart"
    ):
        fjp.resume(unfinished)
    assert contents(unfinished) == before
    with pytest.warns(UserWarning, match="starts again at round 1"):
        fjp.resume(unfinished, allow=["restart"])
    assert lines(unfinished) == lines(whole)


def test_checkpoints_without_their_record_are_not_put_aside(unfinished):
    (unfinished / layout.METRICS).unlink()
    before = contents(unfinished)
    with pytest.raises(RunFolderError, match=r"the record does not reach it.*--allow restart"):
        fjp.resume(unfinished)
    assert contents(unfinished) == before


def test_what_is_said_of_a_checkpoint_is_checked_too(unfinished, whole):
    about = unfinished / layout.CHECKPOINTS / "8" / "about" / "metadata"
    changed = json.loads(about.read_text())
    changed["kinds"]["state/params/dense/kernel"] = ["float32", [4, 5]]
    about.write_text(json.dumps(changed))
    with pytest.warns(UserWarning, match="round 8 is damaged and skipped"):
        fjp.resume(unfinished)
    assert lines(unfinished) == lines(whole)


# Folders and files.


def test_runs_of_one_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = resolve.resolve(settings())
    everybody = threading.Barrier(8)
    found = []

    def claim():
        everybody.wait()
        with layout.claimed(config) as folder:
            found.append(folder)
            everybody.wait()
            layout.create(folder, config, {"a": "b"})

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 8
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {path.name for path in found}
    assert all((folder / "a").read_text() == "b" for folder in found)


def test_the_name_of_a_folder_is_text(tmp_path):
    with pytest.raises(RunFolderError, match=r"must be UTF-8, got .*udcff"):
        fjp.run(settings(), folder=tmp_path / "\udcff")
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_refused_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(fjp.ConfigError):
        fjp.run(settings(**{"client.batch_size": 1000}))
    assert list(tmp_path.iterdir()) == []


def test_two_runs_that_were_given_one_folder_do_not_mix(tmp_path):
    config = resolve.resolve(settings())
    everybody, said = threading.Barrier(4), []

    def create(number):
        everybody.wait()
        try:
            layout.create(tmp_path / "run", config, {"who": str(number)})
        except RunFolderError as error:
            said.append(str(error))

    threads = [threading.Thread(target=create, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(said) == 3
    assert all("holds a run already" in sentence for sentence in said)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_full_disk_leaves_no_empty_mark(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()

    def fill(path, content):
        path.write_bytes(content[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(reading, "write_new", fill)
    with pytest.raises(ZeroDivisionError), failure.marked(folder):
        raise ZeroDivisionError
    assert list(folder.iterdir()) == []


def test_a_refused_folder_keeps_its_mark(tmp_path):
    mark = '{"round": 3, "error": "ValueError: before"}\n'
    (tmp_path / failure.FAILED).write_text(mark)
    with pytest.raises(RunFolderError), failure.marked(tmp_path):
        raise RunFolderError("no")
    assert (tmp_path / failure.FAILED).read_text() == mark


def test_what_is_promised_to_last_is_synced(whole):
    names = {pathlib.Path(path).name for path in SYNCED}
    assert {"config.yaml", "network.json", "metrics.jsonl", "checkpoints", "whole"} <= names
    assert str(whole.parent) in SYNCED


# Being stopped.


def test_a_run_that_is_asked_to_stop_saves_and_resumes_to_the_same_bits(tmp_path, whole):
    rounds = []

    def stop():
        rounds.append(len(rounds) + 1)
        return rounds[-1] == 5

    folder = launch.start(resolve.resolve(settings()), folder=tmp_path / "run", stop=stop)
    assert rounds == [1, 2, 3, 4, 5]
    assert len(lines(folder)) == 5
    assert not (folder / layout.SUMMARY).exists()
    assert load.read(folder).state == "interrupted"
    assert sorted(os.listdir(folder / layout.CHECKPOINTS)) == ["2", "4", "5"]
    fjp.resume(folder)
    assert lines(folder) == lines(whole)


def test_no_handler_is_installed_in_a_thread_or_by_python_calls(whole):
    found = []

    def look():
        with signals.watched(last_words=str) as watch:
            found.extend([signal.getsignal(signal.SIGTERM), watch.stop()])

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [signal.SIG_DFL, False]
    assert HANDLERS == [signal.SIG_DFL] * 8
