"""The table of all methods: its sweep is whole, and its numbers are those of the runs."""

import functools
import pathlib

import pytest

from benchmarks import claims, picture
from benchmarks import methods as benchmark
from fedjaxprune import registry
from fedjaxprune.experiment.config.identity import flat
from fedjaxprune.experiment.config.sections import plain
from fedjaxprune.experiment.folder import layout
from fedjaxprune.experiment.sweeps import plan
from tests.folders import line
from tests.folders import write as write_folder

pytestmark = pytest.mark.xdist_group("benchmark_methods")  # whose sweeps are read once

METHODS = {
    name if not variant else f"{name}/{variant}"
    for name, listed in registry.names("method").items()
    for variant in ("", *listed.variants)
}
# Variants that are in no table of docs/lab/results.md.
UNMEASURED = {
    "dpf/straight_through",
    "fedfit/dense_start",
    "fedfit/joint",
    "fedfit/union",
    "fedmef/pruned_activations",
    "fedmef/without_extrusion",
    "fedrts/posterior_mean",
    "flpqsu/quantized",
    "force_masks/of_clients",
    "grasp/of_clients",
    "grasp/one_exchange",
    "prunefl/initial_only",
    "prunefl/random_start",
    "prunetrain/proximal",
    "snip/gradient_norm",
    "sr_ste/without_decay",
}


def write(member, lines, folder):
    """Write the folder of a member with its config."""
    settings = flat(plain(member.config))
    others = {"model.hidden_size": ...}  # of the folders' own config
    write_folder(folder / member.name, lines, others | settings, seed=settings.pop("seed"))


def method(member):
    return member.config.method.name


def partition(member):
    return member.config.data.partition.name


def sparsity(member):
    return getattr(member.config.method, "sparsity", None)


@pytest.fixture(scope="module", autouse=True)
def read_once():
    """Read each sweep once: it has hundreds of configs."""
    plainly = functools.cache(functools.partial(plan.read, folder=pathlib.Path("nowhere")))

    def read(source, *, folder):
        found = plainly(source)
        members = tuple(one._replace(folder=folder / one.name) for one in found.members)
        return found._replace(folder=folder, members=members)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "read", read)
        yield


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return plan.read(
        str(benchmark.SWEEPS[benchmark.DEFAULT]), folder=tmp_path_factory.mktemp("sweep")
    )


def test_every_measured_method_is_run_on_both_partitions_with_three_seeds(sweep):
    there = {(method(m), partition(m), m.config.seed) for m in sweep.members}
    names = set(map(method, sweep.members))
    assert there == {(name, p, s) for name in names for p in benchmark.TITLES for s in range(3)}
    for other in ("claims", "comparators"):
        members = plan.read(str(benchmark.SWEEPS[other]), folder=sweep.folder).members
        names |= set(map(method, members))
    assert METHODS - names == UNMEASURED


def test_all_methods_do_the_same_local_work_from_the_same_start(sweep):
    protocols = []
    for member in sweep.members:
        settings = flat(plain(member.config))
        shared = ("data.", "federation.", "client.", "server.", "uplink.", "execution.")
        own = ("data.partition.", "client.proximal_mu", "client.correction.")
        kept = {p: v for p, v in settings.items() if p.startswith(shared) and not p.startswith(own)}
        protocols.append(kept)
    assert all(one == protocols[0] for one in protocols)


def test_a_sparsity_is_each_of_the_four_where_weights_are_pruned(sweep):
    by_method = {}
    for member in sweep.members:
        if sparsity(member) and not hasattr(member.config.method, "remove"):
            by_method.setdefault(method(member), set()).add(sparsity(member))
    del by_method["feddip/without_pruning"]  # which prunes nothing
    for name, values in by_method.items():
        assert values == {0.8, 0.9, 0.95, 0.99}, name


@pytest.mark.slow
def test_every_other_network_has_fedavg_beside_it(sweep):
    dense = ("fedavg", "adaptive_dynamic_pruning/squeeze_excitation")  # which is FedAvg with gates
    references = {m.config.model.name for m in sweep.members if method(m) in dense}
    assert references == {m.config.model.name for m in sweep.members}


def test_all_of_a_seed_comes_before_the_next(sweep):
    order = sorted(sweep.members, key=benchmark.turn)
    for networks in ({"lenet5"}, {"resnet8", "gated_resnet8"}):
        seeds = [one.config.seed for one in order if one.config.model.name in networks]
        assert seeds == sorted(seeds)
    first = order[: next(n for n, one in enumerate(order) if one.config.seed)]
    assert set(map(method, first)) == set(map(method, sweep.members))


def test_every_row_has_its_members_alone_and_every_method_a_look_of_its_own(sweep):
    rows = benchmark.rows_of(sweep.members)
    for name, members in rows.items():
        assert len(members) == 6, name
        knobs = {benchmark.knob(flat(plain(m.config)), usual_rounds=40) for m in members}
        assert len({(method(m), m.config.model.name) for m in members}) == len(knobs) == 1
    looks = [picture.look(name) for name in METHODS - UNMEASURED]
    assert len(set(looks)) == len(looks)


@pytest.fixture
def played(tmp_path, sweep):
    """FedAvg with two seeds of one partition and one of the other; AutoFLIP with a stage before."""
    folder = tmp_path / "out"
    for member in sweep.members:
        seed, lines = member.config.seed, None
        if method(member) == "fedavg" and member.config.model.name == "lenet5" and seed < 2:
            if (partition(member), seed) == ("dirichlet", 1):
                continue
            final = 0.8 + 0.02 * seed if partition(member) == "iid" else 0.7
            early = [line(n, mib=2) for n in (1, 2)]
            lines = early + [line(n, mib=2, accuracy=final) for n in range(3, 13)]
        elif method(member) == "autoflip" and sparsity(member) == 0.9 and seed == 0:
            lines = [line(1, mib=6, stage="explore")]
            lines += [line(n, mib=1, accuracy=0.6) for n in range(2, 12)]
        if lines:
            write(member, lines, folder)
    return folder


def cells(text, row):
    return next([c.strip() for c in x.split("|")] for x in text.splitlines() if f"{row}`" in x)


def test_the_table_is_of_the_last_ten_rounds_and_counts_stages_before_training(played, capsys):
    benchmark.main(["--table", "--folder", str(played)])
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


@pytest.mark.slow
def test_what_has_not_finished_is_not_in_the_table(played, sweep, capsys):
    name = "autoflip-iid-lenet5-num-explorers-5-explore-epochs-3-sparsity-0.9-seed-0"
    (played / name / layout.SUMMARY).unlink()
    benchmark.main(["--table", "--folder", str(played)])
    found = cells(capsys.readouterr().out, "--only autoflip-lenet5-sparsity-0.9")
    assert found[5:7] == ["-", "60.00 (1 of 3)"]


@pytest.mark.slow
def test_a_row_plays_its_members_alone(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        benchmark, "run", lambda members, source, jobs: asked.append((members, jobs)) or {}
    )
    benchmark.main(
        ["--only", "feddip-lenet5-sparsity-0.8", "--jobs", "2", "--folder", str(tmp_path)]
    )
    [(members, jobs)] = asked
    assert jobs == 2
    assert len(members) == 6
    assert {(method(m), sparsity(m)) for m in members} == {("feddip", 0.8)}


def test_an_unknown_row_is_refused(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--only", "fedsparse"])
    assert "--only must be one of" in capsys.readouterr().err


def test_the_smaller_table_has_one_protocol_and_a_dense_reference(tmp_path, capsys):
    small = plan.read(str(benchmark.SWEEPS["cifar10"]), folder=tmp_path)
    assert {m.config.seed for m in small.members} == {0, 1, 2}
    assert {m.config.model.name for m in small.members} == {"cnn"}
    assert "fedavg" in set(map(method, small.members))
    write(small.members[0], [line(1, mib=1, accuracy=0.5)], tmp_path)
    benchmark.main(["--sweep", "cifar10", "--table", "--folder", str(tmp_path)])
    assert "`--sweep cifar10 --only fedavg" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(claims.CLAIMS))
def test_claims_are_about_rows_that_are_alike_but_for_the_method(name, tmp_path):
    members = plan.read(str(benchmark.SWEEPS[name]), folder=tmp_path).members
    rows = {row: found[0] for row, found in benchmark.rows_of(members).items()}
    assert claims.CLAIMS[name]
    for claim in claims.CLAIMS[name]:
        row, against = rows[claim.row].config, rows[claim.against].config
        assert row.federation.num_rounds == against.federation.num_rounds
        knob = benchmark.knob(flat(plain(row)), usual_rounds=row.federation.num_rounds)
        assert claim.knob in knob
        assert row.model.name.removeprefix("gated_") == against.model.name.removeprefix("gated_")
        both = [getattr(one.method, "sparsity", None) for one in (row, against)]
        if all(both) and "without_pruning" not in against.method.name:
            assert both[0] == both[1]
            assert getattr(row.method, "remove", "") == getattr(against.method, "remove", "")


def test_claims_pair_runs_by_seed_and_count_what_came_before_training(tmp_path, capsys):
    members = plan.read(str(benchmark.SWEEPS["claims"]), folder=tmp_path).members
    finals = {"autoflip": {0: 0.6, 1: 0.8}, "random_masks": {0: 0.5, 1: 0.6, 2: 0.1}}
    for member in members:
        final = finals.get(method(member), {}).get(member.config.seed)
        if final is None or sparsity(member) != 0.3:
            continue
        lines = [line(1, mib=6, stage="explore")] if method(member) == "autoflip" else []
        lines += [line(len(lines) + n, mib=1, accuracy=final) for n in range(1, 11)]
        write(member, lines, tmp_path)
    benchmark.main(["--sweep", "claims", "--table", "--folder", str(tmp_path)])
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
    for member in plan.read(str(benchmark.SWEEPS["claims"]), folder=tmp_path).members:
        config = member.config
        if config.seed or config.federation.num_rounds != 40:
            continue
        name = method(member).partition("adaptive_dynamic_pruning")[2]
        share = {"/squeeze_excitation": 4, "": 2}.get(name)
        if share and config.model.name == "gated_resnet8":
            flops = {"gated": share, "open": 4, "without_gates": 4}
            lines = [line(1, accuracy=0.5, changes={"compute.inference_flops": flops})]
            write(member, lines, tmp_path)
    benchmark.main(["--sweep", "claims", "--table", "--folder", str(tmp_path)])
    [found] = [x for x in capsys.readouterr().out.splitlines() if x.startswith("| dynamic")]
    assert found.split("|")[3].strip() == "+0.00 (1 of 3)"
    assert found.split("|")[-2].strip() == "50.0 / 100.0"
