import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjaxprune.pruning import selection
from tests import draws

VALUES = draws.normal(0, 3, 3, 8, 6)


@pytest.mark.parametrize(
    ("n", "m", "axis"), [(2, 4, -2), (1, 8, -2), (4, 4, 2), (1, 3, -1), (2, 3, 0)]
)
def test_n_of_m_keeps_the_n_best_of_every_group(n, m, axis):
    kept = np.asarray(jax.jit(selection.n_of_m(n=n, m=m, axis=axis))(VALUES, jnp.int32(0)))
    assert kept.dtype == np.bool_
    values = np.moveaxis(np.asarray(VALUES), axis, -1).reshape(-1, m)
    kept = np.moveaxis(kept, axis, -1).reshape(-1, m)
    assert (kept.sum(axis=1) == n).all()
    expected = np.argsort(np.argsort(-values, axis=1, kind="stable"), axis=1) < n
    np.testing.assert_array_equal(kept, expected)


def test_n_of_m_keeps_the_first_of_equals_and_nan_last():
    select = selection.n_of_m(n=2, m=4, axis=0)
    values = jnp.array([0.0, -0.0, 0.0, 0.0, jnp.nan, 1.0, -jnp.inf, -3.0])
    assert select(values, jnp.int32(0)).tolist() == [True, True] + [False] * 3 + [True, False, True]


@pytest.mark.parametrize("axis", [-1, 2, 0])
@pytest.mark.parametrize("spare", [0, 1])
def test_channels_are_kept_whole_by_their_sum(axis, spare):
    values = jnp.abs(VALUES)
    num_channels, size = values.shape[axis], values.size // values.shape[axis]
    select = jax.jit(selection.channels(axis=axis))
    for whole in range(num_channels + 1):
        num_kept = min(whole * size + spare * (size - 1), values.size)
        kept = np.moveaxis(np.asarray(select(values, jnp.int32(num_kept))), axis, 0)
        kept = kept.reshape(num_channels, -1)
        assert (kept.all(axis=1) | ~kept.any(axis=1)).all()
        worth = np.moveaxis(np.asarray(values), axis, 0).reshape(num_channels, -1).sum(axis=1)
        expected = max(num_kept // size, min(num_kept, 1))
        assert set(np.flatnonzero(kept[:, 0])) == set(np.argsort(-worth)[:expected])


def test_channels_count_nothing_for_absent_entries():
    values = jnp.array([[-jnp.inf, 1.0, -jnp.inf], [5.0, 1.0, -jnp.inf]])
    kept = selection.channels()(values, jnp.int32(2))
    assert kept.tolist() == [[True, False, False]] * 2
    kept = selection.channels()(values, jnp.int32(4))
    assert kept.tolist() == [[True, True, False]] * 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: selection.n_of_m(n=5, m=4), "n=5 and m=4"),
        (lambda: selection.n_of_m(n=0, m=4), "n=0 and m=4"),
        (lambda: selection.n_of_m(n=2, m=5)(VALUES, jnp.int32(0)), r"\(3, 3, 8, 6\) has 8"),
        (lambda: selection.n_of_m(n=2, m=4)(jnp.ones(8), jnp.int32(0)), "axis -2"),
        (lambda: selection.channels(axis=4)(VALUES, jnp.int32(0)), "axis 4"),
    ],
)
def test_a_selection_that_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
