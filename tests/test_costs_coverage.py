"""Coverage, stability and agreement: against counting by hand, and inside a round."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjaxprune import masks
from fedjaxprune.costs import coverage
from fedjaxprune.federated import aggregators, local_training, sampling
from fedjaxprune.pruning import allocation, pruners, schedules, scores
from fedjaxprune.rounds import simulation
from fedjaxprune.rounds.protocol import Protocol
from fedjaxprune.rounds.training import training
from tests import quadratic

KEY = jax.random.key(0)
KERNELS = masks.is_kernel


def random_masks(seed, density=0.5):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.random(leaf.shape) < density), quadratic.PARAMS
    )


def prunable(tree):
    flags = masks.prunable_leaves(tree, KERNELS)
    leaves = zip(jax.tree.leaves(tree), flags, strict=True)
    return np.concatenate([np.asarray(leaf).ravel() for leaf, flag in leaves if flag])


def voted(people):
    """Fold personal masks into votes, as a round does."""
    votes = aggregators.vote_counts()
    sums = votes.init(people[0])
    for one in people:
        sums = votes.add(sums, one, None, jnp.float32(3.0))
    return votes.finish(sums)


def test_coverage_counts_clients_by_weight():
    rounds = [(random_masks(0), 3), (random_masks(1), 0), (random_masks(2), 5)]
    total = coverage.zero(quadratic.PARAMS)
    for one, num_clients in rounds:
        total = jax.jit(coverage.add)(total, one, jnp.int32(num_clients))
    expected = np.sum([n * prunable(one).astype(int) for one, n in rounds], axis=0)
    np.testing.assert_array_equal(prunable(total.counts), expected)
    assert total.num_clients == 8
    report = coverage.report(total, KERNELS)
    np.testing.assert_allclose(report.mean, expected.mean() / 8, rtol=1e-6)
    assert report.least == expected.min()
    np.testing.assert_allclose(report.never, (expected == 0).mean(), rtol=1e-6)


def test_personal_masks_count_by_their_votes():
    people = [random_masks(seed) for seed in range(4)]
    total = coverage.add_votes(coverage.zero(quadratic.PARAMS), voted(people), jnp.int32(4))
    one_by_one = coverage.zero(quadratic.PARAMS)
    for one in people:
        alone = coverage.add(coverage.zero(quadratic.PARAMS), one, jnp.int32(1))
        one_by_one = coverage.merge(one_by_one, alone)
    jax.tree.map(np.testing.assert_array_equal, total, one_by_one)


def test_agreement_is_the_mean_over_pairs():
    people = [random_masks(seed, density=0.3) for seed in range(5)]
    pairs = list(itertools.combinations([prunable(one) for one in people], 2))
    votes = voted(people)
    found = jax.jit(lambda votes, n: coverage.agreement(votes, n, KERNELS))(votes, jnp.int32(5))
    np.testing.assert_allclose(found, np.mean([(a == b).mean() for a, b in pairs]), rtol=1e-6)
    found = coverage.shared(votes, jnp.int32(5), KERNELS)
    both = np.mean([(a & b).sum() for a, b in pairs])
    one = np.mean([prunable(one).sum() for one in people])
    np.testing.assert_allclose(found, both / one, rtol=1e-6)


@pytest.mark.parametrize("measure", [coverage.agreement, coverage.shared])
def test_clients_with_one_mask_agree(measure):
    same = [random_masks(0)] * 3
    assert measure(voted(same), jnp.int32(3), KERNELS) == 1.0
    assert measure(voted(same[:1]), jnp.int32(1), KERNELS) == 1.0
    assert measure(voted(same), jnp.int32(3), lambda path, leaf: False) == 1.0


def test_clients_that_share_nothing_agree_where_neither_keeps():
    first = random_masks(0)
    other = jax.tree.map(jnp.logical_not, first)
    votes = voted([first, other])
    assert coverage.agreement(votes, jnp.int32(2), KERNELS) == 0.0
    assert coverage.shared(votes, jnp.int32(2), KERNELS) == 0.0


def test_stability_is_the_share_that_stayed():
    before, after = random_masks(0), random_masks(1)
    expected = (prunable(before) == prunable(after)).mean()
    np.testing.assert_allclose(coverage.stability(before, after, KERNELS), expected, rtol=1e-6)
    assert coverage.stability(before, before, KERNELS) == 1.0


def test_a_tracked_round_is_the_round_and_counts():
    people = quadratic.population()
    sparsity = schedules.linear(
        initial_sparsity=0.0, final_sparsity=0.8, begin_round=0, end_round=3
    )
    setup = Protocol(num_rounds=4, batcher=quadratic.full_batches(1), optimizer=optax.sgd(0.1))
    algorithm = training(
        setup,
        client=local_training.local_sgd(
            quadratic.MODEL.loss, batcher=setup.batcher, optimizer=setup.optimizer
        ),
        pruner=pruners.prune_to(sparsity, score=scores.magnitude, allocation=allocation.uniform()),
    )
    draw = sampling.uniform(num_clients=6, cohort_size=4)
    advance = simulation.advance(algorithm.stages[0], draw)
    start = simulation.start(
        algorithm, quadratic.PARAMS, {"steps": jnp.float32(0.0)}, num_clients=6
    )
    plain = start
    carried = (start, coverage.zero(quadratic.PARAMS))
    expected = np.zeros(quadratic.NUM_PRUNABLE, int)
    run, run_tracked = jax.jit(advance), jax.jit(coverage.tracked(advance))
    for _ in range(4):
        expected = expected + 4 * prunable(plain.state.masks)
        plain, _ = run(KEY, plain, people)
        carried, _ = run_tracked(KEY, carried, people)
    jax.tree.map(np.testing.assert_array_equal, carried[0].state.params, plain.state.params)
    np.testing.assert_array_equal(prunable(carried[1].counts), expected)
    assert expected.min() < 16  # something was pruned on the way
