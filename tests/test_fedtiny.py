"""FedTiny against its paper: schedules, pool, selection, exchange, and what a run must keep."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjaxprune import masks, models, trees
from fedjaxprune.costs import ledger, storage_models
from fedjaxprune.experiment.run import round_costs
from fedjaxprune.federated import batch_norm, local_training, sampling, sparse_gradients
from fedjaxprune.methods import fedtiny
from fedjaxprune.models import adapters, heads, layers, vgg
from fedjaxprune.pruning import candidates, drop_and_grow, schedules
from fedjaxprune.rounds import protocol, training
from fedjaxprune.structure import jaxprs
from fedjaxprune.types import Broadcast, Message, PrunerInputs, client_data
from fedjaxprune.wire import format as wire_format
from fedjaxprune.wire import messages
from tests import quadratic, resuming

KEY = jax.random.key(5)
PEOPLE = quadratic.population()
SERVER = [0, 1, 2]  # rows that `quadratic.task` gives the server


def setup(num_rounds=6, **changes):
    base = protocol.Protocol(
        num_rounds=num_rounds, batcher=quadratic.full_batches(2), optimizer=optax.sgd(0.1)
    )
    return base._replace(**changes)


def tiny(task=None, **options):
    settings = {
        "sparsity": 0.6,
        "pool_size": 4,
        "server_epochs": 1,
        "drop_fraction": 0.6,
        "prune_every": 2,
        **options,
    }
    task = quadratic.task(setup(), model=quadratic.NORMALIZED) if task is None else task
    return fedtiny.build(fedtiny.FedTiny.model_validate(settings), task)


@functools.cache
def play(ids=(0, 1, 2, 3, 4, 5), **options):
    """Run all stages with these clients: the states from the start, and the metrics."""
    algorithm = tiny(**options)
    state = algorithm.init(quadratic.PARAMS, quadratic.NORMALIZED_STATE)
    members = quadratic.cohort(algorithm, ids)
    states, history = [state], []
    for stage in algorithm.stages:
        run = jax.jit(stage.round)
        for _ in range(stage.num_rounds):
            key = jax.random.fold_in(KEY, state.round)
            state, rows, metrics = run(key, state, members, PEOPLE)
            members = members._replace(states=rows)
            states.append(state)
            history.append(metrics)
    return algorithm, states, history


def points(client_id):
    rows = PEOPLE.order[PEOPLE.offsets[client_id] : PEOPLE.offsets[client_id + 1]]
    return np.asarray(PEOPLE.examples["inputs"])[np.asarray(rows)]


def candidate(state, index):
    return candidates.by_magnitude(state.params, state.method.counts[index], masks.is_kernel)


# Schedules -----------------------------------------------------------------------------------


def test_the_swapped_fractions_are_the_published_ones():
    fraction = drop_and_grow.cosine_decay(initial=0.3, until=100)
    due = drop_and_grow.every(period=10, until=100)
    rounds = [r for r in range(1, 301) if due(jnp.int32(r - 1))]
    assert rounds == list(range(10, 101, 10))
    found = [round(float(schedules.evaluate(fraction, jnp.int32(r - 1))), 3) for r in rounds]
    assert found == [0.293, 0.271, 0.238, 0.196, 0.15, 0.104, 0.062, 0.029, 0.007, 0.0]


def test_the_pool_costs_a_tenth_of_a_dense_model():
    assert [candidates.pool_size(d) for d in (0.1, 0.05, 0.01, 0.005, 0.001)] == [1, 2, 10, 20, 100]
    assert candidates.pool_size(1.0) == 1


@pytest.mark.slow
def test_the_blocks_of_resnet18_and_their_turns():
    model = models.resnet18(input_shape=(32, 32, 3), num_classes=10, norm="batch")
    paths = jaxprs.reading_order(model, input_shape=(32, 32, 3))
    prunable = masks.excluding(masks.is_kernel, "conv_1/kernel")
    params, _ = jax.eval_shape(model.init, KEY)
    flags = masks.prunable_leaves(params, prunable)
    kernels = [p for p, flag in zip(trees.paths(params), flags, strict=True) if flag]
    sizes = dict(zip(trees.paths(params), trees.sizes(params), strict=True))
    blocks = drop_and_grow.by_stage(paths)(kernels)
    totals = np.bincount(blocks, weights=[sizes[path] for path in kernels])
    assert totals.tolist() == [147_456, 524_288, 2_097_152, 8_388_608 + 5_120]
    assert sizes["conv_1/kernel"] == 1_728
    assert sum(totals) + 1_728 == 11_164_352
    assert sum(trees.sizes(params)) == 11_173_962

    counts = drop_and_grow.counts(
        fraction=drop_and_grow.cosine_decay(initial=0.3, until=100),
        period=10,
        until=100,
        blocks=drop_and_grow.by_stage(paths),
        order="backward",
        prunable=prunable,
    )
    # Layers of 100 weights, so that counts are percentages rounded up.
    small = trees.map_with_path(lambda path, leaf: jnp.ones([10, 10], jnp.bool_), params)
    turns, swapped = [], []
    for r in range(1, 101):
        found = dict(
            zip(trees.paths(small), jax.tree.leaves(counts(small, jnp.int32(r - 1))), strict=True)
        )
        active = {path for path, number in found.items() if number > 0}
        if active:
            (block,) = {
                block for path, block in zip(kernels, blocks, strict=True) if path in active
            }
            turns.append(block)
            swapped.append({int(found[path]) for path in active})
            assert active == {path for path, b in zip(kernels, blocks, strict=True) if b == block}
    assert turns == [3, 2, 1, 0, 3, 2, 1, 0, 3]  # from output to input; nine that move anything
    assert swapped == [{n} for n in (30, 28, 24, 20, 15, 11, 7, 3, 1)]


def test_the_blocks_of_vgg11_are_five_pairs():
    image = {"input_shape": (32, 32, 3), "num_classes": 10}
    model = vgg.vgg11(norm="batch", hidden_sizes=(4096, 4096), pool=7, **image)
    paths = jaxprs.reading_order(model, input_shape=(32, 32, 3))
    kernels = [path for path in paths if path.endswith("kernel") and path != "conv_1/kernel"]
    assert len(kernels) == 7 + 3
    found = drop_and_grow.consecutive(paths, num_blocks=5)(kernels)
    assert found == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_blocks_of_consecutive_layers_are_as_equal_as_can_be():
    names = [f"layer_{i}/kernel" for i in (10, 9, 8, 2, 1, 0, 3)]
    assert drop_and_grow.consecutive(names, num_blocks=3)(sorted(names)) == [2, 1, 0, 1, 2, 0, 0]
    with pytest.raises(ValueError, match="at most the number of prunable layers"):
        drop_and_grow.consecutive(names, num_blocks=8)(names)
    with pytest.raises(ValueError, match="lacks other"):
        drop_and_grow.consecutive(names, num_blocks=1)(["other"])


# The pool ------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.1, 0.01])
def test_candidates_keep_near_the_target_and_differ(density):
    sizes = np.array([9_216, 36_864, 73_728, 294_912, 5_120])
    draw = jax.jit(
        lambda key: candidates.noisy_counts(
            key,
            sizes,
            np.full(5, density),
            noise=0.5,
            num_wanted=density * sizes.sum(),
            tolerance=0.02 * density * sizes.sum(),
        )
    )
    counts = np.stack([draw(key) for key in jax.random.split(KEY, 20)])
    assert np.all(np.abs(counts.sum(axis=1) / (density * sizes.sum()) - 1.0) < 0.02)
    relative = counts / (density * sizes)
    assert np.all(counts >= np.floor(0.5 * density * sizes))
    assert np.all(counts <= 1.5 * density * sizes)
    assert len(np.unique(counts, axis=0)) == 20
    assert relative[:, 0].std() > 0.2  # of a uniform variate of half width 0.5: 0.29


def test_a_layer_keeps_at_least_one_weight_and_at_most_all():
    densities = jnp.array([1e-9, 0.5, 0.29, 7.0])
    sizes = jnp.array([100.0, 9.0, 100.0, 8.0])
    with jax.enable_x64(True):
        assert candidates.counts_of(densities, sizes).tolist() == [1, 4, 29, 8]


def test_where_no_draw_comes_close_the_closest_is_taken():
    counts = candidates.noisy_counts(
        KEY, np.array([4, 4]), np.array([0.5, 0.5]), noise=0.0, num_wanted=7.0, tolerance=0.1
    )
    assert counts.tolist() == [2, 2]


def test_a_candidate_that_is_to_keep_all_keeps_all():
    sizes = np.arange(1_000, 1_020)
    wanted = float(sizes.sum())
    counts = candidates.noisy_counts(
        KEY, sizes, np.ones(20), noise=0.5, num_wanted=wanted, tolerance=0.02 * wanted
    )
    assert counts.tolist() == sizes.tolist()


@pytest.mark.slow
def test_erk_candidates_give_small_layers_more():
    def densities(params):
        return jnp.asarray(candidates.erk(params, 0.25, masks.is_kernel), jnp.float32)

    dense, head = (float(value) for value in jax.jit(densities)(quadratic.PARAMS))
    assert head > dense
    np.testing.assert_allclose(24 * dense + 8 * head, 0.25 * 32, rtol=1e-6)
    np.testing.assert_allclose(head / dense, (6 / 8) / (10 / 24), rtol=1e-6)
    algorithm = tiny(allocation="erk", noise=1.0)
    state = algorithm.init(quadratic.PARAMS, quadratic.NORMALIZED_STATE)
    everyone = quadratic.cohort(algorithm, range(6))
    state, _, _ = jax.jit(algorithm.stages[0].round)(KEY, state, everyone, PEOPLE)
    assert np.all(np.asarray(state.method.counts) >= 1)


@pytest.mark.slow
def test_a_candidate_keeps_the_largest_weights_of_each_layer():
    _, states, _ = play()
    state = states[1]
    for index in range(4):
        made = candidate(state, index)
        for name, count in zip(("dense", "head"), state.method.counts[index], strict=True):
            values = np.abs(np.asarray(state.params[name]["kernel"]))
            kept = np.asarray(made[name]["kernel"])
            assert kept.sum() == count
            assert values[kept].min() >= values[~kept].max()
        assert np.all(made["dense"]["bias"])


# Selection -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_start_has_the_weighted_mean_statistics_of_the_lowest_loss():
    _, states, _ = play()
    prepared, compared = states[1], states[3]
    sizes = np.array([len(points(i)) for i in range(6)])
    mean = sum(n * points(i).mean(axis=0) for i, n in enumerate(sizes)) / sizes.sum()
    var = sum(n * points(i).var(axis=0) for i, n in enumerate(sizes)) / sizes.sum()
    norm = compared.model_state["norm"]
    np.testing.assert_allclose(norm["mean"], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(norm["var"], var, rtol=1e-4, atol=1e-6)

    def loss(index):
        params = masks.apply(candidate(prepared, index), prepared.params)
        inputs = jnp.concatenate([points(i) for i in range(6)])
        logits = quadratic.NORMALIZED.predict(params, compared.model_state, inputs)
        return float(jnp.mean(heads.CLASSES.test_loss(logits, jnp.zeros(len(inputs), int))))

    losses = [loss(index) for index in range(4)]
    np.testing.assert_allclose(compared.method.losses, losses, rtol=1e-4)
    assert compared.method.chosen == np.argmin(losses)
    chosen = candidate(prepared, int(np.argmin(losses)))
    chex.assert_trees_all_equal(compared.masks, chosen)
    chex.assert_trees_all_equal(compared.params, masks.apply(chosen, prepared.params))


@pytest.mark.slow
def test_the_total_variance_is_that_of_all_the_data():
    algorithm = tiny(variance="total")
    state = algorithm.init(quadratic.PARAMS, quadratic.NORMALIZED_STATE)
    everyone = quadratic.cohort(algorithm, range(6))
    for stage in algorithm.stages[:2]:
        state, _, _ = stage.round(jax.random.fold_in(KEY, state.round), state, everyone, PEOPLE)
    mean, var = state.method.statistics
    every = np.concatenate([points(i) for i in range(6)])
    for candidate_mean, candidate_var in zip(mean, var, strict=True):
        np.testing.assert_allclose(candidate_mean, every.mean(axis=0), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(candidate_var, every.var(axis=0), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="the variance 'norm/var' has no mean beside it"):
        batch_norm.add_spread({"norm": {"var": var}}, [var], [var])


@pytest.mark.slow
def test_the_server_trains_on_its_own_examples_alone():
    _, states, history = play()
    rows = np.asarray(PEOPLE.examples["inputs"])[SERVER]
    start = np.asarray(quadratic.flatten(quadratic.PARAMS))
    np.testing.assert_allclose(
        quadratic.flatten(states[1].params),
        start + 0.1 * (rows.mean(axis=0) - start),
        rtol=1e-5,
        atol=1e-6,
    )
    assert history[0].num_participating == 0


def test_after_the_choice_its_index_is_sent_to_those_who_hold_the_candidates():
    """The first two clients of four hold them, one holds nothing, one the chosen masks already."""
    algorithm, states, _ = play()
    state, pool = states[3], states[3].method
    assert (pool.held_id, pool.chosen_id) == (state.masks_id - 1, state.masks_id)
    ids = range(4)
    members = quadratic.cohort(algorithm, ids)
    held = [*[int(pool.held_id)] * 2, 0, int(pool.chosen_id)]
    rows = members.states._replace(masks_held=jnp.array(held, jnp.int32))
    message = messages.whole("model_state", state.model_state)
    message |= messages.values("params", state.params, state.masks)
    named = messages.whole("chosen", np.uint8(pool.chosen)) | message
    in_force = messages.masks_in_force(state.masks, [False, True, False, True])
    known, index, full = (len(wire_format.encode(each)) for each in (message, named, in_force))

    def received(before):
        run = jax.jit(algorithm.stages[3].round)
        _, after, metrics = run(KEY, before, members._replace(states=rows), PEOPLE)
        np.testing.assert_array_equal(after.masks_held, [before.masks_id] * 4)
        charged = ledger.account(metrics, before, algorithm)
        return [
            entry.downlink_bits // 8
            for i in ids
            for entry in charged.clients
            if i in entry.client_ids
        ]

    assert received(state) == [index, index, known + full, known]
    assert index < known + full
    later = state._replace(masks_id=state.masks_id + 1)  # an exchange has changed the masks since
    assert received(later) == [known + full] * 4


def test_with_one_candidate_the_selection_leaves_the_mask():
    _, states, _ = play(pool_size=1)
    chex.assert_trees_all_equal(states[1].masks, states[3].masks)
    assert states[3].masks_id == states[1].masks_id
    moved = states[3].model_state["norm"]["mean"] - states[1].model_state["norm"]["mean"]
    assert np.any(np.asarray(moved) != 0.0)


@pytest.mark.slow
def test_one_candidate_without_readjustment_is_fedavg_under_a_fixed_mask_to_the_bit():
    _, states, _ = play(pool_size=1, drop_fraction=0.0)
    plain = training.training(
        setup(),
        client=local_training.local_sgd(
            quadratic.NORMALIZED.loss, batcher=setup().batcher, optimizer=setup().optimizer
        ),
    )
    state = states[3]
    run = jax.jit(plain.stages[0].round)
    members = quadratic.cohort(plain, range(6))
    for expected in states[4:]:
        key = jax.random.fold_in(KEY, state.round)
        state, _, _ = run(key, state, members, PEOPLE)
        chex.assert_trees_all_equal(state, expected)


@pytest.mark.slow
def test_an_unheard_comparison_leaves_the_first_candidate_in_force():
    algorithm = tiny()
    state = algorithm.init(quadratic.PARAMS, quadratic.NORMALIZED_STATE)
    nobody = quadratic.cohort(algorithm, range(6), [False] * 6)
    for stage in algorithm.stages[:3]:
        state, _, _ = stage.round(jax.random.fold_in(KEY, state.round), state, nobody, PEOPLE)
    assert state.method.chosen == 0
    chex.assert_trees_all_equal(state.masks, candidate(state, 0))
    pruned = jax.tree.map(jnp.logical_not, state.masks)
    assert not np.any(quadratic.flatten(masks.apply(pruned, algorithm.deployed_params(state))))
    everyone = quadratic.cohort(algorithm, range(6))
    state, _, _ = algorithm.stages[3].round(KEY, state, everyone, PEOPLE)
    assert not np.any(quadratic.flatten(masks.apply(pruned, state.params)))


class Normalized(nn.Module):
    """BatchNorm alone."""

    @nn.compact
    def __call__(self, x, train, mask=None):
        return layers.BatchNorm(name="batch")(x, train, mask).reshape(x.shape[0], -1)[:, :2]


def test_statistics_are_exact_means_whatever_the_networks_momentum():
    model = adapters.from_linen(Normalized(), input_shape=(2, 2, 3))
    rng = np.random.default_rng(0)
    inputs = (50.0 + 7.0 * rng.normal(size=(7, 2, 2, 3))).astype(np.float32)
    people = quadratic.population()._replace(
        examples={"inputs": jnp.asarray(inputs), "labels": jnp.zeros(7, jnp.int32)},
        order=jnp.arange(7, dtype=jnp.int32),
        offsets=jnp.array([0, 7], jnp.int32),
    )

    def batch(key, data, step):  # 3, 3 and 1 examples
        del key
        slots = 3 * step + jnp.arange(3)
        return quadratic.Batch(
            inputs=data.examples["inputs"][jnp.minimum(slots, 6)],
            labels=jnp.zeros(3, jnp.int32),
            weights=(slots < 7).astype(jnp.float32),
        )

    batcher = quadratic.Batcher(num_steps=lambda data: jnp.int32(3), batch=batch)
    params, state = jax.jit(model.init)(KEY)
    broadcast = Broadcast(params, masks.full(params), state, jnp.int32(0))
    given = KEY, broadcast, (), client_data(people, jnp.int32(0))
    message, _ = jax.jit(batch_norm.statistics(model.loss, batcher=batcher).update)(*given)
    parts = [inputs[:3], inputs[3:6], inputs[6:]]
    mean = inputs.reshape(-1, 3).mean(axis=0)
    var = sum(len(p) * p.reshape(-1, 3).var(axis=0, ddof=1) for p in parts) / 7
    np.testing.assert_allclose(message.fields["statistics"][0], mean, rtol=1e-5)
    np.testing.assert_allclose(message.fields["statistics"][1], var, rtol=1e-4)
    assert message.weight == 7.0
    moving = batch_norm.moving_statistics(model.loss, batcher=batcher, num_passes=10)
    found, _ = jax.jit(moving.update)(*given)
    left = 0.9**30  # of the broadcast's zeros, after three steps in each of ten passes
    assert np.all(np.abs(found.fields["statistics"][0] / (mean * (1.0 - left)) - 1.0) < 0.1)
    assert found.weight == 7.0


def test_losses_of_sequences_count_labels_and_leave_out_negative_ones():
    labels = jnp.array([[0, 1, -1], [1, -1, -1]])
    outputs = jnp.arange(12.0).reshape(2, 3, 2) ** 2
    batcher = quadratic.Batcher(
        num_steps=lambda data: jnp.int32(1),
        batch=lambda key, data, step: quadratic.Batch(jnp.zeros(2), labels, jnp.ones(2)),
    )
    client = batch_norm.losses(
        lambda params, state, inputs: outputs, loss=heads.CLASSES.test_loss, batcher=batcher
    )
    broadcast = Broadcast(quadratic.PARAMS, masks.full(quadratic.PARAMS), {}, jnp.int32(0))
    message, _ = client.update(KEY, broadcast, (), client_data(PEOPLE, jnp.int32(0)))
    chosen = jax.nn.log_softmax(outputs)[jnp.array([0, 0, 1]), jnp.array([0, 1, 0])]
    expected = -np.mean([chosen[0, 0], chosen[1, 1], chosen[2, 1]])
    np.testing.assert_allclose(message.fields["losses"], expected, rtol=1e-5)
    assert message.weight == 3.0


# Exchange ------------------------------------------------------------------------------------


def test_pairs_are_the_largest_gradients_of_pruned_weights():
    grads = {"a": jnp.array([3.0, -5.0, 0.0, 1.0, -2.0]), "b": jnp.array([0.0, 0.0, 9.0])}
    live = {"a": jnp.array([True, False, False, False, False]), "b": jnp.zeros(3, jnp.bool_)}

    def update(key, broadcast, state, data):
        return Message(fields={"grads": grads}, weight=jnp.float32(1.0)), state

    client = sparse_gradients.top_gradients(
        local_training.Client(init=lambda params: (), update=update),
        num_pairs=lambda masks, r: {"a": 2 * r, "b": 2 * r},
    )
    for r, a, b in ((1, [0.0, -5.0, 0.0, 0.0, -2.0], [0.0, 0.0, 9.0]), (0, [0.0] * 5, [0.0] * 3)):
        broadcast = Broadcast(params=grads, masks=live, model_state={}, round=jnp.int32(r))
        message, _ = client.update(KEY, broadcast, (), client_data(PEOPLE, jnp.int32(0)))
        assert message.fields["grads"]["a"].tolist() == a
        assert message.fields["grads"]["b"].tolist() == b


def test_an_exchange_takes_both_sets_from_the_old_mask():
    pruner = drop_and_grow.drop_and_grow(
        lambda masks, r: jax.tree.map(lambda m: jnp.int32(2), masks)
    )
    params = {"a": jnp.array([5.0, -1.0, 2.0, 0.0, 0.0, 0.0]), "b": jnp.array([1.0, 2.0, 0.0])}
    grads = {"a": jnp.array([9.0, 9.0, 9.0, 0.0, -3.0, 1.0]), "b": jnp.array([7.0, 7.0, 0.0])}
    before = jax.tree.map(lambda leaf: leaf != 0, params)
    after, _ = pruner.update(KEY, before, (), PrunerInputs(params, grads, jnp.int32(0)))
    assert after["a"].tolist() == [True, False, False, False, True, True]
    assert after["b"].tolist() == before["b"].tolist()  # nobody sent anything to grow


@pytest.mark.usual("clients")
@pytest.mark.parametrize("weights", ["examples", "clients"])
def test_training_exchanges_one_block_at_a_time_as_computed_by_hand(weights):
    _, states, history = play(gradient_weights=weights)
    start = 3  # stages before training
    sizes = np.array([len(points(i)) for i in range(6)], float)
    grew = 0
    for r in range(1, 7):
        before, after, metrics = states[start + r - 1], states[start + r], history[start + r - 1]
        assert np.array_equal(history[start + r - 1].num_live, history[start - 1].num_live)
        adjusts = r % 2 == 0
        block = {2: "head", 4: "dense", 6: "head"}.get(r)
        for name in ("dense", "head"):
            old = np.asarray(before.masks[name]["kernel"]).ravel()
            new = np.asarray(after.masks[name]["kernel"]).ravel()
            num_live = old.sum()
            amount = int(np.ceil(0.3 * (1 + np.cos(np.pi * r / 6)) * num_live - 1e-9))
            leaf = trees.paths(quadratic.PARAMS).index(f"{name}/kernel")
            sent = num_pairs(metrics)[:, leaf]
            if not adjusts or name != block:
                assert np.array_equal(old, new)
                assert not sent.any()
                continue
            assert np.all(sent <= min(amount, (~old).sum()))
            values = np.asarray(before.params[name]["kernel"]).ravel()
            place = slice(*_place(name))

            def gradient(client_id, values=values, old=old, place=place):
                centre = quadratic.mean_point(PEOPLE, client_id)[place]
                seen = centre + 0.9 * (values - centre)  # after the first of two steps
                return np.where(old, 0.0, np.where(old, seen, 0.0) - centre)

            total = np.zeros(old.size)
            for client_id in range(6):
                grad = gradient(client_id)
                best = np.argsort(-np.abs(grad), kind="stable")[: min(amount, (~old).sum())]
                share = sizes[client_id] / sizes.sum() if weights == "examples" else 1.0
                total[best] += share * grad[best]
            num = min(amount, np.count_nonzero(total))
            grown = np.argsort(-np.abs(total), kind="stable")[:num]
            trained = np.asarray(after.params[name]["kernel"]).ravel()
            assert np.all(trained[grown] == 0.0)
            assert set(grown) == set(np.flatnonzero(new & ~old))
            assert (old & ~new).sum() == num
            grew += num
        assert np.all(quadratic.flatten(after.params)[~_flat(after.masks)] == 0.0)
    assert grew > 0


def test_clients_are_charged_for_looking_and_for_dense_gradients_of_the_block():
    _, states, history = play()
    costs = [round_costs.of_round(quadratic.profile(), m).training_flops or {} for m in history]
    assert set(costs[0].values()) == {0}  # the server alone
    live = np.asarray(states[1].method.counts).sum()  # of all 4 candidates, both layers
    for cost in costs[1:3]:  # one forward pass over 28 examples, nothing backward
        assert cost["forward"] == 2 * 28 * live
        assert cost["dense_forward"] == 2 * 28 * 4 * 32
        assert cost["input_gradient"] == cost["weight_gradient"] == 0
    kernels = [1, 3]
    for r in range(1, 7):
        cost = costs[2 + r]
        dense, head = np.asarray(history[2 + r].num_live)[kernels].tolist()
        further = {2: 8 - head, 4: 24 - dense}.get(r, 0)  # in round 6 nothing is left to exchange
        assert cost["forward"] == 2 * 56 * (dense + head)  # two local steps
        assert cost["weight_gradient"] == cost["forward"] + 2 * 28 * further  # of which one looks


def _flat(tree):
    return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(tree)])


def _place(name):
    ends = np.cumsum([0, *trees.sizes(quadratic.PARAMS)])
    index = trees.paths(quadratic.PARAMS).index(f"{name}/kernel")
    return ends[index], ends[index + 1]


# Traffic -------------------------------------------------------------------------------------


def test_every_message_is_counted():
    algorithm, states, history = play()
    traffic = [ledger.account(m, s, algorithm) for m, s in zip(history, states[1:], strict=True)]
    counts = np.asarray(states[1].method.counts)
    num_statistics, biases = 2 * quadratic.NUM_WEIGHTS, 4 + 2
    statistics = 6 * 32 * 4 * num_statistics
    assert traffic[0].uplink_bits == traffic[0].downlink_bits == 0
    # Six clients receive four candidates: values and masks; biases are the same in all.
    down, up = traffic[1].downlink, traffic[1].uplink
    assert down.values == 6 * 32 * (counts.sum() + biases)
    assert 0 < down.masks <= 6 * 4 * 32  # bitmaps, or shorter
    assert down.statistics == down.indices == 0
    assert up._replace(framing=0) == (0, 0, 0, statistics, 0)
    # They hold the candidates now, receive the mean statistics, and answer with four losses.
    assert traffic[2].downlink._replace(framing=0) == (0, 0, 0, statistics, 0)
    assert traffic[2].uplink._replace(framing=0) == (6 * 32 * 4, 0, 0, 0, 0)
    live = int(np.asarray(history[2].num_live).sum())
    changed = bool(states[3].masks_id != states[1].masks_id)
    down, up = traffic[3].downlink, traffic[3].uplink
    assert down.values == up.values == 6 * 32 * live
    assert down.statistics == up.statistics == 6 * 32 * num_statistics
    assert up.masks == up.indices == down.indices == 0
    assert down.masks == 6 * 8 * changed  # a byte: they hold the candidates, and learn which it is
    # Round 2 of training: pairs of the head's kernel, whose positions lie among its dead weights.
    sent = num_pairs(history[4])
    leaf = trees.paths(quadratic.PARAMS).index("head/kernel")
    room = 8 - int(history[3].num_live[leaf])
    assert sent.sum() == sent[:, leaf].sum() > 0
    assert traffic[4].uplink.values == 32 * (6 * live + sent.sum())
    bitmaps = 8 * np.count_nonzero((sent[:, leaf] > 0) & (sent[:, leaf] < room))  # of a byte
    assert 0 <= traffic[4].uplink.indices <= bitmaps
    # The published formula: sparse models both ways, and pairs with indices of 3 of 8 weights.
    stored = [t.published["fedrts_f4"] for t in traffic]
    assert [t.published["fedtiny"] for t in traffic[:4]] == stored[:4]
    extra = (32 + 3) * sent.sum()
    assert traffic[4].published["fedtiny"] == (stored[4].uplink + extra, stored[4].downlink)
    shapes = [(4,), (6, 4), (2,), (4, 2)]
    assert stored[1].downlink == 6 * sum(
        storage_models.fedrts_f4([4 * (i == 0), row[0], 2 * (i == 0), row[1]], shapes)
        for i, row in enumerate(counts.tolist())
    )


def num_pairs(metrics):
    return np.asarray(metrics.sent.up["reply"]["grads"].sent_counts)


@pytest.mark.slow
def test_a_client_that_joins_for_the_comparison_receives_the_candidates():
    algorithm = tiny()
    state = algorithm.init(quadratic.PARAMS, quadratic.NORMALIZED_STATE)
    history = []
    for stage, ids in zip(algorithm.stages[:3], ([0, 1], [0, 1], [2, 3]), strict=True):
        members = quadratic.cohort(algorithm, ids)
        state, _, metrics = stage.round(KEY, state, members, PEOPLE)
        history.append(ledger.account(metrics, state, algorithm))
    assert history[2].downlink.values == history[1].downlink.values > 0
    assert history[2].downlink.masks == history[1].downlink.masks > 0


@pytest.mark.slow
def test_dense_candidates_are_sent_though_their_masks_are_full():
    algorithm = tiny(sparsity=0.0, pool_size=2)
    state = algorithm.init(quadratic.PARAMS, quadratic.NORMALIZED_STATE)
    everyone = quadratic.cohort(algorithm, range(6))
    prepare, calibrate, *_ = algorithm.stages
    state, _, _ = prepare.round(KEY, state, everyone, PEOPLE)
    state, _, metrics = calibrate.round(KEY, state, everyone, PEOPLE)
    charged = ledger.account(metrics, state, algorithm)
    assert charged.downlink.values == 6 * 32 * (2 * 32 + 4 + 2)  # biases once
    assert charged.published["fedtiny"].downlink >= charged.downlink.values


# Errors and resuming -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"sparsity": 1.0}, r"sparsity\n.*less than 1"),
        ({"noise": 1.5}, r"noise\n.*less than or equal to 1"),
        ({"selection": "best"}, r"selection\n.*'adaptive' or 'vanilla'"),
        ({"block_order": "random"}, r"block_order\n.*'backward' or 'forward'"),
        ({"variance": "all"}, r"variance\n.*'within' or 'total'"),
        ({"gradient_weights": "all"}, r"gradient_weights\n.*'examples' or 'clients'"),
        ({"pool_size": 0}, r"pool_size\n.*greater than or equal to 1"),
        ({"prune_every": 7}, "method.prune_every must be at most 6, .* got 7"),
        ({"prune_every": 3, "last_prune_round": 2}, "method.prune_every must be at most 2, "),
    ],
)
def test_wrong_options_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        tiny(**options)


def test_without_exchanges_their_period_decides_nothing():
    assert tiny(drop_fraction=0.0, prune_every=500).stages[-1].name == "train"


def test_the_clients_that_calibrate_are_those_that_compare():
    stages = tiny().stages
    assert [stage.name for stage in stages] == ["prepare", "calibrate", "compare", "train"]
    assert [stage.cohort for stage in stages[1:]] == ["same", "same", "sampled"]
    vanilla = tiny(**fedtiny.METHOD.variants["vanilla_selection"]).stages
    assert [stage.name for stage in vanilla] == ["prepare", "compare", "train"]


@pytest.mark.parametrize(
    ("options", "num_rounds", "expected"),
    [
        ({}, 300, (10, 100)),  # the published ones
        ({}, 6, (6, 6)),
        ({"last_prune_round": 4}, 300, (4, 4)),
        ({"last_prune_round": 200}, 50, (10, 50)),
        ({"prune_every": 3}, 300, (3, 100)),
    ],
)
def test_unset_settings_follow_the_run(options, num_rounds, expected):
    assert fedtiny.exchange_rounds(fedtiny.FedTiny(**options), num_rounds) == expected


def test_what_the_network_lacks_is_said_before_anything_runs():
    with pytest.raises(ValueError, match="the network has none: take one with BatchNorm"):
        tiny(quadratic.task(setup()))
    with pytest.raises(ValueError, match=r"method.sparsity must be at most 0.9375 .* got 0.95"):
        tiny(sparsity=0.95)
    with pytest.raises(ValueError, match="keeps its 8 kernel weights outside"):
        tiny(behind_a_convolution(), sparsity=0.75)
    with pytest.raises(ValueError, match="needs examples at the server"):
        tiny(quadratic.task(setup(), model=quadratic.NORMALIZED, num_server_examples=0))


def behind_a_convolution():
    """Make a task as if the head were a convolution that reads the inputs."""
    task = quadratic.task(setup(), model=quadratic.NORMALIZED)
    params = {
        **task.facts.params,
        "head": {
            "bias": jax.ShapeDtypeStruct((2,), jnp.float32),
            "kernel": jax.ShapeDtypeStruct((1, 1, 4, 2), jnp.float32),
        },
    }
    facts = task.facts._replace(
        params=params, reading_order=lambda: ["head/kernel", "dense/kernel"]
    )
    return task._replace(facts=facts)


def test_the_first_convolution_is_never_pruned():
    algorithm = tiny(behind_a_convolution(), sparsity=0.6)
    assert sum(masks.prunable_leaves(quadratic.PARAMS, algorithm.prunable)) == 1
    state = algorithm.init(quadratic.PARAMS, quadratic.NORMALIZED_STATE)
    everyone = quadratic.cohort(algorithm, range(6))
    state, _, _ = jax.jit(algorithm.stages[0].round)(KEY, state, everyone, PEOPLE)
    assert np.all(state.masks["head"]["kernel"])
    # 0.4 of all 32 kernel weights live, of which the first convolution has 8, within 2 %.
    assert abs(int(np.sum(state.masks["dense"]["kernel"])) - (0.4 * 32 - 8)) < 1


@pytest.mark.slow
def test_killed_in_any_stage_it_resumes_to_the_same_bits(tmp_path):
    draw = sampling.with_dropout(sampling.uniform(num_clients=6, cohort_size=4), probability=0.2)
    parts = resuming.parts(quadratic.NORMALIZED, tiny(), PEOPLE, draw)
    lines = resuming.assert_resumes(parts, tmp_path)
    assert [line["stage"] for line in lines] == ["prepare", "calibrate", "compare"] + 6 * ["train"]
