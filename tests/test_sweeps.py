"""Sweeps: which runs a file stands for, what is run again, and what a failure does to the rest."""

import itertools
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from typing import Any

import jax
import pytest
import yaml
from fedjaxprune.experiment.config.flat import files
from fedjaxprune.experiment.config.flat.sections import UserError
from jax.experimental.compilation_cache import compilation_cache

from fedjaxprune.cli.main import main
from fedjaxprune.experiment.folder import load, record
from fedjaxprune.experiment.run import launch
from fedjaxprune.experiment.sweeps import execute
from fedjaxprune.experiment.sweeps import flat_plan as plan
from tests.folders import rising, write

TINY = {"rounds": 2, "num_clients": 4, "cohort_size": 2, "local_steps": 1, "devices": 1}


def read(tmp_path, values, out=None):
    path = tmp_path / "mine.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values, sort_keys=False))
    return plan.read(str(path), out=out or tmp_path / "out")


def names(sweep):
    return [member.name for member in sweep.members]


def call(capsys, *args):
    status = 0
    try:
        main([str(arg) for arg in args])
    except SystemExit as stop:
        status = int(stop.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


def test_lists_are_multiplied_and_folders_are_named_by_what_varies(tmp_path):
    values = {"algorithm": ["feddip", "fedprox"], "learning_rate": [0.1, 0.01], "seed": [0, 1]}
    sweep = read(tmp_path, {**values, "rounds": 9})
    assert names(sweep) == [
        f"{algorithm}-learning-rate-{rate}-seed-{seed}"
        for algorithm, rate, seed in itertools.product(*values.values())
    ]
    first = sweep.members[0].config
    assert (first.algorithm, first.learning_rate, first.seed, first.rounds) == ("feddip", 0.1, 0, 9)
    assert first.out == str(tmp_path / "out" / names(sweep)[0])


def test_cases_come_one_after_the_other_and_what_does_not_matter_makes_no_run(tmp_path):
    sweep = read(
        tmp_path,
        {
            "seed": [3, 4],
            "cases": [
                {"algorithm": ["fedavg", "feddip"], "sparsity": [0.8, 0.9]},
                {"algorithm": "feddip_without_penalty", "sparsity": 0.9},
            ],
        },
    )
    assert sorted(names(sweep)) == sorted(
        f"{name}-seed-{seed}"
        for seed in (3, 4)
        for name in (
            "fedavg",  # once, whatever the sparsity
            "feddip-sparsity-0.8",
            "feddip-sparsity-0.9",
            "feddip-without-penalty-sparsity-0.9",
        )
    )


def test_a_list_of_one_names_a_folder_as_a_longer_list_will(tmp_path):
    short = read(tmp_path, {"learning_rate": [0.1], "seed": [0]})
    long = read(tmp_path, {"learning_rate": [0.1, 0.2], "seed": [0, 1]})
    assert names(short)[0] in names(long)


def test_a_preset_comes_first_and_the_file_says_where(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    preset = files.read_source("feddip-fashion-mnist")
    text = yaml.safe_dump({"preset": "feddip-fashion-mnist", "seed": [1, 2], "out": "somewhere"})
    pathlib.Path("mine.yaml").write_text(text)
    sweep = plan.read("mine.yaml", out=None)
    assert sweep.folder == pathlib.Path("somewhere")
    assert sweep.members[0].config.rounds == preset["rounds"]
    pathlib.Path("mine.yaml").write_text("seed: [1]")
    assert plan.read("mine.yaml", out=None).folder == pathlib.Path("runs/mine")


BAD = {
    "unknown": ("seeds: [1]", ["unknown setting 'seeds'", "did you mean 'seed'"]),
    "value": ("rounds: [1, many]", ["rounds", "'many'", "mine.yaml"]),
    "together": ("num_clients: 3\ncohort_size: [2, 4]", ["cohort_size", "num_clients (3)"]),
    "empty list": ("seed: []", ["seed", "list without a value"]),
    "no cases": ("cases: []", ["cases", "- {algorithm: fedavg}"]),
    "cases": ("cases: {algorithm: fedavg}", ["cases", "a list of settings"]),
    "case": ("cases: [fedavg]", ["cases", "a list of settings"]),
    "preset": ("preset: quik", ["quik", "did you mean 'quick'"]),
    "presets": ("preset: [quick]", ["preset", "a preset or a .yaml file"]),
    "out": ("out: [a]", ["out", "a text"]),
    "syntax": ("seed: [1", ["mine.yaml", "not valid YAML"]),
    "folders": ("dataset: [a/b, a b]", ["two members", "'feddip-a-b-seed-0'"]),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_sentence_and_nothing_is_begun(capsys, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    text, words = BAD[name]
    pathlib.Path("mine.yaml").write_text(text)
    status, out, err = call(capsys, "sweep", "mine.yaml")
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err, err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def test_what_is_no_file_is_one_sentence(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source, word in {"quick": "no sweep", "nowhere.yaml": "No such file"}.items():
        status, out, err = call(capsys, "sweep", source)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert word in err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_another_run_is_refused_with_the_field_that_differs(tmp_path):
    sweep = read(tmp_path, {"algorithm": "fedavg", "rounds": 5, "seed": [0, 1]})
    settings: dict[str, Any] = {"rounds": 6, "num_clients": 20, "cohort_size": 10, "devices": 2}
    write(tmp_path / "out" / names(sweep)[1], rising([0.1]), seed=1, **settings)
    with pytest.raises(UserError, match=r"rounds is 6 there and 5 in .*mine.yaml; give the sweep"):
        read(tmp_path, {"algorithm": "fedavg", "rounds": 5, "seed": [0, 1]})
    # Where and on how many devices it ran is no difference; nor is a method's foreign setting.
    read(tmp_path, {"algorithm": "fedavg", "rounds": 6, "seed": [0, 1], "sparsity": 0.7})


@pytest.fixture
def pretended(monkeypatch):
    """Let runs be written at once, and some fail."""
    begun, failing = [], {}

    def start(config, *, trackers, show):
        folder = pathlib.Path(config.out)
        begun.append(folder.name)
        if folder.name in failing:
            raise failing[folder.name]
        settings = config.model_dump(exclude={"out"})
        write(folder, rising([0.1 * (1 + config.seed), 0.5]), **settings)

    def resume(folder, values, given, *, trackers, show):
        begun.append(f"again {folder.name}")
        (folder / record.SUMMARY).write_text("{}")

    monkeypatch.setattr(launch, "start", start)
    monkeypatch.setattr(launch, "resume", resume)
    monkeypatch.setattr(jax, "clear_caches", lambda: None)
    return begun, failing


def test_a_failing_member_does_not_stop_the_others_and_is_named_at_the_end(
    capsys, tmp_path, monkeypatch, pretended
):
    monkeypatch.chdir(tmp_path)
    begun, failing = pretended
    failing["fedavg-seed-0"] = ValueError("it does not\nwork")
    failing["fedavg-seed-2"] = UserError("there is not enough memory.")
    text = yaml.safe_dump({"algorithm": "fedavg", "seed": [0, 1, 2, 3], **TINY})
    pathlib.Path("mine.yaml").write_text(text)
    status, out, err = call(capsys, "sweep", "mine.yaml")
    assert status == 1
    assert begun == [f"fedavg-seed-{n}" for n in range(4)]
    assert err.splitlines()[-1] == (
        "error: 2 of 4 runs failed: fedavg-seed-0 (ValueError: it does not); "
        "fedavg-seed-2 (there is not enough memory.)"
    )
    assert "accuracy, %" in out
    assert "results: runs/mine" in out

    # The next time the two are tried again, the others are not; one was broken off.
    begun.clear()
    failing.clear()
    (tmp_path / "runs" / "mine" / "fedavg-seed-1" / record.SUMMARY).unlink()
    status, out, err = call(capsys, "sweep", "mine.yaml")
    assert (status, err) == (0, "")
    assert begun == ["fedavg-seed-0", "again fedavg-seed-1", "fedavg-seed-2"]
    begun.clear()
    status, out, err = call(capsys, "sweep", "mine.yaml")
    assert (status, err, begun) == (0, "", [])
    assert "│     4 │" in out


def test_an_interrupted_sweep_says_how_it_goes_on(capsys, tmp_path, monkeypatch, pretended):
    monkeypatch.chdir(tmp_path)
    pretended[1]["fedavg-seed-0"] = KeyboardInterrupt()
    pathlib.Path("mine.yaml").write_text(yaml.safe_dump({"algorithm": "fedavg", **TINY}))
    status, _, err = call(capsys, "sweep", "mine.yaml")
    assert status == 130
    assert err == "the sweep goes on with `fedjaxprune sweep mine.yaml`.\n"


def test_the_widest_member_decides_how_many_devices_there_are(tmp_path):
    sweep = read(tmp_path, {"devices": [1, 3, 2], "seed": 0, "algorithm": ["fedavg", "feddip"]})
    assert names(sweep) == ["fedavg-seed-0", "feddip-seed-0"]  # devices make no runs of their own
    sweep = read(tmp_path, {"cases": [{"devices": 1, "seed": 0}, {"devices": 3, "seed": 1}]})
    assert execute._widest(sweep.members).devices == 3


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def apart(cache, tmp_path, monkeypatch):
    """Work in an empty folder, leave the user's cache alone, and put JAX back as it was."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    before = jax.config.values["jax_compilation_cache_dir"]
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


def test_a_sweep_makes_its_runs_for_a_function_that_follows(capsys, apart):
    """For real: two runs, of which one cannot be; a tracker of one's own is told of every round."""
    pathlib.Path("follower_of_tests.py").write_text(
        "import pathlib\n"
        "def track(line):\n"
        "    with pathlib.Path('told').open('a') as file:\n"
        "        print(line.round, file=file)\n"
    )
    values = {"algorithm": "fedavg", "model": ["mlp", "lenet5"], **TINY}
    pathlib.Path("mine.yaml").write_text(yaml.safe_dump(values))
    status, out, err = call(
        capsys, "sweep", "mine.yaml", "--out", "made", "--track", "follower_of_tests:track"
    )
    assert status == 1
    assert "1 of 2 runs failed: fedavg-lenet5-seed-0" in err.splitlines()[-1]
    assert sorted(path.name for path in pathlib.Path("made").iterdir()) == ["fedavg-mlp-seed-0"]
    assert pathlib.Path("told").read_text() == "1\n2\n"
    (made,) = load.read_all(["made"])[0]
    assert (made.state, len(made.lines)) == ("finished", 2)
    sparsities = made.lines[0].layer_sparsity
    assert sparsities is not None
    assert set(sparsities.values()) == {0.0}
    spread = made.lines[-1].client_accuracy
    assert spread is not None
    assert 0 <= spread["lowest"] <= spread["median"] <= spread["highest"] <= 1
    assert "fedavg" in out


def test_an_error_in_round_three_leaves_a_mark_and_two_rounds(capsys, apart, monkeypatch):
    from fedjaxprune.experiment.run import loop

    compiled = loop._compiled

    def third_fails(advance, mesh):
        step, times = compiled(advance, mesh), itertools.count(1)

        def call_step(*args):
            if next(times) == 3:
                raise RuntimeError("the device is gone\nforever")
            return step(*args)

        return call_step

    monkeypatch.setattr(loop, "_compiled", third_fails)
    args = ["run", "--algorithm", "fedavg", "--out", "run"]
    for name, value in {**TINY, "rounds": 5}.items():
        args += [f"--{name.replace('_', '-')}", str(value)]
    with pytest.raises(RuntimeError, match="the device is gone"):
        main(args)
    capsys.readouterr()
    (run,) = load.read_all(["run"])[0]
    assert load.standing(run) == "failed in round 3: RuntimeError: the device is gone"
    assert len(run.lines) == 2
    assert call(capsys, "compare", "run")[0] == 0


def lines_of(folder):
    return {
        path.parent.name: [line._replace(wall_s=0.0) for line in record.read(path.parent)]
        for path in folder.glob("*/config.yaml")
    }


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_sweep_killed_again_and_again_ends_with_the_same_folders(tmp_path, jobs):
    values = {**TINY, "rounds": 30, "checkpoint_every": 5, "seed": [0, 1],
              "cases": [{"algorithm": ["fedavg", "fedprox"]}]}  # fmt: skip
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(values))
    environment = {
        **os.environ,
        "PYTHONPATH": str(pathlib.Path(__file__).parents[1]),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }

    def start(folder):
        code = "from fedjaxprune.cli.main import main; main()"
        args = ["sweep", str(path), "--out", str(folder), "--jobs", str(jobs)]
        return subprocess.Popen(
            [sys.executable, "-c", code, *args],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    whole = start(tmp_path / "whole")
    _, err = whole.communicate(timeout=600)
    assert (whole.returncode, err) == (0, "")
    draw = random.Random(jobs)
    for _ in range(4):
        process = start(tmp_path / "killed")
        time.sleep(draw.uniform(3, 12))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        time.sleep(1)  # processes of --jobs end when they see that they are alone
    process = start(tmp_path / "killed")
    _, err = process.communicate(timeout=600)
    assert (process.returncode, err) == (0, "")
    assert lines_of(tmp_path / "killed") == lines_of(tmp_path / "whole")
    kept = {p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*")}
    found = {p.relative_to(tmp_path / "killed") for p in (tmp_path / "killed").rglob("*")}
    tops = [{p for p in paths if len(p.parts) <= 2} for paths in (kept, found)]
    assert tops[0] == tops[1]
    for name in lines_of(tmp_path / "whole"):
        summaries = [
            json.loads((tmp_path / which / name / record.SUMMARY).read_text())
            for which in ("whole", "killed")
        ]
        for summary in summaries:
            del summary["wall_s"]
        assert summaries[0] == summaries[1]
