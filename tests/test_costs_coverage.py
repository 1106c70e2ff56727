"""How far masks agree: against comparing all pairs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from fedjaxprune import masks
from fedjaxprune.costs import coverage
from fedjaxprune.federated import aggregators
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

    @jax.jit
    def fold():
        sums = votes.init(people[0])
        for one in people:
            sums = votes.add(sums, one, None, jnp.float32(3.0))
        return votes.finish(sums)

    return fold()


def test_agreement_is_the_mean_over_pairs():
    people = [random_masks(seed, density=0.3) for seed in range(5)]
    pairs = list(itertools.combinations([prunable(one) for one in people], 2))
    votes = voted(people)
    found = jax.jit(lambda votes, n: coverage.agreement(votes, n, KERNELS))(votes, jnp.int32(5))
    np.testing.assert_allclose(found, np.mean([(a == b).mean() for a, b in pairs]), rtol=1e-6)


def test_clients_with_one_mask_agree():
    measure = coverage.agreement
    same = [random_masks(0)] * 3
    assert measure(voted(same), jnp.int32(3), KERNELS) == 1.0
    assert measure(voted(same[:1]), jnp.int32(1), KERNELS) == 1.0
    assert measure(voted(same), jnp.int32(3), lambda path, leaf: False) == 1.0


def test_clients_that_share_nothing_agree_where_neither_keeps():
    first = random_masks(0)
    other = jax.tree.map(jnp.logical_not, first)
    votes = voted([first, other])
    assert coverage.agreement(votes, jnp.int32(2), KERNELS) == 0.0
