"""The command that holds a method to the laws, a method of one's own included."""

import subprocess
import sys

import jax
import pytest

from fedjaxprune.cli.main import main

MAIN = "from fedjaxprune.cli.main import main; main()"
METHOD = '''
from fedjaxprune import masks
from fedjaxprune.method import Method
from fedjaxprune.pruning import pruners
from fedjaxprune.rounds.protocol import Hooks
from fedjaxprune.rounds.training import training
from fedjaxprune.settings import Settings, Sparsity, setting


class Own(Settings):
    """Settings."""

    sparsity: Sparsity = setting(0.5, "Pruned fraction.", unit="fraction")


def build(settings, task):
    """Prune by magnitude at the end of each round."""
    def after_round(before, after, metrics):
        return after._replace(params={params}), metrics

    return training(
        task.protocol,
        client=task.local_client(),
        pruner=pruners.prune_to(settings.sparsity),
        hooks=Hooks(after_round=after_round),
    )


MAIN = "from fedjaxprune.cli.main import main; main()"
METHOD = Method(build=build, settings=Own, nothing_pruned={{"sparsity": 0.0}})
'''


def conformance(*arguments):
    return subprocess.run(
        [sys.executable, "-c", MAIN, "conformance", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def own(tmp_path):
    def write(params):
        file = tmp_path / "own.py"
        file.write_text(METHOD.format(params=params))
        return f"{file}:METHOD"

    return write


@pytest.mark.slow
@pytest.mark.parametrize("fast", [True, False])
def test_a_method_of_ones_own_is_held_to_the_laws(own, fast):
    name = own("after.params")
    done = conformance(name, *(["--fast"] if fast else []))
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, last = done.stdout.splitlines()
    assert all(line.startswith("passed  ") for line in lines)
    assert last == f"{name} keeps {len(lines)} of {len(lines)} laws."
    assert len(lines) == (13 if fast else 17)


def test_a_law_that_is_broken_is_said_in_a_sentence(own, capsys, monkeypatch):
    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # devices are there already
    with pytest.raises(SystemExit) as stop:
        main(["conformance", own("before.params"), "--fast"])
    assert stop.value.code == 1
    *lines, last = capsys.readouterr().out.splitlines()
    passed = [line for line in lines if line.startswith("passed  ")]
    wrong = [line for line in lines if line.startswith("failed  ")]
    assert len(passed + wrong) == len(lines) == 13
    assert last.endswith(f" keeps {len(passed)} of 13 laws.")
    law = "pruned entries are exact zeros in parameters and server memory"
    assert f"failed  {law}: round 1 (train): deployed_params are not zero where pruned." in wrong


@pytest.mark.slow
def test_a_method_that_cannot_be_played_says_why(own):
    done = conformance(own("after.parameters"))
    assert done.returncode == 1
    assert done.stdout == (
        "failed  it runs: AttributeError: 'RoundState' object has no attribute 'parameters'\n"
    )
    unknown = conformance("feddipp")
    assert unknown.returncode == 2
    assert "did you mean 'feddip'" in unknown.stderr
