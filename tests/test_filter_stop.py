"""When exchanges about filters end: once more is pruned than nine tenths, or than is asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjaxprune.methods import _filter_rounds, averaged_filters, mpfl, pooled_filters
from fedjaxprune.rounds.protocol import Protocol
from fedjaxprune.structure.channels.groups import Analysis, Group, Member
from fedjaxprune.types import Model, Population
from tests import quadratic

KEY = jax.random.key(3)
NUM_FILTERS = 100  # of two weights each, in one layer: a filter is one percent
PARAMS = {"layer": {"kernel": jnp.linspace(0.1, 2.0, 2 * NUM_FILTERS).reshape(2, NUM_FILTERS)}}
MODEL = Model(init=lambda key: (PARAMS, {}), loss=quadratic.MODEL.loss, predict=lambda p, s, x: x)
LAYER = Group(
    size=NUM_FILTERS,
    members=(Member("layer/kernel", 1, np.arange(NUM_FILTERS)[:, None], "filter"),),
    leaks=(),
    mixes=(),
)
CHANNELS = Analysis(groups=(LAYER,), filters=(LAYER,), fixed=())
PEOPLE = Population(  # three clients with a point each, the start's: all rank alike
    examples={
        "inputs": jnp.broadcast_to(quadratic.flatten(PARAMS)[None], (3, 2 * NUM_FILTERS)),
        "labels": jnp.zeros(3, jnp.int32),
    },
    order=jnp.arange(3, dtype=jnp.int32),
    offsets=jnp.arange(4, dtype=jnp.int32),
)
MODULES = {
    "mpfl": mpfl,
    "pooled_filters": pooled_filters,
    "averaged_filters": averaged_filters,
}


def task():
    protocol = Protocol(num_rounds=1, batcher=quadratic.full_batches(1), optimizer=optax.sgd(0.1))
    return quadratic.task(protocol, model=MODEL, channels=CHANNELS)


def left_after_exchanges(name, **options):
    """Count the filters that are left after each exchange of a method."""
    rule = {"consensus": "majority"} if name == "mpfl" else {}
    settings = MODULES[name].METHOD.settings(vote_epochs=1, layers="all", **rule, **options)
    algorithm = MODULES[name].build(settings, task())
    state = algorithm.init(PARAMS, {})
    members = quadratic.cohort(algorithm, range(3), params=PARAMS)
    (stage, _) = algorithm.stages
    play, counts = jax.jit(stage.round), []
    for _ in range(stage.num_rounds):
        state, rows, _ = play(jax.random.fold_in(KEY, state.round), state, members, PEOPLE)
        members = members._replace(states=rows)
        counts.append(int(state.method.keep[0].sum()))
    return counts


@pytest.mark.parametrize(
    ("sparsity", "stop", "most"),
    [(0.5, None, 90), (0.9, None, 90), (0.95, None, 95), (0.95, 0.3, 30), (0.5, 1.0, 100)],
)
def test_exactly_the_share_is_not_more_than_the_share(sparsity, stop, most):
    settings = _filter_rounds.FilterSettings(sparsity=sparsity, layers="all")
    plan = _filter_rounds.make_plan(task(), settings, num_steps=1, stop=stop)
    over = [
        bool(_filter_rounds.is_over(plan, (jnp.arange(NUM_FILTERS) >= pruned,)))
        for pruned in range(NUM_FILTERS + 1)
    ]
    assert over == [pruned > most for pruned in range(NUM_FILTERS + 1)]


@pytest.mark.usual("pooled_filters")
@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_exchange_follows_once_nine_tenths_or_the_sparsity_are_gone(name):
    """Each exchange takes half of what is left, halves of one to the even number."""
    halved = {"num_prune_steps": 6, "prune_fraction_per_step": 0.5}
    assert left_after_exchanges(name, sparsity=0.5, **halved) == [100, 50, 25, 13, 7, 7, 7]
    assert left_after_exchanges(name, sparsity=0.95, **halved) == [100, 50, 25, 13, 7, 3, 3]


@pytest.mark.usual("mpfl")
@pytest.mark.parametrize("name", sorted(MODULES))
def test_exchanges_go_on_while_just_the_share_is_gone(name):
    steps = {"sparsity": 0.75, "num_prune_steps": 3}
    assert left_after_exchanges(name, stop_sparsity=0.5, **steps) == [100, 75, 50, 25]
    assert left_after_exchanges(name, stop_sparsity=0.49, **steps) == [100, 75, 50, 50]
