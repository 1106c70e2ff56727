"""Rules of consensus against their definitions, in fractions, on votes of every kind."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjaxprune import registry, trees
from fedjaxprune.pruning.structured import filters, voting
from fedjaxprune.settings import Settings

RULES = {
    name: registry.find("consensus", name).part.build(Settings())
    for name in registry.names("consensus")
}
SIZE, STEPS = 12, [Fraction(j, 10) for j in range(10)]
QUOTAS = filters.quotas(STEPS, SIZE)
DECIDE = {
    name: jax.jit(lambda ballot, quota, rule=rule: voting.decide(rule, ballot, quota))
    for name, rule in RULES.items()
}


def half_even(number):
    return round(number)  # of a fraction: half to even


def thresholds(num_voters):
    return [Fraction(t, num_voters) for t in range(1, num_voters + 1)]


def by_definition(name, scores, num_voters, wanted, worth, live):
    """Decide in Python: `scores` are fractions in [0, 1]."""

    def at(threshold):
        return [score >= threshold for score in scores]

    def reaches(kept):
        return Fraction(kept.count(False), len(kept)) >= wanted

    kept = []
    if name == "ascending":
        masks = [at(threshold) for threshold in thresholds(num_voters)]
        kept = next((mask for mask in masks if reaches(mask)), masks[-1])
    elif name == "code_dynamic":  # the public code's loop, word for word
        for i in range(num_voters):
            kept = at(Fraction(num_voters - i, num_voters))
            if reaches(kept):
                break
    elif name == "top_k":
        count = max(len(scores) - half_even(wanted * len(scores)), 1)
        key = [(not live[f], -scores[f], -worth[f], f) for f in range(len(scores))]
        best = sorted(range(len(scores)), key=key.__getitem__)[:count]
        kept = [f in best for f in range(len(scores))]
    elif name == "histogram":  # the percentile of numpy's linear interpolation, exactly
        ordered, place = sorted(scores), wanted * (len(scores) - 1)
        low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
        kept = at(low + (place - math.floor(place)) * (high - low))
    else:
        rule = {"majority": lambda s: s > Fraction(1, 2), "unanimous": lambda s: s == 1}
        kept = [rule.get(name, lambda s: s > 0)(score) for score in scores]
    kept = [a and b for a, b in zip(kept, live, strict=True)]
    if not any(kept):
        alive = [f for f in range(len(scores)) if live[f]]
        best = min(alive, key=lambda f: (-scores[f], -worth[f], f))
        kept = [f == best for f in range(len(scores))]
    return kept


def draw(rng, *, weighted):
    """Draw nodes' masks within what is live: the votes, their weight, and what ties break by."""
    num_voters = int(rng.integers(1, 7))
    live = rng.random(SIZE) < rng.choice([0.4, 1.0])
    live[rng.integers(SIZE)] = True
    weights = rng.integers(1, 9, num_voters) if weighted else np.ones(num_voters, int)
    masks = (rng.random((num_voters, SIZE)) < rng.choice([0.1, 0.5, 0.9])) & live
    worth = rng.integers(0, 4, SIZE).astype(np.float32)
    return weights @ masks, weights.sum(), num_voters, live, worth


def test_the_rules_are_those_of_the_specification():
    by_threshold = {"ascending", "code_dynamic", "majority", "unanimous", "anybody", "histogram"}
    assert set(RULES) == by_threshold | {"top_k"}


@pytest.mark.usual(
    "anybody-True",
    "ascending-False",
    "code_dynamic-True",
    "histogram-False",
    "majority-True",
    "top_k-True",
    "unanimous-False",
)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", sorted(RULES))
def test_a_rule_is_its_definition(name, weighted):
    rng = np.random.default_rng(sum(map(ord, name)))
    number = jnp.float32 if weighted else jnp.int32
    for _ in range(60):
        votes, weight, num_voters, live, worth = draw(rng, weighted=weighted)
        step = int(rng.integers(len(STEPS)))
        ballot = voting.Ballot(
            votes=jnp.asarray(votes, number),
            weight=jnp.asarray(weight, number),
            num_voters=jnp.int32(num_voters),
            live=jnp.asarray(live),
            worth=jnp.asarray(worth),
        )
        kept = DECIDE[name](ballot, trees.take_rows(QUOTAS, step))
        scores = [Fraction(int(v), int(weight)) for v in votes]
        wanted = by_definition(name, scores, num_voters, STEPS[step], worth.tolist(), live.tolist())
        assert kept.tolist() == wanted
        assert kept.any()
        assert not np.any(np.asarray(kept) & ~live)
        if name == "top_k":
            assert int(kept.sum()) == min(live.sum(), SIZE - half_even(STEPS[step] * SIZE))
        if name == "code_dynamic" and int(kept.sum()) > 1:
            assert kept.tolist() in [
                [s == 1 for s in scores],
                [s >= Fraction(1, num_voters) for s in scores],
            ]


@pytest.mark.parametrize("name", sorted(set(RULES) - {"top_k", "histogram"}))
def test_votes_for_one_mask_give_that_mask(name):
    mask = np.arange(SIZE) % 3 != 0
    for num_voters in (1, 10):
        ballot = voting.Ballot(
            votes=jnp.asarray(num_voters * mask, jnp.int32),
            weight=jnp.int32(num_voters),
            num_voters=jnp.int32(num_voters),
            live=jnp.ones(SIZE, jnp.bool_),
            worth=jnp.zeros(SIZE),
        )
        for step in range(len(STEPS)):
            kept = DECIDE[name](ballot, trees.take_rows(QUOTAS, step))
            np.testing.assert_array_equal(kept, mask)


def test_quotas_are_exact_where_floats_are_not():
    steps = [Fraction("0.9") * j / 9 for j in range(10)]
    quota = filters.quotas(steps, 10)
    assert quota.least.tolist() == quota.nearest.tolist() == list(range(10))
    assert math.ceil(0.1 * 3 * 10) == 4  # in floats
    assert filters.quotas([Fraction("0.99")], 4).nearest.tolist() == [3]  # one stays
    assert filters.quotas([Fraction(1, 4)], 6).rank.tolist() == [2]  # 1.25 rounded up
    assert filters.quotas([Fraction(1, 4)], 10).nearest.tolist() == [2]  # 2.5 to even


def test_the_public_codes_kept_filters():
    table = filters.remaining(Fraction("0.1"), 64)
    kept = [64]
    for _ in range(9):
        kept.append(int(table[kept[-1]]))
    assert kept == [64, 58, 52, 47, 42, 38, 34, 31, 28, 25]
    assert filters.remaining(Fraction("0.9"), 3).tolist() == [0, 1, 1, 1]  # never all


VGG11 = ((64, 3), (128, 64), (256, 128), (256, 256), (512, 256), *[(512, 512)] * 3)
SPARSITIES = [9.98, 18.97, 27.17, 34.41, 41.05, 46.91, 52.21, 56.89, 61.19]


@pytest.mark.parametrize("name", ["ascending", "code_dynamic"])
def test_ten_nodes_that_agree_prune_vgg11_as_the_public_code(name):
    """Conv sparsities in per cent after each of 9 exchanges, at a tenth of what is left."""
    rng = np.random.default_rng(0)
    rank = jax.jit(filters.largest)
    steps = [Fraction("0.9") * j / 9 for j in range(10)]
    shapes = dict.fromkeys(VGG11)
    quotas = {size: filters.quotas(steps, size) for size, _ in shapes}
    tables = {size: filters.remaining(Fraction("0.1"), size) for size, _ in shapes}
    norms = {shape: jnp.asarray(rng.random(shape[0]), jnp.float32) for shape in shapes}
    keep = {shape: jnp.ones(shape[0], jnp.bool_) for shape in shapes}
    found, narrow = [], []
    for j in range(10):
        for shape, live in keep.items():
            count = tables[shape[0]][int(live.sum())] if j else live.sum(dtype=jnp.int32)
            vote = rank((norms[shape],), live, count)
            ballot = voting.Ballot(
                votes=10 * vote.astype(jnp.int32),
                weight=jnp.int32(10),
                num_voters=jnp.int32(10),
                live=live,
                worth=norms[shape],
            )
            keep[shape] = DECIDE[name](ballot, trees.take_rows(quotas[shape[0]], j))
            np.testing.assert_array_equal(keep[shape], vote)
        weights = [9 * size * inputs for size, inputs in VGG11]
        kept = [9 * int(keep[shape].sum()) * shape[1] for shape in VGG11]
        found.append(round(100 * (1 - sum(kept) / sum(weights)), 2))
        narrow.append(int(keep[256, 128].sum()))
    assert sum(9 * a * b for a, b in VGG11) == 9_217_728
    assert found == [0.0, *SPARSITIES]
    shares = [round(100 * (1 - k / 256), 1) for k in narrow]
    assert (shares[1:4], shares[9]) == ([10.2, 19.1, 27.3], 61.7)
