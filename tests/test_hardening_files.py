"""Files that may come from strangers: what is read of them, and what is refused in one sentence."""

import json
import os

import pytest
import yaml

from fedjaxprune.data.sources import tfds
from fedjaxprune.errors import ConfigError, DataError, RunFolderError
from fedjaxprune.experiment import reading
from fedjaxprune.experiment.config import files, resolve, yaml_text
from fedjaxprune.experiment.folder import layout
from tests import folders
from tests.test_datasets import pictures, prepare


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("08", 8),
        ("-007", -7),
        ("0o17", 15),
        ("0x1F", 31),
        ("1e-3", 0.001),
        ("1.", 1.0),
        (".5", 0.5),
        ("+1E2", 100.0),
        ("-.inf", float("-inf")),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("no", "no"),
        ("off", "off"),
        ("2024-01-01", "2024-01-01"),
        ("True", True),
        ("~", None),
        ("", None),
        ("<<", "<<"),
        ("'010'", "010"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text, value):
    found = yaml_text.read(f"x: {text}\n")["x"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(("text", "seed"), [("08", 8), ("010", 10), ("0o10", 8)])
def test_a_seed_with_zeros_before_it_is_decimal(text, seed, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"seed: {text}\n")
    assert resolve.resolve(files.read_source(str(path))).seed == seed


def test_a_seed_in_base_60_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("seed: 1:30\n")
    with pytest.raises(ConfigError, match="seed"):
        resolve.resolve(files.read_source(str(path)))


@pytest.mark.parametrize(
    "value",
    ["010", "08", "0o17", "1e5", "1e-3", "no", "off", "1:30", "true", "null", "", "~", "<<", "é"],
)
def test_a_text_is_written_so_that_both_versions_read_a_text(value):
    text = yaml_text.write({"x": value})
    assert yaml_text.read(text) == {"x": value} == yaml.safe_load(text)


@pytest.mark.parametrize("value", [0, -3, 10**20, 0.1, 1e-7, 1e22, float("inf"), True, None])
def test_a_number_is_written_so_that_both_versions_read_it(value):
    text = yaml_text.write({"x": [value]})
    assert yaml_text.read(text) == {"x": [value]} == yaml.safe_load(text)


ALIASES = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abc", "bcd", strict=True)
)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (ALIASES, "anchors and aliases"),
        ("a: &a {<<: *a}\n", "anchors and aliases"),
        ("a: *b\n", "anchors and aliases"),
        ("a: " + "[" * 20_000 + "]" * 20_000, "too deep"),
        ("- " * 20_000 + "x", "too deep"),
        ("a: " + "{b: " * 20_000, "too deep"),
        ("seed: " + "9" * 5_000, "30 digits"),
        ("seed: 0x" + "f" * 5_000, "30 digits"),
        ('a: "\\ud800"\n', "surrogate"),
        ('"\\udfff": 1\n', "surrogate"),
        ("a: !!python/name:os.system\n", "tags"),
        ("a: !!binary eA==\n", "tags"),
        ("a: !!set {x}\n", "tags"),
        ("a: 1\na: 2\n", "set twice"),
        ("? [a]\n: 1\n", "cannot be used"),
    ],
)
def test_what_no_config_needs_is_refused(text, why):
    with pytest.raises(ConfigError, match=why) as error:
        files.load_yaml(text, source="run.yaml")
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("run.yaml")


def test_a_config_behind_a_link_is_read(tmp_path):
    (tmp_path / "there.yaml").write_text("seed: 3\n")
    (tmp_path / "here.yaml").symlink_to("there.yaml")
    assert files.load_source(str(tmp_path / "here.yaml")) == {"seed": 3}


def make(kind, path):
    """Put something that is no regular file, or too large a one, at a path."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_text(" " * (yaml_text.LARGEST + 1))


@pytest.mark.parametrize(
    ("kind", "why"),
    [("pipe", "no regular"), ("device", "no regular"), ("folder", ""), ("large", "larger than")],
)
def test_a_config_is_a_regular_file_of_a_size(kind, why, tmp_path):
    path = tmp_path / "run.yaml"
    make(kind, path)
    with pytest.raises(ConfigError, match=f"cannot read the YAML file .*{why}"):
        files.load_source(str(path))


@pytest.mark.parametrize("kind", ["pipe", "device", "large"])
def test_the_config_of_a_run_is_a_regular_file_of_a_size(kind, tmp_path):
    make(kind, tmp_path / layout.CONFIG)
    with pytest.raises(RunFolderError, match=r"no readable config\.yaml in it: it is"):
        layout.stored(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"data": [1]},
        {"data": {"dataset": {1: 2}}},
        {"parts": {"method": 3}},
        {"parts": {"method": {"name": [1]}}},
        {"client": None},
    ],
)
def test_a_stored_config_of_another_form_is_refused(changes):
    values = {"schema": layout.SCHEMA, **folders.CONFIG, "versions": {}, **changes}
    with pytest.raises(ConfigError) as error:
        files.read_stored(yaml.safe_dump(values), source="config.yaml")
    assert "\n" not in str(error.value)


def test_a_link_is_followed_only_where_it_may_be(tmp_path):
    (tmp_path / "a").write_text("x")
    (tmp_path / "b").symlink_to("a")
    assert reading.text(tmp_path / "b", may_link=True) == "x"
    with pytest.raises(OSError, match="it is a symbolic link"):
        reading.text(tmp_path / "b", may_link=False)


def foreign(folder, kind, tmp_path, monkeypatch):
    """Prepare a set one of whose features is of a class of a module that says if it is imported."""
    prepare(folder, "my_pets", {"train": pictures(3), "test": pictures(2)})
    (path,) = folder.rglob("features.json")
    found = json.loads(path.read_text())
    found["featuresDict"]["features"]["more"] = {kind: "imported_by_a_set.Feature"}
    path.write_text(json.dumps(found))
    (tmp_path / "imported_by_a_set.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize("kind", ["pythonClassName", "python_class_name", "type"])
def test_a_prepared_set_imports_no_code_but_that_of_tfds(kind, tmp_path, monkeypatch):
    foreign(tmp_path / "data", kind, tmp_path, monkeypatch)
    with pytest.raises(DataError, match=r"'imported_by_a_set.Feature'.*--trust-data"):
        tfds.read("my_pets", data_dir=tmp_path / "data")


def test_a_prepared_set_that_is_trusted_may_import(tmp_path, monkeypatch):
    foreign(tmp_path / "data", "pythonClassName", tmp_path, monkeypatch)
    with pytest.raises(DataError, match="cannot be read: imported"):
        tfds.build(
            tfds.TfdsSettings(tfds_name="my_pets", data_dir=str(tmp_path / "data"), trust_data=True)
        )
