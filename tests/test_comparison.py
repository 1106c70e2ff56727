"""Runs side by side: by hand, from folders that no run has made."""

import csv
import io
import json
import math
import statistics
import subprocess
import sys

import pytest

from fedjaxprune.cli.main import main
from fedjaxprune.errors import ConfigError, RunFolderError
from fedjaxprune.experiment.analysis import compare, groups, headline, tables
from fedjaxprune.experiment.folder import failure, layout, load, lock
from tests.folders import MIB, line, rising, write

FEDDIP = {"method": {"name": "feddip", "sparsity": 0.8}}
REGRESSION = {"test.accuracy": None, "clients.accuracy": ...}


def groups_of(*folders):
    return groups.group(load.read_all(folders)[0])[0]


def compared_of(*folders, **options):
    return compare.of_folders(folders, **options)[0]


def call(capsys, *args):
    status = 0
    try:
        main([str(arg) for arg in args])
    except SystemExit as stop:
        status = int(stop.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


def cells(compared, number=0):
    """Write the columns of a group by title."""
    return {c.title: tables.cell(c, compared.measures[number]) for c in tables.everything(compared)}


def said(compared):
    return headline.sentence(compared).replace("\N{MINUS SIGN}", "-")


@pytest.mark.parametrize("name", ["task", "label", "keys"])
def test_runs_that_learn_something_else_of_the_same_data_are_refused(tmp_path, name):
    folders = [
        write(tmp_path / value, rising([0.5]), {f"data.dataset.{name}": value})
        for value in ("one", "other")
    ]
    with pytest.raises(RunFolderError, match="cannot be compared") as caught:
        compare.of_folders(folders)
    assert f"data.dataset.{name} is 'one' in the one and 'other' in" in str(caught.value)


def test_seeds_are_merged_and_numbers_are_those_of_the_hand(tmp_path):
    first = write(tmp_path / "a", rising([0.2, 0.4, 0.6]), seed=0)
    second = write(tmp_path / "b", rising([0.3, 0.5, 0.8]), seed=1)
    small = write(tmp_path / "c", rising([0.1, 0.3, 0.5], mib=1), FEDDIP)
    compared = compared_of(second, small, first)
    assert [m.label for m in compared.groups] == ["fedavg", "feddip"]
    assert [run.name for run in compared.groups[0].runs] == ["a", "b"]  # by seed
    # Three rounds of 1 MiB are the least; every run ended at 0.5 or above.
    assert (compared.budget, compared.target) == (3.0, 0.5)
    assert compared.notes == (
        "3 MiB is the least that a run sent in all.",
        "every finished run reached 50 %.",
    )
    one, two = compared.measures[0]
    assert one.mean_last == pytest.approx(statistics.fmean([0.2, 0.4, 0.6]))
    assert (one.last, one.num_averaged, one.final) == (0.6, 3, 0.6)
    assert (one.at_budget, one.mib_to, one.rounds_to) == (0.2, 6.0, 3.0)
    assert (two.at_budget, two.mib_to, two.rounds_to) == (0.3, 4.0, 2.0)
    assert (one.up, one.down, one.values_up, one.masks) == (3.0, 3.0, 3.0, 3 / 4)
    assert one.values_down == pytest.approx(3.0 - 3 / 4)
    assert (one.dense, one.flops, one.dense_flops) == (12.0, 9e9, 36e9)
    assert compared.measures[1][0].at_budget == 0.5  # its last test is within the budget
    assert compare.deviation([one.last, two.last]) == pytest.approx(statistics.stdev([0.6, 0.8]))


def test_what_is_not_reached_is_not_made_up(tmp_path):
    high = write(tmp_path / "a", rising([0.2, 0.9]), seed=0)
    low = write(tmp_path / "b", rising([0.2, 0.3]), seed=1)
    compared = compared_of(high, low, to_accuracy=0.5, at_mib=0.5)
    one, other = compared.measures[0]
    assert math.isnan(one.at_budget)
    assert (one.rounds_to, math.isnan(other.rounds_to)) == (2.0, True)
    text = cells(compared)
    assert text["rounds to 50 %"] == "2 (1 of 2)"
    assert text["accuracy at 0.5 MiB, %"] == "-"
    assert text["accuracy of the last test, %"] == "60.00 ± 42.43"
    assert text["mean of the last 2 tests, %"] == "40.00 ± 21.21"
    assert text["up, MiB"] == "2.00"  # all alike: no deviation
    assert compared.notes == ("fedavg has no test within 0.5 MiB: it had sent 2 MiB at its first.",)


def test_the_default_budget_leaves_no_cell_empty(tmp_path):
    late = [line(1), line(2), line(3, accuracy=0.7)]
    compared = compared_of(
        write(tmp_path / "a", late), write(tmp_path / "b", rising([0.5, 0.6], mib=1), FEDDIP)
    )
    assert compared.budget == 6.0  # the small run sent 2 MiB in all; the other had no test by then
    assert compared.notes[0] == "6 MiB is what every run had sent at its first test."
    assert [own[0].at_budget for own in compared.measures] == [0.7, 0.6]
    assert not any("-" in cells(compared, number).values() for number in (0, 1))
    assert not any("has no" in note or "has not" in note for note in compared.notes)


def test_the_mean_is_of_the_last_ten_tests(tmp_path):
    short = write(tmp_path / "a", rising([0.0] * 5 + [0.5] * 9 + [0.6]))
    (measures,) = compared_of(short).measures[0]
    assert (measures.mean_last, measures.num_averaged) == (pytest.approx(0.51), 10)
    assert (measures.last, measures.final) == (0.6, 0.6)  # of a short run, the last test
    long = compared_of(write(tmp_path / "b", rising([0.0] * 10 + [0.5] * 10)))
    assert long.measures[0][0].final == 0.5
    both = compared_of(short, write(tmp_path / "c", rising([0.5]), FEDDIP))
    assert tables.num_averaged(both) == "1 to 10 tests"


def test_tests_of_the_stages_before_do_not_count(tmp_path):
    before = rising([0.0] * 3, stage="explore")
    lines = [*before, *(line(n, accuracy=0.5, stage_round=n - 3) for n in (4, 5))]
    (measures,) = compared_of(write(tmp_path / "a", lines)).measures[0]
    assert (measures.mean_last, measures.num_averaged) == (0.5, 2)


def test_runs_that_are_not_finished_do_not_stand_for_those_that_are(tmp_path):
    done = write(tmp_path / "a", rising([0.5, 0.6]), seed=0)
    part = write(tmp_path / "b", rising([0.1]), seed=1, finished=False)
    compared = compared_of(done, part)
    assert len(compared.measures[0]) == 1
    assert compared.budget == 4.0
    assert groups.states(compared.groups[0]) == "seed 1 interrupted after 1 round"


def test_a_regression_is_compared_by_its_error(tmp_path):
    lines = [
        [line(n, accuracy=0.5, mib=mib, changes={**REGRESSION, "test.error": error})
         for n, error in enumerate(errors, start=1)]
        for errors, mib in (([3.0, 1.18], 2), ([2.0, 1.5], 1))
    ]  # fmt: skip
    compared = compared_of(write(tmp_path / "a", lines[0]), write(tmp_path / "b", lines[1], FEDDIP))
    assert compared.score is compare.ERROR
    assert compared.target == pytest.approx(1.5)
    assert [own[0].rounds_to for own in compared.measures] == [2.0, 2.0]
    assert cells(compared)["error of the last test"] == "1.1800"
    assert said(compared) == ("feddip needs 50 % of fedavg's bytes, +0.3 error (one seed).")
    with pytest.raises(ConfigError, match="regression, which has no accuracy"):
        compared_of(tmp_path / "a", to_accuracy=0.5)


def test_labels_name_the_settings_that_differ_by_path(tmp_path):
    write(tmp_path / "s" / "a", rising([0.5]), {"client.optimizer.learning_rate": 0.1})
    write(tmp_path / "s" / "b", rising([0.5]), {"client.optimizer.learning_rate": 0.2})
    write(tmp_path / "s" / "c", rising([0.5]), {**FEDDIP, "evaluation.every": 5})
    write(tmp_path / "s" / "d", rising([0.5]), {**FEDDIP, "uplink": {"name": "top_k"}})
    assert [members.label for members in groups_of(tmp_path / "s")] == [
        "fedavg, client.optimizer.learning_rate 0.1, uplink identity",
        "fedavg, client.optimizer.learning_rate 0.2, uplink identity",
        "feddip, client.optimizer.learning_rate 0.1, uplink identity",
        "feddip, client.optimizer.learning_rate 0.1, uplink top_k",
    ]


def test_where_other_code_ran_it_is_another_configuration(tmp_path):
    method = {"method": {"name": "rigl"}}
    for number, version in enumerate(("0.1", "0.2")):
        parts = {"method": {"name": "rigl", "package": "lab", "version": version}}
        write(tmp_path / "s" / version, rising([0.5]), method, seed=number, parts=parts)
    labels = [members.label for members in groups_of(tmp_path / "s")]
    assert labels == ["rigl, code of method 0.1", "rigl, code of method 0.2"]


def test_different_networks_of_methods_are_pointed_out(tmp_path):
    write(tmp_path / "s" / "a", rising([0.5]))
    write(tmp_path / "s" / "b", rising([0.5]), {**FEDDIP, "model": {"name": "lenet5"}})
    compared, notes = compare.of_folders([tmp_path / "s"])
    assert notes == ["the methods ran different networks: fedavg with mlp, feddip with lenet5."]
    assert said(compared).endswith("(one seed, different networks).")


def test_data_sets_with_other_settings_are_pointed_out(tmp_path):
    for name in ("x", "y"):
        data = {"data.dataset": {"name": "table", "path": f"{name}.csv", "data_dir": name}}
        write(tmp_path / "s" / name, rising([0.5]), data)
    _, notes = compare.of_folders([tmp_path / "s"])
    assert notes == [
        "the runs differ in data.dataset.path: their accuracies can be compared only if the test "
        "set is the same."
    ]


def seeds_of(folder, finals, settings=None, mib=2):
    for seed, final in enumerate(finals):
        write(folder / str(seed), rising([final - 0.1, final], mib=mib), settings, seed=seed)
    return folder


def test_the_headline_says_what_the_seeds_can_show(tmp_path):
    base = seeds_of(tmp_path / "a", [0.90, 0.91, 0.92])
    clear = seeds_of(tmp_path / "b", [0.80, 0.81, 0.82], FEDDIP, mib=1)
    unclear = seeds_of(tmp_path / "c", [0.88, 0.91, 0.915], {"method": {"name": "fedtiny"}}, mib=1)
    # Half widths: 4.303 * sqrt(s1**2 / 3 + s2**2 / 3) points.
    assert said(compared_of(base, clear)) == (
        "feddip needs 50 % of fedavg's bytes, -10.0 ± 3.5 points."
    )
    assert said(compared_of(base, unclear)) == (
        "fedtiny needs 50 % of fedavg's bytes, no clear difference in accuracy (-0.8 ± 5.3 points)."
    )
    assert said(compared_of(base / "0", clear / "0")) == (
        "feddip needs 50 % of fedavg's bytes, -10.0 points (one seed)."
    )
    assert said(compared_of(clear / "0")) == (
        "feddip reaches 80.0 % accuracy at 50 % sparsity, with 25 % of dense bytes."
    )
    going = write(tmp_path / "d", rising([0.1]), finished=False)
    assert said(compared_of(going)) == "No run is finished."


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
    members, notes = groups.group(load.read_all([short, long])[0])
    assert [run.name for run in members[0].runs] == ["b"]
    assert len(notes) == 1
    assert str(short) in notes[0]
    assert str(long) in notes[0]


def test_the_state_of_a_run_is_shown(tmp_path):
    done = write(tmp_path / "done", rising([0.5]))
    failed = write(tmp_path / "failed", rising([0.5, 0.6]), seed=1, finished=False)
    (failed / failure.FAILED).write_text('{"round": 3, "error": "OSError: full"}')
    broken = write(tmp_path / "broken", rising([0.5]), seed=2, finished=False)
    going = write(tmp_path / "going", rising([0.5]), seed=3, finished=False)
    with lock.hold(going):
        found, _ = load.read_all([done, failed, broken, going])
    assert [run.state for run in found] == ["finished", "failed", "interrupted", "running"]
    assert [load.standing(run) for run in found] == [
        "finished after 1 round",
        "failed in round 3: OSError: full",
        "interrupted after 1 round",
        "running after 1 round",
    ]
    assert not lock.is_held(going)


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
    other = write(tmp_path / "other", rising([0.5]), {"data.dataset.name": "mnist"})
    hurt = write(tmp_path / "hurt", rising([0.5, 0.6]))
    header, _, second = (hurt / layout.METRICS).read_text().splitlines(keepends=True)
    (hurt / layout.METRICS).write_text(f"{header}{{}}\n{second}")
    old = write(tmp_path / "old", rising([0.5]))
    (old / layout.METRICS).write_text(second)
    stray = write(tmp_path / "stray", rising([0.5]))
    (stray / layout.CONFIG).write_text("rounds: 3\n")
    broken = write(tmp_path / "broken", rising([0.5]))
    (broken / layout.CONFIG).write_text("rounds: [\n")
    crashed = write(tmp_path / "crashed", [])
    (crashed / failure.FAILED).write_text('{"round": 1, "error": "OSError: full"}')
    write(tmp_path / "deep" / "sweep" / "one", rising([0.5]))
    exported = write(tmp_path / "exported", [])
    (exported / load.EXPORTED).write_text("")
    cases = {
        "nowhere": (["nowhere"], ["'nowhere'", "no such folder"]),
        "file": (["file"], ["'file'", "it is a file"]),
        "no run": (["empty"], ["'empty'", "no config.yaml"]),
        "no round": ([nothing], ["nothing", "no rounds on record yet", "metrics.jsonl"]),
        "failed at once": ([crashed], ["crashed", "failed in round 1", "OSError: full"]),
        "damaged": ([hurt], ["hurt", "damaged in line 2"]),
        "no header": ([old], ["old", "must begin with a header of schema 2"]),
        "no config": ([stray], ["stray", "schema must be 2", "got none"]),
        "no yaml": ([broken], ["broken", "not valid YAML"]),
        "two tasks": (
            [good, other],
            ["good", "other", "data.dataset is 'digits' in the one and 'mnist' in the other"],
        ),
        "no number": ([good, "--at-mib", "much"], ["at-mib", "much"]),
        "no accuracy": ([good, "--to-accuracy", "nan"], ["--to-accuracy", "finite", "got nan"]),
        "endless": ([good, "--at-mib", "inf"], ["--at-mib", "finite number, got inf"]),
        "too much": ([good, "--to-accuracy", "101"], ["to-accuracy", "101", "0<x<=100"]),
        "less than nothing": ([good, "--at-mib", "-1"], ["at-mib", "-1"]),
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


def test_a_torn_last_line_and_runs_without_rounds_are_noted_and_left_out(capsys, tmp_path):
    good = write(tmp_path / "good", rising([0.5, 0.6]))
    with (good / layout.METRICS).open("a") as file:
        file.write('{"stage": "tr')
    nothing = write(tmp_path / "nothing", [], seed=1)
    status, out, err = call(capsys, "compare", good, nothing, "--format", "csv")
    assert status == 0
    torn, empty = err.splitlines()
    assert torn.startswith("note: the last line of ")
    assert "is torn and left out" in torn
    assert "no rounds on record" in empty
    (row,) = csv.DictReader(io.StringIO(out))
    assert float(row["mean of the last 2 tests, %"]) == pytest.approx(55.0)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("traffic.by_client", 5),
        ("traffic.by_client", [{}]),
        ("traffic.by_client", [{"client_ids": "a", "up_bits": 1, "down_bits": 1}]),
        ("compute.training_flops", {"forward": "x"}),
        ("compute.training_flops", 3),
        ("mask.sparsity_by_layer", {"a": "x"}),
        ("traffic.up.values", None),
        ("traffic.down", "x"),
        ("mask.clients_per_weight", "x"),
        ("clients", 1),
        ("test", {"accuracy": []}),
    ],
)
def test_a_line_with_a_field_of_another_kind_is_damaged(tmp_path, path, value):
    lines = [line(1, accuracy=0.5, changes={path: value}), line(2, accuracy=0.6)]
    folder = write(tmp_path / "a", lines)
    with pytest.raises(RunFolderError, match="damaged in line 2"):
        load.read_all([folder])


def test_the_table_in_its_three_forms(capsys, tmp_path):
    write(tmp_path / "s" / "a", rising([0.2, 0.4]), seed=0)
    write(tmp_path / "s" / "b", rising([0.4, 0.6]), seed=1)
    write(tmp_path / "s" / "c", rising([0.1, 0.1], mib=1), {"method": {"name": "fedprox"}})
    given = ("compare", tmp_path / "s")
    status, out, err = call(capsys, *given, "--to-accuracy", "40", "--at-mib", "2")
    assert (status, err) == (0, "")
    assert "50.00 ± 14.14" in out
    for words in ("MiB\n", "to 40 %", "at 2 MiB", "summed over rounds and clients", "last test"):
        assert words.strip() in out
    assert "fedprox has not reached 40.00 %: its best test is 10.00 %." in out
    _, out, _ = call(capsys, *given, "--format", "markdown")
    head, _, first, second = out.splitlines()
    assert head.startswith(
        "| run | seeds | sparsity, % | accuracy of the last test, % | mean of the last 2 tests, % |"
    )
    assert first.startswith("| fedavg | 2 | 50.00 | 50.00 ± 14.14 | 40.00 ± 14.14 |")
    assert first.endswith("| 40 60 |")
    assert second.startswith("| fedprox | 1 |")
    _, out, _ = call(capsys, *given, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert rows[0]["mean of the last 2 tests, % (deviation)"].startswith("14.142")
    assert rows[1]["accuracy of the last test, % (deviation)"] == ""
    assert float(rows[0]["up, MiB"]) == 2 * MIB / MIB
    with pytest.raises(RunFolderError, match="got no run"):
        load.read_all([])


def test_tables_fit_a_terminal_of_80_columns(tmp_path):
    rich = pytest.importorskip("rich.console")
    for name, settings in {
        "a": {},
        "b": FEDDIP,
        "c": {"method": {"name": "feddip", "sparsity": 0.9}},
    }.items():
        for seed in range(2):
            finals = [0.3, 0.5 + seed / 100]
            write(tmp_path / "s" / f"{name}{seed}", rising(finals), settings, seed=seed)
    compared = compared_of(tmp_path / "s")
    console = rich.Console(width=80, record=True, file=io.StringIO())
    for table in tables.terminal(compared, width=80):
        console.print(table)
    text = console.export_text()
    assert "…" not in text
    assert "method.sparsity" in text


def test_looking_at_runs_imports_neither_jax_nor_their_parts(tmp_path):
    write(tmp_path / "a", rising([0.5]), {"method": {"name": "no_such_package:METHOD"}})
    code = (
        "import sys; from fedjaxprune.cli.main import main\n"
        f"main(['compare', {str(tmp_path / 'a')!r}])\n"
        "assert not {'jax', 'plotly', 'no_such_package'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "no_such_package:METHOD" in done.stdout


def test_a_line_that_json_does_not_hold_is_damaged(tmp_path):
    folder = write(tmp_path / "a", rising([0.5, 0.6]))
    rows = (folder / layout.METRICS).read_text().splitlines()
    (folder / layout.METRICS).write_text("\n".join([rows[0], json.dumps([1]), rows[2]]) + "\n")
    with pytest.raises(RunFolderError, match="should be round 1"):
        load.read_all([folder])
