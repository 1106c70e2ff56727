"""The command as users meet it: what it writes, what it refuses and how it goes on after a kill."""

import errno
import json
import os
import pathlib
import random
import re
import shutil
import time

import jax
import pytest
import yaml
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image

import fedjaxprune as fjp
from fedjaxprune import registry
from fedjaxprune.cli.main import cli, main
from fedjaxprune.experiment.folder import layout, record
from fedjaxprune.experiment.run import build, loop
from tests import processes, stub
from tests.processes import lines, small

pytestmark = pytest.mark.usefixtures("built_once")


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Give all runs of these tests one folder for measured chunk sizes, not the user's."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def apart(cache, monkeypatch, tmp_path):
    """Work in an empty folder, leave the user's cache alone, and put JAX back as it was."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    before = jax.config.values["jax_compilation_cache_dir"]
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


def call(capsys, *args: str) -> tuple[int, str, str]:
    """Call the command in this process: exit status, stdout, stderr."""
    status = 0
    try:
        main([str(arg) for arg in args])
    except SystemExit as stop:
        status = int(stop.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


def small_run(capsys, folder, *args: str) -> None:
    status, _, err = call(capsys, "run", *small("--folder", folder, *args))
    assert status == 0, err


def test_the_list_names_everything_on_two_screens(capsys):
    status, out, err = call(capsys, "list")
    assert (status, err) == (0, "")
    assert len(out.splitlines()) < 150
    assert "\n  resnet...  " in out
    words = set(re.findall(r"[\w.]+", out))
    for kind in registry.KINDS:
        assert not set(registry.names(kind)) - words


def test_a_part_without_settings_is_described_too(capsys):
    _, out, _ = call(capsys, "describe", "lenet5")
    assert "61,706\nparameters" in out
    assert "A subclass gives its fields" not in out  # of all settings
    assert "Args:" not in out
    _, out, _ = call(capsys, "describe", "sorted_shards")
    assert "belong to\nnobody" in out


@pytest.mark.usefixtures("pictures")
def test_a_run_writes_its_folder_and_shows_a_table(capsys, tmp_path):
    status, out, err = call(capsys, "run", *small("--folder", "deep/er/run", "--sparsity", "0.25"))
    assert (status, err) == (0, "")
    first, *_ = out.splitlines()
    assert f"{stub.FILE}:METHOD on {stub.FILE}:data with {stub.FILE}:net: 6 rounds" in first
    assert "round 6/6" in out
    assert "25.00 % (25.00 % asked for)" in out
    assert "of dense)" in out
    assert "results: deep/er/run" in out
    folder = tmp_path / "deep/er/run"
    assert {path.name for path in folder.iterdir()} >= {
        layout.CONFIG, layout.METRICS, layout.SUMMARY, layout.NETWORK, layout.CHECKPOINTS,
        layout.PICTURE,
    }  # fmt: skip
    stored = yaml.safe_load((folder / layout.CONFIG).read_text())
    assert stored["schema"] == 2
    assert stored["method"]["sparsity"] == 0.25
    assert stored["versions"]["jax"] == jax.__version__
    assert json.loads((folder / layout.SUMMARY).read_text())["num_rounds"] == 6
    with Image.open(folder / layout.PICTURE) as picture:
        assert picture.size == (1200, 480)


def test_without_a_folder_it_is_named_by_method_data_and_time(capsys, tmp_path):
    status, _, _ = call(capsys, "run", *small("--num-rounds", "1"))
    assert status == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("stub.py-METHOD-stub.py-data-")


def test_unknown_commands_are_one_sentence(capsys):
    names = ", ".join(cli.commands)
    status, _, err = call(capsys, "rum")
    assert status == 2
    assert err == f"error: unknown command 'rum': must be one of {names}; did you mean 'run'?\n"


def test_a_folder_that_cannot_be_written_to(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    status, _, err = call(capsys, "run", *small("--folder", "run"))
    assert status == 2
    assert "not writable" in err
    assert list(tmp_path.iterdir()) == []


def test_an_existing_run_is_resumed_only_on_demand_and_as_it_is(capsys, tmp_path):
    small_run(capsys, "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    status, _, err = call(capsys, "run", *small("--folder", "run"))
    assert status == 2
    assert "--resume" in err
    status, _, err = call(capsys, "run", "--resume", "run", "--num-rounds", "9", "--seed", "0")
    assert status == 2
    assert "federation.num_rounds is 6 in the run, 9 was given" in err
    assert "seed" not in err
    status, _, err = call(capsys, "run", *small("--folder", "run", "--resume"))
    assert (status, err) == (0, "")
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert after == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "schema must be 2"),
        ("schema: 2\nversions: {jax: 1}\n", "not the whole config of a run: it lacks method"),
        ("rounds: [", "not valid YAML"),
    ],
)
def test_a_run_with_a_broken_config_is_not_resumed_as_another(capsys, tmp_path, text, words):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(text)
    status, _, err = call(capsys, "run", "--resume", "run")
    assert status == 2
    assert "config.yaml" in err
    assert words in err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def contents(folder: pathlib.Path) -> dict[pathlib.Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usual("False")
@pytest.mark.parametrize("is_finished", [True, False])
def test_a_run_whose_config_was_edited_is_not_resumed(capsys, tmp_path, is_finished):
    small_run(capsys, "run")
    if not is_finished:
        (tmp_path / "run" / "summary.json").unlink()
    path = tmp_path / "run" / "config.yaml"
    path.write_text(path.read_text().replace("learning_rate: 0.1\n", "learning_rate: 0.2\n"))
    before = contents(tmp_path)
    status, _, err = call(capsys, "run", "--resume", "run")
    assert status == 2
    assert "config.yaml" in err
    assert "edited" in err
    assert contents(tmp_path) == before


def test_a_record_damaged_in_its_middle_is_refused_and_nothing_is_lost(capsys, tmp_path):
    small_run(capsys, "run")
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text(path.read_text().replace('"round": 3', '"round": "'))
    before = contents(tmp_path)
    status, _, err = call(capsys, "run", "--resume", "run")
    assert status == 2
    assert "metrics.jsonl' is damaged in line 4, which should be round 3" in err
    assert contents(tmp_path) == before


def test_what_cannot_be_written_is_one_sentence(capsys, tmp_path, monkeypatch):
    small_run(capsys, "run", "--num-rounds", "1")
    (tmp_path / "run" / "summary.json").unlink()
    shutil.move(tmp_path / "run" / "checkpoints", tmp_path / "elsewhere")
    (tmp_path / "run" / "checkpoints").write_text("")
    status, _, err = call(capsys, "run", "--resume", "run")
    assert status == 2
    assert err.startswith("error: cannot work in the run folder 'run' (")
    assert err.count("\n") == 1
    assert "--resume run" in err

    def fail(folder, line):
        raise OSError(errno.ENOSPC, "No space left on device", str(folder / "metrics.jsonl"))

    monkeypatch.setattr(record, "append", fail)
    status, _, err = call(capsys, "run", *small("--folder", "other"))
    assert status == 2
    assert "No space left on device: 'other/metrics.jsonl'" in err
    assert err.count("\n") == 1


def test_a_checkpoint_that_cannot_be_written_is_one_sentence(capsys, monkeypatch):
    import orbax.checkpoint as ocp

    def fail(*args, **options):
        raise ValueError("the disk is full\nand more")

    monkeypatch.setattr(ocp.CheckpointManager, "save", fail)
    status, _, err = call(capsys, "run", *small("--folder", "run"))
    assert status == 2
    assert "(the disk is full: " in err
    assert err.count("\n") == 1


def test_too_little_memory_is_one_sentence(capsys, monkeypatch):
    def fail(*args, **options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating")

    monkeypatch.setattr(loop, "train", fail)
    status, _, err = call(capsys, "run", *small("--chunk-size", "2", "--folder", "run"))
    assert status == 2
    assert err.startswith("error: there is not enough memory")
    assert "execution.chunk_size (here 2)" in err
    assert err.count("\n") == 1
    monkeypatch.setattr(build, "build", fail)  # the data may be too large by themselves
    status, _, err = call(capsys, "run", *small("--chunk-size", "1", "--folder", "other"))
    assert status == 2
    assert "start a new one with a smaller client.batch_size (here 4) or model" in err


@pytest.mark.slow
def test_rejected_and_absent_clients_are_told_of(capsys):
    status, out, err = call(
        capsys, "run", *small("--model", "mlp", "--learning-rate", "1e30", "--folder", "run")
    )
    assert status == 0
    assert err.count("warning: ") == 1
    assert "no client's message was finite" in err
    status, out, err = call(
        capsys, "run", *small("--cohort-size", "1", "--dropout-rate", "0.9", "--folder", "few")
    )
    assert (status, err) == (0, "")
    assert "loss -" in out


def test_a_resumed_run_may_be_given_its_own_settings_again(capsys, tmp_path):
    given = ["--num-clients", "8", "--cohort-size", "6", "--chunk-size", "100", "--devices", "2"]
    small_run(capsys, "~/run", "--num-rounds", "1", *given)
    folder = tmp_path / "home" / "run"
    execution = layout.stored(folder).values["execution"]
    assert (execution["chunk_size"], execution["devices"]) == (6, 2)
    automatic = (["--devices", "auto"], ["--chunk-size", "auto"])
    for args in (given[2:4], given[4:], *automatic, [folder / "config.yaml"]):
        status, _, err = call(capsys, "run", "--resume", "~/run", *args)
        assert (status, err) == (0, "")


def test_other_versions_are_warned_of_and_a_damaged_checkpoint_too(capsys, tmp_path):
    small_run(capsys, "run")
    path = tmp_path / "run" / "config.yaml"
    path.write_text(path.read_text().replace(f"jax: {jax.__version__}", "jax: 0.0.1"))
    (tmp_path / "run" / "summary.json").unlink()
    for file in (tmp_path / "run" / "checkpoints" / "6").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    before = lines(tmp_path / "run")
    status, out, err = call(capsys, "run", "--resume", "run")
    assert status == 0
    assert "resuming after round 4" in out
    versions, damage = err.splitlines()
    assert f"jax 0.0.1 then and {jax.__version__} now" in versions
    assert damage.startswith("warning: the checkpoint of round 6 is damaged and skipped")
    assert lines(tmp_path / "run") == before


def test_code_that_changed_since_is_warned_of(capsys, tmp_path):
    text = stub.FILE.read_text()
    (tmp_path / "mine.py").write_text(text)
    own = ["--method", "mine.py:METHOD", "--model", "mine.py:net", "--dataset", "mine.py:data"]
    small_run(capsys, "run", *own)
    (tmp_path / "run" / "summary.json").unlink()
    (tmp_path / "mine.py").write_text(f"{text}\n# another version\n")
    status, _, err = call(capsys, "run", "--resume", "run")
    assert status == 0
    assert "the run was made with other code: method was a file with checksum" in err
    status, _, err = call(capsys, "export", "run")
    assert status == 0
    assert err.startswith("warning: the run was made with other code: model was a file with check")
    with pytest.warns(UserWarning, match="made with other code: model was a file with checksum"):
        fjp.export("run", "again")


def test_ctrl_c_says_how_to_go_on(capsys, tmp_path, monkeypatch):
    append = record.append

    def interrupt(folder, line):
        append(folder, line)
        if line["round"] == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(record, "append", interrupt)
    status, _, err = call(capsys, "run", *small("--folder", "run"))
    assert status == 130
    assert err == "interrupted; continue with `fedjaxprune run --resume run`.\n"
    monkeypatch.setattr(record, "append", append)
    status, out, err = call(capsys, "run", "--resume", "run")
    assert (status, err) == (0, "")
    assert "resuming after round 2" in out
    small_run(capsys, "whole")
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")


def assert_killed_and_resumed(folder, whole, settings, *, after_rounds, delay=0.0):
    """Kill a run by SIGKILL, once for each of `after_rounds`, and resume it to the same bits."""
    for number in after_rounds:
        process = processes.command(*processes.arguments(settings, folder))
        processes.wait_for_round(process, folder, number)
        time.sleep(random.Random(number).uniform(0, delay))
        processes.stopped(process)
    processes.assert_resumes(settings, folder, whole)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    settings = small("--num-rounds", "30", "--checkpoints.every", "1")
    whole = processes.completed(settings, tmp_path / "whole")
    assert_killed_and_resumed(tmp_path / "run", whole, settings, after_rounds=[7])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_feddip_killed_again_and_again_resumes_to_the_same_bits(tmp_path, seed):
    """Kill FedDIP with residuals and drop-outs at random moments, before round 1 included."""
    settings = [
        "--method", "feddip", "--num-rounds", "40", "--seed", str(seed), "--checkpoints.every", "3",
        "--sparsity", "0.9", "--uplink", "top_k", "--error-feedback", "--dropout-rate", "0.1",
    ]  # fmt: skip
    whole = processes.completed(settings, tmp_path / "whole")
    moments = sorted(random.Random(seed).sample(range(40), 4))
    assert_killed_and_resumed(
        tmp_path / "run", whole, settings, after_rounds=[0, *moments], delay=0.3
    )


@pytest.mark.slow
def test_mpfl_killed_in_each_of_its_stages_resumes_to_the_same_bits(tmp_path):
    settings = [
        "--method", "mpfl", "--model", "pooled_cnn", "--num-rounds", "3", "--dense-rounds", "2",
        "--num-prune-steps", "2", "--vote-epochs", "1", "--num-clients", "4", "--cohort-size", "2",
        "--steps", "2", "--server-optimizer", "fedavgm", "--uplink", "top_k", "--error-feedback",
        "--checkpoints.every", "1",
    ]  # fmt: skip
    whole = processes.completed(settings, tmp_path / "whole")
    stages = [line["stage"] for line in lines(whole)]
    assert stages == [*["start"] * 2, *["agree"] * 3, *["train"] * 3]
    assert_killed_and_resumed(tmp_path / "run", whole, settings, after_rounds=[1, 3, 6])
