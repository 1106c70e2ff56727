"""The table of all methods: its sweep is whole, and its numbers are those of the runs."""

import typing

import pytest

from benchmarks import claims, picture
from benchmarks import methods as benchmark
from fedjaxprune.experiment import methods
from fedjaxprune.experiment.folder import record
from fedjaxprune.experiment.sweeps import flat_plan as plan
from tests.folders import line, write

SHORT = {"rounds": 2, "num_clients": 4, "cohort_size": 2}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return plan.read(str(benchmark.SWEEPS[benchmark.DEFAULT]), out=tmp_path_factory.mktemp("sweep"))


def test_every_method_is_in_the_sweep_on_both_partitions_with_three_seeds(sweep):
    there = {(m.config.algorithm, m.config.partition, m.config.seed) for m in sweep.members}
    names = typing.get_args(methods.Name)
    assert there == {(n, p, s) for n in names for p in benchmark.TITLES for s in range(3)}


def test_all_methods_do_the_same_local_work_from_the_same_start(sweep):
    names = ("rounds", "num_clients", "cohort_size", "local_steps", "batch_size", "learning_rate")
    names += (
        "learning_rate_decay",
        "momentum",
        "weight_decay",
        "optimizer",
        "dataset",
        "normalize",
        "server_share",
    )
    assert len({tuple(getattr(m.config, name) for name in names) for m in sweep.members}) == 1


def test_a_sparsity_is_each_of_the_four_where_weights_are_pruned(sweep):
    by_method = {}
    for member in sweep.members:
        by_method.setdefault(member.config.algorithm, set()).add(member.config.sparsity)
    for name in set(methods.PRUNING) - set(methods.BY_FILTER):
        assert by_method[name] == {0.8, 0.9, 0.95, 0.99}, name


def test_every_other_network_has_fedavg_beside_it(sweep):
    dense = ("fedavg", "squeeze_excitation")  # the latter is FedAvg on a network with gates
    references = {m.config.model for m in sweep.members if m.config.algorithm in dense}
    assert references == {m.config.model for m in sweep.members}


def test_all_of_a_seed_comes_before_the_next(sweep):
    order = sorted(sweep.members, key=benchmark.turn)
    for networks in ({"lenet5"}, {"resnet8", "gated_resnet8"}):
        seeds = [one.config.seed for one in order if one.config.model in networks]
        assert seeds == sorted(seeds)
    first = order[: next(n for n, one in enumerate(order) if one.config.seed)]
    assert {one.config.algorithm for one in first} == set(typing.get_args(methods.Name))


def test_every_row_has_its_members_alone_and_every_method_a_look_of_its_own(sweep):
    rows = {}
    for member in sweep.members:
        rows.setdefault(benchmark.row_name(member), []).append(member.config)
    for name, configs in rows.items():
        assert len(configs) == 6, name
        knobs = {benchmark.knob(c.model_dump(), usual_rounds=40) for c in configs}
        assert len({(c.algorithm, c.model) for c in configs}) == len(knobs) == 1
    looks = [picture.look(name) for name in typing.get_args(methods.Name)]
    assert len(set(looks)) == len(looks)


@pytest.fixture
def played(tmp_path, sweep):
    """FedAvg with two seeds of one partition and one of the other; AutoFLIP with a stage before."""
    folder = tmp_path / "out"
    for member in sweep.members:
        config, lines = member.config, None
        if config.algorithm == "fedavg" and config.model == "lenet5" and config.seed < 2:
            if (config.partition, config.seed) == ("dirichlet", 1):
                continue
            final = 0.8 + 0.02 * config.seed if config.partition == "iid" else 0.7
            early = [line(n, mib=2) for n in (1, 2)]
            lines = early + [line(n, mib=2, accuracy=final) for n in range(3, 13)]
        elif config.algorithm == "autoflip" and config.sparsity == 0.9 and config.seed == 0:
            lines = [line(1, mib=6, stage="explore")]
            lines += [line(n, mib=1, accuracy=0.6) for n in range(2, 12)]
        if lines:
            write(folder / member.name, lines, **config.model_dump(exclude={"out"}))
    return folder


def cells(text, row):
    return next([c.strip() for c in x.split("|")] for x in text.splitlines() if f"{row}`" in x)


def test_the_table_is_of_the_last_ten_rounds_and_counts_stages_before_training(played, capsys):
    benchmark.main(["--table", "--out", str(played)])
    text = (played / benchmark.TABLE).read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    assert text.count("--only") == 2  # the rows that have runs
    fedavg = cells(text, "--only fedavg-lenet5")
    assert fedavg[5:10] == ["81.00 ± 1.41 (2 of 3)", "70.00 (1 of 3)", "12.00", "12.00", "0.00"]
    autoflip = cells(text, "--only autoflip-lenet5-sparsity-0.9")
    assert autoflip[3:10] == [
        "0.9",
        "50.0",
        "60.00 (1 of 3)",
        "60.00 (1 of 3)",
        "8.00",
        "8.00",
        "6.00",
    ]
    drawn = (played / benchmark.PICTURE).read_text()
    assert drawn.count("<svg") == 1


def test_what_has_not_finished_is_not_in_the_table(played, sweep, capsys):
    (played / "autoflip-partition-iid-lenet5-sparsity-0.9-seed-0" / record.SUMMARY).unlink()
    benchmark.main(["--table", "--out", str(played)])
    found = cells(capsys.readouterr().out, "--only autoflip-lenet5-sparsity-0.9")
    assert found[5:7] == ["-", "60.00 (1 of 3)"]


def test_a_row_plays_its_members_alone(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        benchmark, "play", lambda members, jobs: asked.append((members, jobs)) or {}
    )
    benchmark.main(["--only", "feddip-lenet5-sparsity-0.8", "--jobs", "2", "--out", str(tmp_path)])
    [(members, jobs)] = asked
    assert jobs == 2
    assert len(members) == 6
    assert {(m.config.algorithm, m.config.sparsity) for m in members} == {("feddip", 0.8)}


def test_an_unknown_row_is_refused(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--only", "fedsparse"])
    assert "--only must be one of" in capsys.readouterr().err


def test_the_smaller_table_has_one_protocol_and_a_dense_reference(tmp_path, capsys):
    small = plan.read(str(benchmark.SWEEPS["cifar10"]), out=tmp_path)
    assert {m.config.seed for m in small.members} == {0, 1, 2}
    assert {m.config.model for m in small.members} == {"cnn"}
    assert "fedavg" in {m.config.algorithm for m in small.members}
    name = small.members[0].name
    write(
        tmp_path / name,
        [line(1, mib=1, accuracy=0.5)],
        **small.members[0].config.model_dump(exclude={"out"}),
    )
    benchmark.main(["--sweep", "cifar10", "--table", "--out", str(tmp_path)])
    assert "`--sweep cifar10 --only fedavg" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(benchmark.SWEEPS))
def test_claims_are_about_rows_that_are_alike_but_for_the_method(name, tmp_path):
    members = plan.read(str(benchmark.SWEEPS[name]), out=tmp_path).members
    configs = {benchmark.row_name(member): member.config for member in members}
    assert claims.CLAIMS[name]
    for claim in claims.CLAIMS[name]:
        row, against = configs[claim.row], configs[claim.against]
        assert row.rounds == against.rounds
        assert not claim.knob or claim.row.endswith(f"-{claim.knob}")
        assert row.model.removeprefix("gated_") == against.model.removeprefix("gated_")
        if {row.algorithm, against.algorithm} <= set(methods.PRUNING):
            assert row.sparsity == against.sparsity
            assert row.drops == against.drops


def test_claims_pair_runs_by_seed_and_count_what_came_before_training(tmp_path, capsys):
    members = plan.read(str(benchmark.SWEEPS["claims"]), out=tmp_path).members
    finals = {"autoflip": {0: 0.6, 1: 0.8}, "random_masks": {0: 0.5, 1: 0.6, 2: 0.1}}
    for member in members:
        config = member.config
        final = finals.get(config.algorithm, {}).get(config.seed)
        if final is None or config.sparsity != 0.3:
            continue
        lines = [line(1, mib=6, stage="explore")] if config.algorithm == "autoflip" else []
        lines += [line(len(lines) + n, mib=1, accuracy=final) for n in range(1, 11)]
        write(tmp_path / member.name, lines, **config.model_dump(exclude={"out"}))
    benchmark.main(["--sweep", "claims", "--table", "--out", str(tmp_path)])
    text = capsys.readouterr().out
    [found] = [x for x in text.splitlines() if x.startswith("| AutoFLIP, random masks |")]
    assert [cell.strip() for cell in found.split("|")][3:-1] == [
        "+15.00 ± 7.07 (2 of 3)",  # ten and twenty points; the third seed has no partner
        "16.00 / 10.00",
        "6.00 / 0.00",
        "33 / 30",  # 11 and 10 rounds of 3e9
        "3 / 0",
        "",
    ]


def test_predictions_through_gates_are_told_as_a_share(tmp_path, capsys):
    for member in plan.read(str(benchmark.SWEEPS["claims"]), out=tmp_path).members:
        config = member.config
        if config.seed or config.rounds != 40 or config.model != "gated_resnet8":
            continue
        share = {"squeeze_excitation": 4, "adaptive_dynamic_pruning": 2}.get(config.algorithm)
        if share:
            flops = {"gated": share, "open": 4, "without_gates": 4}
            lines = [line(1, accuracy=0.5, inference_flops=flops)]
            write(tmp_path / member.name, lines, **config.model_dump(exclude={"out"}))
    benchmark.main(["--sweep", "claims", "--table", "--out", str(tmp_path)])
    [found] = [x for x in capsys.readouterr().out.splitlines() if x.startswith("| dynamic")]
    assert found.split("|")[3].strip() == "+0.00 (1 of 3)"
    assert found.split("|")[-2].strip() == "50.0 / 100.0"
