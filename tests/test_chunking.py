"""A chunk size is chosen by measurements; these come from a table here, and once from a clock."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjaxprune.experiment.config import resolve
from fedjaxprune.experiment.config.resolve import Given
from fedjaxprune.experiment.execution import chunk_size, chunk_trial, compilation_cache, memory
from fedjaxprune.experiment.folder import layout
from fedjaxprune.experiment.run import build, composing, examples, launch
from fedjaxprune.experiment.run.listener import Listener
from fedjaxprune.kernels import side_by_side

LONG = chunk_size.Work(
    steps=np.full(40, 5), batch_size=10, cohort_size=16, devices=2, num_rounds=10**6
)
RISING = {1: 100.0, 2: 190.0, 4: 300.0, 8: 350.0}
SETTINGS = {
    "method": "fedavg",
    "federation.num_rounds": 2,
    "data.num_clients": 8,
    "federation.cohort_size": 8,
    "execution.devices": 2,
}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fedjaxprune" / "chunk_sizes.json"


class Table:
    """Measures by looking up, on a clock of its own: every trial takes `cost_s`."""

    def __init__(self, rates, cost_s=1.0):
        self.rates, self.cost_s = rates, cost_s
        self.asked, self.now = [], 0.0

    def __call__(self, size):
        self.asked.append(size)
        self.now += self.cost_s
        return self.rates[size]

    def choose(self, work=LONG, known=None, **options):
        return chunk_size.choose(work, self, known or {}, clock=lambda: self.now, **options)


def never(size):
    raise AssertionError(f"{size} was measured")


def auto(measure, *, work=LONG, key="k", warn=never):
    return chunk_size.auto(work, measure, key=key, estimate=lambda: chunk_size.UNKNOWN, warn=warn)


@pytest.mark.parametrize(
    ("rates", "size", "asked"),
    [
        (RISING, 8, [1, 2, 4, 8]),
        ({**RISING, 8: 301.0}, 4, [1, 2, 4, 8]),  # the smaller of two that are alike
        ({**RISING, 4: 150.0}, 2, [1, 2, 4]),  # no more once slower
        ({**RISING, 4: None}, 2, [1, 2, 4]),  # no more once too large
        ({1: 100.0, 2: 99.0, 4: 300.0, 8: 200.0}, 4, [1, 2, 4, 8]),  # alike is not slower
        ({1: None}, 1, [1]),
    ],
)
def test_the_fastest_that_fits_is_taken(rates, size, asked):
    table = Table(rates)
    choice = table.choose()
    assert (choice.size, table.asked) == (size, asked)
    assert choice.sentence.startswith(f"chunk size {size} (auto): ")
    assert choice.sentence.count("\n") == 0


def test_sizes_are_powers_of_two_and_all_clients_of_a_device():
    assert chunk_size.candidates(1) == [1]
    assert chunk_size.candidates(5) == [1, 2, 4, 5]
    assert chunk_size.candidates(8) == [1, 2, 4, 8]
    assert LONG._replace(cohort_size=9).largest == 5


def test_one_candidate_is_no_trial():
    choice = chunk_size.choose(LONG._replace(cohort_size=2), never, {})
    assert choice.size == 1
    assert "nothing to choose" in choice.sentence


def test_a_short_run_has_no_trial_and_a_longer_one_a_part():
    short = chunk_size.choose(LONG, never, {}, estimate=chunk_size.Estimate(19.0, 2.0))
    assert short.size == 1
    assert "no trial, as the run trains for about 19 s only" in short.sentence
    # 16 clients x 5 steps x 10 examples: 16 s in two rounds with chunks of 1, then 8.4 s.
    table = Table(RISING, cost_s=0.5)
    choice = table.choose(LONG._replace(num_rounds=2))
    assert (choice.size, table.asked) == (2, [1, 2])  # 1.5 s would be over a tenth of 8.4
    assert "more were not tried in a run that trains for 8.4 s" in choice.sentence


def test_a_trial_never_takes_more_than_its_share_after_its_first_size():
    for num_rounds in (1, 5, 30, 200):
        table = Table(RISING, cost_s=2.0)
        work = LONG._replace(num_rounds=num_rounds)
        choice = table.choose(work, estimate=chunk_size.Estimate(1e9, 2.0))
        spent = sum(figure.cost_s for figure in choice.figures.values())
        trained = work.num_examples / max(RISING[size] for size in table.asked)
        assert len(table.asked) == 1 or spent <= chunk_size.SHARE * 2 * trained


def test_known_figures_are_not_measured_and_count_by_what_they_cost():
    known = {size: chunk_size.Figure(rate, 1.0) for size, rate in RISING.items()}
    assert chunk_size.choose(LONG, never, known).size == 8
    dear = {1: chunk_size.Figure(100.0, 60.0)}
    assert chunk_size.choose(LONG._replace(num_rounds=2), never, dear).size == 1


def test_filling_counts_against_a_chunk():
    even = LONG._replace(cohort_size=8, devices=1)
    assert [chunk_size.used(even, size) for size in (1, 2, 8)] == [1.0, 1.0, 1.0]
    assert chunk_size.used(even, 3) == 8 / 9  # three chunks of three for eight clients
    # One client of a cohort of four has 9 steps, the others 1: chunks of 4 do 36 steps for 12.
    ragged = chunk_size.Work(np.array([1, 9, 1, 1]), 10, 4, 1, 1)
    assert chunk_size.used(ragged, 4) == 12 / 36
    assert chunk_size.used(ragged, 2) == 12 / 20
    assert chunk_size.used(ragged._replace(devices=2), 1) == 12 / 20  # 9 + 1 steps beside 2
    table = Table({1: 100.0, 2: 150.0})
    assert table.choose(ragged._replace(num_rounds=10**6)).size == 1


def test_what_was_measured_is_kept(cache):
    table = Table(RISING)
    first = auto(table)
    again = auto(never)
    assert again.size == first.size == 8
    assert "measured earlier" in again.sentence
    assert auto(Table({1: 9.0, 2: 1.0}), key="other").size == 1
    assert auto(never).size == 8
    assert set(json.loads(cache.read_text())) == {"k", "other"}
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]  # no drafts are left


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "\x00",
        '{"k": 3}',
        '{"k": {"0": {"examples_per_s": 1, "trial_s": 1}}}',
        '{"k": {"1": {"examples_per_s": NaN, "trial_s": 1}}}',
        '{"k": {"1": {"examples_per_s": "fast", "trial_s": 1}}}',
        '{"k": {"1": {"examples_per_s": 1}}}',
        pytest.param(
            f'{{"k": {{"1": {{"examples_per_s": 1{"0" * 400}, "trial_s": 1}}}}}}', id="overflow"
        ),
    ],
)
def test_a_damaged_file_is_ignored_with_a_sentence(cache, text):
    cache.parent.mkdir(parents=True)
    cache.write_text(text)
    said = []
    assert auto(Table(RISING), warn=said.append).size == 8
    assert len(said) == 1
    assert "is damaged and not used" in said[0]
    assert auto(never).size == 8  # it has been put right


def test_a_cache_that_cannot_be_written_is_no_error(cache):
    cache.parent.parent.mkdir()
    cache.parent.write_text("a file where the folder should be")
    said = []
    assert auto(Table(RISING), warn=said.append).size == 8
    assert auto(Table(RISING), warn=said.append).size == 8


def test_without_a_home_nothing_is_kept(monkeypatch):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setattr(chunk_size.pathlib.Path, "home", nowhere)
    with compilation_cache.kept():
        assert auto(Table(RISING)).size == 8
        assert auto(Table(RISING)).size == 8


def test_what_did_not_fit_is_tried_again(cache):
    assert auto(Table({**RISING, 4: None})).size == 2
    assert set(json.loads(cache.read_text())["k"]) == {"1", "2"}
    table = Table(RISING)
    assert (auto(table).size, table.asked) == (8, [4, 8])


def test_off_the_cpu_ways_of_convolving_are_tried_with_sizes(monkeypatch):
    tables: dict[side_by_side.Way, Table] = {
        "patches": Table({**RISING, 4: 150.0}),
        "grouped": Table({1: 100.0, 2: 50.0}),
        "sequential": Table({1: 100.0, 2: 101.0, 4: 102.0, 8: 103.0}),
    }
    choices: dict[side_by_side.Way, chunk_size.Choice] = {}
    choices.update((way, table.choose()) for way, table in tables.items())
    found = chunk_size.fastest(choices)
    assert (found.size, found.way) == (2, "patches")
    assert found.sentence.startswith("chunk size 2, convolutions patches (auto). patches: chunk")
    assert "grouped: chunk size 1 (auto): examples/s 100 with 1, 50 with 2" in found.sentence
    assert json.loads(chunk_size.to_text(found))["convolutions"] == "patches"
    short = chunk_size.choose(LONG, never, {}, estimate=chunk_size.Estimate(19.0, 2.0))
    assert chunk_size.fastest({"patches": short, "grouped": short}).way is None

    config = resolve.resolve({**SETTINGS, "model": "cnn"})
    found = examples.read(config)
    task = build.make_task(
        config, build.make_model(config, found.dataset, found.test), found, chunk=1
    )
    assert chunk_trial.ways_to_try(config, task, LONG) == ()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert chunk_trial.ways_to_try(config, task, LONG) == ("patches", "grouped", "sequential")
    alone = LONG._replace(cohort_size=1)
    assert chunk_trial.ways_to_try(config, task, alone) == ()
    given = resolve.replace(config, {"execution.convolutions": "grouped"})
    assert chunk_trial.ways_to_try(given, task, LONG) == ()


@pytest.mark.slow
def test_a_run_keeps_the_size_that_it_began_with(monkeypatch, tmp_path):
    table, trained, told = Table(RISING), [], []
    monkeypatch.setattr(chunk_trial, "measure", lambda *args, **options: table)
    monkeypatch.setattr(chunk_trial, "estimate", lambda *args, **options: chunk_size.UNKNOWN)
    monkeypatch.setattr(chunk_size, "SHARE", 1e9)
    monkeypatch.setattr(
        launch, "_train", lambda folder, parts, *_, **__: trained.append(parts.config)
    )
    folder = tmp_path / "run"
    listener = Listener(note=told.append)
    launch.start(resolve.resolve(SETTINGS), folder=folder, listener=listener)
    assert table.asked == [1, 2, 4]
    assert (
        "chunk size 4 (auto): examples/s 100 with 1, 190 with 2, 300 with 4, measured in"
        in (told[0])
    )
    assert layout.stored(folder).values["execution"]["chunk_size"] == 4
    on_record = json.loads((folder / chunk_size.FILE).read_text())
    assert on_record["chunk_size"] == 4
    assert on_record["figures"]["2"]["examples_per_s"] == 190.0

    monkeypatch.setattr(chunk_trial, "choose", pytest.fail)
    for given in ({}, {"execution.chunk_size": "auto"}):
        launch.resume(folder, Given(given))
    chosen = resolve.resolve({**SETTINGS, "execution.chunk_size": 3})
    launch.start(chosen, folder=tmp_path / "other")
    assert [config.execution.chunk_size for config in trained] == [4, 4, 4, 3]
    assert not (tmp_path / "other" / chunk_size.FILE).exists()


@pytest.fixture(scope="module")
def small():
    config = resolve.resolve({**SETTINGS, "client.steps": 2})
    parts = build.build(config)
    work = chunk_size.Work(np.full(8, 2), 16, 8, 2, 2)
    scale = lambda key, inputs: inputs.astype(jnp.float32) / 16  # noqa: E731
    batcher = composing.batches_of(batch_size=16, train=scale, test=scale, seed=0)()
    batcher = batcher._replace(num_steps=lambda data: jnp.int32(2))
    measure = chunk_trial.measure(
        parts.model, batcher, parts.population, work=work, mesh=parts.mesh
    )
    return config, parts, work, batcher, measure


def test_the_estimate_that_spares_short_runs_a_trial(small):
    _, parts, work, batcher, _ = small
    params, _ = jax.eval_shape(parts.model.init, jax.random.key(0))
    # Six operations for each weight of an MLP and example, but none for the inputs' gradient.
    weights = sum(leaf.size for leaf in jax.tree.leaves(params))
    found = chunk_trial.estimate(parts.model, batcher, parts.population, work=work)
    expected = work.num_examples * (6 * weights / 2e10 + 2e-4 / 16) / work.devices
    assert found.training_s == pytest.approx(expected, rel=0.3)
    assert 1 < found.trial_s < 10


@pytest.mark.slow
def test_a_trial_plays_local_training(small):
    *_, measure = small
    assert measure(2) > 0


def test_a_trial_is_of_clients_whose_examples_are_there(monkeypatch, small):
    _, parts, work, batcher, _ = small
    people = parts.population._replace(offsets=jnp.array([0, 0, 0, 0, 4, 4, 4, 9, 9]))  # fed
    tried = []
    monkeypatch.setattr(
        chunk_trial, "_time", lambda play, given, *rest: tried.append(given[3].tolist()) or 1.0
    )
    chunk_trial.measure(parts.model, batcher, people, work=work, mesh=parts.mesh)(1)
    assert tried == [[6, 3]]


def test_a_size_that_does_not_fit_is_told_from_one_that_fails(monkeypatch, small):
    *_, measure = small
    said = ["RESOURCE_EXHAUSTED: Out of memory", "INTERNAL: something else"]

    def fail(*args):
        raise jax.errors.JaxRuntimeError(said.pop(0))

    monkeypatch.setattr(chunk_trial, "_time", fail)
    assert measure(2) is None
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        measure(2)
    monkeypatch.undo()
    monkeypatch.setattr(memory, "free_bytes", lambda: 1000.0)
    assert measure(2) is None


@pytest.mark.parametrize(
    ("files", "room"),
    [
        ({}, np.inf),
        ({"memory.max": "max\n"}, np.inf),
        (
            {
                "memory.max": "1000\n",
                "memory.current": "700\n",
                "memory.stat": "anon 600\ninactive_file 50\n",
            },
            350.0,
        ),
        (
            {
                "memory/memory.limit_in_bytes": "1000\n",
                "memory/memory.usage_in_bytes": "900\n",
                "memory/memory.stat": "inactive_file 7\ntotal_inactive_file 30\n",
            },
            130.0,
        ),
        ({"memory.max": "1000\n"}, np.inf),
    ],
)
def test_a_container_has_less_room_than_its_machine(monkeypatch, tmp_path, files, room):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    free = memory.free_bytes()
    assert free is None or free <= room
    assert memory.room_in_container(tmp_path) == room


def test_figures_are_kept_apart_by_what_they_depend_on():
    work = chunk_size.Work(np.full(8, 2), 16, 8, 2, 2)

    def key(work=work, **changes):
        named = {name.replace("__", "."): value for name, value in changes.items()}
        given = resolve.merge(resolve.read(SETTINGS), resolve.read(named))
        config = resolve.resolve(given)
        found = examples.read(config)
        model = build.make_model(config, found.dataset, found.test)
        task = build.make_task(config, model, found, chunk=1)
        return chunk_trial.key(config, task, work)

    assert key() == key(client__optimizer__learning_rate=0.5, seed=3, client__optimizer="adam")
    different = [key(), key(model="cnn"), key(model__hidden_sizes=(9,)), key(data__augment=True)]
    different += [key(work._replace(devices=1)), key(work._replace(steps=np.full(8, 1)))]
    different += [key(work._replace(batch_size=3)), key(execution__compute_dtype="bfloat16")]
    assert len(set(different)) == len(different)
