"""Laws and answers by hand of aggregators that take whole messages as vectors."""

import functools

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedjaxprune import registry
from fedjaxprune.federated import aggregators
from fedjaxprune.types import Aggregator
from tests import draws

NAMES = sorted(registry.names("aggregator"))
WHOLE = sorted(
    ["centered_clipping", "geometric_median", "krum", "multi_krum", "norm_bounding", "server_trust"]
)
REFERENCE = {"a": jnp.array([[1.0, -1.0]]), "b": jnp.array(2.0)}
PRESENT = 6


def build(name):
    part = registry.find("aggregator", name).part
    return part.build(part.settings())


def reduce(aggregator, values, weights, reference=REFERENCE):
    """Aggregate ``[C, ...]`` by an aggregator of any kind."""
    if isinstance(aggregator, Aggregator):
        total = aggregator.init(jax.tree.map(lambda leaf: leaf[0], values))
        for i, weight in enumerate(weights):
            one = jax.tree.map(lambda leaf, i=i: leaf[i], values)
            total = aggregator.add(total, one, None, weight)
        return aggregator.finish(total)
    if isinstance(aggregator, aggregators.ServerAggregator):
        aggregator = aggregator.beside(reference)
    return aggregator.reduce(values, None, weights)


def compiled(name):
    rule = build(name)
    return jax.jit(lambda values, weights: reduce(rule, values, weights))


COMPILED = {name: compiled(name) for name in NAMES}


def aggregate(rule, values, weights=None):
    """Reduce ``[C, ...]`` in one program; everybody counts alike where there are no weights."""
    if weights is None:
        weights = jnp.ones(jax.tree.leaves(values)[0].shape[0])
    return jax.jit(lambda *given: rule.reduce(given[0], None, given[1]))(values, weights)


def line(*numbers):
    """Make clients whose messages are one number each."""
    return jnp.array(numbers, jnp.float32)


@st.composite
def cohorts(draw):
    """Draw six messages, many of them alike, and who is present."""
    numbers = st.sampled_from([-3.0, -1.0, 0.0, 0.5, 1.0, 1.5, 8.0, 1e3, 1e30])
    flat = draw(arrays.arrays(np.float32, (PRESENT, 3), elements=numbers))
    weights = draw(
        arrays.arrays(np.float32, PRESENT, elements=st.sampled_from([0.0, 1.0, 2.0, 7.0]))
    )
    return {"a": flat[:, :2].reshape(PRESENT, 1, 2), "b": flat[:, 2]}, weights


def close(first, second, tolerance=1e-5):
    leaves = list(zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))
    scale = max(1.0, *(np.max(np.abs(one)) for one, _ in leaves))  # of whole messages
    for one, other in leaves:
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance * scale)


SOME = hypothesis.settings(max_examples=20, deadline=None, derandomize=True)


@pytest.mark.usual("geometric_median", "krum", "trimmed_mean", "weighted_mean", "centered_clipping")
@pytest.mark.parametrize("name", NAMES)
@hypothesis.given(cohorts(), st.permutations(range(PRESENT)))
@SOME
def test_the_order_of_clients_is_irrelevant_to_every_aggregator(name, cohort, order):
    values, weights = cohort
    order = np.array(order)
    shuffled = jax.tree.map(lambda leaf: leaf[order], values)
    # A geometric median that starts on a message leaves it by powers of its rounding.
    tolerance = 1e-4 if name == "geometric_median" else 1e-5
    before, after = COMPILED[name](values, weights), COMPILED[name](shuffled, weights[order])
    close(before, after, tolerance)


@pytest.mark.parametrize("name", NAMES)
@hypothesis.given(cohorts())
@SOME
def test_the_absent_count_for_nothing_in_every_aggregator(name, cohort):
    values, weights = cohort
    absent = weights == 0

    def spoilt(leaf):
        return np.where(absent.reshape(-1, *[1] * (leaf.ndim - 1)), np.float32(np.nan), leaf)

    after = COMPILED[name](jax.tree.map(spoilt, values), weights)
    chex.assert_trees_all_equal(after, COMPILED[name](values, weights))
    if not np.any(weights > 0):
        chex.assert_trees_all_equal(after, jax.tree.map(np.zeros_like, after))


@pytest.mark.parametrize("name", NAMES)
@hypothesis.given(cohorts())
@SOME
def test_what_is_masked_in_every_message_stays_exact_zero(name, cohort):
    values, weights = cohort
    values["a"][..., 1] = 0.0
    assert COMPILED[name](values, weights)["a"][0, 1] == 0.0


@pytest.mark.parametrize("name", WHOLE)
def test_alike_messages_are_their_own_aggregate(name):
    values = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (6, *leaf.shape)), REFERENCE)
    close(COMPILED[name](values, jnp.array([1.0, 9.0, 0.0, 2.0, 1.0, 3.0])), REFERENCE)


@pytest.mark.parametrize("name", [one for one in WHOLE if one != "server_trust"])
@pytest.mark.parametrize("wrong", [1e3, 1e30, 3e38, -jnp.inf, jnp.nan])
def test_one_wrong_client_of_five_is_bounded(name, wrong):
    honest = draws.normal(0, 5, 4, 3)
    weights = jnp.array([1.0, 1.0, 3e38, 1.0, 1.0])  # a weight that it made up
    values = np.array(honest)
    values[2] = wrong
    largest = np.linalg.norm(honest.reshape(5, -1), axis=1).max()
    assert np.linalg.norm(COMPILED[name](values, weights)) <= 1.2 * largest


def test_krum_takes_the_message_with_the_closest_neighbors():
    # With f = 1 of 5 two neighbors count: scores 1 + 4, 1 + 1, 1 + 4, 1 + 64, 1 + 81.
    values = line(0.0, 1.0, 2.0, 10.0, 11.0)
    assert aggregate(aggregators.krum(tolerated=0.2), values) == 1.0
    chosen = aggregate(aggregators.multi_krum(tolerated=0.2), values)
    assert chosen == (0.0 + 1.0 + 2.0 + 10.0) / 4
    chosen = aggregate(aggregators.multi_krum(tolerated=0.4), values)
    # With f = 2 the nearest one alone counts: scores 1, 1, 1, 1, 1; three places for five.
    np.testing.assert_allclose(chosen, 24.0 / 5, rtol=1e-6)


def test_krum_shares_a_place_between_equal_scores():
    values = line(0.0, 1.0, 5.0)
    assert aggregate(aggregators.krum(tolerated=0.0), values) == 0.5
    alone = jnp.array([0.0, 0.0, 2.0])
    assert aggregate(aggregators.krum(tolerated=0.2), values, alone) == 5.0


def test_distances_are_over_all_leaves_together():
    # By leaf the first two agree in `a`, the last two in `b`; as wholes the middle two are closest.
    values = {"a": line(0.0, 0.0, 1.0), "b": line(9.0, 1.0, 1.0)}
    result = aggregate(aggregators.krum(tolerated=0.0), values)
    assert (result["a"], result["b"]) == (0.5, 1.0)


def test_the_hostile_are_counted_in_decimals():
    values = line(0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 50.0, 60.0, 70.0)
    result = aggregate(aggregators.multi_krum(tolerated=0.3), values)
    np.testing.assert_allclose(result, 0.3, rtol=1e-6)  # three of ten, not four: all seven are kept


def test_the_geometric_median_of_a_triangle_is_its_fermat_point():
    # From this point the corners lie at 0, 120 and 240 degrees, at distances 1, 2 and 4.
    angles = np.array([0.0, 2.0, 4.0]) * np.pi / 3
    corners = np.stack([np.cos(angles), np.sin(angles)], 1) * np.array([1.0, 2.0, 4.0])[:, None]
    corners = jnp.asarray(corners + np.array([[3.0, -1.0]]), jnp.float32)
    rule = aggregators.geometric_median(num_iterations=60)
    np.testing.assert_allclose(aggregate(rule, corners), jnp.array([3.0, -1.0]), atol=1e-3)


def test_the_geometric_median_on_a_line_is_the_median():
    values = line(-5.0, 0.0, 1.0, 2.0, 1e6)
    rule = aggregators.geometric_median(num_iterations=10)
    np.testing.assert_allclose(aggregate(rule, values), 1.0, atol=1e-4)


def test_one_step_of_weiszfeld_by_hand():
    values = jnp.array([[3.0, 4.0], [-3.0, 4.0], [0.0, -10.0], [0.0, -10.0]])
    rule = aggregators.geometric_median(num_iterations=1)
    # The medians are 0 and (-10 + 4) / 2 = -3; distances sqrt(58), sqrt(58), 7, 7.
    near, far = 1 / np.sqrt(58), 1 / 7
    y = (2 * near * 4 + 2 * far * -10) / (2 * near + 2 * far)
    np.testing.assert_allclose(aggregate(rule, values), [0.0, y], rtol=1e-5, atol=1e-6)


def test_centered_clipping_by_hand():
    # Around the median 1 a radius of 2 turns 11 into 3: 1 + (-1 + 0 + 2) / 3, then once more.
    values = line(0.0, 1.0, 11.0)
    once = aggregators.centered_clipping(radius=2.0, num_iterations=1)
    np.testing.assert_allclose(aggregate(once, values), 4 / 3, rtol=1e-6)
    twice = aggregators.centered_clipping(radius=2.0, num_iterations=2)
    second = 4 / 3 + (-4 / 3 - 1 / 3 + 2) / 3
    np.testing.assert_allclose(aggregate(twice, values), second, rtol=1e-6)
    own = aggregators.centered_clipping(radius=None, num_iterations=1)  # distances 1, 0, 10
    np.testing.assert_allclose(aggregate(own, values), 1.0, atol=1e-6)


def test_norm_bounding_by_hand():
    values = jnp.array([[3.0, 4.0], [0.0, 1.0], [0.0, -20.0]])
    rule = aggregators.norm_bounding(bound=5.0)
    np.testing.assert_allclose(aggregate(rule, values), [1.0, 0.0], atol=1e-6)
    rule = aggregators.norm_bounding(bound=None)  # the median of 5, 1 and 20
    np.testing.assert_allclose(aggregate(rule, values), [1.0, 0.0], atol=1e-6)
    rule = aggregators.norm_bounding(bound=100.0)  # nobody is that long: the mean
    np.testing.assert_allclose(aggregate(rule, values), [1.0, -5.0], rtol=1e-6)


def test_trust_by_hand():
    # The server says (2, 0). Cosines are 1, 0.6, 0 and -1; lengths become 2.
    values = jnp.array([[10.0, 0.0], [3.0, 4.0], [0.0, 7.0], [-2.0, 0.0]])
    rule = aggregators.server_trust().beside(jnp.array([2.0, 0.0]))
    expected = (np.array([2.0, 0.0]) + 0.6 * np.array([1.2, 1.6])) / 1.6
    np.testing.assert_allclose(aggregate(rule, values), expected, rtol=1e-6)
    np.testing.assert_array_equal(aggregate(rule, values[2:]), [0.0, 0.0])
    silent = aggregators.server_trust().beside(jnp.zeros(2))
    np.testing.assert_array_equal(aggregate(silent, values), [0.0, 0.0])


FINE = {  # its distances are in the unit of the messages
    "geometric_median": aggregators.geometric_median(num_iterations=3, smoothing=1e-37)
}
BESIDE = {
    name: jax.jit(functools.partial(reduce, FINE[name] if name in FINE else build(name)))
    for name in WHOLE
}


@pytest.mark.usual(
    "-100-geometric_median",
    "-100-krum",
    "-100-norm_bounding",
    "60-centered_clipping",
    "60-server_trust",
)
@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("power", [-100, 60])
def test_the_unit_of_messages_does_not_matter(name, power):
    # Squares of these numbers are 0 or infinite in float32; powers of 2 change no other digit.
    honest = draws.normal(0, 6, 3) + 1.0
    values = {"a": honest[:, None, :2].at[2].multiply(-8.0), "b": honest[:, 2]}
    weights = jnp.ones(6)
    scaled, own = jax.tree.map(lambda leaf: jnp.ldexp(leaf, power), (values, REFERENCE))
    run = BESIDE[name]
    before, after = run(values, weights, REFERENCE), run(scaled, weights, own)
    chex.assert_trees_all_equal(jax.tree.map(lambda leaf: jnp.ldexp(leaf, power), before), after)
    assert float(jnp.abs(before["b"])) > 0.0


@pytest.mark.parametrize("name", WHOLE)
def test_weights_above_zero_do_not_matter(name):
    values = draws.normal(1, 6, 1, 2)
    values = {"a": values, "b": values[:, 0, 0]}
    weights = jnp.array([1.0, 5.0, 0.0, 2.0, 3.0, 4.0])
    equal = (weights > 0).astype(jnp.float32)
    chex.assert_trees_all_equal(COMPILED[name](values, weights), COMPILED[name](values, equal))


@pytest.mark.parametrize("name", WHOLE)
def test_half_precision_fields_without_leaves_and_integers(name):
    half = jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf.astype(jnp.bfloat16), (3, *leaf.shape)), REFERENCE
    )
    assert jax.tree.leaves(COMPILED[name](half, jnp.ones(3)))[0].dtype == jnp.float32
    assert reduce(build(name), {}, jnp.ones(3), {}) == {}
    with pytest.raises(ValueError, match=rf"aggregators\.{name} averages .* 'steps' is int32"):
        reduce(build(name), {"steps": jnp.ones(3, jnp.int32)}, jnp.ones(3), {"steps": jnp.ones([])})


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: aggregators.krum(tolerated=0.5), r"tolerated must lie in \[0, 0.5\), got 0.5"),
        (lambda: aggregators.multi_krum(tolerated=-0.1), r"tolerated must lie in \[0, 0.5\)"),
        (lambda: aggregators.krum(tolerated=float("nan")), r"tolerated must lie in \[0, 0.5\)"),
        (lambda: aggregators.norm_bounding(bound=0.0), "bound must be greater than 0, got 0.0"),
        (
            lambda: aggregators.centered_clipping(radius=float("nan"), num_iterations=1),
            "radius must be greater than 0, got nan",
        ),
        (
            lambda: aggregators.geometric_median(num_iterations=0),
            "num_iterations must be greater than 0, got 0",
        ),
        (
            lambda: aggregators.geometric_median(num_iterations=1, smoothing=0.0),
            "smoothing must be greater than 0, got 0.0",
        ),
    ],
)
def test_arguments_that_make_no_sense_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()
