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
from fedjaxprune.rounds import protocol
from fedjaxprune.types import client_data
from tests import quadratic

KEY = jax.random.key(5)
PEOPLE = quadratic.population()


@functools.cache
def play(num_rounds=6, **options):
    """Run the draw and all rounds with all clients: the states after each."""
    setup = protocol.Protocol(
        num_rounds=num_rounds, batcher=quadratic.full_batches(2), optimizer=optax.sgd(0.1)
    )
    settings = rigl.RigL(**{**rigl.METHOD.law_settings, "allocation": "uniform", **options})
    algorithm = rigl.build(settings, quadratic.task(setup))
    states = [algorithm.init(quadratic.PARAMS, {"steps": jnp.float32(0.0)})]
    members = quadratic.cohort(algorithm, range(6))
    for stage in algorithm.stages:
        run = jax.jit(stage.round)
        for _ in range(stage.num_rounds):
            key = jax.random.fold_in(KEY, states[-1].round)
            state, rows, _ = run(key, states[-1], members, PEOPLE)
            members = members._replace(states=rows)
            states.append(state)
    return states[1:]  # the first is the draw's


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
    start = protocol.broadcast_of(before)
    sent, weights = [], []
    for i in range(6):
        message, _ = client.update(KEY, start, (), client_data(PEOPLE, jnp.int32(i)))
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
