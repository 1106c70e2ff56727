"""FedDIP against its specification: schedules, nested masks, lossless masked uploads, traffic."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjaxprune import masks, models, trees, types
from fedjaxprune import traffic as accounts
from fedjaxprune.costs import ledger
from fedjaxprune.experiment.run import round_costs
from fedjaxprune.federated import local_training, penalties
from fedjaxprune.methods import feddip
from fedjaxprune.pruning import pruners, schedules
from fedjaxprune.rounds import protocol, training
from tests import quadratic
from tests.playing import ROUNDS, STATE, dip, setup, simulate, some

KEY = jax.random.key(5)


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [
        ((0, 1, 25, 49), 0.0),
        ((50, 99), 5e-4),
        ((100, 149), 5.26316e-4),
        ((500,), 7.36842e-4),
        ((950, 999), 9.73684e-4),
    ],
)
def test_the_penalty_climbs_as_in_the_public_code(rounds, expected):
    schedule = feddip.stepped_penalty(max_penalty=1e-3, num_rounds=1000)
    for index in rounds:
        np.testing.assert_allclose(schedule(jnp.int32(index)), expected, rtol=1e-5)


def test_rounds_left_over_belong_to_the_last_segment():
    schedule = feddip.stepped_penalty(max_penalty=1e-3, num_rounds=59)  # 20 segments of 2, 19 over
    assert schedule(jnp.int32(58)) == schedule(jnp.int32(38))
    assert schedule(jnp.int32(37)) < schedule(jnp.int32(38))


def test_fewer_rounds_than_segments_are_refused():
    with pytest.raises(ValueError, match="at least as many rounds; got num_rounds=19"):
        feddip.stepped_penalty(max_penalty=1e-3, num_rounds=19)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"sparsity": 1.0}, "sparsity\n  Input should be less than 1"),
        ({"initial_sparsity": -0.1}, "initial_sparsity\n  Input should be greater than or equal"),
        ({"sparsity": 0.1}, r"initial_sparsity must be at most sparsity \(0.1\), .* got 0.25"),
        ({"mode": "both"}, "should be 'masked', 'regrow', 'dense' or 'unpruned'"),
        ({"max_penalty": 1e-4}, "max_penalty must be 0 or at least 0.0005, .*, got 0.0001"),
        ({"prune_every": 6}, r"method.prune_every must be less than federation.num_rounds \(6\)"),
        ({"sparsity": 0.99}, "method.sparsity must leave at least one of the 32 prunable weights"),
        ({"num_segments": 7}, "at least as many rounds; got num_rounds=6"),
    ],
)
def test_options_outside_their_range_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        dip(**options)(setup())


def expected_kept(index, period=2):
    """Count by hand: 32 prunable weights, the cubic curve at the last revision before `index`."""
    due = index - index % period
    sparsity = 0.75 + (0.25 - 0.75) * (1 - due / ROUNDS) ** 3
    return 32 - round(sparsity * 32)


@pytest.mark.usual("regrow")
@pytest.mark.parametrize("mode", ["masked", "regrow", "dense"])
def test_the_number_of_live_weights_follows_the_curve_exactly(mode):
    _, _, history = simulate(dip(mode=mode)(setup()), some)
    kernels = masks.prunable_leaves(quadratic.PARAMS, masks.is_kernel)
    for index, metrics in enumerate(history):
        assert np.asarray(metrics.num_live)[kernels].sum() == expected_kept(index)


@pytest.mark.usual("dense")
@pytest.mark.parametrize("mode", ["masked", "regrow", "dense"])
def test_dense_weight_gradients_are_charged_where_the_pruned_entries_count(mode):
    """In the published mode nothing depends on them, so a device need not take them."""
    states, _, history = simulate(dip(mode=mode)(setup()), lambda index: ([0, 3], None))
    for index, (before, metrics) in enumerate(zip(states[:-1], history[1:], strict=True), start=1):
        cost = round_costs.of_round(quadratic.profile(), metrics).training_flops
        assert cost is not None
        live = np.asarray(masks.num_kept(before.masks))[[1, 3]]
        assert live.sum() < 32
        assert cost["forward"] == 2 * 22 * live.sum()  # two steps of 3 + 8 examples
        assert cost["input_gradient"] == 2 * 22 * live[1]
        is_dense = {"masked": False, "regrow": index % 2 == 0, "dense": True}[mode]
        assert cost["weight_gradient"] == 2 * 22 * (32 if is_dense else live.sum())


def test_masks_are_nested_in_the_published_mode():
    states, _, _ = simulate(dip()(setup()), some)
    for before, after in itertools.pairwise(states):
        assert not np.any(quadratic.flatten(after.masks) & ~quadratic.flatten(before.masks))


@pytest.mark.slow
def test_masks_regrow_in_the_other_modes():
    # A strong rate in the dense entries lets pruned weights overtake live ones.
    for mode in ("regrow", "dense"):
        strong = setup(optimizer=optax.sgd(0.5), batcher=quadratic.full_batches(4))
        states, _, _ = simulate(dip(mode=mode)(strong), some)
        regrown = [
            np.any(quadratic.flatten(after.masks) & ~quadratic.flatten(before.masks))
            for before, after in itertools.pairwise(states)
        ]
        assert any(regrown), mode


@pytest.mark.slow
def test_sending_only_live_entries_loses_nothing_in_the_published_mode():
    """The public code's order: send dense deltas, mask the aggregate by the old masks, rank."""
    sparsity = schedules.cubic(
        initial_sparsity=0.25, final_sparsity=0.75, begin_round=0, end_round=ROUNDS
    )
    draw = feddip.erk_start(sparsity=0.25, prunable=masks.is_kernel)
    coefficient = feddip.stepped_penalty(max_penalty=0.01, num_rounds=ROUNDS, num_segments=3)
    client = local_training.dense_feedback_sgd(
        quadratic.MODEL.loss,
        batcher=setup().batcher,
        optimizer=setup().optimizer,
        penalties=(penalties.layer_norms(coefficient=coefficient, prunable=masks.is_kernel),),
    )
    revise = pruners.when(schedules.every(2), pruners.prune_to(sparsity))

    def mask_then_rank(key, mask_tree, state, inputs):
        masked = masks.apply(mask_tree, inputs.params)
        return revise.update(key, mask_tree, state, inputs._replace(params=masked))

    dense_upload = training.training(
        setup(),
        client=client,
        pruner=revise._replace(update=mask_then_rank),
        masking=protocol.Masking(
            train=lambda key, state: jax.lax.cond(
                state.round == 0, lambda: draw(key, state.params), lambda: state.masks
            ),
            upload=lambda state: masks.full(state.params),
        ),
    )
    expected = simulate(dense_upload, some)[0][-1]
    result = simulate(dip()(setup()), some)[0][-1]
    chex.assert_trees_all_equal(result.params, expected.params)
    chex.assert_trees_all_equal(result.masks, expected.masks)


def test_traffic_follows_the_closed_form():
    algorithm = dip()(setup())
    _, _, history = simulate(algorithm, lambda r: ([0, 1, 2], None))
    state = algorithm.init(quadratic.PARAMS, STATE)
    for index, metrics in enumerate(history):
        live = 32 if index == 0 else expected_kept(index - 1)  # round 0 is dense both ways
        values = 32 * (live + 6)  # with six biases
        new_masks = index > 0 and (index - 1) % 2 == 0  # revised at the end of rounds 0, 2, 4
        traffic = ledger.account(metrics, state, algorithm)
        assert traffic.uplink.values == traffic.downlink.values == 3 * values
        assert traffic.uplink.indices == traffic.uplink.masks == 0
        assert 0 <= traffic.downlink.masks <= (3 * 32 if new_masks else 0)  # a bitmap, or shorter
        statistics = 3 * 32 * sum(trees.sizes(STATE))
        assert traffic.downlink.statistics == statistics
        assert (
            traffic.uplink.statistics == statistics - 3 * 32
        )  # the gates' density is the server's
        specified = traffic.published["values_and_bitmaps"]
        assert specified.uplink == 3 * values
        assert specified.downlink == 3 * values + (3 * 32 if new_masks else 0)
        scheduled = 0.75 + (0.25 - 0.75) * (1 - index / ROUNDS) ** 3
        zeros = np.asarray(metrics.sent.reports[feddip.ZEROS]).sum() / (3 * 38)
        code = traffic.published["feddip_code"]
        assert code.downlink == 3 * int(32 * (1 - scheduled) * 38)
        assert code.uplink == 3 * int(32 * (1 - zeros) * 38)


@pytest.mark.usual("regrow")
@pytest.mark.parametrize("mode", ["regrow", "dense"])
def test_dense_entries_are_charged_where_they_travel(mode):
    algorithm = dip(mode=mode)(setup())
    _, _, history = simulate(algorithm, lambda r: ([0, 1, 2], None))
    state = algorithm.init(quadratic.PARAMS, STATE)
    dense = 3 * 32 * quadratic.NUM_WEIGHTS
    for index, metrics in enumerate(history):
        uplink_bits = ledger.account(metrics, state, algorithm).uplink.values
        if mode == "dense" or index % 2 == 0:
            assert uplink_bits == dense
        else:
            assert uplink_bits < dense


def test_masks_are_charged_to_those_who_do_not_hold_them_yet():
    algorithm = dip(sparsity=0.25)(setup())  # one revision, at the end of round 0
    groups = [[0, 1], [0, 2], [1, 2], [0, 1], [2, 3]]
    _, _, history = simulate(algorithm, lambda r: (groups[r], None), num_rounds=5)
    assert [int(m.sent.num_masks[m.participated].sum()) for m in history] == [0, 2, 1, 0, 1]


@pytest.mark.parametrize(
    ("num_rounds", "reached"), [(8, "after round 6 of 8, reaches 0.879"), (20, None), (1000, None)]
)
def test_a_run_whose_last_revision_falls_short_says_so(num_rounds, reached):
    """At sparsity 0.9, revised every 5 rounds from 0.5 on, as published."""
    task = quadratic.task(setup(num_rounds=num_rounds))
    notes = feddip.build(feddip.FedDIP(), task).notes
    if reached is None:
        assert notes == ()
    else:
        assert len(notes) == 1
        assert reached in notes[0]


def test_defaults_that_follow_from_the_run_fall_into_it():
    for num_rounds in (1, 2, 4, 30):
        short = setup(num_rounds=num_rounds)
        algorithm = feddip.build(feddip.FedDIP(), quadratic.task(short))
        assert algorithm.stages[0].num_rounds == num_rounds
    few = feddip.build(feddip.FedDIP(sparsity=0.3), quadratic.task(setup()))
    _, _, history = simulate(few, some, num_rounds=1)
    kernels = masks.prunable_leaves(quadratic.PARAMS, masks.is_kernel)
    assert np.asarray(history[0].num_live)[kernels].sum() == 32 - round(0.3 * 32)


def test_shortcuts_are_pruned_where_they_are_asked_for():
    model = quadratic.MODEL._replace(
        init=lambda key: ({"shortcut": quadratic.PARAMS["dense"]}, {"steps": jnp.float32(0.0)})
    )
    without, with_them = (
        feddip.build(
            feddip.FedDIP(sparsity=0.5, prune_shortcuts=flag), quadratic.task(setup(), model=model)
        )
        for flag in (False, True)
    )
    with_them.init(*model.init(KEY))
    with pytest.raises(ValueError, match="nothing to prune"):
        without.init(*model.init(KEY))


def test_the_first_round_trains_under_one_random_erk_draw():
    draw = feddip.erk_start(sparsity=0.5, prunable=masks.is_kernel)
    first, second = draw(KEY, quadratic.PARAMS), draw(jax.random.key(6), quadratic.PARAMS)
    assert np.any(quadratic.flatten(first) != quadratic.flatten(second))
    # ERK, by hand: raw scores (6+4)/24 and (4+2)/8; ε = 16/(10+6) = 1, so nothing is forced dense.
    assert int(first["dense"]["kernel"].sum()) == 10
    assert int(first["head"]["kernel"].sum()) == 6
    assert np.all(first["dense"]["bias"])


def test_shortcuts_of_residual_networks_are_exempt():
    leaf = jnp.zeros([1, 1, 4, 8])
    assert not feddip.without_shortcuts("stage_1/block_0/shortcut/kernel", leaf)
    assert feddip.without_shortcuts("stage_1/block_0/conv_0/kernel", leaf)


@pytest.mark.slow
def test_the_first_draw_on_a_residual_network_has_the_published_layer_sparsities():
    model = models.resnet18(input_shape=(32, 32, 3), num_classes=100, norm="batch")
    params, _ = jax.eval_shape(model.init, KEY)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), params)
    draw = feddip.erk_start(sparsity=0.5, prunable=feddip.without_shortcuts)
    drawn = jax.jit(draw)(KEY, params)
    found = {
        path: round(1 - float(jnp.mean(leaf)), 4)
        for path, leaf in zip(trees.paths(drawn), jax.tree.leaves(drawn), strict=True)
    }
    pruned = {path: sparsity for path, sparsity in found.items() if sparsity}
    assert sorted(pruned.values()) == [0.2836] * 3 + [0.4648] + [0.6439] * 3
    assert pruned["stage_4_block_1/conv_1/kernel"] == 0.4648


def blank(kind, **fields):
    return kind(**{**dict.fromkeys(kind._fields, 0), **fields})


def round_of(index, kept, *, stale):
    """Make the metrics of a round of five clients, as far as formulas read them."""
    num_masks = np.full(5, stale, np.int32)
    sent = blank(accounts.Sent, round=index, client_ids=np.arange(5), num_masks=num_masks)
    sent = sent._replace(up={}, reports={feddip.ZEROS: np.zeros([5, 1], np.int64)})
    return blank(
        types.RoundMetrics,
        num_downloaded=np.tile(kept, (5, 1, 1)),
        num_uploaded=np.tile(kept, (5, 1)),
        participated=np.ones(5, bool),
        num_participating=5,
        sent=sent,
    )


@pytest.mark.parametrize(
    ("network", "classes", "dense", "downloads"),
    [
        ("lenet5", 10, 9_416, (2_591, 1_885, 1_532)),
        ("alexnet", 10, 3_551_066, (977_076, 710_924, 577_848)),
        ("resnet18", 100, 1_712_056, (471_072, 342_754, 278_595)),
    ],
)
def test_downloads_as_the_public_code_counts_them(network, classes, dense, downloads):
    """1000 rounds, 5 clients: 2**20 bits down at final sparsity .8, .9, .95, and up if dense."""
    params = published(network, classes)
    state = blank(types.RoundState, params=params)
    for final, expected in zip((0.8, 0.9, 0.95), downloads, strict=True):
        charge = feddip.code_formula(final_sparsity=final, initial_sparsity=0.5, num_rounds=1000)
        bits = [charge(round_of(r, np.zeros(1, int), stale=False), state) for r in range(1000)]
        assert round(sum(b.downlink for b in bits) / 2**20) == expected
        assert round(sum(b.uplink for b in bits) / 2**20) == dense


def published(network, classes):
    shape = (28, 28, 1) if network == "lenet5" else (32, 32, 3)
    norm = {"norm": "batch"} if network == "resnet18" else {}
    make = getattr(models, network)
    model = make(input_shape=shape, num_classes=classes, **norm)
    return jax.eval_shape(model.init, KEY)[0]


@pytest.mark.usual("lenet5-10-2.299-totals0-with_masks0")
@pytest.mark.parametrize(
    ("network", "classes", "dense", "totals", "with_masks"),
    [
        ("lenet5", 10, 2.299, (0.642, 0.471, 0.386), (0.678, 0.507, 0.421)),
        ("alexnet", 10, 866.96, (240.0, 175.3, 143.0), (253.5, 188.8, 156.5)),
        ("resnet18", 100, 417.98, (120.5, 89.8, 74.4), (126.9, 96.2, 80.9)),
    ],
)
def test_the_traffic_of_a_long_run_is_that_of_the_specification(
    network, classes, dense, totals, with_masks
):
    """1000 rounds, 5 clients, a revision every 5: GiB both ways at final sparsity .8, .9, .95."""
    params = published(network, classes)
    flags = np.array(masks.prunable_leaves(params, feddip.without_shortcuts))
    sizes = np.array(trees.sizes(params))
    num_prunable = int(sizes[flags].sum())
    state = blank(types.RoundState, params=params)
    prunable = feddip.without_shortcuts

    def total_gib(live_at):
        bits = [0, 0]
        for index in range(1000):
            kept = np.where(flags, 0, sizes)  # only sums count: the first leaves are full
            room = np.where(flags, sizes, 0)
            kept += np.clip(live_at(index) - (np.cumsum(room) - room), 0, room)
            metrics = round_of(index, kept, stale=index > 0)  # the specification's upper bound
            charged = ledger.charge_by_formula(metrics, state, prunable=prunable)
            values = sum(charged["values"])
            bits[0] += values
            bits[1] += sum(charged["values_and_bitmaps"]) - values
        return bits[0] / 8 / 2**30, sum(bits) / 8 / 2**30

    def live(final):
        def at(index):
            if index == 0:
                return num_prunable
            due = (index - 1) - (index - 1) % 5  # the last revision before this round
            sparsity = final + (0.5 - final) * (1 - due / 1000) ** 3
            return num_prunable - round(sparsity * num_prunable)

        return at

    digits = 3 if network == "lenet5" else 1
    assert round(total_gib(lambda index: num_prunable)[0], digits if digits == 3 else 2) == dense
    for final, values, masked in zip((0.8, 0.9, 0.95), totals, with_masks, strict=True):
        found = total_gib(live(final))
        assert (round(found[0], digits), round(found[1], digits)) == (values, masked)
