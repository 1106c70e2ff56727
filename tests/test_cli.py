"""The command as users meet it: what it writes, what it refuses and how it goes on after a kill."""

import errno
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import yaml
from jax.experimental.compilation_cache import compilation_cache

from fedjaxprune.cli.main import cli, main
from fedjaxprune.experiment import methods
from fedjaxprune.experiment.config.flat import identity, validation
from fedjaxprune.experiment.folder import checkpoints, record
from fedjaxprune.experiment.run import build, launch, loop

# A run of seconds: a dense method compiles fastest.
SMALL = [
    "--algorithm", "fedavg", "--rounds", "6", "--num-clients", "8", "--cohort-size", "2",
    "--local-steps", "1", "--checkpoint-every", "2", "--eval-every", "2",
]  # fmt: skip


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Give all runs of these tests one folder for compiled code, not the user's."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def apart(cache, monkeypatch, tmp_path):
    """Work in an empty folder, leave the user's cache alone, and put JAX back as it was."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
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
    status, _, err = call(capsys, "run", *SMALL, "--out", folder, *args)
    assert status == 0, err


def lines(folder: pathlib.Path) -> list[record.RoundRecord]:
    """Read a record without its times."""
    return [line._replace(wall_s=0.0) for line in record.read(folder)]


def test_a_run_writes_its_folder_and_shows_a_table(capsys, tmp_path):
    status, out, err = call(capsys, "run", *SMALL, "--out", "deep/er/run")
    assert (status, err) == (0, "")
    folder = tmp_path / "deep" / "er" / "run"
    names = sorted(entry.name for entry in folder.iterdir() if entry.name != "chunk_size.json")
    assert names == ["accuracy.png", "checkpoints", "config.yaml", "metrics.jsonl", "summary.json"]
    assert "chunk size 1 (auto): a device has one client a round" in out
    assert "test accuracy" in out
    assert "deep/er/run" in out
    stored = yaml.safe_load((folder / "config.yaml").read_text())
    assert stored["rounds"] == 6
    assert stored["versions"]["jax"] == jax.__version__
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["num_rounds"] == 6
    assert summary["uplink_bits"] == sum(line.uplink_bits for line in lines(folder))
    assert (folder / "accuracy.png").read_bytes().startswith(b"\x89PNG")

    # Its config makes the same run again; options go before it.
    status, _, err = call(capsys, "run", folder / "config.yaml", "--out", "again")
    assert (status, err) == (0, "")
    assert lines(tmp_path / "again") == lines(folder)

    status, out, _ = call(capsys, "run", "--resume", folder)
    assert status == 0
    assert "finished" in out
    assert "test accuracy" in out


def test_without_out_the_folder_is_named_by_method_data_and_time(capsys, tmp_path):
    small = [*SMALL, "--rounds", "1"]
    assert call(capsys, "run", *small)[0] == 0
    assert call(capsys, "run", *small)[0] == 0  # in the same second, maybe
    names = [entry.name for entry in (tmp_path / "runs").iterdir()]
    assert len(names) == 2
    assert all(name.startswith("fedavg-digits-20") for name in names)


def test_options_go_before_the_file_and_the_file_before_the_defaults(capsys, tmp_path):
    (tmp_path / "mine.yaml").write_text("rounds: 3\nseed: 5\nlearning_rate: 1e-2\n")
    small_run(capsys, "run", "mine.yaml", "--rounds", "2")
    stored = record.stored(tmp_path / "run")[0]
    assert (stored.rounds, stored.seed, stored.learning_rate) == (2, 5, 0.01)
    assert stored.momentum == 0.0


# What is given, and what the sentence must name: field, what was given, what is allowed.
BAD = {
    "algorithm": (["--algorithm", "fedipp"], ["algorithm", "fedipp", "fedavg", "'feddip'"]),
    "model": (["--model", "lenet"], ["model", "lenet", "mlp", "did you mean 'lenet5'"]),
    "dataset": (["--dataset", "Digit"], ["dataset", "'Digit'", "did you mean 'digits'"]),
    "no data set": (["--dataset", "mnist:"], ["dataset", "'mnist:'", "`name/config`"]),
    "no data folder": (
        ["--dataset", "mnist", "--data-dir", "/nowhere"],
        ["dataset", "/nowhere (named by data_dir)", "does not exist", "prepare it once"],
    ),
    "empty data folder": (["--data-dir="], ["data_dir", "not empty", "--data-dir"]),
    "unprepared": (["--dataset", "fashion_mnist"], ["fashion_mnist", "prepare"]),
    "option": (["--round", "3"], ["--round", "did you mean '--rounds'"]),
    "value missing": (["--rounds"], ["--rounds", "`fedjaxprune run --help`"]),
    "preset": (["quik"], ["quik", "did you mean 'quick'"]),
    "no yaml": (["missing.yaml"], ["missing.yaml", "No such file"]),
    "no yaml name": (["./settings.txt"], ["settings.txt", "a preset", ".yaml file"]),
    "no yaml name here": (["file"], ["'file' is neither", "a preset", ".yaml file"]),
    "yaml syntax": (["syntax.yaml"], ["syntax.yaml", "line 2, column"]),
    "yaml key twice": (["twice.yaml"], ["twice.yaml", "line 2", "'rounds' is set twice"]),
    "yaml nothing": (["nothing.yaml"], ["rounds", "got nothing", "nothing.yaml"]),
    "yaml truth": (["truth.yaml"], ["rounds", "an integer", "True", "truth.yaml"]),
    "yaml key": (["key.yaml"], ["learning_rat", "did you mean 'learning_rate'", "key.yaml"]),
    "yaml value": (["value.yaml"], ["rounds", "many", "an integer", "value.yaml"]),
    "yaml list": (["list.yaml"], ["list.yaml", "name: value"]),
    "sparsity": (["--sparsity", "1"], ["sparsity", "'1'", "[0, 1)", "--sparsity"]),
    "negative": (["--sparsity", "-0.1"], ["sparsity", "-0.1", "[0, 1)"]),
    "rounds": (["--rounds", "2.5"], ["rounds", "2.5", "an integer"]),
    "many rounds": (["--rounds", "9" * 23], ["rounds", "an integer in [1, 2147483647]"]),
    "endless rounds": (["--rounds", "9" * 5000], ["rounds", "2147483647", "999..."]),
    "rarely pruned": (["--prune-every", "100"], ["prune_every", "rounds (100)", "got 100"]),
    "many epochs": (["--local-epochs", "99999999"], ["local_epochs", "99999999", "examples"]),
    "many steps": (["--local-steps", "999999999"], ["local_steps", "999999999", "batch_size"]),
    "large batch": (["--batch-size", "2000000000"], ["batch_size", "(1442)", "2000000000"]),
    "large float": (["--learning-rate", "1e39"], ["learning_rate", "1e+30", "1e39"]),
    "infinite": (["--max-penalty", "1e400"], ["max_penalty", "1e+30", "1e400"]),
    "empty out": (["--out="], ["out", "not empty", "--out"]),
    "cohort": (["--cohort-size", "99"], ["cohort_size", "99", "20"]),
    "population": (
        ["--num-clients", "5000", "--cohort-size", "2"],
        ["partition", "5000", "examples"],
    ),
    "minimum": (
        ["--partition", "dirichlet", "--min-client-size", "999"],
        ["partition", "dirichlet", "999"],
    ),
    "shards": (["--partition", "shards", "--classes-per-client", "11"], ["partition", "11"]),
    "model and data": (["--model", "lenet5"], ["model", "lenet5", "digits", "8"]),
    "out is a file": (["--out", "file/run"], ["out", "file"]),
    "out is taken": (["--out", "taken"], ["out", "taken", "empty"]),
    "resume nothing": (["--resume", "nowhere"], ["resume", "nowhere", "no run"]),
    "resume what": (["--resume"], ["resume", "folder"]),
    "two folders": (["--resume", "a", "--out", "b"], ["'a'", "'b'"]),
    "surplus": (["quick", "slow"], ["error: got", "slow", "`fedjaxprune run --help`"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_and_no_folder(capsys, tmp_path, name):
    args, words = BAD[name]
    (tmp_path / "syntax.yaml").write_text("rounds: [1\nseed: 2\n")
    (tmp_path / "key.yaml").write_text("learning_rat: 1\n")
    (tmp_path / "value.yaml").write_text("rounds: many\n")
    (tmp_path / "list.yaml").write_text("- rounds\n")
    (tmp_path / "twice.yaml").write_text("rounds: 1\nrounds: 2\n")
    (tmp_path / "nothing.yaml").write_text("rounds:\n")
    (tmp_path / "truth.yaml").write_text("rounds: true\n")
    (tmp_path / "file").write_text("")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("")
    before = sorted(tmp_path.rglob("*"))
    status, out, err = call(capsys, "run", *args)
    assert status == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    for word in words:
        assert word in err, err
    assert sorted(tmp_path.rglob("*")) == before


def test_unknown_commands_are_one_sentence(capsys):
    status, _, err = call(capsys, "rum")
    assert status == 2
    names = ", ".join(cli.commands)
    assert err == f"error: unknown command 'rum': must be one of {names}; did you mean 'run'?\n"


def test_a_folder_that_cannot_be_written_to(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    status, _, err = call(capsys, "run", "--out", "run")
    assert status == 2
    assert "not writable" in err
    assert list(tmp_path.iterdir()) == []


def test_an_existing_run_is_resumed_only_on_demand_and_as_it_is(capsys, tmp_path):
    small_run(capsys, "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    status, _, err = call(capsys, "run", *SMALL, "--out", "run")
    assert status == 2
    assert "--resume" in err
    status, _, err = call(capsys, "run", "--resume", "run", "--rounds", "9", "--seed", "0")
    assert status == 2
    assert "rounds is 6 in the run, 9 was given" in err
    assert "seed" not in err
    status, _, err = call(capsys, "run", *SMALL, "--out", "run", "--resume")
    assert (status, err) == (0, "")
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert after == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not the whole config"),
        ("rounds: 6\n", "not the whole config"),
        ("rounds: 6\nversions: {jax: 1}\n", "it lacks algorithm, sparsity"),
        ("rounds: many\n", "many"),
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
    path.write_text(path.read_text().replace("rounds: 6\n", ""))
    status, _, err = call(capsys, "run", "--resume", "run")
    assert status == 2
    assert "it lacks rounds" in err
    del before[path]
    after = contents(tmp_path)
    del after[path]
    assert after == before


def test_a_record_damaged_in_its_middle_is_refused_and_nothing_is_lost(capsys, tmp_path):
    small_run(capsys, "run")
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text(path.read_text().replace('"round": 3', '"round": "'))
    before = contents(tmp_path)
    status, _, err = call(capsys, "run", "--resume", "run")
    assert status == 2
    assert "metrics.jsonl' is damaged in line 3" in err
    assert contents(tmp_path) == before


def test_what_cannot_be_written_is_one_sentence(capsys, tmp_path, monkeypatch):
    small_run(capsys, "run", "--rounds", "1")
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
    status, _, err = call(capsys, "run", *SMALL, "--out", "other")
    assert status == 2
    assert "No space left on device: 'other/metrics.jsonl'" in err
    assert err.count("\n") == 1


def test_a_checkpoint_that_cannot_be_written_is_one_sentence(capsys, tmp_path, monkeypatch):
    import orbax.checkpoint as ocp

    def fail(*args, **options):
        raise ValueError("the disk is full\nand more")

    monkeypatch.setattr(ocp.CheckpointManager, "save", fail)
    status, _, err = call(capsys, "run", *SMALL, "--out", "run")
    assert status == 2
    assert "(the disk is full: " in err
    assert err.count("\n") == 1


def test_too_little_memory_is_one_sentence(capsys, monkeypatch):
    def fail(*args, **options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating")

    monkeypatch.setattr(loop, "train", fail)
    status, _, err = call(capsys, "run", *SMALL, "--chunk-size", "2", "--out", "run")
    assert status == 2
    assert err.startswith("error: there is not enough memory")
    assert "--chunk-size (here 2)" in err
    assert err.count("\n") == 1
    monkeypatch.setattr(build, "build", fail)  # the data may be too large by themselves
    status, _, err = call(capsys, "run", *SMALL, "--chunk-size", "1", "--out", "other")
    assert status == 2
    assert "start a new one with a smaller --batch-size (here 16) or --model" in err


def test_rejected_and_absent_clients_are_told_of(capsys):
    status, out, err = call(capsys, "run", *SMALL, "--learning-rate", "1e30", "--out", "run")
    assert status == 0
    assert err.count("warning: ") == 1
    assert "every client's message was not finite" in err
    status, out, err = call(
        capsys, "run", *SMALL, "--cohort-size", "1", "--dropout-probability", "0.9", "--out", "few"
    )
    assert (status, err) == (0, "")
    assert "loss - accuracy" in out


def test_a_resumed_run_may_be_given_its_own_settings_again(capsys, tmp_path):
    given = ["--num-clients", "40", "--cohort-size", "30", "--chunk-size", "100"]
    given += ["--devices", "2"]
    small_run(capsys, "~/run", "--rounds", "1", *given)
    folder = tmp_path / "home" / "run"
    assert record.stored(folder)[0].chunk_size == 30
    assert record.stored(folder)[0].devices == 2
    automatic = (["--devices", "0"], ["--chunk-size", "auto"])
    for args in (given[2:4], given[4:], *automatic, [folder / "config.yaml"]):
        status, _, err = call(capsys, "run", "--resume", "~/run", *args)
        assert (status, err) == (0, "")


def test_the_target_stands_beside_the_sparsity_that_was_reached(capsys):
    status, out, _ = call(capsys, "run", *SMALL, "--algorithm", "feddip", "--sparsity", "0.3")
    assert status == 0
    assert "(target 30.00%)" in out
    assert "compiling the first round\nround 1/6" in out
    assert all(row == row.rstrip() for row in out.splitlines())


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


def test_ctrl_c_says_how_to_go_on(capsys, tmp_path, monkeypatch):
    append = record.append

    def interrupt(folder, line):
        append(folder, line)
        if line.round == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(record, "append", interrupt)
    status, _, err = call(capsys, "run", *SMALL, "--out", "run")
    assert status == 130
    assert err == "interrupted; continue with `fedjaxprune run --resume run`.\n"
    monkeypatch.setattr(record, "append", append)
    status, out, err = call(capsys, "run", "--resume", "run")
    assert (status, err) == (0, "")
    assert "resuming after round 2" in out
    small_run(capsys, "whole")
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")


def test_list_names_everything(capsys):
    status, out, err = call(capsys, "list")
    assert (status, err) == (0, "")
    for name in ("feddip", "lenet5", "digits", "quick"):
        assert f"  {name} " in out
    rows = " ".join(out.split("models:")[0].split())
    for name, words in {
        "fedtiny": "2212.01977) settings: sparsity, prune_every, pretrain_epochs, pool_size, "
        "fedtiny_selection, development_share, swap_fraction, prune_until needs: BatchNorm "
        "(resnets, vgg11_bn, vgg16_bn, gated networks), examples at the server (server_share) "
        "network by default: resnet8 random_masks",
        "autoflip": "2405.10271) settings: sparsity, development_share, explore_epochs,",
        "mpfl": "2312.03889) settings: sparsity, pretrain_epochs, mask_iterations, filter_factor, "
        "consensus, votes, start_rounds, drops needs: convolutions network by default: resnet8",
        "adaptive_dynamic_pruning": "2106.06921) settings: gate_warm_up, gate_gradient, "
        "gate_upload, gates, gate_density needs: gates (gated_resnet8, gated_resnet32,",
        "feddip": "2309.06805) settings: sparsity, initial_sparsity, prune_every, max_penalty,",
    }.items():
        summary = rows.split(f" {name} ", maxsplit=1)[1]
        assert words in summary, name


def test_prepared_sets_are_listed(capsys, tfds_data_dir):
    status, out, _ = call(capsys, "list", "--data-dir", tfds_data_dir)
    assert status == 0
    assert "fashion_mnist" in out
    assert f"from {tfds_data_dir}, named by data_dir" in out


def python(code: str, *args: str, **options) -> subprocess.Popen:
    """Start a process of its own."""
    source = pathlib.Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(source), **options}
    return subprocess.Popen(
        [sys.executable, "-c", code, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def test_help_explains_every_setting_without_importing_jax():
    code = """
import sys
from fedjaxprune.cli.main import main
try:
    main(["run", "--help"])
except SystemExit as stop:
    assert stop.code in (0, None)
assert "jax" not in sys.modules
from fedjaxprune.experiment.config.flat.sections import RunConfig
for name in RunConfig.model_fields:
    print("expected", name)
"""
    process = python(code)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    rows = out.splitlines()
    expected = [row.split()[1] for row in rows if row.startswith("expected ")]
    assert expected
    for name in expected:
        assert f"--{name.replace('_', '-')} " in out
    assert " ".join(out.split()).count("default: ") == len(expected)


@pytest.mark.parametrize(
    ("args", "idle"),
    [
        (["--algorithm", "fedavg", "--sparsity", "0.9", "--alpha", "1"], "sparsity, alpha"),
        (["--algorithm", "autoflip", "--prune-every", "3"], "prune_every"),
        (["--algorithm", "squeeze_excitation", "--gate-density", "0.5"], "gate_density"),
        (["--algorithm", "autoflip", "--sparsity", "0.5", "--eval-every", "9"], None),
        (["--partition", "dirichlet", "--alpha", "1", "--sparsity", "0.9"], None),
    ],
)
def test_settings_that_nothing_reads_are_named_in_one_sentence(capsys, monkeypatch, args, idle):
    monkeypatch.setattr(launch, "start", lambda *args, **kwargs: None)
    status, out, err = call(capsys, "run", *args)
    assert (status, out) == (0, "")
    assert err.count("\n") == (idle is not None)
    assert idle is None or f": {idle} (`fedjaxprune list`" in err


@pytest.mark.parametrize("name", validation.alternatives("algorithm"))
def test_the_settings_that_are_listed_for_a_method_are_read_by_it(name):
    in_use = {"explore_watch": "validation"} if name in methods.EXPLORING else {}
    settings = validation.validate({"algorithm": name, **in_use}).model_dump()
    assert [knob for knob in identity.knobs(name) if not identity.matters(knob, settings)] == []


def command(*args: str) -> subprocess.Popen:
    """Start the command in a process of its own."""
    return python("from fedjaxprune.cli.main import main; main()", *args)


def wait_for_round(process: subprocess.Popen, folder: pathlib.Path, number: int) -> None:
    """Wait until a run has recorded a round, or has ended."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if len(record.read(folder)) >= number:
            return
        time.sleep(0.002)


def final_arrays(folder: pathlib.Path, num_rounds: int) -> list[np.ndarray]:
    """Read all arrays of the last checkpoint: parameters, masks, rows."""
    import orbax.checkpoint as ocp

    with checkpoints.open_manager(folder / record.CHECKPOINTS, keep=3) as manager:
        args = ocp.args.Composite(arrays=ocp.args.PyTreeRestore())
        tree = manager.restore(num_rounds, args=args)["arrays"]
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def assert_killed_and_resumed(folder, whole, settings, *, after_rounds, num_rounds, delay=0.0):
    """Kill a run by SIGKILL, once for each of `after_rounds`, and resume it to the same bits."""
    args = ["run", *settings, "--out", str(folder)]
    for number in after_rounds:
        process = command(*args)
        wait_for_round(process, folder, number)
        time.sleep(random.Random(number).uniform(0, delay))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        if (folder / record.CONFIG).exists():
            args = ["run", "--resume", str(folder)]
    process = command(*args)
    _, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    assert lines(folder) == lines(whole)
    for array, other in zip(
        final_arrays(folder, num_rounds), final_arrays(whole, num_rounds), strict=True
    ):
        np.testing.assert_array_equal(array, other)


def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    settings = [*SMALL, "--rounds", "30", "--checkpoint-every", "1"]
    process = command("run", *settings, "--out", str(tmp_path / "whole"))
    _, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    assert_killed_and_resumed(
        tmp_path / "run", tmp_path / "whole", settings, after_rounds=[7], num_rounds=30
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_feddip_killed_again_and_again_resumes_to_the_same_bits(tmp_path, seed):
    """Kill FedDIP with residuals and drop-outs at random moments, before round 1 included."""
    settings = [
        "--rounds", "40", "--seed", str(seed), "--checkpoint-every", "3", "--sparsity", "0.9",
        "--uplink", "top_k", "--error-feedback", "--dropout-probability", "0.1",
    ]  # fmt: skip
    process = command("run", *settings, "--out", str(tmp_path / "whole"))
    _, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    moments = sorted(random.Random(seed).sample(range(40), 4))
    assert_killed_and_resumed(
        tmp_path / "run",
        tmp_path / "whole",
        settings,
        after_rounds=[0, *moments],
        num_rounds=40,
        delay=0.3,
    )


@pytest.mark.slow
def test_mpfl_killed_in_each_of_its_stages_resumes_to_the_same_bits(tmp_path):
    settings = [
        "--algorithm", "mpfl", "--model", "pooled_cnn", "--rounds", "3", "--start-rounds", "2",
        "--mask-iterations", "2", "--pretrain-epochs", "1", "--num-clients", "4",
        "--cohort-size", "2", "--local-steps", "2", "--server", "fedavgm", "--uplink", "top_k",
        "--error-feedback", "--checkpoint-every", "1",
    ]  # fmt: skip
    process = command("run", *settings, "--out", str(tmp_path / "whole"))
    _, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    stages = [line.stage for line in lines(tmp_path / "whole")]
    assert stages == [*["start"] * 2, *["agree"] * 3, *["train"] * 3]
    assert_killed_and_resumed(
        tmp_path / "run", tmp_path / "whole", settings, after_rounds=[1, 3, 6], num_rounds=8
    )
