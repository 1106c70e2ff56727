"""Sweeps: which runs a file stands for, what they are called, and what is refused."""

import itertools
import pathlib

import pytest
import yaml

from fedjaxprune.errors import ConfigError
from fedjaxprune.experiment.config import files
from fedjaxprune.experiment.sweeps import plan
from tests import stub_parts


@pytest.fixture(autouse=True)
def stubs(monkeypatch, tmp_path):
    stub_parts.use(monkeypatch)
    monkeypatch.chdir(tmp_path)


def read(values, folder: str | None = "out"):
    text = values if isinstance(values, str) else yaml.safe_dump(values, sort_keys=False)
    pathlib.Path("mine.yaml").write_text(text)
    return plan.read("mine.yaml", folder=pathlib.Path(folder) if folder else None)


def names(sweep):
    return [member.name for member in sweep.members]


def test_lists_are_multiplied_and_folders_are_named_by_what_varies():
    values = {
        "method": ["feddip", "feddip/without_penalty"],
        "client.optimizer.learning_rate": [0.1, 0.01],
        "seed": [0, 1],
    }
    sweep = read({**values, "federation": {"num_rounds": 9}})
    assert names(sweep) == [
        f"{method.replace('/', '-').replace('_', '-')}-learning-rate-{rate}-seed-{seed}"
        for method, rate, seed in itertools.product(*values.values())
    ]
    first = sweep.members[0]
    assert first.folder == pathlib.Path("out") / first.name
    assert (first.config.method.name, first.config.seed) == ("feddip", 0)
    assert first.config.federation.num_rounds == 9
    assert sweep.notes == ()


@pytest.mark.parametrize("is_nested", [True, False])
def test_cases_come_one_after_the_other_nested_or_by_path(is_nested):
    feddip = {"name": "feddip", "sparsity": [0.8, 0.9]}
    by_path = {"method": "feddip", "method.sparsity": [0.8, 0.9]}
    cases = [{"method": "fedtiny"}, {"method": feddip} if is_nested else by_path]
    sweep = read({"seed": [3, 4], "model": "mlp", "cases": cases})
    assert sorted(names(sweep)) == [
        *(f"feddip-sparsity-{sparsity}-seed-{seed}" for sparsity in (0.8, 0.9) for seed in (3, 4)),
        "fedtiny-seed-3",
        "fedtiny-seed-4",
    ]


def test_a_case_names_a_part_and_settings_of_all_remain():
    values = {
        "method": {"name": "feddip", "mode": "dense"},
        "client.epochs": 5,
        "model": "mlp",
        "cases": [{"seed": 1}, {"method": "fedavg"}, {"method": {"sparsity": 0.5}}],
    }
    configs = [member.config for member in read(values).members]
    assert [config.method.name for config in configs] == ["feddip", "fedavg", "feddip"]
    assert {config.client.epochs for config in configs} == {5}
    assert [getattr(config.method, "mode", None) for config in configs] == ["dense", None, "dense"]


def test_what_does_not_change_the_numbers_makes_no_run():
    sweep = read({"execution.devices": [1, 3, 2], "evaluation": {"every": [1, 2]}})
    assert names(sweep) == ["feddip-seed-0"]


def test_a_preset_comes_first_and_the_file_says_where():
    pathlib.Path("base.yaml").write_text("federation: {num_rounds: 7}\nmethod: {sparsity: 0.5}\n")
    sweep = read({"preset": "base.yaml", "seed": [1, 2], "folder": "somewhere"}, folder=None)
    assert sweep.folder == pathlib.Path("somewhere")
    assert {member.config.federation.num_rounds for member in sweep.members} == {7}
    assert {member.config.method.sparsity for member in sweep.members} == {0.5}
    assert read("seed: [1]", folder=None).folder == pathlib.Path("runs/mine")


def test_networks_that_differ_by_default_are_named():
    (note,) = read({"method": ["fedavg", "feddip", "fedtiny"]}).notes
    assert note == (
        "no model is given, so the networks differ: gated_resnet8 for fedavg; mlp for feddip, "
        "fedtiny; set `model` to compare on one."
    )
    assert read({"method": ["fedavg", "feddip"], "model": "mlp"}).notes == ()


BAD = {
    "unknown": ("seeds: [1]", ["unknown setting 'seeds' (from mine.yaml); did you mean seed?"]),
    "value": ("federation.num_rounds: [1, many]", ["federation.num_rounds", "'many'", "mine.yaml"]),
    "part": ("method: [feddip, fedipp]", ["method (from mine.yaml) must be one of", "'feddip'"]),
    "together": (
        "data.num_clients: 3\nfederation.cohort_size: [2, 4]",
        ["federation.cohort_size must be at most data.num_clients (3), got 4"],
    ),
    "settings in a list": (
        "method: [fedavg, {name: feddip, sparsity: 0.5}]",
        [
            "method has settings in its list, {'name': 'feddip'",
            "`- method: {...}` (from mine.yaml)",
        ],
    ),
    "nested settings in a list": (
        "client: {optimizer: [{name: sgd, momentum: 0.5}]}",
        ["client.optimizer has settings", "one of the cases, such as `- client.optimizer: {...}`"],
    ),
    "a list of a section": ("server: [{clip: 3}]", ["server has settings in its list, {'clip': 3"]),
    "empty list": ("seed: []", ["seed is a list without a value (from mine.yaml)"]),
    "no cases": ("cases: []", ["cases must be a list", "- {method: NAME}"]),
    "cases": ("cases: {method: fedavg}", ["cases must be a list"]),
    "case": ("cases: [fedavg]", ["cases must be a list"]),
    "preset": ("preset: quik", ["unknown preset 'quik'"]),
    "presets": ("preset: [quick]", ["preset must be a preset or a .yaml file"]),
    "folder": ("folder: [a]", ["folder must be a text"]),
    "syntax": ("seed: [1", ["mine.yaml is not valid YAML"]),
    "same name": (
        "data.dataset: tfds\ndata.dataset.tfds_name: [a/b, a b]",
        ["two members", "'feddip-tfds-name-a-b-seed-0'"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_sentence(name):
    text, words = BAD[name]
    with pytest.raises(ConfigError) as caught:
        read(text)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_folders_of_other_runs_are_refused():
    values = {"method": "feddip", "federation.num_rounds": 5, "seed": [0, 1]}
    sweep = read(values)
    member = sweep.members[1]
    member.folder.mkdir(parents=True)
    text = files.to_yaml(member.config, versions={})
    (member.folder / "config.yaml").write_text(text)
    read({**values, "execution.devices": 1})
    with pytest.raises(ConfigError, match=r"num_rounds is 5 there and 6 in mine.yaml; give the"):
        read({**values, "federation.num_rounds": 6})
    pathlib.Path("out/config.yaml").write_text(text)
    with pytest.raises(ConfigError, match="'out' is the folder of a single run"):
        read(values)
