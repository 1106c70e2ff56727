"""The config: the same in YAML and as options, with one sentence for whatever is wrong."""

import importlib.metadata
import typing

import pytest
from fedjaxprune.experiment.config.flat import files, validation
from fedjaxprune.experiment.config.flat.sections import RunConfig, UserError
from fedjaxprune.experiment.config.flat.validation import validate

from fedjaxprune.experiment import methods
from fedjaxprune.experiment.analysis import plots
from fedjaxprune.experiment.folder import record
from fedjaxprune.experiment.run import build
from fedjaxprune.experiment.tracking import progress
from fedjaxprune.methods import feddip
from fedjaxprune.pruning.structured import voting


def test_yaml_round_trip():
    given = RunConfig(algorithm="fedprox", alpha=0.25, local_steps=3, seed=7, data_dir="here")
    text = files.to_yaml(given, versions={"jax": "1"})
    assert validate(files.read_yaml(text, source="test")) == given


@pytest.mark.parametrize("name", sorted(files.preset_texts()))
def test_presets_are_valid_and_explain_themselves(name):
    text = files.preset_texts()[name]
    assert text.startswith("# ")
    validate(files.read_source(name))


def test_the_quick_preset_is_the_default():
    assert validate(files.read_source("quick")) == RunConfig()


def test_every_setting_has_a_description_and_a_default():
    for name, field in RunConfig.model_fields.items():
        assert field.description, name
        assert not field.is_required(), name


@pytest.mark.parametrize(
    ("setting", "table"),
    [
        ("algorithm", build.ALGORITHMS),
        ("model", build.MODELS),
        ("partition", build.PARTITIONS),
        ("uplink", build.UPLINKS),
        ("aggregator", build.AGGREGATORS),
        ("server", build.SERVERS),
        ("drift", build.DRIFTS),
        ("consensus", voting.PARTS),
    ],
)
def test_every_name_has_a_factory_and_every_factory_a_name(setting, table):
    assert validation.alternatives(setting) == list(table)


def test_the_config_knows_where_the_penalty_starts():
    assert methods.MIN_PENALTY == feddip.MIN_PENALTY


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"sparsity": 1.0}, ["sparsity", "[0, 1)", "1.0"]),
        ({"sparsity": float("nan")}, ["sparsity", "nan"]),
        ({"rounds": 0}, ["rounds", "at least 1", "0"]),
        ({"rounds": "many"}, ["rounds", "an integer", "many"]),
        ({"chunk_size": "many"}, ["chunk_size", "auto or an integer at least 1", "many"]),
        ({"chunk_size": 0}, ["chunk_size", "auto or an integer at least 1", "0"]),
        ({"chunk_size": True}, ["chunk_size", "auto or an integer", "True"]),
        ({"learning_rate": None}, ["learning_rate", "greater than 0", "got nothing"]),
        ({"augment": "perhaps"}, ["augment", "true or false", "perhaps"]),
        ({"algorithm": "fed-dip"}, ["algorithm", "fedavg", "fed-dip", "did you mean 'feddip'"]),
        ({"learning_rat": 1}, ["learning_rat", "did you mean 'learning_rate'"]),
        ({"cohort_size": 30, "num_clients": 20}, ["cohort_size", "30", "20"]),
        (
            {"uplink": "quantize", "uplink_bits_per_value": 2, "error_feedback": True},
            ["uplink_bits_per_value", "at least 3", "got 2"],
        ),
        ({"sparsity": 0.3, "initial_sparsity": 0.5}, ["initial_sparsity", "0.5", "0.3"]),
        ({"prune_every": 9, "rounds": 9}, ["prune_every", "rounds (9)", "got 9"]),
        ({"rounds": True}, ["rounds", "an integer", "True"]),
        ({"sparsity": False}, ["sparsity", "a number", "False"]),
        ({"rounds": 2**31}, ["rounds", "an integer in [1, 2147483647]", "2147483648"]),
        ({"learning_rate": 1e39}, ["learning_rate", "1e+30", "1e+39"]),
        ({"server_learning_rate": 1e300}, ["server_learning_rate", "1e+30"]),
        ({"local_steps": 2**20, "batch_size": 2**20}, ["local_steps", "2047", "1048576"]),
        ({"out": ""}, ["out", "not empty"]),
        ({"server": "fedadam"}, ["server_learning_rate", "fedadam"]),
        ({"max_penalty": 1e-4}, ["max_penalty", "0.0001", "0.0005"]),
        (
            {"algorithm": "adaptive_dynamic_pruning", "model": "resnet8"},
            ["model", "gated_resnet8", "needs gates", "'resnet8'"],
        ),
        (
            {"algorithm": "autoflip", "explore_watch": "validation", "development_share": 1},
            ["development_share", "less than 1", "'validation'", "got 1.0"],
        ),
        ({"gate_warm_up": 0.6}, ["gate_warm_up", "[0, 0.5]", "0.6"]),
        ({"gate_upload": "some"}, ["gate_upload", "salient, touched, dense", "some"]),
    ],
)
def test_a_wrong_value_is_one_sentence(values, words):
    with pytest.raises(UserError) as caught:
        validate(values)
    sentence = str(caught.value)
    assert "\n" not in sentence
    for word in words:
        assert word in sentence


def test_a_sparsity_that_nothing_uses_is_not_complained_about():
    validate({"algorithm": "fedavg", "sparsity": 0.0})


def test_differences_name_both_sides_and_leave_places_out():
    stored = RunConfig(rounds=5, seed=1, chunk_size=1)
    values = {"rounds": 6, "seed": 1, "out": "elsewhere", "data_dir": "there", "chunk_size": "auto"}
    assert files.differences(stored, values, validate(values)) == [
        "rounds is 5 in the run, 6 was given"
    ]


def test_versions_name_the_packages_that_decide_the_bits():
    versions = record.versions()
    assert versions["jax"] == importlib.metadata.version("jax")
    assert {"fedjaxprune", "python", "numpy", "flax", "optax"} <= set(versions)


def make_line(number: int, **changes: typing.Any) -> record.RoundRecord:
    line = record.RoundRecord(
        stage="train", round=number, train_loss=1.0, test_loss=1.0, test_accuracy=0.5,
        sparsity=0.5, num_kept=10, num_changed=0, uplink_bits=2**40, downlink_bits=2**41,
        mask_bits=3, statistics_bits=0, uplink_parts={}, downlink_parts={}, client_bits=[],
        modeled_bits={}, num_participating=2, num_rejected=1,
        modeled_flops={"forward": 2**60}, mean_coverage=0.5, mask_stability=0.75, wall_s=0.5,
    )  # fmt: skip
    return line._replace(**changes)


def test_a_summary_adds_exactly_and_averages_the_last_ten_tests():
    lines = [make_line(n + 1, test_accuracy=n / 100) for n in range(20)]
    lines[-1] = lines[-1]._replace(test_accuracy=None)
    summary = record.summarize(lines)
    assert summary["uplink_bits"] == 20 * 2**40
    assert summary["num_rejected"] == 20
    assert summary["modeled_flops"] == {"forward": 20 * 2**60}
    assert summary["mean_coverage"] == 10.0
    assert summary["mask_stability"] == 0.75
    assert summary["test_accuracy"] == 0.18
    assert summary["test_accuracy_mean_of_last_10"] == pytest.approx(0.135)


def test_the_table_tells_rounds_and_tests_of_the_last_stage_from_those_before_it():
    stages = ["prepare", "calibrate", "compare", "train", "train"]
    accuracies = [0.1, 0.1, 0.1, 0.6, 0.8]
    lines = [
        make_line(n, stage=stage, test_accuracy=accuracy)
        for n, (stage, accuracy) in enumerate(zip(stages, accuracies, strict=True), start=1)
    ]
    whole = [line._replace(modeled_flops=None) for line in lines]
    for summed, rounds, tests in (
        (whole, "2 of train, 5 in all", "mean of last 2 tests of train"),
        (whole[3:], "2", "mean of last 2 tests"),
    ):
        first, second = progress.table(record.summarize(summed), target=None).columns
        shown = dict(zip(first.cells, second.cells, strict=True))
        assert shown["rounds"] == rounds
        assert shown[f"test accuracy, {tests}"] == "70.00%"


def test_a_record_is_read_but_for_a_torn_end(tmp_path):
    for number in (1, 2, 3):
        record.append(tmp_path, make_line(number))
    path = tmp_path / record.METRICS
    assert [line.round for line in record.read(tmp_path)] == [1, 2, 3]
    for torn in (path.read_text()[:-1], path.read_text()[:-9], path.read_text()[:-9] + "\n"):
        path.write_text(torn)
        assert [line.round for line in record.read(tmp_path)] == [1, 2]
    assert record.read(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("old", "new"),
    [("{", "("), ('"round": 2', '"round": 3'), ('"num_kept": 10', '"num_kept": "x"'), ("\n", "")],
)
def test_a_record_that_is_damaged_before_its_end_is_refused(tmp_path, old, new):
    for number in (1, 2, 3):
        record.append(tmp_path, make_line(number))
    path = tmp_path / record.METRICS
    first, second, third = path.read_text().splitlines(keepends=True)
    path.write_text(first + second.replace(old, new) + third + first)
    with pytest.raises(UserError, match="damaged in line 2"):
        record.read(tmp_path)


def test_defaults_follow_what_they_depend_on():
    assert validate({"sparsity": 0.3}).initial_sparsity == 0.3
    assert validate({"num_clients": 5}).cohort_size == 5
    assert validate({"rounds": 3}).prune_every == 2
    assert validate({"rounds": 1}).prune_every == 1
    for name in methods.GATED:
        assert validate({"algorithm": name}).model in methods.GATED_NETWORKS
    assert validate({"algorithm": "feddp_threshold"}).model == "resnet8"
    usual = validate({})
    assert (usual.initial_sparsity, usual.cohort_size, usual.prune_every) == (0.5, 10, 5)


@pytest.mark.parametrize("tested", [True, False])
def test_the_picture_is_drawn_even_of_one_round_without_tests(tmp_path, tested):
    lines = [make_line(1, test_accuracy=0.5 if tested else None)]
    plots.accuracy(lines, tmp_path / "accuracy.png", title="a run")
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_is_held_by_one_process(tmp_path):
    record.create(tmp_path / "run", RunConfig())
    with (
        record.hold(tmp_path / "run"),
        pytest.raises(UserError, match="another process"),
        record.hold(tmp_path / "run"),
    ):
        pass
    with record.hold(tmp_path / "run"):  # and let go afterwards
        pass


def test_a_draft_that_a_killed_run_left_is_no_hindrance(tmp_path):
    (tmp_path / ".run.new").mkdir()
    (tmp_path / ".run.new" / "config.yaml").write_text("algo")
    record.create(tmp_path / "run", RunConfig())
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]
    assert record.stored(tmp_path / "run")[0] == RunConfig()
