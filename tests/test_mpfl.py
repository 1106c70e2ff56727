"""MPFL and its controls against the paper's scheme: agreement, rewinding, removal, traffic."""

import functools
import itertools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjaxprune import masks, models, trees
from fedjaxprune.costs import ledger
from fedjaxprune.errors import ConfigError
from fedjaxprune.federated import aggregators, sampling, server_optimizers
from fedjaxprune.methods import averaged_filters, fedavg, mpfl, pooled_filters, random_filters
from fedjaxprune.models import adapters, resnet, vgg
from fedjaxprune.pruning.structured import filters
from fedjaxprune.rounds.protocol import Protocol
from fedjaxprune.structure.channels import groups
from tests import quadratic, resuming

KEY = jax.random.key(4)
PEOPLE = quadratic.population()
LOCAL_STEPS, ROUNDS, ITERATIONS = 3, 2, 2
NUM_FILTERS = 4 + 2
SLOW = pytest.mark.slow  # seconds each, and the same code as MPFL's


def setup(**changes):
    base = Protocol(num_rounds=ROUNDS, batcher=quadratic.full_batches(2), optimizer=optax.sgd(0.1))
    return base._replace(**changes)


def run(algorithm, ids=tuple(range(6)), people=PEOPLE, num_rounds=None):
    """Play all stages, or the first rounds: the states from the start, and the metrics."""
    state = algorithm.init(quadratic.PARAMS, {})
    members = quadratic.cohort(algorithm, ids)
    states, history = [state], []
    for stage in algorithm.stages:
        play = jax.jit(stage.round)
        for _ in range(stage.num_rounds):
            if num_rounds is not None and len(history) >= num_rounds:
                return states, history
            key = jax.random.fold_in(KEY, state.round)
            state, rows, metrics = play(key, state, members, people)
            members = members._replace(states=rows)
            states.append(state)
            history.append(metrics)
    return states, history


def make(module=mpfl, *, model=quadratic.MODEL, protocol=None, **options):
    """Build a method by filter on the client with a known answer, as if it had two layers."""
    ranking = {"num_prune_steps": ITERATIONS, "vote_epochs": LOCAL_STEPS}
    options = {
        "layers": "all",
        **({} if module is random_filters else ranking),
        **options,
    }
    task = quadratic.task(protocol or setup(), model=model, max_size=28)
    return module.build(module.METHOD.settings(**options), task)


def charge(algorithm, metrics, state):
    return ledger.account(metrics, state, algorithm)


@functools.cache
def voted():
    """Play MPFL with all clients, once for all tests."""
    algorithm = make(consensus="top_k")
    return algorithm, *run(algorithm)


def trained(client_id, params, mean=None):
    """Train at one client: the known answer, under the masks that are zero in `params`."""
    mean = quadratic.mean_point(PEOPLE, client_id) if mean is None else mean
    flat = np.asarray(quadratic.flatten(params))
    moved = mean + 0.9**LOCAL_STEPS * (flat - mean)
    ends = np.cumsum(trees.sizes(quadratic.PARAMS))[:-1]
    leaves, structure = jax.tree.flatten(quadratic.PARAMS)
    parts = np.split(np.where(flat == 0, 0.0, moved), ends)
    return jax.tree.unflatten(
        structure, [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
    )


def best(params, live, counts):
    """Keep, of each layer, so many live filters of largest norm."""
    keep = []
    for name, bits, count in zip(("dense", "head"), live, counts, strict=True):
        norms = np.where(bits, np.linalg.norm(params[name]["kernel"], axis=0), -1.0)
        keep.append(np.isin(np.arange(len(bits)), np.argsort(-norms, kind="stable")[:count]))
    return keep


def counts_at(step):
    """Count what is wanted: 4 - round(4 q), 2 - round(2 q) for q = 0, 1/4, 1/2."""
    return {0: (4, 2), 1: (3, 2), 2: (2, 1)}[step]  # half of 1 is rounded to even


# Agreement -----------------------------------------------------------------------------------


def test_every_exchange_is_the_vote_as_computed_by_hand():
    _, states, _ = voted()
    start = quadratic.PARAMS
    worth = [np.linalg.norm(start[name]["kernel"], axis=0) for name in ("dense", "head")]
    for step in range(ITERATIONS + 1):
        before, after = states[step], states[step + 1]
        live = [np.asarray(bits) for bits in before.method.keep]
        votes = [best(trained(i, before.params), live, counts_at(step)) for i in range(6)]
        for layer, count in enumerate(counts_at(step)):
            tally = np.sum([vote[layer] for vote in votes], axis=0)
            order = sorted(range(len(tally)), key=lambda f: (-tally[f], -worth[layer][f], f))
            kept = np.isin(np.arange(len(tally)), order[:count])
            np.testing.assert_array_equal(after.method.keep[layer], kept)
            pairs = itertools.combinations([vote[layer] for vote in votes], 2)
            agree = np.mean([np.mean(one == two) for one, two in pairs])
            assert after.method.agreement[step, layer] == pytest.approx(agree, abs=1e-6)


def test_weights_are_rewound_masks_nested_and_a_filter_takes_its_bias_along():
    _, states, _ = voted()
    for before, after in itertools.pairwise(states[: ITERATIONS + 2]):
        chex.assert_trees_all_equal(after.params, masks.apply(after.masks, quadratic.PARAMS))
        for new, old in zip(after.method.keep, before.method.keep, strict=True):
            assert not np.any(np.asarray(new) & ~np.asarray(old))
        for name, bits in zip(("dense", "head"), after.method.keep, strict=True):
            np.testing.assert_array_equal(after.masks[name]["bias"], bits)
            kernel = np.asarray(after.masks[name]["kernel"])
            np.testing.assert_array_equal(kernel, np.broadcast_to(bits, kernel.shape))
    for state in states[ITERATIONS + 1 :]:  # and training leaves the mask as it is
        chex.assert_trees_all_equal(state.masks, states[-1].masks)
        assert not np.any(quadratic.flatten(state.params)[~_flat(state.masks)])
    assert np.any(quadratic.flatten(states[-1].params) != quadratic.flatten(states[3].params))


def _flat(tree):
    return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize("module", [mpfl, pooled_filters])
def test_one_node_is_iterative_magnitude_pruning_with_rewinding(module):
    """Train, prune the smallest of what is left, rewind, repeat, on one node's or pooled data."""
    algorithm = make(module)
    is_vote = module is mpfl
    states, _ = run(algorithm, ids=[3], num_rounds=ITERATIONS + 1)
    mean = None if is_vote else np.asarray(PEOPLE.examples["inputs"]).mean(axis=0)
    live, params = [np.ones(4, bool), np.ones(2, bool)], quadratic.PARAMS
    for step, state in enumerate(states[1:]):
        live = best(trained(3, params, mean), live, counts_at(step))
        params = masks.apply(
            {
                name: {"bias": bits, "kernel": jnp.broadcast_to(bits, leaf["kernel"].shape)}
                for (name, leaf), bits in zip(quadratic.PARAMS.items(), live, strict=True)
            },
            quadratic.PARAMS,
        )
        chex.assert_trees_all_equal(tuple(map(np.asarray, state.method.keep)), tuple(live))
        chex.assert_trees_all_equal(state.params, params)


def test_averaged_filters_rank_the_plain_mean_of_the_clients_weights():
    algorithm = make(averaged_filters)
    states, history = run(algorithm, num_rounds=ITERATIONS + 1)
    for step, (before, after) in enumerate(itertools.pairwise(states)):
        everybody = [trained(i, before.params) for i in range(6)]
        mean = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *everybody)
        live = [np.asarray(bits) for bits in before.method.keep]
        wanted = tuple(best(mean, live, counts_at(step)))
        chex.assert_trees_all_equal(tuple(map(np.asarray, after.method.keep)), wanted)
    traffic = charge(algorithm, history[-1], states[-1])
    dense = 6 * 32 * quadratic.NUM_WEIGHTS
    assert traffic.uplink.values == dense
    assert traffic.published["filter_masked"] == (dense, 6 * NUM_FILTERS)


def test_averaged_filters_go_through_a_robust_aggregator():
    algorithm = make(averaged_filters, protocol=setup(aggregator=aggregators.median()))
    (_, first, second), _ = run(algorithm, num_rounds=2)
    everybody = [trained(i, first.params) for i in range(6)]
    middle = jax.tree.map(lambda *leaves: np.median(leaves, axis=0), *everybody)
    wanted = tuple(best(middle, [np.ones(4, bool), np.ones(2, bool)], counts_at(1)))
    chex.assert_trees_all_equal(tuple(map(np.asarray, second.method.keep)), wanted)


def test_random_filters_follow_from_the_seed_and_do_not_travel():
    algorithm = make(random_filters)
    states, history = run(algorithm)
    assert [int(bits.sum()) for bits in states[-1].method.keep] == [2, 1]
    assert all(charge(algorithm, m, states[-1]).downlink.masks == 0 for m in history)


def test_examples_may_vote_and_a_share_of_what_is_left_may_go():
    algorithm = make(votes="examples", prune_fraction_per_step=0.4, consensus="majority")
    states, _ = run(algorithm, num_rounds=2)
    sizes = np.array([3, 5, 2, 8, 4, 6])
    live = [np.ones(4, bool), np.ones(2, bool)]
    counts = (4 - round(0.4 * 4), 2 - round(0.4 * 2))
    votes = [best(trained(i, quadratic.PARAMS), live, counts) for i in range(6)]
    for layer, bits in enumerate(states[2].method.keep):
        tally = sizes @ np.array([vote[layer] for vote in votes])
        np.testing.assert_array_equal(bits, 2 * tally > sizes.sum())


@pytest.mark.slow
@pytest.mark.parametrize(
    "module", [mpfl, *(pytest.param(m, marks=SLOW) for m in (averaged_filters, pooled_filters))]
)
def test_the_exchange_that_prunes_nothing_may_be_left_out(module):
    """The later rounds are the same, masks and charges included, and it costs nothing."""
    own: dict[str, Any] = {"consensus": "top_k"} if module is mpfl else {}
    algorithm, states, history = voted() if module is mpfl else (a := make(module), *run(a))
    shorter = make(module, skip_first_exchange=True, **own)
    assert [stage.num_rounds for stage in shorter.stages] == [ITERATIONS, ROUNDS]
    found, told = run(shorter)
    later = zip(states[2:], found[1:], strict=True)
    chex.assert_trees_all_equal(found[0].params, states[1].params)
    for wanted, state in later:
        assert state.round == wanted.round - 1
        for name in ("params", "masks", "masks_id", "server"):
            chex.assert_trees_all_equal(getattr(state, name), getattr(wanted, name))
        chex.assert_trees_all_equal(state.method.keep, wanted.method.keep)
        chex.assert_trees_all_equal(state.method.agreement, wanted.method.agreement[1:])
    charged = [charge(shorter, m, s) for m, s in zip(told, found[1:], strict=True)]
    assert charged == [
        charge(algorithm, m, s) for m, s in zip(history[1:], states[2:], strict=True)
    ]
    if module is mpfl:
        total = sum(sum(traffic.published["filter_masked"]) for traffic in charged[:ITERATIONS])
        assert total == agreement_bits(NUM_FILTERS, 6, ITERATIONS - 1)


def test_no_exchange_follows_once_enough_is_pruned():
    algorithm = make(stop_sparsity=0.1)
    states, history = run(algorithm, num_rounds=ITERATIONS + 1)
    assert [int(m.num_participating) for m in history] == [6, 6, 0]  # a quarter goes at first
    chex.assert_trees_all_equal(states[3]._replace(round=states[2].round), states[2])
    traffic = charge(algorithm, history[2], states[3])
    assert (traffic.uplink_bits, traffic.downlink_bits, traffic.clients) == (0, 0, ())
    assert set(map(tuple, traffic.published.values())) == {(0, 0)}


def assert_is_fedavg(states):
    """See that plain FedAvg leads from the first of some states to the others, to the bit."""
    plain = fedavg.build(fedavg.FedAvg(), quadratic.task(setup()))
    play, members = jax.jit(plain.stages[0].round), quadratic.cohort(plain, range(6))
    state = plain.init(quadratic.PARAMS, {})
    state = state._replace(params=states[0].params, masks=states[0].masks)
    for expected in states[1:]:
        key = jax.random.fold_in(KEY, expected.round - 1)
        state, _, _ = play(key, state, members, PEOPLE)
        chex.assert_trees_all_equal(state.params, expected.params)


def test_what_the_server_remembers_of_a_trained_start_is_rewound_too():
    server = server_optimizers.fedavgm(learning_rate=1.0, momentum=0.9)
    algorithm = make(protocol=setup(server=server), dense_rounds=2, consensus="top_k")
    states, _ = run(algorithm, num_rounds=2 + ITERATIONS + 1)
    started, agreed = states[2], states[-1]
    assert np.all(quadratic.flatten(optax.tree.get(started.server, "trace")) != 0)
    chex.assert_trees_all_equal(agreed.server, server_optimizers.init(server, agreed.params))
    chex.assert_trees_all_equal(agreed.params, masks.apply(agreed.masks, started.params))


def test_training_is_fedavg_under_the_mask_to_the_bit():
    _, states, _ = voted()
    assert_is_fedavg(states[ITERATIONS + 1 :])


# Removal -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_is_pruned_can_be_removed_exactly():
    """Masks by filter and by channel compute the same, whatever stands where channels are gone."""
    module = resnet.ResNet(
        widths=(4, 8), depths=(1, 1), num_classes=3, norm="batch", block="plain", stem="cifar"
    )
    model = adapters.from_linen(module, input_shape=(6, 6, 3))
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(
        lambda leaf: jnp.asarray(rng.uniform(0.2, 0.9, leaf.shape), leaf.dtype),
        jax.eval_shape(model.init, KEY),
    )
    params, state = drawn
    inputs = jnp.asarray(rng.normal(size=(2, 6, 6, 3)), jnp.float32)
    channels = groups.analyze(model.predict, params, state, inputs)
    layers = filters.layers(channels, params)
    keep = tuple(jnp.arange(group.size) % 4 != 1 for group in layers)
    expand = functools.partial(filters.to_masks, channels, layers)
    own = jax.jit(lambda keep: expand(keep, params, drops="filters"))(keep)
    removed = jax.jit(lambda keep: expand(keep, params, drops="channels"))(keep)
    sizes = [int(masks.num_kept(mask).sum()) for mask in (own, removed)]
    assert sizes[1] < sizes[0] < sum(trees.sizes(params))
    predict = jax.jit(model.predict)
    small = masks.apply(removed, params)
    wanted = predict(small, state, inputs)
    np.testing.assert_allclose(predict(masks.apply(own, params), state, inputs), wanted, rtol=1e-6)
    anything = jax.tree.map(
        lambda a, b, leaf: jnp.where(b, leaf, jnp.where(a, leaf * 3.0 - 7.0, 0.0)),
        own,
        removed,
        params,
    )
    np.testing.assert_allclose(predict(anything, state, inputs), wanted, rtol=1e-6)
    # A layer's bits stand in its kernel, normalization included.
    paths = dict(zip(trees.paths(own), jax.tree.leaves(own), strict=True))
    for group, bits in zip(layers, keep, strict=True):
        for member in group.members:
            mask = np.moveaxis(np.asarray(paths[member.path]), member.axis, 0)
            if member.role != "filter":
                np.testing.assert_array_equal(mask, bits)
            assert not mask[~np.asarray(bits)].any()


def test_training_may_leave_out_what_reads_pruned_channels():
    algorithm = make(pooled_filters, remove="channels")
    states, history = run(algorithm, num_rounds=ITERATIONS + 1)
    assert np.all(np.asarray(states[2].masks["head"]["kernel"]))  # not before the last exchange
    read = np.asarray(states[-1].masks["head"]["kernel"])
    dense, head = map(np.asarray, states[-1].method.keep)
    assert (dense.sum(), head.sum()) == (2, 1)
    np.testing.assert_array_equal(read, np.outer(dense, head))
    np.testing.assert_array_equal(history[-1].num_live, states[-1].method.removed_kept)


# Traffic -------------------------------------------------------------------------------------


def agreement_bits(num_filters: int, num_clients: int, num_prune_steps: int) -> int:
    """Charge the agreement: a bit a filter, up and down, in every exchange, of every client.

    The exchange that prunes nothing counts, too; initial weights follow from a seed.
    """
    return (num_prune_steps + 1) * num_clients * 2 * num_filters


def test_the_closed_form_of_the_agreement():
    """The specification's figures: bytes of a mask, and of ten exchanges with ten nodes."""
    assert agreement_bits(2_752, 10, 9) == 8 * 68_800
    cases = [
        (vgg.vgg11(norm="none", input_shape=(32, 32, 3), num_classes=100), 2_752, 9_217_728, 344),
        (
            models.resnet18(
                norm="batch", input_shape=(64, 64, 3), num_classes=100, stem="imagenet"
            ),
            4_800,
            11_166_912,
            600,
        ),
        (
            models.resnet34(
                norm="batch", input_shape=(64, 64, 3), num_classes=100, stem="imagenet"
            ),
            8_512,
            21_267_648,
            1_064,
        ),
    ]
    for model, num_filters, num_weights, num_bytes in cases:
        params, _ = jax.eval_shape(model.init, KEY)
        kernels = [
            leaf
            for path, leaf in zip(trees.paths(params), jax.tree.leaves(params), strict=True)
            if filters.convolutions(path, leaf)
        ]
        assert sum(leaf.shape[-1] for leaf in kernels) == num_filters == 8 * num_bytes
        assert sum(trees.sizes(kernels)) == num_weights


def test_all_filters_of_vgg11_are_found():
    model = vgg.vgg11(norm="none", input_shape=(32, 32, 3), num_classes=100)
    params, state = jax.eval_shape(model.init, KEY)
    inputs = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    layers = filters.layers(groups.analyze(model.predict, params, state, inputs), params)
    assert [group.size for group in layers] == [64, 128, 256, 256, 512, 512, 512, 512]


def test_the_ledger_is_the_closed_form():
    algorithm, states, history = voted()
    charged = [charge(algorithm, m, s) for m, s in zip(history, states[1:], strict=True)]
    agreed = charged[: ITERATIONS + 1]
    total = sum(sum(traffic.published["filter_masked"]) for traffic in agreed)
    assert total == agreement_bits(NUM_FILTERS, 6, ITERATIONS)
    # Measured: the first mask says nothing, the last goes down in the first round of training.
    assert [t.downlink_bits for t in agreed[:2]] == [0, 0]
    for traffic, kept in zip(charged, [(4, 2), (3, 2), (2, 1)], strict=False):
        partly = sum(8 for k, size in zip(kept, (4, 2), strict=True) if k < size)
        assert traffic.uplink.masks == 6 * partly  # a byte a layer that is not whole
        assert traffic.uplink._replace(framing=0, masks=0) == (0, 0, 0, 0, 0)
    first, second = charged[ITERATIONS + 1 :]
    assert (first.downlink.masks, second.downlink.masks) == (6 * 2 * 8, 0)
    masked = 32 * (2 * 6 + 1 * 4 + 6)  # filters of 6 and 4 weights; all 6 biases
    removed = 32 * (2 * 6 + 1 * 2 + 3)
    for traffic in (first, second):
        assert traffic.published["filter_masked"] == (6 * masked, 6 * masked)
        assert traffic.published["channel_removed"] == (6 * removed, 6 * removed)
        assert traffic.uplink.values == 6 * (masked - 32 * 3)  # pruned biases do not travel


@pytest.mark.slow  # the ledger's table has the same among its cases
def test_a_trained_start_goes_down_once_to_everybody():
    algorithm = make(dense_rounds=1)
    state = algorithm.init(quadratic.PARAMS, {})
    everyone = quadratic.cohort(algorithm, range(6)).states
    received = []
    plays = [jax.jit(stage.round) for stage in algorithm.stages]
    for index, ids in ((0, [0, 1, 2]), (1, [0, 1, 3]), (1, [0, 1, 4]), (1, [2, 3, 4])):
        members = quadratic.cohort(algorithm, ids)
        members = members._replace(states=trees.take_rows(everyone, jnp.asarray(ids)))
        before = state
        state, rows, metrics = plays[index](KEY, state, members, PEOPLE)
        everyone = jax.tree.map(
            lambda all_, new, ids=ids: all_.at[jnp.asarray(ids)].set(new), everyone, rows
        )
        traffic = charge(algorithm, metrics, state)
        live = 32 * int(masks.num_kept(before.masks).sum())
        received.append(traffic.downlink.values // live)
        assert traffic.published["values"].downlink == traffic.downlink.values
    assert received == [3, 3, 1, 1]  # all for training; all; client 4; client 2
    assert not np.array_equal(state.params["dense"]["bias"], jnp.zeros(4))  # the start moved


# Errors and resuming -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 1.0},
        {"num_prune_steps": 0},
        {"prune_fraction_per_step": 1.0},
        {"votes": "all"},
        {"remove": "all"},
        {"stop_sparsity": 1.5},
        {"dense_rounds": -1},
        {"vote_epochs": 0},
        {"layers": "dense"},
    ],
    ids=lambda options: "".join(options),
)
def test_wrong_settings_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        make(**options)


def test_a_network_without_filters_is_refused():
    with pytest.raises(ValueError, match="there are no filters to prune: the network has no"):
        make(layers="convolutions")


def half(ballot, quota):
    """Keep every second filter; a rule of consensus of somebody's own."""
    del quota
    return jnp.arange(ballot.votes.shape[0]) % 2 == 0


def test_a_consensus_rule_is_found_by_name_wherever_it_is():
    algorithm = make(consensus=f"{half.__module__}:half")
    states, _ = run(algorithm, num_rounds=1)
    assert [bits.tolist() for bits in states[-1].method.keep] == [
        [True, False, True, False],
        [True, False],
    ]
    with pytest.raises(
        ConfigError, match=r"method\.consensus must be one of .* did you mean 'top_k'"
    ):
        make(consensus="topk")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "stages"),
    [
        ({}, ["agree", "agree", "train"]),
        pytest.param(
            {"dense_rounds": 2, "num_prune_steps": 2, "votes": "examples", "remove": "channels"},
            [*["start"] * 2, *["agree"] * 3, *["train"] * 2],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_killed_in_any_stage_it_resumes_to_the_same_bits(tmp_path, options, stages):
    algorithm = make(
        model=quadratic.NORMALIZED,
        protocol=setup(num_rounds=stages.count("train")),
        **{"num_prune_steps": 1, **options},
    )
    uniform = sampling.uniform(num_clients=6, cohort_size=4)
    parts = resuming.parts(
        quadratic.NORMALIZED,
        algorithm,
        PEOPLE,
        sampling.with_dropout(uniform, probability=0.2),
    )
    lines = resuming.assert_resumes(parts, tmp_path, stops=range(2, len(stages) + 1), eval_every=9)
    assert [line["stage"] for line in lines] == stages
    assert all(
        line["mask"]["clients_per_weight"] > 0 for line in lines
    )  # the agreement trains, too
    for line in lines:
        assert ("agreement" not in line["method"]) == (line["stage"] != "agree")
    first = next(line for line in lines if line["stage"] == "agree")
    assert first["method"]["agreement"] == [1.0, 1.0]  # nobody prunes in the first exchange
