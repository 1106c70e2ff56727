"""What Python calls, on a stub method, network and data set: by file, and as values."""

import json
import shutil
import subprocess
import sys
import threading

import jax
import numpy as np
import optax
import pytest
import yaml

import fedjaxprune as fjp
from fedjaxprune import Listener
from fedjaxprune.data import batching, partitions, transforms
from tests import stub

pytestmark = pytest.mark.usefixtures("built_once")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Run once by file."""
    return fjp.run(stub.settings(), folder=tmp_path_factory.mktemp("runs") / "whole")


@pytest.fixture
def run(whole, tmp_path):
    """Give a run folder that may be changed."""
    shutil.copytree(whole.folder, tmp_path / "run")
    return fjp.load(tmp_path / "run")


def without_times(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{**json.loads(line), "time_s": 0.0} for line in lines]


def test_a_run_is_read_back_with_its_network(whole):
    assert whole.state == "finished"
    assert whole.config["method"]["sparsity"] == 0.5
    assert whole.record["test.accuracy"].shape == (3,)
    assert whole.record["method.changes"].tolist() == [8, *whole.record["method.changes"][1:]]
    assert whole.summary["mask"]["sparsity"] == 0.5
    assert whole.params["dense"]["kernel"].shape == (4, 4)
    np.testing.assert_array_equal(
        whole.params["dense"]["kernel"] != 0, whole.masks["dense"]["kernel"]
    )
    inputs = np.eye(4, dtype=np.float32)
    expected = whole.model.predict(whole.params, {}, inputs)
    np.testing.assert_allclose(whole.predict(inputs), expected, rtol=1e-6)


def test_the_folder_says_whose_code_ran(whole):
    stored = yaml.safe_load((whole.folder / "config.yaml").read_text())
    origin = stored["parts"]["method"]
    assert origin["source"] == "file"
    assert origin["path"].endswith("stub.py")
    assert len(origin["sha256"]) == 64
    assert set(stored["parts"]) == {"method", "model", "data.dataset"}


def test_an_interrupted_run_resumes_to_the_same_bits(whole, tmp_path):
    class Stop(Exception):
        pass

    def stop(line):
        if line["round"] == 2:
            raise Stop

    with pytest.raises(Stop):
        fjp.run(stub.settings(), folder=tmp_path / "run", listener=Listener(round=stop))
    assert fjp.load(tmp_path / "run").state == "failed"
    again = fjp.resume(tmp_path / "run")
    assert again.state == "finished"
    assert without_times(again.folder) == without_times(whole.folder)
    jax.tree.map(np.testing.assert_array_equal, again.params, whole.params)


def test_values_take_the_place_of_names(tmp_path):
    arrays = stub.data()
    network = stub.net(input_shape=(4,), num_classes=4)
    own = {"model": network, "data": arrays, "method": stub.METHOD}
    made = fjp.run(**own, num_rounds=2, batch_size=4, sparsity=0.25, folder=tmp_path / "run")
    assert made.config["data"]["partition"]["name"] == "by_key"  # the ids of the mapping
    assert made.config["data"]["num_clients"] == 6
    assert made.summary["mask"]["sparsity"] == 0.25
    assert made.model is network
    (made.folder / "summary.json").unlink()
    with pytest.raises(fjp.RunFolderError, match=r"was a value given in Python .*give it again"):
        fjp.resume(made.folder)
    assert fjp.resume(made.folder, **own).num_rounds == 2
    other = {**arrays, "inputs": arrays["inputs"] + 1}
    with pytest.raises(fjp.RunFolderError, match="the data are not those of the run"):
        fjp.resume(made.folder, **{**own, "data": other})
    wide = stub.net(input_shape=(4,), num_classes=4)._replace(
        init=lambda key: (
            {"dense": {"kernel": jax.numpy.zeros((4, 4)), "bias": jax.numpy.zeros(4)}},
            {},
        )
    )
    with pytest.raises(fjp.RunFolderError, match=r"dense/bias is float32 \(4,\) now and absent in"):
        fjp.resume(made.folder, **{**own, "model": wide})


def test_an_algorithm_that_is_built_already_is_run(tmp_path):
    arrays = stub.data()
    batcher = batching.epochs(num_epochs=1, batch_size=4, preprocess=transforms.chain())
    protocol = fjp.Protocol(num_rounds=2, batcher=batcher, optimizer=optax.sgd(0.1))
    examples = {"inputs": arrays["inputs"], "labels": arrays["labels"].astype(np.int32)}
    population = partitions.population(examples, np.split(np.arange(48), 4))
    network = stub.net(input_shape=(4,), num_classes=4)
    task = fjp.task(network, population, protocol, batch_size=4)
    algorithm = stub.build(stub.Stub(sparsity=0.75), task)
    data = (arrays["inputs"], arrays["labels"])
    made = fjp.run(
        method=algorithm, model=network, data=data, num_clients=4, folder=tmp_path / "run"
    )
    assert made.num_rounds == 2
    assert made.summary["mask"]["sparsity"] == 0.75


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("batch", r"weight of at least 0, .* got -1\.0 in the first batch of client 0"),
        ("num_steps", "no fewer than 0 local steps, got -12 for client 0"),
    ],
)
def test_a_batcher_of_ones_own_gives_no_less_than_nothing(name, sentence):
    usual = batching.epochs(num_epochs=1, batch_size=4, preprocess=transforms.chain())

    def batch(key, data, step):
        made = usual.batch(key, data, step)
        return made._replace(weights=-made.weights)

    wrong = {"batch": batch, "num_steps": lambda data: -data.size}
    protocol = fjp.Protocol(
        num_rounds=2, batcher=usual._replace(**{name: wrong[name]}), optimizer=optax.sgd(0.1)
    )
    arrays = stub.data()
    examples = {"inputs": arrays["inputs"], "labels": arrays["labels"].astype(np.int32)}
    people = partitions.population(examples, np.split(np.arange(48), 4))
    with pytest.raises(ValueError, match=sentence):
        fjp.task(stub.net(input_shape=(4,), num_classes=4), people, protocol)


def test_a_sweep_is_compared_and_reported(tmp_path):
    content = {**stub.settings(), "method.sparsity": [0.25, 0.5]}
    made = fjp.sweep(content, folder=tmp_path / "many")
    assert len(made.runs) == 2
    assert made.failed == {}
    assert {run.config["method"]["sparsity"] for run in made.runs} == {0.25, 0.5}
    again = fjp.sweep(content, folder=tmp_path / "many", listener=Listener(begin=pytest.fail))
    assert len(again.runs) == 2  # nothing was run again
    compared = fjp.compare(made.runs)
    assert [len(group.runs) for group in compared.groups] == [1, 1]
    page = fjp.report(made.folder, tmp_path / "report.html")
    assert page.read_text().startswith("<!doctype html>")


def test_a_finished_runs_folder_is_refused_for_a_sweep(whole):
    with pytest.raises(fjp.FedJaxPruneError, match="is the folder of a single run"):
        fjp.sweep(stub.settings(seed=[0, 1]), folder=whole.folder)


def test_an_exported_network_needs_no_data(run, tmp_path, monkeypatch):
    monkeypatch.setattr(stub, "data", None)
    net = fjp.export(run, tmp_path / "net")
    inputs = np.eye(4, dtype=np.float32)
    np.testing.assert_allclose(net.predict(inputs), run.predict(inputs), rtol=1e-5, atol=1e-6)
    assert (tmp_path / "net" / "README.md").exists()


def test_a_run_works_in_a_thread_and_prints_nothing(tmp_path, capfd):
    found = []
    thread = threading.Thread(
        target=lambda: found.append(fjp.run(stub.settings(), folder=tmp_path / "run"))
    )
    thread.start()
    thread.join()
    assert found[0].state == "finished"
    assert capfd.readouterr() == ("", "")


def test_a_listener_is_told_what_is_run_first(tmp_path):
    told = []

    def listen(name):
        return lambda *given: told.append((name, given))

    listener = Listener(*(listen(name) for name in Listener._fields))
    fjp.run(stub.settings(), folder=tmp_path / "run", listener=listener)
    names = [name for name, _ in told]
    assert names[0] == "begin"
    assert [name for name in names if name not in ("note", "warn")] == [
        "begin",
        "start",
        *["round"] * 3,
        "finish",
    ]
    assert "warn" not in names


MISTAKES = {
    "a setting that is not there": (
        lambda folder: fjp.run(stub.settings(), num_round=2, folder=folder),
        "there is no setting 'num_round' of this run; did you mean 'federation.num_rounds'?",
    ),
    "a setting of two sections": (
        lambda folder: fjp.run(stub.settings(), every=2, folder=folder),
        "every may be evaluation.every or checkpoints.every: give it by its full path",
    ),
    "data that are none": (
        lambda folder: fjp.run(stub.settings(), data=(np.zeros(3), np.zeros(4)), folder=folder),
        "inputs",
    ),
    "a network of another width": (
        lambda folder: fjp.run(
            stub.settings(), model=stub.net(input_shape=(4,), num_classes=3), folder=folder
        ),
        "model 'own_model' does not fit the data set",
    ),
    "a network without what the method needs": (
        lambda folder: fjp.run(
            stub.settings(),
            method=stub.METHOD._replace(needs=fjp.Needs(batch_norm=True)),
            folder=folder,
        ),
        "needs BatchNorm statistics, and the network",
    ),
    "a method that builds nothing": (
        lambda folder: fjp.run(
            stub.settings(),
            method=stub.METHOD._replace(build=lambda settings, task: None),
            folder=folder,
        ),
        "must build an Algorithm, got NoneType",
    ),
    "no run": (lambda folder: fjp.resume(folder), "holds no run"),
    "nothing to load": (lambda folder: fjp.load(folder), "is no run: there is no such folder"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_and_no_folder(tmp_path, name):
    attempt, sentence = MISTAKES[name]
    with pytest.raises(fjp.FedJaxPruneError) as caught:
        attempt(tmp_path / "run")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_folder_is_used_once(run):
    with pytest.raises(fjp.RunFolderError, match="holds a run already"):
        fjp.run(stub.settings(), folder=run.folder)


def test_looking_at_a_run_imports_no_jax_and_no_part(whole):
    code = (
        "import sys, fedjaxprune as fjp\n"
        f"run = fjp.load({str(whole.folder)!r})\n"
        "assert run.record['test.accuracy'].shape == (3,)\n"
        "assert not {'jax', 'tests.stub', 'stub'} & set(sys.modules), 'imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_package_imports_nothing():
    code = (
        "import sys, fedjaxprune\n"
        "heavy = {'jax', 'numpy', 'pydantic', 'click', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert 'run' in dir(fedjaxprune)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", fjp.__all__)
def test_every_public_name_is_there(name):
    assert getattr(fjp, name) is not None


def test_a_run_warns_of_a_sparsity_that_its_last_revision_misses(tmp_path):
    said = []
    method = {"name": "gradual_magnitude", "sparsity": 0.9, "prune_every": 2}
    given = {**stub.settings(), "method": method}
    fjp.run(given, folder=tmp_path / "run", listener=Listener(warn=said.append))
    assert [one for one in said if "method.sparsity is 0.9, but the last revision" in one]
