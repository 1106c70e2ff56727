"""What the guard of a round covers: values, weights, and everything that a round writes."""

import functools

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjaxprune import trees
from fedjaxprune.federated import aggregators, local_training, server_optimizers
from fedjaxprune.federated.corrections import fednova, scaffold
from fedjaxprune.pruning import pruners
from fedjaxprune.rounds import stages, training
from fedjaxprune.rounds.protocol import FieldSpec, Hooks
from fedjaxprune.types import Client, Message, Pruner
from tests import quadratic
from tests.playing import KEY, PEOPLE, STATE, UPLINKS, setup

EVERYBODY = list(range(6))
MOMENTUM = {"server": server_optimizers.fedavgm(learning_rate=1.0, momentum=0.9)}
INNER = local_training.local_sgd(
    quadratic.MODEL.loss, batcher=quadratic.full_batches(1), optimizer=optax.sgd(0.1)
)


def tampering(change, *, of=(3,), inner=INNER):
    """Let clients of the given ids change their messages: ``(fields, weight) -> the same``."""

    def update(key, broadcast, state, data):
        message, after = inner.update(key, broadcast, state, data)
        begins = jnp.stack([PEOPLE.offsets[i] for i in of])
        bad = jnp.any(data.start == begins)
        changed = Message(*change(dict(message.fields), message.weight))
        return trees.tree_where(bad, changed, message), after

    return Client(init=inner.init, update=update)


def full_of(name, value):
    def change(fields, weight):
        return {
            **fields,
            name: jax.tree.map(lambda x: jnp.full_like(x, value), fields[name]),
        }, weight

    return change


def weighing(value):
    return lambda fields, weight: (fields, jnp.full_like(weight, value))


def play(algorithm, ids=EVERYBODY, *, state=None, participated=None):
    state = algorithm.init(quadratic.PARAMS, STATE) if state is None else state
    members = quadratic.cohort(algorithm, ids, participated)
    after, rows, metrics = jax.jit(algorithm.stages[0].round)(KEY, state, members, PEOPLE)
    return members, after, rows, metrics


def one_round(client, ids=EVERYBODY, *, state=None, participated=None, **protocol):
    algorithm = training.training(setup(**protocol), client=client)
    return play(algorithm, ids, state=state, participated=participated)


IMPLAUSIBLE = {
    "statistics of 3e38": full_of("model_state", 3e38),
    "a delta of 3e38": full_of("delta", 3e38),
    "a delta of 2 to the 64": full_of("delta", -(2.0**64)),
    "a delta of NaN": full_of("delta", jnp.nan),
    "a loss of 1e30": full_of("metrics", 1e30),
    "a weight of 3e38": weighing(3e38),
    "a weight of 1e30": weighing(1e30),
    "a negative weight": weighing(-1.0),
    "a weight of NaN": weighing(jnp.nan),
}


PLAUSIBLE = {
    "a delta just below 2 to the 64": full_of("delta", float(np.nextafter(np.float32(2.0**64), 0))),
    "a weight of 2 to the 31": weighing(2.0**31),
    "a weight of zero": weighing(0.0),
}


CASES = {"honest": lambda fields, weight: (fields, weight), **IMPLAUSIBLE, **PLAUSIBLE}


@functools.cache
def mixed():
    """Make a round in which each client's label says which case it is."""

    def update(key, broadcast, state, data):
        inner, after = INNER.update(key, broadcast, state, data)
        made = [Message(*case(dict(inner.fields), inner.weight)) for case in CASES.values()]
        case = data.examples["labels"][data.order[data.start]]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves)[case], *made), after

    algorithm = training.training(
        setup(uplink=UPLINKS["feedback_top_k"], **MOMENTUM), client=INNER._replace(update=update)
    )
    return algorithm, jax.jit(algorithm.stages[0].round)


def play_mixed(cases, participated):
    algorithm, run = mixed()
    labels = np.zeros(len(PEOPLE.order), np.int32)
    for client, case in enumerate(cases):
        begin, end = np.asarray(PEOPLE.offsets)[client : client + 2]
        labels[np.asarray(PEOPLE.order)[begin:end]] = case
    people = PEOPLE._replace(examples={**PEOPLE.examples, "labels": jnp.asarray(labels)})
    members = quadratic.cohort(algorithm, EVERYBODY, participated)
    return members, *run(KEY, algorithm.init(quadratic.PARAMS, STATE), members, people)


def is_implausible(case):
    return list(CASES)[case] in IMPLAUSIBLE


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_message_that_is_not_plausible_is_counted_as_rejected(name):
    cases = [0, 0, 0, list(CASES).index(name), 0, 0]
    assert play_mixed(cases, [True] * 6)[-1].num_rejected == int(name in IMPLAUSIBLE)


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(
    cases=st.lists(st.integers(0, len(CASES) - 1), min_size=6, max_size=6),
    present=st.lists(st.booleans(), min_size=6, max_size=6),
)
def test_whoever_is_rejected_is_as_good_as_absent(cases, present):
    members, after, rows, metrics = play_mixed(cases, present)
    counts = [here and not is_implausible(case) for here, case in zip(present, cases, strict=True)]
    assert metrics.num_rejected == sum(present) - sum(counts)
    _, wanted, own, _ = play_mixed(cases, counts)
    if not any(counts):
        algorithm, _ = mixed()
        same_but_counters(algorithm.init(quadratic.PARAMS, STATE), after)
        chex.assert_trees_all_equal(rows[:2], members.states[:2])
    else:
        chex.assert_trees_all_equal(after, wanted)
        chex.assert_trees_all_equal(rows[:2], own[:2])


def test_values_below_a_bound_are_told_by_type():
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        assert trees.all_below([jnp.array([1.0, -2.0], dtype)], 2.0**64)
        assert not trees.all_below([jnp.array([1.0, jnp.inf], dtype)], 2.0**64)
    assert not trees.all_below([jnp.array([2.0**64], jnp.bfloat16)], 2.0**64)
    assert trees.all_below([jnp.array([2**31 - 1]), jnp.array([True])], 2.0**4)
    assert not trees.all_below([jnp.array([16.0])], 2.0**4)
    assert trees.all_below([jnp.array([15.99])], 2.0**4)


# A round that overflows ----------------------------------------------------------------------


def exploding(state):
    """Make a state from which any step of a server with momentum leads to an infinity."""
    return state._replace(
        server=jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.inf), state.server)
    )


def same_but_counters(before, after):
    chex.assert_trees_all_equal(after._replace(round=before.round), before)
    assert after.round == before.round + 1


@pytest.mark.usual("scaffold")
@pytest.mark.parametrize(
    "correction", ["none", "scaffold", pytest.param("fednova", marks=pytest.mark.slow)]
)
def test_a_round_that_overflows_changes_nothing_but_counters(correction):
    corrections = {
        "none": None,
        "scaffold": scaffold.control_variates(),
        "fednova": fednova.normalized_averaging(batcher=quadratic.full_batches(1)),
    }
    algorithm = training.training(
        setup(uplink=UPLINKS["feedback_top_k"], correction=corrections[correction], **MOMENTUM),
        client=INNER,
        pruner=pruners.prune_to(0.5),
    )
    state = exploding(algorithm.init(quadratic.PARAMS, STATE))
    members, after, rows, metrics = play(algorithm, state=state)
    same_but_counters(state, after)
    chex.assert_trees_all_equal(rows[:2], members.states[:2])
    assert metrics.num_rejected == len(EVERYBODY)
    assert metrics.num_changed == 0


def test_statistics_that_overflow_the_state_drop_the_round():
    def spread(fields, weight):  # its aggregate is infinite, though all values are plausible
        return {**fields, "model_state": {"steps": jnp.float32(2.0**63)}}, weight

    square = aggregators.weighted_mean()
    square = square._replace(
        finish=lambda sums: jax.tree.map(lambda x: x**8, aggregators.weighted_mean().finish(sums))
    )
    algorithm = training.training(
        setup(uplink=UPLINKS["feedback_top_k"]),
        client=tampering(spread, of=EVERYBODY),
        fields={"model_state": FieldSpec(square)},
    )
    state = algorithm.init(quadratic.PARAMS, {"steps": jnp.float32(0.0)})
    members, after, rows, metrics = play(algorithm, state=state)
    same_but_counters(state, after)
    chex.assert_trees_all_equal(rows[:2], members.states[:2])
    assert metrics.num_rejected == len(EVERYBODY)


def test_a_pruner_whose_memory_overflows_drops_the_round():
    def update(key, masks, state, inputs):
        cleared = jax.tree.map(jnp.zeros_like, masks)
        return cleared, state / 0.0

    algorithm = training.training(
        setup(), client=INNER, pruner=Pruner(init=lambda params: jnp.float32(1.0), update=update)
    )
    state = algorithm.init(quadratic.PARAMS, STATE)
    members, after, rows, metrics = play(algorithm, state=state)
    same_but_counters(state, after)
    chex.assert_trees_all_equal(rows[:2], members.states[:2])
    assert metrics.num_rejected == len(EVERYBODY)
    assert np.array_equal(metrics.num_live, trees.sizes(quadratic.PARAMS))


def test_a_hook_that_brings_in_a_nan_drops_the_round():
    def after_round(before, after, metrics):
        return after._replace(method=jnp.float32(jnp.nan)), metrics

    algorithm = training.training(
        setup(uplink=UPLINKS["feedback_top_k"]), client=INNER, hooks=Hooks(after_round=after_round)
    )
    state = algorithm.init(quadratic.PARAMS, STATE)._replace(method=jnp.float32(0.0))
    members, after, rows, metrics = play(algorithm, state=state)
    same_but_counters(state, after)
    chex.assert_trees_all_equal(rows[:2], members.states[:2])
    assert metrics.num_rejected == len(EVERYBODY)


def test_what_hooks_count_stays_where_nobody_was_heard():
    hooks = Hooks(
        after_round=lambda before, after, metrics: (
            after._replace(method=after.method + 1),
            metrics,
        )
    )
    algorithm = training.training(setup(), client=INNER, hooks=hooks)
    state = algorithm.init(quadratic.PARAMS, STATE)._replace(method=jnp.int32(0))
    _, after, _, _ = play(algorithm, state=state)
    assert after.method == 1
    _, after, _, _ = play(algorithm, state=state, participated=[False] * 6)
    same_but_counters(state, after)


def test_state_that_begins_infinite_does_not_veto_rounds():
    best = optax.chain(
        optax.sgd(1.0),
        optax.GradientTransformation(
            init=lambda params: jnp.float32(jnp.inf),
            update=lambda updates, state, params=None: (updates, state),
        ),
    )
    _, after, _, metrics = one_round(INNER, server=best)
    assert metrics.num_rejected == 0
    assert not np.array_equal(after.params["head"]["kernel"], quadratic.PARAMS["head"]["kernel"])


def own_stage(change):
    """Make a stage of one's own, which lets `change` have what a training round gives."""
    algorithm = training.training(setup(), client=INNER)
    inner = algorithm.stages[0].round

    def round_fn(key, state, members, people):
        return change(*inner(key, state, members, people))

    state = algorithm.init(quadratic.PARAMS, STATE)
    members = quadratic.cohort(algorithm, EVERYBODY)
    return state, lambda: stages.guarded(round_fn)(KEY, state, members, PEOPLE)


def test_a_stage_of_ones_own_whose_metrics_are_not_finite_is_dropped():
    def change(state, rows, metrics):
        wrong = metrics.train["loss"]._replace(total=jnp.float32(jnp.nan))
        return state, rows, metrics._replace(train={**metrics.train, "loss": wrong})

    state, run = own_stage(change)
    after, _, metrics = jax.jit(run)()
    same_but_counters(state, after)
    assert metrics.num_rejected == len(EVERYBODY)


def test_rounds_of_ones_own_are_counted_and_keep_their_shapes():
    state, run = own_stage(lambda after, rows, m: (after._replace(round=after.round - 1), rows, m))
    assert jax.jit(run)()[0].round == state.round + 1

    def changed(name, leaf):
        def change(after, rows, metrics):
            tree = jax.tree.map(leaf, getattr(after, name))
            return after._replace(**{name: tree}), rows, metrics

        return change

    for name, leaf, sentence in (
        (
            "params",
            lambda x: x[None],
            r"the state after a round must have shape \(\d+,\) at params",
        ),
        ("params", lambda x: x.astype(jnp.bfloat16), "'params/.*' is bfloat16 and was float32"),
        ("masks", lambda x: x.astype(jnp.int32), "'masks/.*' is int32 and was bool"),
    ):
        _, run = own_stage(changed(name, leaf))
        with pytest.raises(ValueError, match=sentence):
            jax.eval_shape(run)
    _, run = own_stage(lambda after, rows, metrics: (after, rows._replace(uplink=0.0), metrics))
    with pytest.raises(ValueError, match="the clients' rows after a round must be a tree like"):
        jax.eval_shape(run)


WRONG_NUMBERS = {
    "clip": (-1.0, 0.0, float("nan"), float("inf")),
    "max_weight": (-1.0, 0, float("nan")),
    "chunk_size": (0, 2.0, True, "2"),
}


@pytest.mark.parametrize("name", WRONG_NUMBERS)
def test_a_number_that_would_stop_or_turn_training_is_refused(name):
    for value in WRONG_NUMBERS[name]:
        with pytest.raises(ValueError, match=f"{name} must be a .*, got "):
            training.training(setup(**{name: value}), client=INNER)


# The user's robust aggregator, and bounds ----------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("field", [pytest.param("model_state", marks=pytest.mark.slow), "grads"])
def test_statistics_and_gradients_go_through_the_robust_aggregator(field):
    inner = local_training.local_sgd(
        quadratic.MODEL.loss,
        batcher=quadratic.full_batches(1),
        optimizer=optax.sgd(0.1),
        report_grads=lambda index: index >= 0,
    )

    def update(key, masks, state, inputs):
        return masks, inputs.grads

    def init(params):
        return jax.tree.map(jnp.zeros_like, params)

    def run(client, aggregator):
        algorithm = training.training(
            setup(aggregator=aggregator), client=client, pruner=Pruner(init=init, update=update)
        )
        after = play(algorithm)[1]
        return after.model_state if field == "model_state" else after.pruner

    wrong = tampering(full_of(field, 1e9), inner=inner)
    for aggregator in (aggregators.median(), aggregators.trimmed_mean(fraction=0.2)):
        assert max(np.abs(x).max() for x in jax.tree.leaves(run(wrong, aggregator))) < 100.0
    assert max(np.abs(x).max() for x in jax.tree.leaves(run(wrong, None))) > 1e6


@pytest.mark.slow
def test_control_variates_go_through_the_robust_aggregator():
    def run(aggregator, change):
        correction = scaffold.control_variates()
        inner = correction.wrap(INNER)
        protocol = setup(
            aggregator=aggregator,
            correction=correction._replace(wrap=lambda client: tampering(change, inner=inner)),
        )
        return play(training.training(protocol, client=INNER))[1].correction

    def nothing(fields, weight):
        return fields, weight

    median = run(aggregators.median(), full_of("control", 1e9))
    assert np.abs(quadratic.flatten(median)).max() < 10.0
    assert np.abs(quadratic.flatten(run(None, full_of("control", 1e9)))).max() > 1e6
    # a robust sum over examples is about that of the mean
    chex.assert_trees_all_close(run(aggregators.median(), nothing), run(None, nothing), atol=2.0)


def test_a_long_delta_is_shortened_to_the_clip():
    def delta_of(clip, change):
        after = one_round(tampering(change), [3], clip=clip)[1]
        return quadratic.flatten(after.params) - quadratic.flatten(quadratic.PARAMS)

    whole = delta_of(None, lambda fields, weight: (fields, weight))
    norm = float(np.linalg.norm(np.asarray(whole, np.float64)))
    kept = delta_of(2.0 * norm, lambda fields, weight: (fields, weight))
    np.testing.assert_array_equal(kept, whole)
    half = delta_of(0.5 * norm, lambda fields, weight: (fields, weight))
    np.testing.assert_allclose(half, 0.5 * whole, rtol=1e-5, atol=1e-6)
    long = delta_of(1.0, full_of("delta", 3e38))  # the squares of which overflow
    np.testing.assert_allclose(np.linalg.norm(long), 1.0, rtol=1e-5)


@pytest.mark.slow
def test_a_client_counts_for_at_most_the_largest_weight():
    def run(**protocol):
        return quadratic.flatten(one_round(INNER, [2, 3], **protocol)[1].params)

    start = np.asarray(quadratic.flatten(quadratic.PARAMS))
    means = [quadratic.mean_point(PEOPLE, i) for i in (2, 3)]  # of 2 and of 8 examples
    for bound, weights in ((None, (2, 8)), (100.0, (2, 8)), (2.0, (2, 2)), (4.0, (2, 4))):
        mean = sum(w * m for w, m in zip(weights, means, strict=True)) / sum(weights)
        found = run(max_weight=bound)
        np.testing.assert_allclose(found, start + 0.1 * (mean - start), rtol=1e-4, atol=1e-6)
