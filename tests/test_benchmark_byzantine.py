"""The table of aggregators under attack: it is whole, is resumed, and its verdict follows."""

import jax.numpy as jnp
import pytest

from benchmarks import byzantine
from fedjaxprune import registry


def test_every_attack_meets_every_robust_aggregator():
    names = {one["name"] for one in byzantine.ATTACKS.values()}
    assert names == set(registry.names("attack"))
    assert set(byzantine.AGGREGATORS) | {"unweighted_mean"} == set(registry.names("aggregator"))
    cases = byzantine.cases(quick=False)
    assert len(cases) == len(set(cases)) == 2 * 2 * 3 * 8 * 9
    assert set(byzantine.cases(quick=True)) < set(cases)


@pytest.mark.slow
def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    asked = []

    def program(*combination):
        asked.append(combination)
        return lambda key, population: jnp.float32(0.5), lambda case: None

    monkeypatch.setattr(byzantine, "program", program)
    cases = byzantine.cases(quick=True)
    byzantine.run(cases[:3], tmp_path)
    byzantine.run(cases, tmp_path)
    assert byzantine.read(tmp_path) == dict.fromkeys(cases, 0.5)
    done = list(dict.fromkeys(map(byzantine.combination, cases)))
    assert asked == [*done[:2], *done[1:]]  # the second combination was half done
    assert capsys.readouterr().out.count("50.0 %") == len(cases)


def test_the_verdict_names_who_holds_and_what_nobody_does():
    def case(rule, attack, seed=0):
        return byzantine.Case("dense", "IID", rule, attack, seed)

    results = {
        case("weighted_mean", "none"): 0.94,
        case("weighted_mean", "none", 1): 0.96,
        case("weighted_mean", "sign flip"): 0.50,
        case("median", "none"): 0.94,
        case("median", "sign flip"): 0.93,
        case("krum", "sign flip"): 0.91,
    }
    text = byzantine.table(results)
    assert "| aggregator | none | sign flip |" in text
    assert "| `weighted_mean` | 95.0 ± 1.4 | 50.0 |" in text
    assert "| `krum` | - | 91.0 |" in text
    assert "the mean without an attack (95.0 %): under every attack `median`." in text
    results[case("median", "sign flip")] = 0.5
    assert "under every attack none; nobody under sign flip." in byzantine.table(results)


def test_there_is_no_table_without_results(tmp_path):
    assert byzantine.read(tmp_path) == {}
    assert byzantine.table({}) == ""
    with pytest.raises(SystemExit):
        byzantine.main(["--slow"])
