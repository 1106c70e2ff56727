"""Aggregators under attack: accuracy on `digits` with a fifth of the clients hostile.

    python -m benchmarks.byzantine                  # all; continues where it stopped
    python -m benchmarks.byzantine --quick          # a corner of it: does it work?
    python -m benchmarks.byzantine --table          # from the results that are there

Every attack meets every aggregator, dense (`fedavg`) and at 0.9 sparsity (`gradual_magnitude`),
with IID and Dirichlet(0.5) clients and three seeds. All 20 clients take part in every round, and
four are hostile, always the same. The server holds a tenth of the examples, whether the aggregator
asks for them or not. Results are lines of ``results.jsonl`` in the folder, the table is
``byzantine.md`` beside it.

One compiled program serves all partitions and seeds of a combination: they differ in the clients'
examples, in the initial weights and in the draws, not in any shape.
"""

import argparse
import functools
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjaxprune.data import partitions
from fedjaxprune.experiment.config import resolve
from fedjaxprune.experiment.run import build, evaluation, examples
from fedjaxprune.rounds import simulation
from fedjaxprune.types import Population

NUM_ROUNDS, LAST = 60, 5  # rounds, and of how many the accuracy is a mean
POINTS = 3.0  # from the mean without an attack: what counts as holding
SEEDS = (0, 1, 2)
METHODS: Mapping[str, Mapping[str, Any]] = {  # what they change in the protocol
    "dense": {"method": {"name": "fedavg"}},
    "0.9 sparse": {
        "method": {
            "name": "gradual_magnitude",
            "sparsity": 0.9,
            "end_round": NUM_ROUNDS // 2,
            "allocation": "erk",
        },
        "client.optimizer": {"name": "sgd", "learning_rate": 0.3},
    },
}
PARTITIONS: Mapping[str, Callable[..., Any]] = {
    "IID": partitions.iid,
    "Dirichlet(0.5)": functools.partial(partitions.dirichlet, alpha=0.5, min_size=1),
}
AGGREGATORS: Mapping[str, Mapping[str, Any]] = {
    "weighted_mean": {},
    "norm_bounding": {},
    "median": {},
    "trimmed_mean": {"fraction": 0.2},
    "krum": {"tolerated": 0.2},
    "multi_krum": {"tolerated": 0.2},
    "geometric_median": {},
    "centered_clipping": {},
    "server_trust": {},
}
ATTACKS: Mapping[str, Mapping[str, Any]] = {
    "none": {"name": "none"},
    "sign flip": {"name": "sign_flip"},
    "scaling, -10": {"name": "scaling", "factor": -10.0},
    "label flip": {"name": "label_flip"},
    "a little, 1.5": {"name": "little_is_enough", "deviations": 1.5},
    "inner product, 0.5": {"name": "inner_product", "strength": 0.5},
    "inner product, 10": {"name": "inner_product", "strength": 10.0},
    "NaN": {"name": "nan"},
}
PROTOCOL: Mapping[str, Any] = {
    "data": {"dataset": "digits", "num_clients": 20},
    "federation": {"num_rounds": NUM_ROUNDS, "cohort_size": 20},
    "client": {"steps": 5, "batch_size": 16, "optimizer": {"name": "sgd", "learning_rate": 0.1}},
    "server": {"data_fraction": 0.1},
    "execution": {"devices": 1, "chunk_size": 20},
}


class Case(NamedTuple):
    """One run of the benchmark, by the names of its parts."""

    method: str
    partition: str
    aggregator: str
    attack: str
    seed: int


Results = dict[Case, float]  # accuracies, fractions


def cases(*, quick: bool) -> list[Case]:
    """List all runs, those that share a program next to each other."""
    rules: Iterable[str] = ("weighted_mean", "median", "multi_krum") if quick else AGGREGATORS
    names: Iterable[str] = ("none", "inner product, 10") if quick else ATTACKS
    seeds = SEEDS[:1] if quick else SEEDS
    methods = list(METHODS)[:1] if quick else METHODS
    order = itertools.product(methods, rules, names, PARTITIONS, seeds)
    return [Case(m, p, a, attack, seed) for m, a, attack, p, seed in order]


def program(
    method: str, aggregator: str, attack: str
) -> tuple[Callable[[jax.Array, Population], jax.Array], Callable[[Case], Population]]:
    """Compile a combination: ``(key, population) -> accuracy``, and give a case's population."""
    changes = {
        **METHODS[method],
        "server.aggregator": {"name": aggregator, **AGGREGATORS[aggregator]},
        "federation.attack": ATTACKS[attack],
    }
    given = resolve.merge(resolve.read(PROTOCOL), resolve.read(changes))
    parts = build.build(resolve.resolve(given))
    found = examples.read(parts.config)
    labels = np.asarray(found.dataset.train["labels"])
    rest = np.setdiff1d(np.arange(len(labels)), found.held)
    (advance,) = parts.advance
    test = evaluation.evaluate(parts.model, parts.preprocess, task=parts.task)

    @jax.jit
    def play(key: jax.Array, population: Population) -> jax.Array:
        init_key, run_key = jax.random.split(key)
        params, model_state = parts.model.init(init_key)
        start = simulation.start(parts.algorithm, params, model_state, num_clients=20)

        def one(now, _):
            now, _ = advance(run_key, now, population)
            deployed = parts.algorithm.deployed_params(now.state)
            return now, test(deployed, now.state.model_state, parts.test).num_correct

        _, hits = jax.lax.scan(one, start, length=NUM_ROUNDS)
        return hits[-LAST:].astype("float32").mean() / parts.test.labels.shape[0]

    def population_of(case: Case) -> Population:
        rng = np.random.default_rng(case.seed)
        deal = PARTITIONS[case.partition](rng, labels[rest], num_clients=20)
        return partitions.population(dict(found.dataset.train), [rest[rows] for rows in deal])

    return play, population_of


def combination(case: Case) -> tuple[str, str, str]:
    """Name what is compiled together."""
    return case.method, case.aggregator, case.attack


def run(wanted: Sequence[Case], folder: pathlib.Path) -> None:
    """Run the cases that have no result yet."""
    folder.mkdir(parents=True, exist_ok=True)
    there = read(folder)
    for key, group in itertools.groupby(wanted, combination):
        missing = [one for one in group if one not in there]
        if not missing:
            continue
        play, population_of = program(*key)
        for case in missing:
            accuracy = float(play(jax.random.key(case.seed), population_of(case)))
            with open(folder / "results.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps([*case, accuracy]) + "\n")
            print(f"{' · '.join(map(str, case))}: {100 * accuracy:.1f} %", flush=True)
        jax.clear_caches()


def read(folder: pathlib.Path) -> Results:
    """Read the results that are there."""
    file = folder / "results.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return {Case(*one[:-1]): one[-1] for one in map(json.loads, lines)}


def table(results: Results) -> str:
    """Write a table for each method and partition, and below it what holds."""
    text = ""
    for method, partition in itertools.product(METHODS, PARTITIONS):
        cells: dict[tuple[str, str], list[float]] = {}
        for case, accuracy in results.items():
            if (case.method, case.partition) == (method, partition):
                cells.setdefault((case.aggregator, case.attack), []).append(100 * accuracy)
        if cells:
            text += f"**{method}, {partition}**\n\n{_rows(cells)}\n{_verdict(cells)}\n\n"
    return text


def _rows(cells: Mapping[tuple[str, str], Sequence[float]]) -> str:
    attacks = [name for name in ATTACKS if any(attack == name for _, attack in cells)]
    lines = [["aggregator", *attacks], ["---"] * (1 + len(attacks))]
    for rule in AGGREGATORS:
        found = [cells.get((rule, attack), ()) for attack in attacks]
        if any(found):
            lines.append([f"`{rule}`", *map(_cell, found)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(values: Sequence[float]) -> str:
    """Write a mean ± deviation over seeds."""
    if not values:
        return "-"
    spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{spread}"


def _verdict(cells: Mapping[tuple[str, str], Sequence[float]]) -> str:
    """Say which aggregators stay near the mean without an attack, attack by attack."""
    base = cells.get(("weighted_mean", "none"))
    if not base:
        return ""
    least = np.mean(base) - POINTS
    holds = {
        attack: [
            rule for rule in AGGREGATORS if (c := cells.get((rule, attack))) and np.mean(c) >= least
        ]
        for attack in ATTACKS
        if attack != "none" and any(one == attack for _, one in cells)
    }
    always = [rule for rule in AGGREGATORS if all(rule in rules for rules in holds.values())]
    never = [attack for attack, rules in holds.items() if not rules]
    said = f"Within {POINTS:g} points of the mean without an attack ({np.mean(base):.1f} %): "
    said += f"under every attack {_names(always)}"
    return said + (f"; nobody under {', '.join(never)}." if never else ".")


def _names(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.byzantine", description="Aggregators under attack."
    )
    parser.add_argument("--quick", action="store_true", help="dense, three aggregators, one attack")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument(
        "--folder", type=pathlib.Path, default=pathlib.Path("runs", "byzantine"), metavar="FOLDER"
    )
    options = parser.parse_args(arguments)
    if not options.table:
        run(cases(quick=options.quick), options.folder)
    if results := read(options.folder):
        text = table(results)
        (options.folder / "byzantine.md").write_text(text, encoding="utf-8")
        print(text)


if __name__ == "__main__":
    main()
