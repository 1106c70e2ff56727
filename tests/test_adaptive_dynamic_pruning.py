"""Adaptive dynamic pruning against its specification: gates, strict steps, uploads, FLOPs."""

import functools
import os
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjaxprune import masks, metrics, trees
from fedjaxprune.costs import flops, ledger
from fedjaxprune.experiment.run import evaluation, round_costs
from fedjaxprune.federated import (
    aggregators,
    gated_updates,
    local_training,
    personalization,
    sampling,
    server_optimizers,
    uplinks,
)
from fedjaxprune.kernels import pooling
from fedjaxprune.methods import adaptive_dynamic_pruning as adp
from fedjaxprune.methods import fedavg, feddp_threshold
from fedjaxprune.models import adapters, gated, layers, resnet, vgg
from fedjaxprune.models import gates as gating
from fedjaxprune.pruning.structured import filters
from fedjaxprune.rounds import facts, simulation
from fedjaxprune.rounds.protocol import Protocol
from fedjaxprune.types import Broadcast, Population, client_data
from fedjaxprune.wire import format as wire_format
from fedjaxprune.wire import messages
from tests import quadratic, resuming

KEY = jax.random.key(11)
SHAPE = (4, 4, 3)
WIDTHS = (4, 6)  # of two gated layers in a chain
OPTIMIZER = optax.chain(optax.add_decayed_weights(0.05), optax.sgd(0.1, momentum=0.9))
SIZES = (5, 9, 3)  # of the clients
GATES = [f"conv_{i}/gate_{part}" for i in (1, 2) for part in ("bias", "kernel")]


def chain(module, **options):
    head = vgg.Head(pool=1, hidden_sizes=(), num_classes=3, dropout=0.0)
    made = module(plan=(WIDTHS[:1], WIDTHS[1:]), head=head, norm="batch", **options)
    return adapters.from_linen(made, input_shape=SHAPE)


def gated_chain(density):
    return chain(gated.GatedVgg, density=density, choice="salient", gate_scale=1.0)


GATED = gated_chain(0.5)


def readers_of(model, shape=SHAPE):
    return facts.of_model(model, inputs=facts.float_inputs(shape)).gate_readers()


XLA_FLAGS = os.environ.get("XLA_FLAGS", "")


def population(seed=0):
    rng = np.random.default_rng(seed)
    total = sum(SIZES)
    return Population(
        examples={
            "inputs": jnp.asarray(rng.normal(size=(total, *SHAPE)), jnp.float32),
            "labels": jnp.asarray(rng.integers(3, size=total), jnp.int32),
        },
        order=jnp.arange(total, dtype=jnp.int32),
        offsets=jnp.asarray(np.concatenate([[0], np.cumsum(SIZES)]), jnp.int32),
    )


PEOPLE = population()


def setup(num_rounds=2, **changes):
    batcher = quadratic.full_batches(2, max_size=max(SIZES))
    return Protocol(num_rounds, batcher, OPTIMIZER)._replace(**changes)


def play(algorithm, model=GATED, num_rounds=2, *, to_the_bit=False):
    """Play rounds with all clients; give the last simulation and the metrics of every round.

    Two programs that are compared `to_the_bit` are compiled as in production (see conftest.py).
    """
    params, state = jax.jit(model.init)(KEY)
    now = simulation.start(algorithm, params, state, num_clients=3)
    ids = jnp.arange(3, dtype=jnp.int32)
    everybody = jnp.ones(3, jnp.bool_)
    is_fused = to_the_bit and "fusion_emitters" in XLA_FLAGS
    advance = jax.jit(
        simulation.advance(algorithm.stages[0], lambda key: (ids, everybody)),
        compiler_options={"xla_cpu_use_fusion_emitters": True} if is_fused else None,
    )
    history = []
    for _ in range(num_rounds):
        now, told = advance(KEY, now, PEOPLE)
        history.append(jax.device_get(told))
    return now, history


def task(protocol, model=GATED):
    if model in (quadratic.MODEL, quadratic.GATED):
        return quadratic.task(protocol, model=model)
    inputs = facts.float_inputs(SHAPE)
    return quadratic.task(protocol, model=model, facts=facts.of_model(model, inputs=inputs))


def dynamic(protocol, model=GATED, **settings):
    return adp.build(adp.AdaptiveDynamicPruning(**settings), task(protocol, model))


def threshold(protocol, model=quadratic.MODEL, *, num_epochs=1, **settings):
    settings = feddp_threshold.FedDPThreshold(**{"layers": "all", **settings})
    return feddp_threshold.build(settings, task(protocol, model)._replace(num_epochs=num_epochs))


@functools.cache
def played(*, density=0.5, to_the_bit=False, **settings):
    """Play a variant once for all laws."""
    model = gated_chain(density)
    algorithm = dynamic(setup(), model, **settings)
    return algorithm, *play(algorithm, model, to_the_bit=to_the_bit)


def charge(algorithm, metrics, state):
    return ledger.account(metrics, state, algorithm)


# Degenerate settings -------------------------------------------------------------------------


class SqueezeConv(nn.Module):
    """Squeeze-and-excitation as its own formula: no choice, nothing kept or counted."""

    features: int

    @nn.compact
    def __call__(self, x, train, mask):
        start = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
        kernel = self.param("gate_kernel", start, (x.shape[-1], self.features))
        bias = self.param("gate_bias", nn.initializers.ones, (self.features,))
        saliency = nn.relu(nn.sigmoid(pooling.global_average_pool(x)) @ kernel + bias[None])
        x = layers.Conv(self.features, 3, 1, name="conv")(x)
        return resnet.NormLayer("batch", name="norm")(x, train, mask) * saliency[:, None, None]


class SqueezeVgg(nn.Module):
    plan: Any
    head: Any
    norm: Any

    @nn.compact
    def __call__(self, x, train, mask=None):
        for i, (width,) in enumerate(self.plan, start=1):
            x = pooling.max_pool(nn.relu(SqueezeConv(width, name=f"conv_{i}")(x, train, mask)))
        return vgg.apply_head(self.head, x, train)


@functools.cache
def squeezed():
    squeeze = chain(SqueezeVgg)
    algorithm = fedavg.build(fedavg.FedAvg(), quadratic.task(setup(), model=squeeze))
    return play(algorithm, squeeze, to_the_bit=True)[0].state


@pytest.mark.slow  # test_models_gated.py compares the networks themselves
def test_open_gates_are_the_squeeze_excitation_network_to_the_bit():
    """With strict steps and salient uploads: then all is touched, and all is salient."""
    _, now, history = played(density=1.0, to_the_bit=True)
    chex.assert_trees_all_equal(now.state.params, squeezed().params)
    assert gating.density(now.state.model_state) == 1.0
    sizes = trees.sizes(now.state.params)
    assert history[-1].num_uploaded.tolist() == [sizes] * 3


@pytest.mark.slow
def test_the_reference_is_fedavg_of_the_squeeze_excitation_network_to_the_bit():
    variant = dict(adp.METHOD.variants["squeeze_excitation"])
    model = gated_chain(variant.pop("model.density"))
    now, _ = play(dynamic(setup(), model, **variant), model, to_the_bit=True)
    chex.assert_trees_all_equal(now.state.params, squeezed().params)
    statistics = {k: v for k, v in now.state.model_state.items() if k != gating.COLLECTION}
    chex.assert_trees_all_equal(statistics, squeezed().model_state)


@pytest.mark.slow
def test_what_is_not_touched_did_not_change_so_that_sending_the_rest_is_sending_all():
    """To the bit, with momentum and weight decay: absent entries are dense averaging's zeros."""
    _, touched, history = played(density=0.25, to_the_bit=True, upload="touched")
    _, dense, _ = played(density=0.25, to_the_bit=True, upload="dense")
    chex.assert_trees_all_equal(touched.state.params, dense.state.params)
    chex.assert_trees_all_equal(touched.state.model_state, dense.state.model_state)
    assert history[0].num_uploaded.sum() < 3 * sum(trees.sizes(dense.state.params))


def test_a_client_does_not_send_back_the_density_that_the_server_set():
    """22 bytes: a float32 and a header of 18."""
    algorithm, now, history = played(density=0.25, upload="dense")
    message = messages.whole("delta", now.state.params) | messages.weight(5)
    given = message | messages.whole("model_state", now.state.model_state)
    statistics = {k: v for k, v in now.state.model_state.items() if k != gating.COLLECTION}
    known = message | messages.whole("model_state", statistics)
    num_bytes, more = (len(wire_format.encode(each)) for each in (known, given))
    assert more - num_bytes == 22
    charged = charge(algorithm, history[0], now.state)
    assert charged.uplink_bits == 3 * 8 * num_bytes
    values = sum(trees.sizes((now.state.params, statistics)))
    assert charged.published[adp.NAME].uplink == 3 * 32 * values


# The strict step -----------------------------------------------------------------------------


def close(path, leaf):
    """Make every gate keep its upper channels, whatever it sees."""
    if path.endswith("gate_kernel"):
        return jnp.zeros_like(leaf)
    return jnp.arange(1.0, leaf.size + 1) if path.endswith("gate_bias") else leaf


@pytest.mark.usual("strict")
@pytest.mark.parametrize("gradient", ["strict", "plain"])
def test_a_strict_step_leaves_alone_what_the_whole_batch_dropped(gradient):
    params, state = jax.jit(GATED.init)(KEY)
    params = trees.map_with_path(close, params)
    start = jax.tree.map(lambda leaf: leaf + 0.25, OPTIMIZER.init(params))  # momentum from before
    batch = setup().batcher.batch(KEY, client_data(PEOPLE, jnp.int32(2)), jnp.int32(0))

    def step(params, state, memory):
        grads, (after, seen) = jax.grad(GATED.loss, has_aux=True)(params, state, batch, KEY)
        updates, now = OPTIMIZER.update(grads, memory, params)
        taken = local_training.LocalStep(
            before=local_training.Local(params, memory, state),
            after=local_training.Local(optax.apply_updates(params, updates), now, after),
            metrics=seen,
            step=jnp.int32(0),
            num_steps=jnp.int32(1),
        )
        return gated_updates.freeze_unused(OPTIMIZER)(taken), taken.after, seen

    strict, plain, seen = jax.jit(step)(params, state, start)
    now = strict if gradient == "strict" else plain
    for layer, width in zip(gating.layers_of(params), WIDTHS, strict=True):
        dropped = np.arange(width) < width // 2
        np.testing.assert_array_equal(~dropped, gating.kept(seen)[layer].total > 0)
        compared = [
            *moved(params, now.params, f"{layer}/"),
            *moved(start[1][0].trace, now.optimizer[1][0].trace, f"{layer}/"),
            *moved(state["batch_stats"], now.model_state["batch_stats"], f"{layer}/"),
        ]
        assert len(compared) == 5 + 5 + 2
        for path, change in compared:
            assert np.any(change[..., ~dropped]), path
            is_still = not np.any(change[..., dropped])
            # What strictness is about: momentum, decay and statistics move it.
            assert is_still == (gradient == "strict"), path


def moved(before, after, prefix):
    paths = trees.paths(before)
    pairs = zip(paths, jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    return [(p, np.asarray(b - a)) for p, a, b in pairs if p.startswith(prefix)]


# Uploads -------------------------------------------------------------------------------------


LARGE = {"input_shape": (32, 32, 3), "num_classes": 10, "norm": "batch", "density": 0.7}


def wide_chain():
    head = vgg.Head(pool=1, hidden_sizes=(), num_classes=3, dropout=0.0)
    options = {"norm": "batch", "density": 0.7, "choice": "salient", "gate_scale": 1.0}
    module = gated.GatedVgg(plan=((64, 128), (256, 512)), head=head, **options)
    return adapters.from_linen(module, input_shape=SHAPE)


@pytest.mark.slow
def test_readers_are_kernels_with_one_gated_maker():
    (only,) = readers_of(GATED)
    assert only == ("conv_2/conv/kernel", 2, "conv_1")
    model = gated.gated_resnet8(input_shape=(8, 8, 1), num_classes=3, norm="batch", density=0.7)
    residual = readers_of(model, (8, 8, 1))
    blocks = [f"stage_{i}_block_1" for i in (1, 2, 3)]
    assert sorted(residual) == [(f"{b}/conv_2/conv/kernel", 2, f"{b}/conv_1") for b in blocks]


@pytest.mark.slow
def test_a_client_sends_its_most_kept_channels_with_their_salient_inputs():
    algorithm, now, history = played()
    (bits,) = [dict(told.sent.up[gated_updates.SALIENT]) for told in history[:1]]
    np.testing.assert_array_equal(
        bits[gated_updates.SALIENT].sent_counts, [[2, 3]] * 3
    )  # round(rho C)
    by_path = dict(zip(trees.paths(now.state.params), history[0].num_uploaded.T, strict=True))
    expected = {
        "conv_1/conv/kernel": 9 * 3 * 2,  # the image's channels are not gated
        "conv_2/conv/kernel": 9 * 2 * 3,
        "conv_1/gate_kernel": 3 * 2,  # all inputs of a salient channel's gate
        "conv_2/gate_kernel": 4 * 3,
        "conv_1/gate_bias": 2,
        "conv_2/gate_bias": 3,
        "conv_1/norm/batch/scale": 2,
        "conv_1/norm/batch/bias": 2,
        "conv_2/norm/batch/scale": 3,
        "conv_2/norm/batch/bias": 3,
        "dense_1/kernel": 6 * 3,
        "dense_1/bias": 3,
    }
    assert {path: counts.tolist() for path, counts in by_path.items()} == {
        path: [count] * 3 for path, count in expected.items()
    }
    values = sum(expected.values())
    statistics = 2 * (2 + 3)  # means and variances; the server has set the density itself
    all_statistics = 2 * sum(WIDTHS) + 1  # and the density
    charged = charge(algorithm, history[0], now.state)
    assert charged.uplink.values == 3 * 32 * values
    assert charged.uplink.statistics == 3 * 32 * statistics
    assert charged.uplink.indices == 3 * 2 * 8  # a bit a channel; each layer fills a byte
    assert charged.published[adp.NAME].uplink == 3 * (32 * (values + statistics) + sum(WIDTHS))
    everything = sum(trees.sizes(now.state.params)) + all_statistics
    assert charged.published[adp.NAME].downlink == 3 * 32 * everything


def test_the_most_kept_are_counted_over_the_round():
    report = {
        "layers": {
            "a/kept": metrics.Mean(total=jnp.array([3.0, 0.0, 5.0, 3.0]), weight=jnp.float32(5.0)),
            "a/through": metrics.zero(),
        }
    }
    for density, kept in ((0.5, [1, 0, 1, 0]), (0.7, [1, 0, 1, 1]), (0.01, [0, 0, 1, 0])):
        bits = gated_updates.most_kept(report, jnp.float32(density))
        np.testing.assert_array_equal(bits["a"], np.array(kept, bool))
    np.testing.assert_array_equal(gated_updates.touched(report)["a"], [True, False, True, True])


@pytest.mark.usual("0.7-0.49")
@pytest.mark.parametrize(("density", "share"), [(0.7, 0.49), (0.656, 0.43)])
def test_a_plain_chain_sends_the_square_of_the_density(density, share):
    model = wide_chain()
    params, _ = jax.eval_shape(model.init, KEY)
    read = readers_of(model)
    wide = dict(zip(trees.paths(params), jax.tree.leaves(params), strict=True))
    bits = {}
    for layer in gating.layers_of(params):
        size = wide[f"{layer}/gate_bias"].shape[0]
        bits[layer] = np.arange(size) < int(gating.num_kept(jnp.float32(density), size))

    @jax.jit
    def kept_of_both():
        both = (
            gated_updates.of_params(bits, params),
            gated_updates.of_readers(bits, read, params),
        )
        return masks.num_kept(jax.tree.map(jnp.logical_and, *both))

    counts = dict(zip(trees.paths(params), np.asarray(kept_of_both()), strict=True))
    behind_others = [f"conv_{i}/conv/kernel" for i in range(2, 5)]
    for path in behind_others:
        _, _, inputs, outputs = wide[path].shape
        kept = [round(density * n) for n in (inputs, outputs)]
        assert counts[path] == 9 * kept[0] * kept[1]
    total = sum(int(counts[path]) for path in behind_others)
    assert total / sum(wide[path].size for path in behind_others) == pytest.approx(share, abs=2e-3)


def test_absent_entries_count_as_no_change_or_for_nobody():
    """Of two clients with known answers, one keeps the first channels, the other the last."""
    points = np.zeros((8, quadratic.NUM_WEIGHTS), np.float32)
    points[:4, 4:28].reshape(4, 6, 4)[:, :, :2] = 1.0
    points[4:, 4:28].reshape(4, 6, 4)[:, :, 2:] = 3.0
    people = Population(
        examples={"inputs": jnp.asarray(points), "labels": jnp.zeros(8, jnp.int32)},
        order=jnp.arange(8, dtype=jnp.int32),
        offsets=jnp.array([0, 4, 8], jnp.int32),
    )
    shared = Protocol(1, quadratic.full_batches(1), optax.sgd(0.5))
    zero = jax.tree.map(jnp.zeros_like, quadratic.PARAMS)
    found = {}
    for name, rule in (("mean", None), ("holders", aggregators.holder_mean())):
        algorithm = dynamic(shared._replace(aggregator=rule), quadratic.GATED)
        state, _, _ = jax.jit(algorithm.stages[0].round)(
            KEY,
            algorithm.init(zero, quadratic.GATED_STATE),
            quadratic.cohort(algorithm, [0, 1], params=zero),
            people,
        )
        found[name] = np.asarray(state.params["dense"]["kernel"])[0]
    np.testing.assert_allclose(found["mean"], [0.25, 0.25, 0.75, 0.75])  # half a step, two clients
    np.testing.assert_allclose(found["holders"], [0.5, 0.5, 1.5, 1.5])


# Density over the rounds, personal gates -----------------------------------------------------


def test_the_warm_up_holds_and_then_follows_a_line():
    schedule = adp.warm_up(density=0.6, num_rounds=100, hold=0.1, until=0.5)
    found = [round(float(schedule(jnp.int32(r))), 4) for r in (0, 9, 10, 20, 30, 49, 50, 99)]
    assert found == [1.0, 1.0, 1.0, 0.9, 0.8, 0.61, 0.6, 0.6]
    sudden = adp.warm_up(density=0.6, num_rounds=10, hold=0.2, until=0.2)
    assert [round(float(sudden(jnp.int32(r))), 4) for r in (1, 2)] == [1.0, 0.6]


def test_the_density_follows_its_schedule_and_waits_where_nobody_is_heard():
    algorithm = dynamic(setup_of_points(), quadratic.GATED, warm_up_fraction=0.25, warm_up_end=0.25)
    run = jax.jit(algorithm.stages[0].round)
    state = algorithm.init(quadratic.PARAMS, quadratic.GATED_STATE)
    members = quadratic.cohort(algorithm, [0, 3])
    found = []
    for present in ([True, True], [False, False], [True, False]):
        state, _, told = run(
            KEY, state, members._replace(participated=jnp.array(present)), quadratic.population()
        )
        kept = gating.kept(told.train)["dense"]
        found.append((float(gating.density(state.model_state)), float(jnp.sum(kept.total))))
    # Two steps of 3 + 8 examples with 4 channels; nobody; two steps of 3 examples with 2.
    assert found == [(1.0, 2 * 11 * 4.0), (1.0, 0.0), (0.5, 2 * 3 * 2.0)]


def setup_of_points(**changes):
    return Protocol(4, quadratic.full_batches(2), optax.sgd(0.1))._replace(**changes)


@pytest.mark.slow
def test_personal_gates_stay_at_home():
    _, now, history = played(gate_sharing="personal")
    start, _ = jax.jit(GATED.init)(KEY)
    flags = masks.prunable_leaves(start, gating.is_gate)
    paths = trees.paths(start)
    assert [p for p, flag in zip(paths, flags, strict=True) if flag] == sorted(GATES)
    first, last = (
        [leaf for leaf, flag in zip(jax.tree.leaves(tree), flags, strict=True) if flag]
        for tree in (start, now.state.params)
    )
    chex.assert_trees_all_equal(first, last)  # the server knows those of the start
    for leaf, begun in zip(now.rows.client.own, first, strict=True):
        assert all(np.any(np.asarray(row - begun)) for row in leaf)  # each client has its own
        assert np.any(np.asarray(leaf[0] - leaf[1]))
    counts = zip(
        history[0].num_uploaded.T, history[0].num_downloaded[0, 0], trees.sizes(start), strict=True
    )
    for (up, down, size), flag in zip(counts, flags, strict=True):
        assert down == (0 if flag else size)
        assert np.all(up == 0) if flag else np.all(up > 0)
    _, others, _ = played()
    assert any(
        np.any(np.asarray(a - b))
        for a, b in zip(*map(jax.tree.leaves, (others.state.params, now.state.params)), strict=True)
    )


def test_personal_parameters_go_on_where_their_client_left_them():
    inner = local_training.local_sgd(
        quadratic.MODEL.loss, batcher=quadratic.full_batches(1), optimizer=optax.sgd(0.5)
    )
    client = personalization.keep_own(inner, is_own=lambda path, leaf: path == "head/bias")
    people = quadratic.population()
    broadcast = Broadcast(quadratic.PARAMS, masks.full(quadratic.PARAMS), {}, jnp.int32(0))
    state, update = client.init(quadratic.PARAMS), jax.jit(client.update)
    mean = quadratic.mean_point(people, 3)[28:30]  # where the bias lies
    for expected in (0.5, 0.75):  # halfway, and halfway again, from a broadcast that stays
        message, state = update(KEY, broadcast, state, client_data(people, jnp.int32(3)))
        np.testing.assert_allclose(state.own[0], expected * mean, rtol=1e-5)
        assert not np.any(message.fields["delta"]["head"]["bias"])
        assert np.any(message.fields["delta"]["head"]["kernel"])


# FLOPs ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_flops_of_a_gated_resnet_are_those_of_the_specification():
    model = gated.gated_resnet32(**LARGE)
    counted = flops.of_model(model, None, jnp.zeros((1, 32, 32, 3)))
    own = [layer for layer in counted if "gate_kernel" in layer.path]
    rest = [layer for layer in counted if layer not in own]
    assert flops.dense(rest).forward == 68_862_592
    assert flops.dense(own).forward == 52_320 - 1_120  # the gates without their biases
    assert flops.dense(own).forward / 68_862_592 < 0.0008
    firsts = [n.path for n in rest if n.path.endswith("conv_1/conv/kernel")]
    seconds = [n.path for n in rest if n.path.endswith("conv_2/conv/kernel")]
    expected = {0.9: 0.855, 0.8: 0.72, 0.7: 0.595, 0.62: 0.50, 0.6: 0.48, 0.5: 0.375}
    alike = [n for n in rest if n.path in (*firsts, *seconds) and "block_1" not in n.path]
    for density, share in expected.items():
        gates = dict.fromkeys(firsts, density) | dict.fromkeys(seconds, density**2)
        weighed = flops.gated(counted, gates)
        blocks = [layer for layer in weighed if layer.path in {n.path for n in alike}]
        ratio = flops.sparse(blocks).forward / flops.dense(blocks).forward
        assert ratio == pytest.approx((density + density**2) / 2, abs=1e-6)
        assert abs(ratio - share) <= 0.0025  # as printed there
        # All of the network, its first layers and gates included: within two parts in a hundred.
        assert flops.sparse(weighed).forward / 68_862_592 == pytest.approx(share, abs=0.02)


def test_the_record_counts_inference_by_what_the_gates_let_through():
    """Gates that keep the upper half, whatever they see, and images with one channel of three."""
    params, state = jax.jit(GATED.init)(KEY)
    params = trees.map_with_path(close, params)
    inputs = jnp.asarray(PEOPLE.examples["inputs"]) * jnp.array([1.0, 0.0, 0.0])[None, None, None]
    test = evaluation.TestSet(inputs=inputs, labels=PEOPLE.examples["labels"])
    look = jax.jit(evaluation.evaluate(GATED, lambda key, inputs: inputs, batch_size=5))
    tested = look(params, state, test)
    shares = {name: float(metrics.value(value)) for name, value in tested.through.items()}
    assert shares["conv_1"] == pytest.approx(1 / 3 * 2 / 4)
    assert 0.0 < shares["conv_2"] <= 0.5 * 0.5 + 1e-6  # a kept channel may be zero after its ReLU
    assert all(value.weight == sum(SIZES) for value in tested.through.values())
    profile = round_costs.profile(
        GATED,
        params,
        inputs,
        preprocess=lambda key, inputs: inputs,
        prunable=masks.is_kernel,
        warn=pytest.fail,
    )
    told: Any = type("Told", (), {"num_live": np.array(trees.sizes(params))})
    found = round_costs.of_inference(profile, told, tested.through)
    first, second, head = 16 * 9 * 3 * 4, 4 * 9 * 4 * 6, 6 * 3
    own = 3 * 4 + 4 * 6
    assert found == {
        "gated": 2 * (round(first / 6) + round(second * shares["conv_2"]) + head + own),
        "open": 2 * (first + second + head + own),
        "without_gates": 2 * (first + second + head),
    }
    assert round_costs.of_inference(profile, told, {}) is None


def test_the_record_counts_training_by_what_the_gates_let_through():
    _, now, history = played()
    profile = round_costs.profile(
        GATED,
        now.state.params,
        PEOPLE.examples["inputs"],
        preprocess=lambda key, inputs: inputs,
        prunable=masks.is_kernel,
        warn=pytest.fail,
    )
    found = round_costs.of_round(profile, history[0]).training_flops
    assert found is not None
    through = gating.through(history[0].train)
    assert [float(value.weight) for value in through.values()] == [2.0 * sum(SIZES)] * 2
    shares = [float(value.total / value.weight) for value in through.values()]
    assert shares[0] == pytest.approx(0.5)  # of an image whose channels are all there
    assert 0.0 < shares[1] <= 0.25
    first, second, rest = 16 * 9 * 3 * 4, 4 * 9 * 4 * 6, 6 * 3 + 3 * 4 + 4 * 6
    examples = 2 * 2 * sum(SIZES)  # two steps, two FLOPs each
    assert found["forward"] == examples * (round(first * 0.5) + round(second * shares[1]) + rest)
    assert found["dense_forward"] == examples * (first + second + rest)
    assert found["weight_gradient"] == found["forward"]


# FedDP's threshold ---------------------------------------------------------------------------


def test_small_weights_become_zero_after_each_epoch_and_may_return():
    """One client, steps of known length: an entry at w goes half of the way to its point."""
    target = np.zeros(quadratic.NUM_WEIGHTS, np.float32)
    target[4:28] = np.linspace(0.1, 2.4, 24)
    people = Population(
        examples={"inputs": jnp.asarray(target)[None], "labels": jnp.zeros(1, jnp.int32)},
        order=jnp.zeros(1, jnp.int32),
        offsets=jnp.array([0, 1], jnp.int32),
    )
    zero = jax.tree.map(jnp.zeros_like, quadratic.PARAMS)
    algorithm = threshold(
        Protocol(1, quadratic.full_batches(4), optax.sgd(0.5)), num_epochs=2, threshold=0.9
    )
    state, _, told = jax.jit(algorithm.stages[0].round)(
        KEY,
        algorithm.init(zero, {"steps": jnp.float32(0.0)}),
        quadratic.cohort(algorithm, [0], params=zero),
        people,
    )
    points = target[4:28]
    after = np.where(0.75 * points > 0.9, 0.75 * points, 0.0)  # two steps
    after = points + 0.25 * (after - points)
    after = np.where(after > 0.9, after, 0.0)
    np.testing.assert_allclose(state.params["dense"]["kernel"].ravel(), after, rtol=1e-6)
    assert 0 < np.sum(after == 0) < np.sum(0.75 * points <= 0.9) + 1
    share = told.train[feddp_threshold.SPARSITY]
    mean = (np.mean(after == 0) + 1.0) / 2.0  # of this layer and the other, which stays at zero
    assert float(metrics.value(share)) == pytest.approx(mean)
    assert algorithm.diagnostics(told) == {feddp_threshold.SPARSITY: pytest.approx(mean)}
    assert told.num_live.tolist()[trees.paths(zero).index("dense/kernel")] == np.sum(after != 0)


def test_what_all_clients_made_zero_is_exactly_zero_and_without_threshold_it_is_fedavg():
    people = quadratic.population()
    ends, sparsity = {}, {}
    for name, algorithm in {
        "fedavg": fedavg.build(fedavg.FedAvg(), quadratic.task(setup_of_points())),
        "none": threshold(setup_of_points(), threshold=0.0),
        "all": threshold(setup_of_points(), threshold=9.0),
    }.items():
        state, _, told = jax.jit(algorithm.stages[0].round)(
            KEY,
            algorithm.init(quadratic.PARAMS, {"steps": jnp.float32(0.0)}),
            quadratic.cohort(algorithm, [0, 1, 3]),
            people,
        )
        ends[name] = state.params
        sparsity[name] = told.train.get(feddp_threshold.SPARSITY)
    rounding = 3e-7  # of three programs, which XLA may optimize each in its own way
    chex.assert_trees_all_close(ends["none"], ends["fedavg"], rtol=rounding)
    for layer in ("dense", "head"):
        assert not np.any(ends["all"][layer]["kernel"])
        own, plain = ends["all"][layer]["bias"], ends["fedavg"][layer]["bias"]
        np.testing.assert_allclose(own, plain, rtol=rounding)
    assert metrics.value(sparsity["all"]) == 1.0


@pytest.mark.parametrize(
    ("changes", "share"),
    [
        ({"server": server_optimizers.fedavg(learning_rate=0.5)}, 0.5),  # half of the way to zero
        ({"uplink": uplinks.top_k(fraction=0.02)}, 1.0),  # of nearly all, nobody sent anything
    ],
)
def test_zeros_of_the_clients_are_the_servers_where_its_step_leads_there(changes, share):
    algorithm = threshold(setup_of_points(**changes), threshold=9.0)
    state, _, _ = jax.jit(algorithm.stages[0].round)(
        KEY,
        algorithm.init(quadratic.PARAMS, {"steps": jnp.float32(0.0)}),
        quadratic.cohort(algorithm, [0, 1, 3]),
        quadratic.population(),
    )
    before, after = quadratic.PARAMS["dense"]["kernel"], state.params["dense"]["kernel"]
    assert np.sum(np.isclose(after, share * before, rtol=1e-5)) >= before.size - 3


def test_layers_count_alike_in_the_sparsity_of_the_threshold():
    params = {"a": {"kernel": jnp.array([[[0.0, 1.0]]])}, "b": {"kernel": jnp.ones((1, 2, 4))}}
    assert feddp_threshold.layer_sparsity(params, filters.convolutions) == 0.25
    assert not filters.convolutions("dense/kernel", jnp.ones((2, 2)))


# Errors and resuming -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"gradient": "lazy"}, "gradient"),
        ({"upload": "all"}, "upload"),
        ({"gate_sharing": "mine"}, "gate_sharing"),
        ({"warm_up_fraction": -0.1}, "warm_up_fraction"),
        ({"warm_up_fraction": 1.0}, "warm_up_fraction"),
        (
            {"warm_up_fraction": 0.6},
            r"warm_up_fraction must be at most warm_up_end \(0.5\), got 0.6",
        ),
    ],
)
def test_wrong_settings_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        adp.AdaptiveDynamicPruning(**settings)


def test_other_wrong_options_are_refused():
    any_client: Any = local_training.Client(init=tuple, update=local_training.local_sgd)  # pyright: ignore
    with pytest.raises(ValueError, match="rule must be 'salient' or 'touched', got 'best'"):
        gated_updates.report(any_client, rule="best")  # pyright: ignore
    with pytest.raises(ValueError, match="threshold"):
        threshold(setup_of_points(), threshold=-1.0)


def test_what_does_not_fit_is_refused_before_anything_runs():
    with pytest.raises(ValueError, match="the network has no gates"):
        dynamic(setup_of_points(), quadratic.MODEL)
    median = setup(aggregator=aggregators.median())
    with pytest.raises(ValueError, match=r"server\.aggregator must be a mean.* 'salient'"):
        dynamic(median)
    dynamic(median, upload="dense")
    by_group = {
        density: gated.gated_resnet8(
            input_shape=SHAPE, num_classes=3, norm="group", density=density
        )
        for density in (0.7, 1.0)
    }
    with pytest.raises(ValueError, match=r"model\.norm must be 'batch'"):
        dynamic(setup(), by_group[0.7])
    dynamic(setup(), by_group[1.0])
    algorithm = threshold(setup_of_points(), layers="convolutions")
    with pytest.raises(ValueError, match="there is nothing to prune"):
        algorithm.init(quadratic.PARAMS, {})


def resumes(folder, stops, model, people, **options):
    """Resume with all that a round carries over: momentum, schedule, own gates, drop-outs."""
    algorithm = dynamic(
        setup(num_rounds=4), model, warm_up_fraction=0.25, warm_up_end=0.75, **options
    )
    draw = sampling.with_dropout(sampling.uniform(num_clients=3, cohort_size=2), probability=0.2)
    return resuming.assert_resumes(
        resuming.parts(model, algorithm, people, draw), folder, stops=stops
    )


@pytest.mark.slow
def test_killed_it_resumes_to_the_same_bits(tmp_path):
    people = quadratic.population(sizes=SIZES)
    resumes(tmp_path, (3,), quadratic.GATED, people)


@pytest.mark.slow
def test_killed_after_any_round_it_resumes_with_personal_gates(tmp_path):
    lines = resumes(tmp_path, (2, 3, 4), GATED, PEOPLE, gate_sharing="personal")
    assert all(line["compute"]["inference_flops"] is not None for line in lines)
