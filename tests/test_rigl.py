"""RigL-style dynamic sparse training: what its masks keep, and which weights change places."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjaxprune import masks, trees
from fedjaxprune.federated import local_training
from fedjaxprune.methods import rigl
from fedjaxprune.pruning import drop_and_grow
from fedjaxprune.rounds import protocol
from fedjaxprune.types import PrunerInputs, client_data
from tests import quadratic

KEY = jax.random.key(5)
PEOPLE = quadratic.population()


@functools.cache
def play(**options):
    """Run the draw and all rounds with all clients: the states after each."""
    return [state for state, _ in played(**options)]


def played(num_rounds=6, **options):
    """Give the states with the metrics."""
    setup = protocol.Protocol(
        num_rounds=num_rounds, batcher=quadratic.full_batches(2), optimizer=optax.sgd(0.1)
    )
    settings = rigl.RigL(**{**rigl.METHOD.law_settings, "allocation": "uniform", **options})
    algorithm = rigl.build(settings, quadratic.task(setup))
    state = algorithm.init(quadratic.PARAMS, {"steps": jnp.float32(0.0)})
    members = quadratic.cohort(algorithm, range(6))
    for stage in algorithm.stages:
        run = jax.jit(stage.round)
        for _ in range(stage.num_rounds):
            key = jax.random.fold_in(KEY, state.round)
            state, rows, metrics = run(key, state, members, PEOPLE)
            members = members._replace(states=rows)
            yield state, metrics  # the first are the draw's


def kernels(tree):
    leaves = zip(trees.paths(tree), jax.tree.leaves(tree), strict=True)
    return {path: np.asarray(leaf) for path, leaf in leaves if "kernel" in path}


def test_sparsity_is_held_layer_by_layer_and_the_rest_is_dense():
    for state in play():
        live = {path: int(mask.sum()) for path, mask in kernels(state.masks).items()}
        assert live == {"dense/kernel": 12, "head/kernel": 4}
        assert np.asarray(state.masks["dense"]["bias"]).all()
        pruned = masks.apply(jax.tree.map(jnp.logical_not, state.masks), state.params)
        assert not any(np.any(leaf) for leaf in kernels(pruned).values())


def test_weights_change_places_in_the_rounds_that_are_due_only():
    states = play()
    changed = [
        int(masks.num_changed(before.masks, after.masks))
        for before, after in itertools.pairwise(states)
    ]
    assert [number > 0 for number in changed] == [False, True, False, True, False, False]
    # Of 12 and 4 live weights, 0.25 * (1 + cos(2 pi / 5)) go in round 2, rounded up; each counts
    # twice, as one entry goes and one comes. Less in round 4.
    assert changed[1] == 2 * (4 + 2)
    assert changed[3] == 2 * (1 + 1)


def test_the_smallest_go_and_the_steepest_come():
    states = play()
    before, after = states[1], states[2]
    client = local_training.local_sgd(
        quadratic.MODEL.loss,
        batcher=quadratic.full_batches(2),
        optimizer=optax.sgd(0.1),
        report_grads=lambda round: round >= 0,
        report_steps=local_training.last_step,
    )
    start, update = protocol.broadcast_of(before), jax.jit(client.update)
    sent, weights = [], []
    for i in range(6):
        message, _ = update(KEY, start, (), client_data(PEOPLE, jnp.int32(i)))
        sent.append(message)
        weights.append(float(message.weight))
    share = np.array(weights) / sum(weights)

    def mean(field):
        values = [kernels(one.fields[field]) for one in sent]
        paths = kernels(before.params)
        return {p: sum(w * v[p] for w, v in zip(share, values, strict=True)) for p in paths}

    trained = {path: kernels(before.params)[path] + d for path, d in mean("delta").items()}
    for path, mask in kernels(before.masks).items():
        gone, come = mask & ~kernels(after.masks)[path], ~mask & kernels(after.masks)[path]
        assert gone.sum() == come.sum() > 0
        assert np.abs(trained[path][gone]).max() <= np.abs(trained[path][mask & ~gone]).min()
        assert not kernels(after.params)[path][come].any()  # grown from zero
    # A client sends its largest gradients alone, so a grown weight is among some client's largest.
    count = {"dense/kernel": 4, "head/kernel": 2}
    for path, mask in kernels(before.masks).items():
        dead = ~mask
        chosen = np.zeros_like(mask)
        for one in sent:
            sizes = np.where(dead, np.abs(kernels(one.fields["grads"])[path]), -np.inf)
            chosen |= sizes >= np.sort(sizes, axis=None)[-count[path]]
        assert not (~mask & kernels(after.masks)[path] & ~chosen).any()


def test_sets_weights_grow_at_random_and_nothing_travels_for_it():
    states, history = [], []
    options = {"grow": "random", "decay": "constant", "prune_every": 1, "last_prune_round": 5}
    for state, metrics in played(**options):
        states.append(state)
        history.append(metrics)
    # A half of 12 and of 4 live weights; those that come back at once do not count as changed.
    grown = [
        {path: int((~mask & kernels(after.masks)[path]).sum()) for path, mask in before.items()}
        for before, after in zip([kernels(s.masks) for s in states], states[1:], strict=False)
    ]
    assert max(one["dense/kernel"] for one in grown) <= 6
    assert max(one["head/kernel"] for one in grown) <= 2
    assert len({tuple(one.values()) for one in grown[:5]}) > 1  # by chance
    assert sum(one["dense/kernel"] for one in grown) > 5
    assert grown[5] == {"dense/kernel": 0, "head/kernel": 0}
    for state in states:
        live = {path: int(mask.sum()) for path, mask in kernels(state.masks).items()}
        assert live == {"dense/kernel": 12, "head/kernel": 4}
    assert all("grads" not in one.sent.up["reply"] for one in history[1:])


# The published example: six of ten weights are live.
VALUES = [0.5, -0.2, 0.1, 0.9, -0.05, 0.3, 0, 0, 0, 0]
SLOPES = [0.01, 0.4, -0.02, 0.03, 0.7, 0.05, 0.2, -0.6, 0.1, 0.3]
LIVE = [True] * 6 + [False] * 4


@functools.cache
def exchanger(offered):
    """Compile an exchange of the example with any gradient and number."""

    @jax.jit
    def run(slopes, number):
        inputs = PrunerInputs(
            params=[jnp.array(VALUES)], grads=[slopes], round=jnp.int32(0), statistics={}
        )
        pruner = drop_and_grow.drop_and_grow(lambda masks, index: [number], offered=offered)
        return pruner.update(KEY, [jnp.array(LIVE)], (), inputs)[0][0]

    return lambda slopes, number: "".join(
        str(int(bit)) for bit in run(jnp.array(slopes), jnp.int32(number))
    )


@pytest.mark.parametrize(
    ("number", "returning", "others"),
    [
        (1, "1111110000", "1111010100"),
        (2, "1101110100", "1101010101"),
        (3, "1101110100", "1001011101"),
        (0, "1111110000", "1111110000"),
    ],
)
def test_dropped_weights_may_return_as_published_or_not_as_here(number, returning, others):
    assert exchanger("pruned_or_dropped")(SLOPES, number) == returning
    assert exchanger("pruned")(SLOPES, number) == others


def test_without_a_gradient_nothing_is_exchanged():
    for offered in ("pruned", "pruned_or_dropped"):
        assert exchanger(offered)([0.0] * 10, 3) == "1111110000"


def test_where_few_are_offered_the_best_of_the_dropped_stay():
    slopes = [0.0] * 9 + [0.3]
    assert exchanger("pruned_or_dropped")(slopes, 3) == "1111010001"


def test_the_share_decays_as_published():
    fraction = drop_and_grow.cosine_decay(initial=0.3, until=100)
    published = {0: 0.3, 10: 0.292658, 25: 0.256066, 50: 0.15, 75: 0.043934, 90: 0.007342, 100: 0}
    for index, share in published.items():
        np.testing.assert_allclose(fraction(jnp.float32(index - 1)), share, atol=5e-7)


def test_a_guide_decides_on_pruned_weights_alone():
    with pytest.raises(ValueError, match="offered must be 'pruned' with a guide"):
        drop_and_grow.drop_and_grow(
            lambda masks, index: masks,
            guide=lambda masks, inputs: drop_and_grow.Guide(masks, masks),
            offered="pruned_or_dropped",
        )


def test_a_share_of_nothing_keeps_the_first_masks():
    states = play(drop_fraction=0.0)
    for state in states[1:]:
        assert int(masks.num_changed(states[0].masks, state.masks)) == 0


@pytest.mark.parametrize(
    ("num_rounds", "options", "expected"),
    [
        (200, {}, (10, 150)),
        (8, {}, (2, 6)),
        (1, {}, (1, 1)),
        (8, {"prune_every": 3, "last_prune_round": 20}, (3, 8)),
    ],
)
def test_exchanges_end_at_three_quarters_of_a_run(num_rounds, options, expected):
    assert rigl._exchange_rounds(rigl.RigL(**options), num_rounds) == expected


def test_a_run_without_any_exchange_is_refused():
    with pytest.raises(ValueError, match=r"prune_every must be at most 6, the last round in which"):
        rigl._exchange_rounds(rigl.RigL(prune_every=7), 8)
