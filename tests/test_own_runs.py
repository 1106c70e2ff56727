"""Own data with own networks, from end to end: by the command, and as values in Python.

Whatever a user writes beyond the defaults is at most three lines; `TINY` only keeps tests short.
"""

import csv
import json
import pathlib
import shutil
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from sklearn.datasets import load_breast_cancer

import fedjaxprune as fjp
from fedjaxprune.cli import main
from tests import own_networks
from tests.test_datasets import TEXT, prepare
from tests.test_own_data import in_memory

NETWORKS = pathlib.Path(own_networks.__file__)
TINY = "--method fedavg --num-rounds 1 --epochs 1 --chunk-size 1 --devices 1 --learning-rate 0.05"
FEW = {"method": "fedavg", "num_rounds": 1, "epochs": 1, "chunk_size": 1, "devices": 1}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(NETWORKS, "networks.py")
    return tmp_path


def command(capsys, *args):
    """Call the command: its status and what it printed."""
    try:
        main.main([*args])
        status = 0
    except SystemExit as error:
        status = error.code
    said = capsys.readouterr()
    return status, said.out + said.err


def trained(capsys, text):
    """Run a YAML file of at most three lines: the run."""
    assert len(text.strip().splitlines()) <= 3
    pathlib.Path("mine.yaml").write_text(text)
    status, said = command(capsys, "run", "mine.yaml", "--folder", "run", *TINY.split())
    assert status == 0, said
    return fjp.load("run"), said


def write_table():
    data: Any = load_breast_cancer()
    with pathlib.Path("cancer.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow([*data.feature_names, "hospital", "diagnosis"])
        for i, (row, label) in enumerate(zip(data.data, data.target, strict=True)):
            rows.writerow([*row, f"h{i % 3}", data.target_names[label]])


def write_images():
    for name, level in (("cat", 60), ("dog", 180)):
        pathlib.Path("pets", name).mkdir(parents=True)
        for i in range(15):
            noise = np.random.default_rng(i).integers(0, 40, (6, 6, 3))
            Image.fromarray((level + noise).astype(np.uint8)).save(f"pets/{name}/{i}.png")


def write_text():
    said = "shall i compare thee to a summers day, thou art more lovely"
    parts = [f"{name}:\n{said} {i}\n" for i in range(6) for name in ("ROMEO", "JULIET")]
    pathlib.Path("play.txt").write_text("\n".join(parts))


def test_a_table_with_client_ids_and_a_linen_network_by_the_command(capsys):
    write_table()
    run, said = trained(
        capsys,
        "data.dataset: {name: ./cancer.csv, label: diagnosis}\n"
        "data.partition: {name: by_key, key: hospital}\n"
        "model: {name: './networks.py:linen', width: 6}\n",
    )
    assert "1 round, the clients by key\nfolder: run" in said
    assert run.config["data"]["num_clients"] == 3
    assert run.config["data"]["dataset"]["keys"] == ["hospital"]
    assert run.summary["mask"]["num_prunable"] == 6 * 32  # 30 features: no hospital among them
    assert run.summary["test"]["accuracy"] > 0.6
    code = yaml.safe_load(pathlib.Path("run/config.yaml").read_text())["parts"]["model"]
    assert len(code["sha256"]) == 64
    for wrong, sentence in {
        "--num-clients=4": "data.num_clients must be 3, as the partition 'by_key' makes so many",
        "--key=hospitl": "keys: cancer.csv has no 'hospitl', only mean radius,",
    }.items():
        status, said = command(capsys, "run", "mine.yaml", "--folder", "other", wrong)
        assert status == 2
        assert sentence in " ".join(said.split())


@pytest.mark.slow
def test_a_folder_of_images_and_an_nnx_network_by_the_command(capsys):
    write_images()
    run, _ = trained(
        capsys,
        "data: {dataset: ./pets, num_clients: 3}\nmodel: './networks.py:normalized'\n",
    )
    assert run.params["hidden"]["kernel"].shape == (6 * 6 * 3, 4)
    assert {"mean", "var"} <= set(run.model_state["norm"])
    assert run.predict(np.zeros((2, 6, 6, 3), np.uint8)).shape == (2, 2)


def test_a_text_and_a_transformer_by_the_command(capsys):
    write_text()
    run, _ = trained(
        capsys,
        "data.dataset: {name: ./play.txt, length: 12}\n"
        "data.partition: by_key\n"
        "model: './networks.py:transformer'\n",
    )
    assert run.config["data"]["num_clients"] == 2  # Romeo and Juliet
    assert 0 <= run.summary["test"]["accuracy"] <= 1


def test_a_hugging_face_set_and_an_equinox_network_as_values():
    run = fjp.run(model=own_networks.equinox, data=in_memory(), **FEW, folder="run")
    assert run.config["data"]["num_clients"] == 4  # its writers
    assert run.config["data"]["partition"]["name"] == "by_key"
    assert run.predict(np.zeros((2, 8, 8, 1), np.uint8)).shape == (2, 3)


SEQUENCES = np.random.default_rng(0).integers(0, 5, (24, 7)).astype(np.int32)
FEATURES = np.random.default_rng(0).normal(size=(24, 3)).astype(np.float32)
IMAGES = np.zeros((24, 6, 6, 3), np.uint8)
LABELS = np.arange(24) % 2


@pytest.mark.slow  # the other half of data with networks: seconds each to compile
@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (own_networks.NET, FEATURES),
        (own_networks.linen, FEATURES),
        (own_networks.normalized, IMAGES),
        (lambda rngs: own_networks.Nnx(108, 2, rngs), IMAGES),
    ],
    ids=["linen", "linen_function", "nnx", "nnx_function_of_rngs"],
)
def test_networks_as_values(model, inputs):
    run = fjp.run(model=model, data=(inputs, LABELS), num_clients=2, folder="run", **FEW)
    assert run.state == "finished"
    assert run.predict(inputs[:3]).shape == (3, 2)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["./networks.py:NET", "./networks.py:equinox"])
def test_networks_of_a_file(capsys, model):
    write_table()
    trained(
        capsys,
        "data.dataset: {name: ./cancer.csv, label: diagnosis, keys: [hospital]}\n"
        f"data.num_clients: 3\nmodel: '{model}'\n",
    )


@pytest.mark.slow
def test_a_text_and_the_character_lstm_by_the_command(capsys):
    write_text()
    text = (
        "data.dataset: {name: ./play.txt, length: 12}\ndata.partition: by_key\nmodel: char_lstm\n"
    )
    run, _ = trained(capsys, text)
    assert run.summary["train"]["loss"] is not None


@pytest.mark.slow
def test_a_text_of_tfds_and_a_language_model_up_to_the_card_and_the_report(capsys, folder):
    write_text()
    text = pathlib.Path("play.txt").read_text()
    splits = {"train": [(text, None)], "test": [(text[:200], None)]}
    prepare(folder / "tfds", "tiny_shakespeare", splits, features={"text": TEXT})
    run, _ = trained(
        capsys,
        "data.dataset: {name: tiny_shakespeare, data_dir: tfds, length: 12, predict: every}\n"
        "data.partition: by_key\n"
        "model: {name: gpt, width: 8, num_layers: 1, labels: every}\n",
    )
    assert run.config["data"]["num_clients"] == 2
    tokens = np.zeros((2, 12), np.int32)
    assert run.predict(tokens).shape == (2, 12, run.params["embedding"].shape[0])
    status, said = command(capsys, "export", "run")
    assert status == 0, said
    card = (folder / "run" / "export" / "README.md").read_text()
    assert "float32 [batch, 12, outputs]" in card
    symbols = json.loads(card.partition("```json\n")[2].partition("\n")[0])
    spoken = text.replace("ROMEO:", "").replace("JULIET:", "")
    assert symbols == sorted(set(spoken))
    assert 'pipeline_tag: "text-generation"' in card
    assert command(capsys, "report", "run")[0] == 0


@pytest.mark.slow
def test_a_transformer_as_a_value():
    data = fjp.Dataset(
        name="symbols",
        train={"inputs": SEQUENCES[:16], "labels": SEQUENCES[:16, 0]},
        test={"inputs": SEQUENCES[16:], "labels": SEQUENCES[16:, 0]},
        task="sequence",
        num_classes=5,
        input_shape=(7,),
    )
    run = fjp.run(model=own_networks.transformer, data=data, num_clients=2, folder="run", **FEW)
    assert run.predict(SEQUENCES[:2]).shape == (2, 5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "label", "row"),
    [
        ("binary", "diagnosis", "test accuracy"),
        ("regression", "mean radius", "test error, last (mean absolute)"),
    ],
)
def test_tables_of_two_classes_and_of_numbers(capsys, task, label, row):
    write_table()
    columns = "features: [mean area, mean smoothness]"
    _, said = trained(
        capsys,
        f"data.dataset: {{name: ./cancer.csv, label: {label}, task: {task}, {columns}}}\n"
        "data.num_clients: 3\nmodel: {name: mlp, hidden_sizes: [4]}\n",
    )
    assert row in said


class Unbuilt(own_networks.nn.Module):
    """A network that is not called."""


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"model": Unbuilt},
            "class Unbuilt, not a model: name an instance of it, such as `net = U",
        ),
        ({"model": 3}, "it must be a Model, a flax linen module, .* got int"),
        ({"data": load_breast_cancer}, "'return_X_y', .* to give what it returns, call it"),
        (
            {"data": (FEATURES, FEATURES[:, 0])},
            "integer classes, got float32; for numbers set .*task",
        ),
        ({"data": (FEATURES, LABELS[:3])}, "24 .*3"),
        ({"method": 3}, "method: 3 is of type int, not a method: it must be a Method"),
        ({"method": lambda task: 3}, r"method '<lambda>' must build an Algorithm, got int\."),
        ({"optimizer": 0.1}, r"client\.optimizer: 0\.1 is of type float, not an optimizer"),
        ({"lr": 0.1}, r"no setting 'lr' of this run; did you mean 'client\.optimizer\.learning_"),
        ({"alpha": 0.1}, "no setting 'alpha' here: it is a setting of dirichlet, .* not of iid"),
        ({"num_client": 2}, "no setting 'num_client' of this run; did you mean 'data.num_clients'"),
    ],
    ids=map(str, range(11)),
)
def test_a_wrong_value_is_one_sentence(options, sentence):
    given = {"model": "mlp", "data": (FEATURES, LABELS), "num_clients": 2, **FEW, **options}
    with pytest.raises(fjp.FedJaxPruneError, match=sentence) as caught:
        fjp.run(**given, folder="run")
    assert "\n" not in str(caught.value)
    assert not pathlib.Path("run").exists()


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--dataset", "./cancr.csv"], "there is no file ./cancr.csv; did you mean 'cancer.csv'?"),
        (["--dataset", "./pet"], "there is no file or folder './pet'; did you mean 'pets'?"),
        (["--dataset", "./notes.xlsx"], "files that are read end in .csv, .tsv, .parquet, "),
        (["--dataset", "./cancer.csv"], "label (--label COLUMN): cancer.csv has no 'label', only"),
        (
            ["--dataset", "./cancer.csv", "--label", "diagnosis", "--features", "mean area,3"],
            "features: cancer.csv has no '3'",
        ),
        (
            ["--model", "./networks.py:Block"],
            "is the class Block, not a model: name",
        ),
        (["--model", "./networks.py"], "must be ./networks.py:NAME, got"),
        (["--model", "./networks.py:line"], "has no line; did you mean 'linen'?"),
    ],
    ids=map(str, range(8)),
)
def test_a_wrong_word_is_one_sentence(capsys, args, sentence):
    write_table()
    pathlib.Path("pets").mkdir()
    pathlib.Path("notes.xlsx").touch()
    status, said = command(capsys, "run", "--method", "fedavg", "--folder", "run", *args)
    assert status == 2, said
    assert sentence in said
    assert len([line for line in said.splitlines() if line.startswith("error: ")]) == 1
    assert not pathlib.Path("run").exists()
