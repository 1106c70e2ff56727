"""The nested configuration: what is resolved, what is refused and how, and what becomes text."""

import copy
import pathlib
import typing
from typing import Any

import pytest

from fedjaxprune import registry
from fedjaxprune.errors import ConfigError
from fedjaxprune.experiment.config import describe, errors, files, identity, json_schema, resolve
from fedjaxprune.experiment.config.sections import PLACES, RunConfig, plain
from fedjaxprune.method import Method
from fedjaxprune.registry import Part
from fedjaxprune.settings import Settings, describe_settings, setting
from tests import stub_parts


@pytest.fixture(autouse=True)
def stubs(monkeypatch):
    stub_parts.use(monkeypatch)


def refused(values) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve.resolve(values)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence[-1] in ".?"
    return sentence


class Mine(Settings):
    """Settings of a method of one's own."""

    rate: float = setting(0.5, "A rate.", unit="factor", ge=0)


def build(settings: Any, task: Any) -> Any:
    """Give back what it was given."""
    return settings, task


def test_defaults_make_a_run_whose_parts_are_there_with_their_settings():
    config = resolve.resolve({})
    assert config == resolve.resolve({"method": "feddip"})
    found = config.parts.method
    assert isinstance(config.method, found.part.settings)
    assert (config.method.name, config.method.sparsity) == ("feddip", 0.9)
    assert found.part.build(config.method, "task") == (config.method, "task")
    assert config.client.optimizer.learning_rate == 0.1
    assert (config.data.num_clients, config.federation.cohort_size) == (20, 10)
    assert config.uplink.error_feedback is False
    assert config.execution.devices == "auto"


def test_the_same_config_nested_dotted_and_as_values():
    nested = {
        "method": {"name": "feddip", "sparsity": 0.8},
        "client": {"optimizer": {"name": "adam", "learning_rate": 0.01}, "epochs": 1},
        "data": {"partition": "dirichlet"},
    }
    dotted = {
        "method.sparsity": "0.8",
        "client.optimizer": "adam",
        "client.optimizer.learning_rate": 0.01,
        "client.epochs": "1",
        "data.partition.name": "dirichlet",
    }
    mixed = {"client": {"optimizer.learning_rate": 0.01, "optimizer": "adam"}, "client.epochs": 1}
    one = resolve.resolve(nested)
    assert resolve.resolve(dotted) == one
    partition = {"data.partition": registry.find("partition", "dirichlet")}
    assert resolve.resolve({**mixed, "method.sparsity": 0.8, **partition}) == one


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"data.num_clients": 5}, (5, 5)),
        ({"data.partition": "by_key"}, (None, None)),
        ({"data.partition": "by_key", "data.num_clients": 30}, (30, 10)),
        ({"data.num_clients": 50, "federation.cohort_size": 40}, (50, 40)),
    ],
)
def test_clients_and_cohort_follow_what_is_known(values, expected):
    config = resolve.resolve(values)
    assert (config.data.num_clients, config.federation.cohort_size) == expected


def test_replacing_checks_the_whole_again():
    config = resolve.resolve({"data.partition": "by_key"})
    known = resolve.replace(config, {"data.num_clients": 7, "execution.chunk_size": 2})
    assert (known.data.num_clients, known.federation.cohort_size) == (7, 7)
    assert known.execution.chunk_size == 2
    assert known.parts is config.parts
    with pytest.raises(ConfigError, match=r"federation\.cohort_size must be at most"):
        resolve.replace(known, {"data.num_clients": 3})


def test_a_variant_comes_before_the_users_own_settings():
    config = resolve.resolve({"method": "feddip/corrected"})
    assert (config.method.name, config.method.sparsity) == ("feddip/corrected", 0.5)
    assert config.client.correction.name == "scaffold"
    own = {"method": {"name": "feddip/corrected", "sparsity": 0.7}, "client.correction": "none"}
    config = resolve.resolve(own)
    assert (config.method.sparsity, config.client.correction.name) == (0.7, "none")
    gated = resolve.resolve({"method": "feddip/gated", "model": "gated_resnet8"})
    assert gated.model.gate == "random"


def test_the_model_follows_the_method_and_data_are_found_by_name():
    assert resolve.resolve({"method": "fedavg"}).model.name == "gated_resnet8"
    data = resolve.resolve({"data.dataset": "cifar10"}).data.dataset
    assert (data.name, data.tfds_name) == ("cifar10", "cifar10")
    table = resolve.resolve({"data.dataset": "here/mine.csv"})
    assert (table.data.dataset.path, table.parts.dataset.part.settings.__name__) == (
        "here/mine.csv",
        "Table",
    )


def test_naming_another_part_drops_the_settings_of_the_one_before():
    first = resolve.read({"method": {"name": "feddip", "mode": "dense"}, "client.epochs": 3})
    first = resolve.merge(first, resolve.read({"client.optimizer.momentum": 0.9}))
    uplink = {"uplink": {"name": "top_k", "fraction": 0.5, "error_feedback": True}}
    first = resolve.merge(first, resolve.read(uplink))
    then = {"method": "fedtiny", "client.optimizer": "adam", "uplink": "quantize"}
    config = resolve.resolve(resolve.merge(first, resolve.read(then)))
    assert (config.method.name, config.client.optimizer.name) == ("fedtiny", "adam")
    assert (config.client.epochs, config.uplink.error_feedback) == (3, True)
    kept = resolve.resolve(resolve.merge(first, resolve.read({"method": "feddip/without_penalty"})))
    assert (kept.method.mode, kept.method.max_penalty) == ("dense", 0.0)


def test_values_are_parts():
    def plain_function(task, *, depth: int = 2):
        return task, depth

    made = resolve.resolve({"method": {"name": plain_function, "depth": 5}})
    assert made.method.name == "plain_function"
    assert made.parts.method.part.build(made.method, "task") == ("task", 5)
    method = Method(build=build, settings=Mine, default_model="lenet5")
    made = resolve.resolve({"method": {"name": method, "rate": 0.25}})
    assert (made.method.rate, made.model.name) == (0.25, "lenet5")
    network, arrays = object(), {"inputs": _Array(), "labels": _Array()}
    made = resolve.resolve({"model": network, "data": {"dataset": arrays}})
    assert made.parts.model.part.build(made.model, input_shape=(1,), num_classes=2) is network
    assert made.parts.dataset.part.build(made.data.dataset) is arrays
    with pytest.raises(ConfigError, match=r"method.rate must be a number at least 0, got -1"):
        resolve.resolve({"method": {"name": method, "rate": -1}})


class _Array:
    shape = (1,)


def test_a_file_is_a_part_and_the_folder_says_whose_code_ran(tmp_path):
    path = tmp_path / "mine.py"
    text = "def net(*, input_shape, num_classes, width: int = 8):\n    return width\n"
    path.write_text(text)
    config = resolve.resolve({"model": {"name": f"{path}:net", "width": 3}})
    assert config.parts.model.part.build(config.model, input_shape=(1,), num_classes=2) == 3
    stored = files.read_stored(files.to_yaml(config, versions={"jax": "1"}), source="config.yaml")
    assert stored.parts["model"]["path"] == str(path)
    assert list(stored.parts) == ["model"]
    assert files.code_changes(stored.parts, files.whose_code(config)) == ""
    path.write_text(text + "# changed\n")
    again = resolve.resolve(stored.values)
    change = files.code_changes(stored.parts, files.whose_code(again))
    assert change.startswith("the run was made with other code: model was a file with checksum ")
    assert files.code_changes(stored.parts, {}).endswith("and is built in now.")


# What is given, and what the sentence must say.
BAD = {
    "fraction": ({"method.sparsity": 1.0}, ["method.sparsity must be a number in [0, 1)", "1.0"]),
    "nan": ({"method.sparsity": float("nan")}, ["method.sparsity", "nan"]),
    "bool": ({"federation.num_rounds": True}, ["federation.num_rounds", "an integer", "True"]),
    "false": ({"method": {"sparsity": False}}, ["method.sparsity", "a number", "False"]),
    "zero": ({"federation": {"num_rounds": 0}}, ["federation.num_rounds", "at least 1", "got 0"]),
    "text": ({"client.epochs": "many"}, ["client.epochs", "an integer", "'many'"]),
    "half": ({"client.epochs": "2.5"}, ["client.epochs", "an integer", "'2.5'"]),
    "huge": ({"federation.num_rounds": 2**31}, ["[1, 2147483647]", "2147483648"]),
    "float": ({"client.optimizer.learning_rate": 1e39}, ["learning_rate", "1e+30", "1e+39"]),
    "infinite": ({"method.max_penalty": float("inf")}, ["method.max_penalty", "1e+30", "inf"]),
    "digits": ({"client.epochs": "9" * 4000}, ["client.epochs", "2147483647", "999..."]),
    "nothing": ({"client.epochs": None}, ["client.epochs", "got nothing"]),
    "flag": ({"data.augment": "perhaps"}, ["data.augment must be true or false", "perhaps"]),
    "word": ({"method.mode": "maskd"}, ["masked, regrow, dense", "did you mean 'masked'?"]),
    "auto": ({"execution.chunk_size": "many"}, ["auto or an integer at least 1", "many"]),
    "auto 0": ({"execution.devices": 0}, ["execution.devices must be auto or an integer"]),
    "dtype": ({"execution.compute_dtype": "float23"}, ["float32, bfloat16", "'float32'"]),
    "mapping": ({"client.epochs": {"a": 1}}, ["client.epochs must be an integer", "{'a': 1}"]),
    "list": ({"seed": [1]}, ["seed must be an integer", "[1]"]),
    "empty": ({"data.dataset": {"name": "tfds", "tfds_name": ""}}, ["tfds_name", "not empty"]),
    "needed": ({"data.dataset": "tfds"}, ["data.dataset.tfds_name must be set"]),
    "needed rate": (
        {"server": {"optimizer": "fedadam"}},
        ["server.optimizer.server_learning_rate must be set: a number greater than 0"],
    ),
    "section": ({"client": 5}, ["client must be settings as `name: value`, got 5"]),
    "section list": ({"data": ["digits"]}, ["data must be settings"]),
    "key": ({"client": {1: 2}}, ["client.1 must be a text"]),
    "twice": ({"client": {"epochs": 1}, "client.epochs": 2}, ["client.epochs is set twice"]),
    "twice named": ({"method": "feddip", "method.name": "fedavg"}, ["method.name is set twice"]),
    "schema": ({"schema": 1}, ["schema must be 2", "got 1"]),
    "no method": ({"method": None}, ["method must be a name", "got nothing"]),
    "number": ({"method": 5}, ["method must be a name", "`fedjaxprune list method`", "got 5"]),
    "method": ({"method": "fed-dip"}, ["method must be one of fedavg,", "did you mean 'feddip'?"]),
    "old method": ({"method": "scaffold"}, ["method: 'scaffold' is a correction, not a method"]),
    "old variant": ({"method": "feddip_without_penalty"}, ["'feddip/without_penalty'"]),
    "variant": ({"method": "feddip/with"}, ["must be one of without_penalty, corrected", "'with'"]),
    "model": ({"model": "lenet"}, ["model must be one of mlp,", "did you mean 'lenet5'?"]),
    "partition": ({"data.partition": "irichlet"}, ["data.partition must be one of", "'dirichlet'"]),
    "optimizer": ({"client.optimizer": "adamm"}, ["client.optimizer must be one of", "'adam'"]),
    "aggregator": ({"server": {"aggregator": "mean"}}, ["server.aggregator must be one of"]),
    "uplink": ({"uplink": "topk"}, ["uplink must be one of", "did you mean 'top_k'?"]),
    "other kind": ({"uplink": "adam"}, ["uplink: 'adam' is an optimizer, not an uplink"]),
    "file": ({"model": "nowhere.py:net"}, ["model: 'nowhere.py:net' cannot be read"]),
    "no name": ({"method": {"sparsty": 0.5}}, ["'method.sparsty'; did you mean method.sparsity?"]),
    "unknown": ({"learning_rat": 1}, ["did you mean client.optimizer.learning_rate?"]),
    "in a section": ({"client": {"learning_rate": 1}}, ["client.optimizer.learning_rate?"]),
    "elsewhere": ({"client.num_rounds": 5}, ["did you mean federation.num_rounds?"]),
    "two": ({"every": 5}, ["did you mean evaluation.every or checkpoints.every?"]),
    "of another": (
        {"method": {"name": "fedavg", "sparsity": 0.5}},
        ["'method.sparsity': it is a setting of feddip, fedtiny, not of fedavg."],
    ),
    "of another part": ({"alpha": 1}, ["it is a setting of dirichlet, not of iid"]),
    "of a network": ({"method": "feddip/gated"}, ["model.gate", "gated_resnet8, not of mlp"]),
    "momentum": (
        {"client.optimizer": {"name": "adam", "momentum": 0.9}},
        ["client.optimizer.momentum", "it is a setting of sgd, not of adam"],
    ),
    "lr": ({"lr": 1}, ["'lr'; did you mean client.optimizer.learning_rate?"]),
    "wd": ({"client": {"wd": 1}}, ["did you mean client.optimizer.weight_decay?"]),
    "rounds": ({"rounds": 1}, ["since schema 2 it is federation.num_rounds."]),
    "algorithm": ({"algorithm": "feddip"}, ["since schema 2 it is method."]),
    "epochs": ({"local_epochs": 1}, ["since schema 2 it is client.epochs."]),
    "threshold": ({"weight_threshold": 1}, ["since schema 2 it is method.threshold."]),
    "nonsense": ({"xyzzy": 1}, ["unknown setting 'xyzzy': `fedjaxprune run --help` lists"]),
    "nested nonsense": ({"foo": {"bar": 1}}, ["unknown setting 'foo'"]),
    "own check": (
        {"method": {"initial_sparsity": 0.5, "sparsity": 0.3}},
        ["method.initial_sparsity must be at most sparsity (0.3), got 0.5."],
    ),
    "cohort": (
        {"data.num_clients": 20, "federation.cohort_size": 30},
        ["federation.cohort_size must be at most data.num_clients (20), got 30."],
    ),
    "steps": (
        {"client": {"steps": 2**20, "batch_size": 2**20}},
        ["client.steps must be at most 2047 with client.batch_size 1048576"],
    ),
    "bits": (
        {"uplink": {"name": "quantize", "bits": 2, "error_feedback": True}},
        ["uplink.bits must be at least 3 with error_feedback", "got 2"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_whatever_is_wrong_is_one_sentence_with_the_full_path(name):
    values, words = BAD[name]
    before = copy.deepcopy(values)
    sentence = refused(values)
    for word in words:
        assert word in sentence, sentence
    assert values == before


def test_a_sentence_says_where_a_setting_came_from():
    sentence = refused(resolve.Given({"method.sparsity": 2}, {"method.sparsity": "--sparsity"}))
    assert sentence == "method.sparsity must be a number in [0, 1), got 2 (from --sparsity)."
    given = resolve.read({"client": {"lr": 1}}, source="mine.yaml")
    assert "'client.lr' (from mine.yaml); did you mean" in refused(given)
    given = resolve.read({"method": "fedipp"}, source="mine.yaml")
    assert "method (from mine.yaml) must be one of" in refused(given)


def test_every_old_name_leads_to_a_path_of_a_section():
    tops = set(RunConfig.model_fields)
    for old, new in errors.RENAMED.items():
        assert new.partition(".")[0] in tops
        if old not in tops:  # a section has the old name of `server`
            assert f"since schema 2 it is {new}." in refused({old: 1})


def test_shared_settings_are_described():
    for path, (owner, name) in resolve.paths(RunConfig).items():
        if path in PLACES:
            continue
        (row,) = [row for row in describe_settings(owner) if row.name == name]
        assert row.meaning, path
        assert row.default, path
        is_number = "integer" in row.type or "number" in row.type
        assert (bool(row.unit), bool(row.bounds)) == (is_number, is_number), path
    assert {place.kind for place in PLACES.values()} <= set(registry.KINDS)


def test_yaml_there_and_back():
    given = {
        "method": {"name": "feddip/corrected", "max_penalty": 0.0},
        "server.optimizer": {"name": "fedadam", "server_learning_rate": 0.01},
        "data.dataset": "cifar10",
        "client.steps": 3,
        "seed": 7,
    }
    config = resolve.resolve(given)
    text = files.to_yaml(config, versions={"jax": "1"})
    assert text.startswith("schema: 2\nmethod:\n  name: feddip/corrected\n")
    stored = files.read_stored(text, source="config.yaml")
    assert (stored.versions, stored.parts) == ({"jax": "1"}, {})
    assert stored.values == plain(config)
    assert resolve.resolve(stored.values) == config
    short = files.to_yaml(config)
    assert resolve.resolve(files.load_yaml(short, source="test")) == config
    assert files.fingerprint(resolve.resolve(stored.values)) == files.fingerprint(config)


def test_the_shortest_command_makes_the_same_config():
    given = {
        "method": {"name": "feddip/corrected", "mode": "dense"},
        "server.optimizer": {"name": "fedadam", "server_learning_rate": 0.01},
        "server.aggregator": {"name": "trimmed_mean", "fraction": 0.2},
        "uplink": {"name": "top_k", "fraction": 0.3, "error_feedback": True},
        "data": {"normalize": False, "num_clients": 8},
        "evaluation.every": 3,
        "execution.devices": 1,
    }
    assert files.command(resolve.resolve(given)) == (
        "fedjaxprune run --method feddip/corrected --server-optimizer fedadam "
        "--aggregator trimmed_mean --uplink top_k --mode dense --num-clients 8 --no-normalize "
        "--server-learning-rate 0.01 --server.aggregator.fraction 0.2 --uplink.fraction 0.3 "
        "--error-feedback --evaluation.every 3"
    )
    assert files.command(resolve.resolve({})) == "fedjaxprune run --method feddip"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("schema: 2\n", "", "schema must be 2 for this version of fedjaxprune, got none"),
        ("schema: 2\n", "schema: 3\n", "got 3 (from config.yaml)"),
        ("seed: 0\n", "", "not the whole config of a run: it lacks seed"),
        ("versions:\n  jax: '1'\n", "", "it lacks versions"),
        ("seed: 0\n", "seed: 0\nseed: 1\n", "'seed' is set twice"),
        ("schema: 2\n", "schema: [2\n", "not valid YAML"),
    ],
)
def test_a_broken_config_of_a_run_folder_is_refused(old, new, words):
    text = files.to_yaml(resolve.resolve({}), versions={"jax": "1"})
    assert old in text
    with pytest.raises(ConfigError) as caught:
        files.read_stored(text.replace(old, new), source="config.yaml")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_identity_leaves_out_what_does_not_change_the_numbers():
    base = plain(resolve.resolve({}))
    neutral = {
        "seed": 3,
        "evaluation.every": 7,
        "checkpoints.keep": 9,
        "execution.devices": 2,
        "execution.chunk_size": 4,
    }
    same = plain(resolve.resolve(neutral))
    assert identity.configuration(same) == identity.configuration(base)
    assert [path for path, _, _ in identity.differences(base, same)] == [
        "evaluation.every",
        "checkpoints.keep",
        "execution.devices",
        "execution.chunk_size",
        "seed",
    ]
    for changes in ({"execution.compute_dtype": "bfloat16"}, {"method.sparsity": 0.8}):
        other = plain(resolve.resolve(changes))
        assert identity.configuration(other) != identity.configuration(base)
    there = plain(resolve.resolve({"data.dataset": {"name": "cifar10", "data_dir": "there"}}))
    here = plain(resolve.resolve({"data.dataset": "cifar10"}))
    assert identity.configuration(there) == identity.configuration(here)


def test_differences_from_a_stored_run_name_both_sides():
    stored = resolve.resolve({"federation.num_rounds": 5, "execution.chunk_size": 1})
    given = {
        "federation.num_rounds": "6",
        "seed": 0,
        "execution.chunk_size": "auto",
        "execution.devices": 100,
    }
    stored = resolve.replace(stored, {"execution.devices": 10})
    assert files.differences(stored, resolve.read(given)) == [
        "federation.num_rounds is 5 in the run, 6 was given"
    ]
    assert files.differences(stored, resolve.read({"method": "fedavg"})) == [
        "method is 'feddip' in the run, 'fedavg' was given"
    ]
    assert files.differences(stored, resolve.read({"execution.convolutions": "patches"})) == [
        "execution.convolutions is 'auto' in the run, 'patches' was given"
    ]


def test_devices_that_share_models_are_compared_by_what_a_cohort_takes():
    given = {"federation.cohort_size": 3, "execution.model_devices": 2}
    stored = resolve.resolve({**given, "execution.devices": 6})
    for number, is_same in ((6, True), (8, True), (4, False)):
        again = resolve.read({"execution.devices": number})
        assert (files.differences(stored, again) == []) == is_same


def test_descriptions_say_all_that_a_part_declares():
    text = str(describe.describe("feddip"))
    for words in (
        "feddip: Stub of a method with settings",
        "Long et al., FedDIP, 2023, arXiv 2309.06805",
        "a network with BatchNorm",
        "sparsity  [number in [0, 1); fraction; default: 0.9]",
        "initial_sparsity  [number in [0, 1); fraction; default: 0.5, or the sparsity if less]",
        "feddip/corrected  client.correction = scaffold, sparsity = 0.5",
        "A second paragraph",
        "fedjaxprune run --method feddip",
    ):
        assert words in text
    assert describe.describe("feddip/corrected").command.endswith("--method feddip/corrected")
    assert describe.describe("fedavg").namesakes == ("server_optimizer/fedavg",)
    adam = describe.describe("server_optimizer/fedadam")
    assert adam.command == ("fedjaxprune run --server-optimizer fedadam --server-learning-rate ...")
    assert describe.describe("top_k").settings[0].bounds == "in (0, 1]"
    with pytest.raises(ConfigError, match=r"there is no part 'fedipp'.*did you mean 'feddip'"):
        describe.describe("fedipp")


def test_parts_of_ones_own_are_described_by_what_they_are(tmp_path):
    text = '''
def net(*, input_shape, num_classes, width: int = 8):
    """Make a net."""
'''
    (tmp_path / "mine.py").write_text(text)
    found = describe.describe(f"{tmp_path / 'mine.py'}:net")
    assert (found.kind, found.summary, found.settings[0].name) == ("model", "Make a net.", "width")
    assert describe.describe(Method(build=build, settings=Mine)).kind == "method"
    assert describe.describe(Part(build=lambda settings, rng, labels: 1)).kind == "partition"


def test_the_json_schema_has_every_section_and_part():
    made: typing.Any = json_schema.schema()
    sections = made["properties"]
    assert set(sections) == {"schema", *RunConfig.model_fields}
    method = sections["method"]["anyOf"]
    assert "feddip/corrected" in method[0]["examples"]
    (own,) = [one for one in method if "mode" in one.get("properties", {})]
    assert own["properties"]["mode"]["enum"] == ["masked", "regrow", "dense"]
    optimizer = sections["client"]["properties"]["optimizer"]["anyOf"]
    assert optimizer[0]["examples"] == ["sgd", "adam"]
    uplinks = sections["uplink"]["anyOf"]
    (share,) = [one for one in uplinks if "fraction" in one.get("properties", {})]
    assert "error_feedback" in share["properties"]


def test_paths_in_a_file_are_seen_from_the_file(tmp_path, monkeypatch):
    other = tmp_path / "other"
    for folder in (other, tmp_path / "here"):
        folder.mkdir()
    for name in ("mine.py", "table.csv", "base.yaml"):
        (other / name).write_text("def net(*, input_shape, num_classes):\n    return 1\n")
    text = "model: mine.py:net\ndata.dataset: {name: table, path: table.csv, test_path: no.csv}\n"
    (other / "config.yaml").write_text(text)
    (other / "sweep.yaml").write_text(
        "preset: base.yaml\nfolder: base.yaml\nseed: [0, 1]\ndata: {dataset: [table.csv, digits]}\n"
        "cases: [{model: [mine.py:net, mlp]}, {method: {name: mpfl, consensus: mine.py:net}}]\n"
    )

    def seen(name: str, folder: pathlib.Path) -> dict:
        monkeypatch.chdir(folder)
        return dict(files.read_source(name).values)

    data = {"data.dataset.name": "table", "data.dataset.test_path": "no.csv"}
    there = {"model.name": "mine.py:net", "data.dataset.path": "table.csv", **data}
    assert seen("config.yaml", other) == seen(str(other / "config.yaml"), other) == there
    below = {"model.name": "./other/mine.py:net", "data.dataset.path": "./other/table.csv", **data}
    assert seen("other/config.yaml", tmp_path) == below
    away = {"model.name": f"{other}/mine.py:net", "data.dataset.path": f"{other}/table.csv", **data}
    assert seen("../other/config.yaml", tmp_path / "here") == away
    # The config of a run folder says where its paths are seen from.
    (tmp_path / "here" / "config.yaml").write_text(f"{text}started_in: {other}\n")
    assert seen("config.yaml", tmp_path / "here") == away
    monkeypatch.chdir(tmp_path)
    assert files.load_source("other/sweep.yaml") == {
        "preset": "./other/base.yaml",
        "folder": "base.yaml",
        "seed": [0, 1],
        "data": {"dataset": ["./other/table.csv", "digits"]},
        "cases": [
            {"model": ["./other/mine.py:net", "mlp"]},
            {"method": {"name": "mpfl", "consensus": "./other/mine.py:net"}},
        ],
    }
    # A run that was started with one way to write a path may be continued with another.
    with registry.as_started_in(str(other)):
        stored = resolve.resolve({"model": "mine.py:net"})
        given = resolve.read({"model": str(other / "mine.py") + ":net"})
        assert files.differences(stored, given) == []
        assert files.differences(stored, resolve.read({"model": "mlp"}))
