"""Runs side by side: by hand, from folders that no run has made."""

import csv
import io
import json
import math
import re
import statistics
from typing import Any, get_args

import pytest

from fedjaxprune.cli.main import main
from fedjaxprune.experiment import methods
from fedjaxprune.experiment.analysis import compare, tables
from fedjaxprune.experiment.config.flat import files, identity, validation
from fedjaxprune.experiment.config.flat.sections import RunConfig, UserError
from fedjaxprune.experiment.folder import failure, load, record
from tests.folders import MIB, line, rising, write


def groups_of(*folders):
    return compare.group(load.read_all(folders)[0])[0]


def call(capsys, *args):
    status = 0
    try:
        main([str(arg) for arg in args])
    except SystemExit as stop:
        status = int(stop.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


def test_seeds_are_merged_and_numbers_are_those_of_the_hand(tmp_path):
    first = write(tmp_path / "a", rising([0.2, 0.4, 0.6]), seed=0)
    second = write(tmp_path / "b", rising([0.3, 0.5, 0.8]), seed=1)
    small = write(tmp_path / "c", rising([0.1, 0.3, 0.5], mib=1), algorithm="feddip", sparsity=0.8)
    members = groups_of(second, small, first)
    assert [m.label for m in members] == ["fedavg", "feddip"]
    assert [run.name for run in members[0].runs] == ["a", "b"]  # by seed
    compared = compare.compare(members)
    # Three rounds of 1 MiB are the least; what all reach on average is 0.3.
    assert (compared.budget, compared.target) == (3.0, 0.3)
    one, two = compared.measures[0]
    assert one.accuracy == statistics.fmean([0.2, 0.4, 0.6])
    assert (one.accuracy_at, one.mib_to, one.rounds_to) == (0.2, 4.0, 2.0)
    assert (two.accuracy_at, two.mib_to, two.rounds_to) == (0.3, 2.0, 1.0)
    assert (one.up, one.down, one.values_up, one.masks) == (3.0, 3.0, 3.0, 3 / 4)
    assert one.values_down == pytest.approx(3.0 - 3 / 4)
    assert one.flops == 9e9
    assert compared.measures[1][0].accuracy_at == 0.5  # its last test is within the budget
    assert compare.deviation([m.accuracy for m in (one, two)]) == pytest.approx(
        statistics.stdev([0.4, 1.6 / 3])
    )


def test_what_is_not_reached_is_not_made_up(tmp_path):
    high = write(tmp_path / "a", rising([0.2, 0.9]), seed=0)
    low = write(tmp_path / "b", rising([0.2, 0.3]), seed=1)
    compared = compare.compare(groups_of(high, low), target=0.5, budget=0.5)
    one, other = compared.measures[0]
    assert math.isnan(one.accuracy_at)
    assert (one.rounds_to, math.isnan(other.rounds_to)) == (2.0, True)
    columns = [c for part in tables.columns(compared).values() for c in part]
    text = {c.title: tables.cell(c, compared.measures[0]) for c in columns}
    assert text["rounds to 50 %"] == "2 (1 of 2)"
    assert text["at 0.5 MiB, %"] == "-"
    assert text["accuracy, %"] == "40.00 ± 21.21"
    assert text["up, MiB"] == "2.00"  # all alike: no deviation


def test_the_mean_is_of_the_last_ten_tests(tmp_path):
    folder = write(tmp_path / "a", rising([0.0] * 5 + [0.5] * 10))
    assert compare.compare(groups_of(folder)).measures[0][0].accuracy == 0.5


def test_tests_of_the_stages_before_do_not_count(tmp_path):
    lines = [*rising([0.0] * 3), *rising([0.5] * 2)]
    lines = [
        line._replace(stage="explore" if n < 3 else "train", round=n + 1)
        for n, line in enumerate(lines)
    ]
    folder = write(tmp_path / "a", lines)
    assert compare.compare(groups_of(folder)).measures[0][0].accuracy == 0.5


def test_runs_that_are_not_finished_do_not_stand_for_those_that_are(tmp_path):
    done = write(tmp_path / "a", rising([0.5, 0.6]), seed=0)
    part = write(tmp_path / "b", rising([0.1]), seed=1, finished=False)
    compared = compare.compare(groups_of(done, part))
    assert len(compared.measures[0]) == 1
    assert compared.budget == 4.0
    assert compare.states(compared.groups[0]) == "seed 1 broken off after 1 round"


def test_settings_of_other_methods_tell_no_runs_apart():
    def config(**settings):
        return identity.configuration(RunConfig(**settings).model_dump())

    assert config(algorithm="fedavg", sparsity=0.9) == config(algorithm="fedavg", sparsity=0.8)
    assert config(algorithm="feddip", sparsity=0.9) != config(algorithm="feddip", sparsity=0.8)
    assert config(algorithm="fedavg", alpha=0.1) == config(algorithm="fedavg")
    dirichlet = {"algorithm": "fedavg", "partition": "dirichlet"}
    assert config(**dirichlet, alpha=0.1) != config(**dirichlet)
    assert config(seed=1, devices=1, eval_every=5) == config(seed=2)
    for name in ("mpfl", "pooled_filters", "averaged_filters"):
        exchange = {"algorithm": name, "pretrain_epochs": 1}
        assert config(**exchange) != config(**{**exchange, "pretrain_epochs": 2})
    watching = {"algorithm": "autoflip", "explore_watch": "validation"}
    assert config(**watching, development_share=0.2) != config(**watching)
    assert config(algorithm="autoflip", development_share=0.2) == config(algorithm="autoflip")
    gated = {"algorithm": "squeeze_excitation"}
    assert config(**gated, sparsity=0.9, gate_density=0.5, gates="personal") == config(**gated)
    gated = {"algorithm": "random_channels"}
    assert config(**gated, sparsity=0.9, consensus="top_k") == config(**gated)
    assert config(**gated, gate_density=0.5) != config(**gated)
    future = {"algorithm": "of tomorrow", "sparsity": 0.5, "out": "x"}
    assert identity.configuration(future) == {"algorithm": "of tomorrow", "sparsity": 0.5}


def test_every_setting_that_is_left_out_for_a_method_exists():
    names = {*identity.NEUTRAL, identity.SEED, *identity._OF_METHODS, *identity._OF_PARTS}
    assert names <= set(RunConfig.model_fields)
    # And none is forgotten: no method, and no setting that is a method's own.
    assert set(identity._LISTED) == set(validation.alternatives("algorithm"))
    own = {name for name, field in RunConfig.model_fields.items() if _group(field) == "Method"}
    assert own - {"algorithm"} <= {*identity._OF_METHODS, *identity._OF_PARTS}


def _group(field):
    return field.json_schema_extra["group"]


def test_settings_of_methods_matter_to_those_that_their_descriptions_name():
    named = {*identity._OF_METHODS, "algorithm"}
    for name, field in RunConfig.model_fields.items():
        extra: Any = field.json_schema_extra
        if extra["group"] != "Method":
            continue
        assert name in named, name
        whole = {"explore_watch": "validation", "partition": "iid"}
        for method in set(re.findall(r"\w+", str(field.description))) & set(get_args(methods.Name)):
            assert identity.matters(name, {**whole, "algorithm": method}), (name, method)
    assert not identity.matters("consensus", {"algorithm": "fedavg"})
    assert not identity.matters("development_share", {"algorithm": "autoflip"})
    gated = {"algorithm": "squeeze_excitation", "model": "gated_resnet8"}
    assert not identity.matters("gate_density", gated)
    assert identity.matters("gate_density", {**gated, "algorithm": "random_channels"})


def test_the_command_of_a_run_makes_its_config_again():
    config = RunConfig(
        algorithm="feddip", sparsity=0.8, partition="dirichlet", alpha=0.1, augment=True,
        local_steps=3, seed=4, rounds=7, dataset="a b",
    )  # fmt: skip
    words = files.command(config.model_dump())
    assert words == (
        "fedjaxprune run --sparsity 0.8 --dataset 'a b' --partition dirichlet --alpha 0.1 "
        "--augment --rounds 7 --local-steps 3 --seed 4"
    )
    assert files.command({"algorithm": "of tomorrow"}) == "fedjaxprune run config.yaml"


def test_records_of_older_versions_can_be_looked_at(tmp_path):
    folder = write(tmp_path / "a", rising([0.5, 0.6]))
    path = folder / record.METRICS
    new = ("uplink_parts", "downlink_parts", "client_bits", "modeled_bits", "modeled_flops",
           "mean_coverage", "mask_stability", "layer_sparsity", "client_accuracy")  # fmt: skip
    rows = [json.loads(row) for row in path.read_text().splitlines()]
    old = [{k: v for k, v in row.items() if k not in new} for row in rows]
    path.write_text("".join(json.dumps({**row, "of tomorrow": 1}) + "\n" for row in old))
    (measures,) = compare.compare(groups_of(folder)).measures[0:1]
    assert (measures[0].values_up, measures[0].masks) == (2.0, 0.5)
    assert measures[0].values_down == 1.5
    assert math.isnan(measures[0].flops)


def test_a_folder_of_run_folders_stands_for_them_and_each_counts_once(tmp_path):
    write(tmp_path / "sweep" / "x", rising([0.5]), seed=0)
    write(tmp_path / "sweep" / "y", rising([0.5]), seed=1)
    (tmp_path / "sweep" / "notes").mkdir()
    found, notes = load.read_all([tmp_path / "sweep", tmp_path / "sweep" / "x"])
    assert ([run.name for run in found], notes) == (["x", "y"], [])
    write(tmp_path / "other" / "x", rising([0.5]), seed=2)
    found, _ = load.read_all([tmp_path / "sweep", tmp_path / "other"])
    assert [run.name for run in found] == ["sweep/x", "sweep/y", "other/x"]


def test_the_same_run_twice_is_one(tmp_path):
    short = write(tmp_path / "a", rising([0.5]), finished=False)
    long = write(tmp_path / "b", rising([0.5, 0.6]))
    members, notes = compare.group(load.read_all([short, long])[0])
    assert [run.name for run in members[0].runs] == ["b"]
    assert len(notes) == 1
    assert str(short) in notes[0]
    assert str(long) in notes[0]


def test_the_state_of_a_run_is_told(tmp_path):
    done = write(tmp_path / "done", rising([0.5]))
    failed = write(tmp_path / "failed", rising([0.5, 0.6]), seed=1, finished=False)
    (failed / failure.FAILED).write_text('{"round": 3, "error": "OSError: full"}')
    broken = write(tmp_path / "broken", rising([0.5]), seed=2, finished=False)
    going = write(tmp_path / "going", rising([0.5]), seed=3, finished=False)
    with record.hold(going):
        found, _ = load.read_all([done, failed, broken, going])
    assert [run.state for run in found] == ["finished", "failed", "broken off", "running"]
    assert [load.standing(run) for run in found] == [
        "finished after 1 round",
        "failed in round 3: OSError: full",
        "broken off after 1 round",
        "still going after 1 round",
    ]
    assert not load.is_held(going)


def test_an_error_marks_the_run_and_the_next_start_takes_the_mark_away(tmp_path):
    folder = write(tmp_path / "a", rising([0.5, 0.6]), finished=False)

    def fail():
        with failure.marked(folder):
            raise ZeroDivisionError("by nothing\nand more")

    with pytest.raises(ZeroDivisionError):
        fail()
    assert failure.read(folder) == failure.Failure(3, "ZeroDivisionError: by nothing")
    with failure.marked(folder):
        assert failure.read(folder) is None
    assert failure.read(folder) is None
    (folder / failure.FAILED).write_text("{")
    assert failure.read(folder) is None


def test_bad_input_is_one_sentence(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = write(tmp_path / "good", rising([0.5]))
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    nothing = write(tmp_path / "nothing", [], seed=1)
    other = write(tmp_path / "other", rising([0.5]), dataset="mnist")
    hurt = write(tmp_path / "hurt", rising([0.5, 0.6]))
    (hurt / record.METRICS).write_text("{}\n" + json.dumps(line(2)._asdict()) + "\n")
    stray = write(tmp_path / "stray", rising([0.5]))
    (stray / record.CONFIG).write_text("rounds: 3\n")
    broken = write(tmp_path / "broken", rising([0.5]))
    (broken / record.CONFIG).write_text("rounds: [\n")
    crashed = write(tmp_path / "crashed", [])
    (crashed / failure.FAILED).write_text('{"round": 1, "error": "OSError: full"}')
    write(tmp_path / "deep" / "sweep" / "one", rising([0.5]))
    exported = write(tmp_path / "exported", [])
    (exported / load.EXPORTED).write_text("")
    cases = {
        "nowhere": (["nowhere"], ["'nowhere'", "no such folder"]),
        "file": (["file"], ["'file'", "it is a file"]),
        "no run": (["empty"], ["'empty'", "no config.yaml"]),
        "no round": ([nothing], ["nothing", "no rounds on record yet", "metrics.jsonl is empty"]),
        "failed at once": ([crashed], ["crashed", "failed in round 1", "OSError: full"]),
        "damaged": ([hurt], ["hurt", "damaged in line 1"]),
        "no config": ([stray], ["stray", "config.yaml names no algorithm or no data set"]),
        "no yaml": ([broken], ["broken", "not valid YAML"]),
        "two tasks": (
            [good, other],
            ["good", "other", "dataset is 'digits' in the one and 'mnist' in the other"],
        ),
        "no number": ([good, "--mib", "much"], ["mib", "much"]),
        "no accuracy": ([good, "--accuracy", "nan"], ["--accuracy", "finite number, got nan"]),
        "endless": ([good, "--mib", "inf"], ["--mib", "finite number, got inf"]),
        "too much": ([good, "--accuracy", "101"], ["accuracy", "101", "0<x<=100"]),
        "less than nothing": ([good, "--mib", "-1"], ["mib", "-1"]),
        "no name": ([""], ["empty name"]),
        "too long": (["x" * 300], ["no such folder"]),
        "no user": (["~nobody_here/x"], ["no such folder"]),
        "two levels": (["deep"], ["'deep' is no run", "there are runs in 'deep/sweep'"]),
        "export": ([exported], ["exported", "it is an exported network"]),
    }
    for name in ("compare", "report"):
        if name == "report":
            pytest.importorskip("plotly", reason="report needs plotly")
        for args, words in cases.values():
            before = sorted(tmp_path.rglob("*"))
            status, out, err = call(capsys, name, *args)
            assert (status, out) == (2, ""), err
            assert err.startswith("error: ")
            assert err.count("\n") == 1
            for word in words:
                assert word in err, err
            assert sorted(tmp_path.rglob("*")) == before


def test_a_torn_last_line_and_runs_without_rounds_are_told_of_and_left_out(capsys, tmp_path):
    good = write(tmp_path / "good", rising([0.5, 0.6]))
    with (good / record.METRICS).open("a") as file:
        file.write('{"stage": "tr')
    nothing = write(tmp_path / "nothing", [], seed=1)
    status, out, err = call(capsys, "compare", good, nothing, "--format", "csv")
    assert status == 0
    torn, empty = err.splitlines()
    assert torn.startswith("note: the last line of ")
    assert "is torn and left out" in torn
    assert "no rounds on record" in empty
    (row,) = csv.DictReader(io.StringIO(out))
    assert float(row["accuracy, %"]) == pytest.approx(55.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("client_bits", 5),
        ("client_bits", [{}]),
        ("modeled_flops", {"forward": "x"}),
        ("layer_sparsity", {"a": None}),
        ("uplink_parts", {"values": None}),
        ("mask_bits", "x"),
        ("mean_coverage", "x"),
        ("client_accuracy", 1),
    ],
)
def test_a_line_with_a_field_of_another_kind_is_damaged(tmp_path, name, value):
    folder = write(tmp_path / "a", rising([0.5, 0.6]))
    path = folder / record.METRICS
    first, second = map(json.loads, path.read_text().splitlines())
    path.write_text(json.dumps({**first, name: value}) + "\n" + json.dumps(second) + "\n")
    with pytest.raises(UserError, match="damaged in line 1"):
        load.read_all([folder])


def test_the_table_in_its_three_forms(capsys, tmp_path):
    write(tmp_path / "s" / "a", rising([0.2, 0.4]), seed=0)
    write(tmp_path / "s" / "b", rising([0.4, 0.6]), seed=1)
    write(tmp_path / "s" / "c", rising([0.1, 0.1], mib=1), algorithm="fedprox", proximal_mu=0.5)
    status, out, err = call(capsys, "compare", tmp_path / "s", "--accuracy", "40", "--mib", "2")
    assert (status, err) == (0, "")
    assert "40.00 ± 14.14" in out
    assert "MiB to 40 %" in out
    assert "at 2 MiB, %" in out
    _, out, _ = call(capsys, "compare", tmp_path / "s", "--format", "markdown")
    head, _, first, second = out.splitlines()
    assert head.startswith("| run | seeds | sparsity, % | accuracy, % |")
    assert first.startswith("| fedavg | 2 | 50.00 | 40.00 ± 14.14 |")
    assert first.endswith("| 30.00 50.00 |")
    assert second.startswith("| fedprox | 1 |")
    _, out, _ = call(capsys, "compare", tmp_path / "s", "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert rows[0]["accuracy, % (deviation)"].startswith("14.142")
    assert rows[1]["accuracy, % (deviation)"] == ""
    assert float(rows[0]["up, MiB"]) == 2 * MIB / MIB
    with pytest.raises(UserError, match="got no run"):
        load.read_all([])
