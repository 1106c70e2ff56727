"""The command's options: by path and in short, what is refused, and help without JAX."""

import contextlib
import os
import pathlib
import subprocess
import sys

import pytest
import yaml

from fedjaxprune.cli import main as command
from fedjaxprune.cli import running
from fedjaxprune.experiment.config import files, resolve
from fedjaxprune.experiment.execution.processes import ALONE
from fedjaxprune.experiment.run import launch
from tests import stub_parts


@pytest.fixture
def begun(monkeypatch, tmp_path):
    """Take the parts of `stub_parts`, an empty folder, and only note which runs are begun."""
    stub_parts.use(monkeypatch)
    monkeypatch.chdir(tmp_path)
    noted = []
    monkeypatch.setattr(
        running, "progress", lambda *, details, **_: contextlib.nullcontext(details)
    )
    monkeypatch.setattr(launch, "start", lambda config, **rest: noted.append((config, rest)))
    monkeypatch.setattr(launch, "resume", lambda *args, **rest: noted.append((*args, rest)))
    return noted


def call(capsys, *args):
    status = 0
    try:
        command.main([str(arg) for arg in args])
    except SystemExit as stop:
        status = int(stop.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


def test_options_short_and_full_set_the_same(capsys, begun):
    short = ["--method", "feddip", "--sparsity", "0.8", "--optimizer", "adam", "--num-rounds", "3"]
    short += ["--learning_rate", "0.5", "--no-normalize", "--uplink", "top_k", "--fraction", "0.5"]
    full = ["--method.sparsity=0.8", "--client.optimizer", "adam", "--federation.num-rounds", "3"]
    full += ["--client.optimizer.learning-rate", "0.5", "--no-data.normalize"]
    full += ["--uplink.name", "top_k", "--uplink.fraction", "0.5"]
    for args in (short, full):
        status, out, err = call(capsys, "run", *args, "--folder", "here")
        assert (status, out, err) == (0, "", "")
    (one, rest), (other, _) = begun
    assert one == other
    assert callable(rest.pop("stop"))
    assert rest.pop("processes") == ALONE
    assert rest == {"folder": pathlib.Path("here"), "trackers": {}, "listener": False}
    assert (one.method.sparsity, one.client.optimizer.name, one.uplink.fraction) == (
        0.8,
        "adam",
        0.5,
    )


def test_options_go_before_the_file_and_the_file_before_the_defaults(capsys, begun):
    settings = {"method": {"name": "fedtiny", "pool_size": 3}, "federation": {"num_rounds": 9}}
    pathlib.Path("mine.yaml").write_text(yaml.safe_dump({**settings, "client.epochs": 7}))
    for args in (["mine.yaml", "--pool-size", "none"], ["--pool-size", "none", "mine.yaml"]):
        status, _, err = call(capsys, "run", *args, "--num-rounds", "2", "--details")
        assert (status, err) == (0, "")
    (one, rest), (other, _) = begun
    assert one == other
    assert (one.method.pool_size, one.federation.num_rounds, one.client.epochs) == (None, 2, 7)
    assert rest["listener"] is True  # with details
    assert call(capsys, "run", "mine.yaml", "--method", "feddip")[0] == 0
    assert (begun[-1][0].method.name, begun[-1][0].client.epochs) == ("feddip", 7)


def test_lists_are_given_with_commas(capsys, begun):
    for text in ("7, 8", "[7,8]", "7,8"):
        assert call(capsys, "run", "--hidden-sizes", text)[::2] == (0, "")
    assert [config.model.hidden_sizes for config, _ in begun] == [(7, 8)] * 3
    assert files.command(begun[0][0]).endswith(" --hidden-sizes '[7, 8]'")
    err = call(capsys, "run", "--hidden-sizes", "7,x")[2]
    assert err.startswith("error: model.hidden_sizes must be a list of integers, got ")


def test_resuming_reads_options_with_the_parts_of_the_run(capsys, begun):
    config = resolve.resolve({"method": "fedtiny"})
    pathlib.Path("old").mkdir()
    pathlib.Path("old/config.yaml").write_text(files.to_yaml(config, versions={}))
    for args in (["--resume", "old"], ["--folder", "old", "--resume"], ["--resume=old"]):
        assert call(capsys, "run", "--pool-size", "4", *args)[::2] == (0, "")
    for folder, given, _ in begun:
        assert (folder, dict(given.values)) == (pathlib.Path("old"), {"method.pool_size": "4"})


BAD = {
    "value": (["--sparsity", "1"], ["method.sparsity", "[0, 1)", "'1' (from --sparsity)"]),
    "negative": (["--seed", "-1"], ["seed must be an integer in", "'-1' (from --seed)"]),
    "full": (["--method.sparsity", "x"], ["method.sparsity", "'x' (from --sparsity)"]),
    "none": (["--batch-size", "none"], ["client.batch_size must be an integer", "'none'"]),
    "missing": (["--num-rounds"], ["--num-rounds", "`fedjaxprune run --help`"]),
    "no name": (["--method"], ["--method", "requires an argument"]),
    "method": (["--method", "fedipp"], ["method must be one of", "did you mean 'feddip'?"]),
    "optimizer": (["--optimizer", "sdg"], ["client.optimizer must be one of", "'sgd'"]),
    "near": (["--num-round", "3"], ["'--num-round'; did you mean --num-rounds?"]),
    "lr": (["--lr", "1"], ["'--lr'; did you mean --learning-rate?"]),
    "wd": (["--wd", "1"], ["'--wd'; did you mean --weight-decay?"]),
    "out": (["--out", "x"], ["'--out'; did you mean --folder?"]),
    "own": (["--detail"], ["'--detail'; did you mean --details?"]),
    "rounds": (["--rounds", "1"], ["since schema 2 it is --num-rounds (federation.num_rounds)"]),
    "algorithm": (["--algorithm", "feddip"], ["since schema 2 it is --method (method)"]),
    "eval": (["--eval-every", "2"], ["it is --evaluation.every (evaluation.every)"]),
    "server": (["--server", "fedavgm"], ["it is --server-optimizer (server.optimizer)"]),
    "owner": (["--method", "fedavg", "--sparsity", "0"], ["a setting of feddip, fedtiny, not of"]),
    "full owner": (["--model.norm", "batch"], ["a setting of resnet8, gated_resnet8, not of mlp"]),
    "of data": (["--data-dir", "x"], ["'--data-dir': it is a setting of tfds, not of digits"]),
    "ambiguous": (["--every", "3"], ["give --evaluation.every or --checkpoints.every"]),
    "ambiguous part": (
        ["--uplink", "top_k", "--aggregator", "trimmed_mean", "--fraction", "0.5"],
        [
            "'--fraction': several sections have it, so give",
            "--server.aggregator.fraction or --uplink.fraction",
        ],
    ),
    "nonsense": (["--xyzzy", "1"], ["unknown option '--xyzzy': `fedjaxprune run --help` lists"]),
    "surplus": (["quick", "slow"], ["got", "slow", "`fedjaxprune run --help`"]),
    "preset": (["quik"], ["unknown preset 'quik'", "did you mean 'quick'?"]),
    "file": (["missing.yaml"], ["missing.yaml", "No such file"]),
    "no yaml": (["./settings.txt"], ["is neither a preset nor a .yaml file"]),
    "syntax": (["syntax.yaml"], ["syntax.yaml", "line 2, column"]),
    "twice": (["twice.yaml"], ["twice.yaml", "line 2", "'seed' is set twice"]),
    "key": (["key.yaml"], ["'client.lr' (from key.yaml); did you mean", "learning_rate?"]),
    "old": (["old.yaml"], ["'rounds' (from old.yaml): since schema 2 it is federation.num_rounds"]),
    "in file": (["value.yaml"], ["method.sparsity", "'most' (from value.yaml)"]),
    "list": (["list.yaml"], ["list.yaml must hold settings"]),
    "schema": (["schema.yaml"], ["schema must be 2", "got 1 (from schema.yaml)"]),
    "empty folder": (["--folder="], ["--folder must be a folder, got none"]),
    "resume": (["--resume"], ["--resume must be a folder, got none"]),
    "short and full": (
        ["--method.name", "feddip", "--method", "fedavg"],
        ["one of --method and --method.name must be left out"],
    ),
    "setting twice": (["--epochs", "3", "--client.epochs", "3"], ["--epochs and --client.epochs"]),
    "yes and no": (["--no-normalize", "--data.normalize"], ["--data.normalize and --no-normalize"]),
    "two amounts": (["--epochs", "3", "--steps", "2"], ["client.epochs must", "steps", "got 3"]),
    "two amounts in file": (["work.yaml"], ["client.epochs must be left out", "(here 4;"]),
    "file and option": (["steps.yaml", "--epochs", "3"], ["client.epochs must be left out"]),
    "empty variant": (["--method", "feddip/"], ["the variant of 'feddip' must", "got ''"]),
    "no such variants": (["--method", "fedavg/"], ["'fedavg' has no variants, got ''"]),
    "nested variant": (["--method", "feddip//corrected"], ["variant of 'feddip'", "'/corrected'"]),
    "variant alone": (["--method", "/corrected"], ["method must be one of", "'/corrected'"]),
    "two folders": (["--resume", "a", "--folder", "b"], ["'a'", "'b'; give one"]),
    "cohort": (["--cohort-size", "99"], ["federation.cohort_size", "(20), got 99"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(capsys, begun, name):
    args, words = BAD[name]
    for file, text in {
        "syntax": "seed: [1\nseed: 2\n",
        "twice": "seed: 1\nseed: 2\n",
        "key": "client: {lr: 1}\n",
        "old": "rounds: 3\n",
        "value": "method: {sparsity: most}\n",
        "list": "- rounds\n",
        "schema": "schema: 1\n",
        "work": "client: {epochs: 3, steps: 4}\n",
        "steps": "client: {steps: 4}\n",
    }.items():
        pathlib.Path(f"{file}.yaml").write_text(text)
    status, out, err = call(capsys, "run", *args)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    for word in words:
        assert word in err
    assert begun == []


def test_list_and_describe_and_validate(capsys, begun):
    status, out, err = call(capsys, "list")
    assert (status, err) == (0, "")
    for words in ("method:", "feddip/...", "lenet5", "two convolutions", "preset:", "quick "):
        assert words in out
    assert "feddip/corrected " in call(capsys, "list", "method")[1]
    assert call(capsys, "list", "server-optimizers")[1].splitlines()[0] == "server_optimizer:"
    assert "did you mean 'model'?" in call(capsys, "list", "modle")[2]
    assert call(capsys, "describe", "top_k")[1].startswith("top_k: the largest\n")
    assert call(capsys, "describe", "topk")[0] == 2
    pathlib.Path("mine.yaml").write_text("method: fedtiny\nseed: 3\n")
    assert call(capsys, "validate", "mine.yaml")[1] == (
        "ok: mine.yaml runs fedtiny with mlp on digits.\n"
    )
    pathlib.Path("many.yaml").write_text("method: [fedtiny, feddip]\nseed: [1, 2]\n")
    assert call(capsys, "validate", "many.yaml")[1] == "ok: many.yaml is a sweep of 4 runs.\n"
    pathlib.Path("mine.yaml").write_text("method: fedtiny\nsede: 3\n")
    assert "did you mean seed?" in call(capsys, "validate", "mine.yaml")[2]


def test_help_lists_settings_of_the_named_parts(capsys, begun):
    status, out, _ = call(capsys, "run", "--method", "feddip", "--help")
    assert status == 0
    for words in ("--sparsity NUMBER", "Pruned fraction at the end.", "--initial-sparsity", "0.9]"):
        assert words in out
    assert "settings of the chosen parts: `fedjaxprune describe feddip`" in out


def python(code):
    """Run code in a process of its own: its output."""
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("args", [["--help"], ["run", "--help"], ["list"]])
def test_help_and_lists_import_no_jax_and_help_is_short(args):
    out = python(
        "import sys\n"
        "from fedjaxprune.cli import main as command\n"
        f"try: command.main({args})\n"
        "except SystemExit as stop: assert not stop.code\n"
        "heavy = {'jax', 'numpy', 'rich', 'fedjaxprune.methods.feddip'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert len(sys.modules) < 600, len(sys.modules)\n"
    )
    assert 5 < out.count("\n") < 150
    if "run" in args:
        for words in ("--num-rounds", "--method", "--optimizer", "fedjaxprune describe feddip"):
            assert words in out
