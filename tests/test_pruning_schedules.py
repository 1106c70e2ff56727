import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjaxprune.pruning import schedules

RAMPS = {"linear": schedules.linear, "cubic": schedules.cubic, "cosine": schedules.cosine}
FEDDIP_ROUNDS = [0, 1, 5, 100, 250, 500, 750, 995]
FEDDIP = {  # from 0.5 in round 0, towards the key in round 1000
    0.80: [0.5, 0.500899, 0.504478, 0.581300, 0.673438, 0.762500, 0.795313, 0.800000],
    0.90: [0.5, 0.501199, 0.505970, 0.608400, 0.731250, 0.850000, 0.893750, 0.900000],
    0.95: [0.5, 0.501349, 0.506716, 0.621950, 0.760156, 0.893750, 0.942969, 0.950000],
}


def feddip(final):
    return schedules.cubic(
        initial_sparsity=0.5, final_sparsity=final, begin_round=0, end_round=1000
    )


@pytest.mark.parametrize("final", FEDDIP)
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float32])
def test_cubic_gives_the_sparsities_of_feddip(final, dtype):
    values = jax.vmap(feddip(final))(jnp.array(FEDDIP_ROUNDS, dtype))
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, FEDDIP[final], rtol=0, atol=6e-7)


@pytest.mark.parametrize("final", FEDDIP)
def test_evaluate_gives_every_printed_digit(final):
    values = [float(schedules.evaluate(feddip(final), jnp.int32(t))) for t in FEDDIP_ROUNDS]
    np.testing.assert_allclose(values, FEDDIP[final], rtol=0, atol=5.001e-7)


@pytest.mark.parametrize("name", sorted(RAMPS))
def test_a_ramp_holds_its_ends_and_never_turns_back(name):
    ramp = RAMPS[name](initial_sparsity=0.2, final_sparsity=0.9, begin_round=10, end_round=30)
    values = np.asarray(jax.jit(jax.vmap(ramp))(jnp.arange(50, dtype=jnp.int32)))
    np.testing.assert_allclose(values[:11], 0.2, rtol=1e-6)
    np.testing.assert_allclose(values[30:], 0.9, rtol=1e-6)
    assert (np.diff(values[10:31]) > 0).all()


@pytest.mark.parametrize(("name", "part"), [("linear", 0.5), ("cubic", 0.875), ("cosine", 0.5)])
def test_a_ramp_is_known_halfway(name, part):
    ramp = RAMPS[name](initial_sparsity=0.25, final_sparsity=0.75, begin_round=4, end_round=8)
    assert float(ramp(jnp.int32(6))) == pytest.approx(0.25 + 0.5 * part, abs=1e-7)


@pytest.mark.parametrize("size", [61_470, 11_038_400])
def test_counts_are_those_of_python_in_every_round(size):
    schedule = feddip(0.9)

    def count(round):
        return schedules.num_kept(size, schedules.evaluate(schedule, round))

    rounds = jnp.arange(1000, dtype=jnp.int32)
    mapped = jax.jit(jax.vmap(count))(rounds)
    expected = [size - round((0.9 + (0.5 - 0.9) * (1 - t / 1000) ** 3) * size) for t in range(1000)]
    assert mapped.dtype == jnp.int32
    assert mapped.tolist() == expected

    def step(carry, round):
        return carry, jax.lax.cond(round % 2 == 0, count, lambda round: round, round)

    _, scanned = jax.jit(lambda: jax.lax.scan(step, 0, rounds[:20]))()
    assert scanned.tolist()[::2] == expected[:20:2]


@pytest.mark.parametrize(
    ("size", "kept"),
    [
        (61_470, [30_735, 12_294, 6_147, 3_074]),
        (23_262_912, [11_631_456, 4_652_582, 2_326_291, 1_163_146]),
        (11_038_400, [5_519_200, 2_207_680, 1_103_840, 551_920]),
    ],
    ids=["lenet5", "alexnet", "resnet18"],
)
def test_what_is_kept_of_feddips_networks(size, kept):
    """Of their prunable weights at 0.5, 0.8, 0.9 and 0.95, as FedDIP's specification lists it."""
    with jax.enable_x64(True):
        sparsities = [jnp.float64(value) for value in (0.5, 0.8, 0.9, 0.95)]
        assert [int(schedules.num_kept(size, value)) for value in sparsities] == kept


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.29, 0.5, 0.9, 0.95, 0.99])
@pytest.mark.parametrize("size", [0, 1, 3, 10, 1000, 61_470, 23_262_912])
def test_a_constant_keeps_what_python_says(sparsity, size):
    value = schedules.evaluate(schedules.constant(sparsity), jnp.int32(3))
    assert value.dtype == np.float64
    assert int(schedules.num_kept(size, value)) == size - round(sparsity * size)


def test_a_schedule_of_the_user_may_answer_in_single_precision():
    given = [lambda round: jnp.float32(0.5), lambda round: 0.5, optax.constant_schedule(0.5)]
    for schedule in given:
        assert int(schedules.num_kept(8, schedules.evaluate(schedule, jnp.int32(0)))) == 4


def test_every_and_at_are_due_when_they_say():
    rounds = jnp.arange(20, dtype=jnp.int32)

    def due(predicate):
        flags = jax.jit(jax.vmap(predicate))(rounds)
        chex.assert_type(flags, jnp.bool_)
        return np.flatnonzero(flags).tolist()

    assert due(schedules.every(5)) == [0, 5, 10, 15]
    assert due(schedules.every(5, start=3)) == [3, 8, 13, 18]
    assert due(schedules.every(5, start=3, until=13)) == [3, 8]
    assert due(schedules.every(1, until=2)) == [0, 1]
    assert due(schedules.at(7)) == [7]
    assert due(schedules.at(3, 0, 19)) == [0, 3, 19]


def test_steps_keep_the_printed_fractions_and_end_where_they_should():
    five = schedules.exponential_steps(0.95, 5)
    expected = [0.549280, 0.301709, 0.165723, 0.091028, 0.05]
    np.testing.assert_allclose(1 - np.array(five), expected, atol=1e-6)
    hundred = 1 - np.array(schedules.exponential_steps(0.99, 100))
    expected = [0.954993, 0.630957, 0.1, 0.010471, 0.01]
    np.testing.assert_allclose(hundred[[0, 9, 49, 98, 99]], expected, atol=1e-6)
    assert five[-1] == 0.95  # to the bit, as halves are rounded by it
    assert schedules.linear_steps(0.75, 3) == (0.25, 0.5, 0.75)
    listed = schedules.listed(five)
    for step, sparsity in [*enumerate(five), (5, 0.95), (99, 0.95)]:
        assert float(schedules.evaluate(listed, jnp.int32(step))) == sparsity


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.listed([]), "sparsities must list at least one number, got none"),
        (lambda: schedules.listed([0.5, 1.0]), r"sparsities must lie in \[0, 1\), got 1.0"),
        (lambda: schedules.constant(1.0), r"value must lie in \[0, 1\), got 1.0"),
        (lambda: schedules.constant(float("nan")), "got nan"),
        (lambda: feddip(1.5), r"final_sparsity must lie in \[0, 1\), got 1.5"),
        (
            lambda: schedules.linear(
                initial_sparsity=0.0, final_sparsity=0.5, begin_round=5, end_round=5
            ),
            "got 5 and 5",
        ),
        (lambda: schedules.every(0), "period must be at least 1 round, got 0"),
        (lambda: schedules.every(2, start=-1), "start must be a round from 0, got -1"),
        (lambda: schedules.every(2, start=4, until=4), r"after start \(4\), got 4"),
        (lambda: schedules.at(), "one or more rounds"),
        (lambda: schedules.at(-3), "-3"),
    ],
)
def test_a_senseless_schedule_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
