"""The ledger: what it charges is what the encoder writes; formulas are those of the papers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjaxprune import masks, models, trees
from fedjaxprune import traffic as accounts
from fedjaxprune.costs import ledger, storage_models
from fedjaxprune.experiment.folder import summary
from fedjaxprune.federated import cohort as cohort_lib
from fedjaxprune.federated import gated_updates, local_training
from fedjaxprune.federated import personalization as personal_lib
from fedjaxprune.federated.corrections import scaffold
from fedjaxprune.methods import feddip
from fedjaxprune.models import gates
from fedjaxprune.pruning import allocation
from fedjaxprune.rounds import protocol, training
from fedjaxprune.testing import history, scenario
from fedjaxprune.testing.history import Members
from fedjaxprune.traffic import SILENT
from fedjaxprune.types import Broadcast
from fedjaxprune.wire import format as wire_format
from fedjaxprune.wire import messages
from tests import folders, quadratic
from tests.laws import rows
from tests.playing import UPLINKS, dip, plain, setup, simulate, some

is_kernel = masks.is_kernel
FLAGS = masks.prunable_leaves(quadratic.PARAMS, is_kernel)
ABSENT_IS_ZERO = ("feddip_prunetrain", "fedfit")  # what is not sent counts as a change
# Stages in which no client takes part.
AT_SERVER = ("choose", "draw", "prepare", "prune_alone", "settle", "shuffle", "reinitialize")


def cohorts(index):
    ids = tuple((index + j) % 6 for j in range(4))
    return Members(ids, (True, index % 3 != 1, True, index != 4))


def with_personal_masks(inner):
    def update(key, broadcast, state, data):
        odd = (data.size % 2) == 1
        mine = jax.tree.map(
            lambda leaf: (jnp.arange(leaf.size).reshape(leaf.shape) % 3 == 0) == odd,
            quadratic.PARAMS,
        )
        mine = masks.restrict(mine, masks.is_kernel)
        message, state = inner.update(key, broadcast._replace(masks=mine), state, data)
        return message._replace(fields={**message.fields, "masks": mine}), state

    return inner._replace(update=update)


def personal(settings):
    inner = local_training.local_sgd(
        quadratic.MODEL.loss, batcher=settings.batcher, optimizer=settings.optimizer
    )
    return training.training(settings, client=with_personal_masks(inner))


def is_own(path, leaf):
    del leaf
    return path == "head/bias"


def personal_parameters(s):
    def travelling(state):
        return personal_lib.shared(state.masks, is_own=is_own)

    client = local_training.local_sgd(
        quadratic.MODEL.loss, batcher=s.batcher, optimizer=s.optimizer
    )
    return training.training(
        s,
        client=personal_lib.keep_own(client, is_own=is_own),
        masking=protocol.Masking(upload=travelling, download=travelling),
    )


OWN = {"personal_masks": personal, "personal_parameters": personal_parameters}
USUAL = [  # the others share with them what they send
    ("adaptive_dynamic_pruning", "feedback_top_k"),
    ("fedavg/scaffold", "identity"),
    ("feddip", "quantize"),
    ("fedtiny+fednova", "quantize"),
    ("magnitude_masks/one_client", "identity"),
    ("mpfl+started", "identity"),
    ("personal_masks", "identity"),
    ("personal_parameters", "identity"),
    ("snip/of_clients", "identity"),
]
REST = {(name, "identity") for name in (*rows.names(), *OWN)} | {("feddip", one) for one in UPLINKS}
REST |= {("feddip+scaffold", "random_k")}
# What their servers send beside live weights is held to the encoder by `laws.charges_are_written`.
REST = {case for case in REST if rows.family(case[0]) not in ("sr_ste", "top_kast")}
REST.remove(("dpf/straight_through", "identity"))
CASES = USUAL + [pytest.param(*case, marks=pytest.mark.slow) for case in sorted(REST - set(USUAL))]


def make(name, uplink):
    """Build a row, or a method of this module, for ten rounds of training."""
    if name not in OWN:
        changed = {"federation.num_rounds": 10}
        own = {"uplink": uplink, "aggregator": None}  # one would be told which entries were sent
        own["downlink"] = None  # whose lengths are held to laws of their own
        return rows.make(name, adapt=lambda s: s._replace(**own), **changed)
    s = setup(num_rounds=10, uplink=uplink)
    if name == "personal_parameters":
        s = s._replace(correction=scaffold.control_variates())
    state = {"steps": jnp.float32(0.0)}
    return scenario.Scenario(OWN[name](s), quadratic.task(s), quadratic.PARAMS, state)


# What clients send in stages that do not train, and beside their delta in training.
REPLIES = {"calibrate": ("statistics",), "compare": ("losses",), "score": ("grads",)}
# Who explores uploads the squares of how far it moved, or for these how it moved.
EXPLORED = ("autoflip+channels", "autoflip/explored_start")
SCORED = {"ssfl": ("scores",), "wanda": ("squares",)}
REPLIES |= {"agree": ("masks",), "average": ("trained",)}
REPLIES |= {"score_1": ("squares",), "score_2": ("squares",)}  # block by block
REPLIES |= {"gradient": ("grads",), "curvature": ("curvature",), "measure": ("loss",)}
BESIDE = ("control", "effective_steps", "gains", "grads", "model_state")
BESIDE += ("other_gains", "places", "scores")


@pytest.mark.usual(
    "adaptive_dynamic_pruning-feedback_top_k",
    "fedavg/scaffold-identity",
    "personal_masks-identity",
    "snip/of_clients-identity",
)
@pytest.mark.parametrize(("name", "wire_name"), CASES)
def test_what_is_charged_is_what_is_written(name, wire_name, monkeypatch):
    """All stages, and ten rounds of training: catch every client's message, encode it, compare."""
    caught = []

    def keep(fields, sent, masks, weight):
        caught.append((fields, sent, masks, weight))

    inner = UPLINKS[wire_name]
    last = {"sent": ()}

    def update(key, delta, state, sent):
        delta, state = inner.update(key, delta, state, sent)
        last["sent"] = sent
        return delta, state

    run = cohort_lib.run

    def spy(key, update, by_field, broadcast, *rest, **options):
        def told(*arguments):
            message, state = update(*arguments)
            seen = broadcast if isinstance(broadcast, Broadcast) else arguments[1][0]
            wanted = {"delta", "masks", "statistics", "losses", "trained", "scores", "curvature"}
            wanted |= {"deviations", "loss", "move", "squares", gated_updates.SALIENT, SILENT}
            wanted |= {*BESIDE}
            fields = {key: tree for key, tree in message.fields.items() if key in wanted}
            masks = () if isinstance(broadcast, Broadcast) else seen.masks
            jax.debug.callback(keep, fields, last["sent"], masks, message.weight, ordered=True)
            return message, state

        last["sent"] = ()
        return run(key, told, by_field, broadcast, *rest, **options)

    monkeypatch.setattr(cohort_lib, "run", spy)
    made = make(name, inner._replace(update=update))
    algorithm = made.algorithm
    play_round, _ = history.player(made)
    state, everyone = history.start(made)
    names = [stage.name for stage in algorithm.stages for _ in range(stage.num_rounds)]
    states, measured = [state], []
    for index in range(len(names)):
        state, everyone, metrics = play_round(index, state, everyone, cohorts(index))
        states.append(state)
        measured.append(metrics)
    jax.effects_barrier()
    assert len(caught) == 4 * sum(stage not in AT_SERVER for stage in names)
    caught.reverse()

    versions = dict.fromkeys(range(6), 0)
    told = dict.fromkeys(range(6), False)  # what a method tells clients once
    num_pairs = num_silent = 0
    for index, (stage, metrics) in enumerate(zip(names, measured, strict=True)):
        before, after = states[index : index + 2]
        traffic = ledger.account(metrics, before, algorithm)
        charged = {
            client: (entry.uplink_bits, entry.downlink_bits)
            for entry in traffic.clients
            for client in entry.client_ids
        }
        assert traffic.uplink_bits == sum(traffic.uplink) == sum(u for u, _ in charged.values())
        assert traffic.downlink_bits == sum(traffic.downlink)
        if stage in AT_SERVER:
            by_one = name.endswith("one_client") or stage == "prune_alone"
            sends_model = stage == "prune_alone"
            assert charged == (guest(before, after, sends_model=sends_model) if by_one else {})
            continue
        ids, present = cohorts(index)
        assert sorted(charged) == sorted(ids)
        for slot, client in enumerate(ids):
            fields, sent, masks, weight = caught.pop()
            version = int(before.masks_id)
            if stage == "agree" and name == "mpfl+started":
                version = max(version, 1)  # of a client that was sent the start
            is_stale = versions[client] != version
            if rows.family(name) in (*rows.BY_FILTER, "prunetrain"):
                is_new = versions[client] == 0 and stage == "agree" and name == "mpfl+started"
                down = received_by_filter(stage, algorithm, before, is_stale, is_new)
                if stage == "train" and name.startswith("prunetrain"):
                    down += coefficient_bits(before, told[client])
            else:
                down = received(name, stage, algorithm, before, masks, versions[client])
            up = 0
            if present[slot]:
                versions[client] = version
                told[client] |= stage == "train"
                as_pairs = rows.family(name) in ("fedmef", "fedtiny", "rigl")
                if stage in (*REPLIES, "explore"):
                    message = {}
                    moved = ("model_state", "move") if name in EXPLORED else ("deviations",)
                    replies = SCORED.get(name) or REPLIES.get(stage, moved)
                    for field in replies:
                        if rows.family(name) == "snip":  # of live weights
                            message |= messages.values(field, fields[field], before.masks)
                            continue
                        write = bits_by_filter if field == "masks" else messages.whole
                        message |= write(field, reported(name, fields[field]))
                    up = bits_of(message | messages.weight(weight))
                elif fields.get(SILENT):
                    up = bits_of({SILENT: wire_format.counted(np.ones([], np.bool_))})
                    num_silent += 1
                else:
                    if rows.family(name) in (
                        "feddip_prunetrain",
                        "fedfit",
                    ):  # what is not sent counts as a change
                        fields = {**fields, "delta": apply(sent, fields["delta"])}
                    corrected = at_large(name, masks)
                    if rows.family(name) == "fedfit":
                        corrected = scored(name, corrected, fields["masks"]), corrected
                    up = written(inner, fields, sent, corrected, weight, as_pairs=as_pairs)
                    num_pairs += as_pairs and np.count_nonzero(trees_flat(fields["grads"]))
            assert charged[client] == (up, down)
    assert (num_pairs > 0) == (rows.family(name) in ("fedmef", "fedtiny", "rigl"))
    assert (num_silent > 0) == name.startswith("flpqsu")


def bits_of(message):
    return 8 * len(wire_format.encode(message))


def reported(name, tree):
    """Leave out what a method does not score."""
    return {one: {"kernel": tree[one]["kernel"]} for one in tree} if name == "ssfl" else tree


def without_density(state):
    """Leave out what the server set itself: how many channels gates keep."""
    return {name: tree for name, tree in state.items() if name != gates.COLLECTION}


def trees_flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def guest(before, after, *, sends_model):
    """Encode what the client that makes the mask for all receives and sends."""
    down = messages.whole("model_state", before.model_state)
    down |= messages.whole("params", before.params)
    up = bits_of(messages.personal_masks(after.masks, FLAGS))
    if sends_model:
        model = messages.whole("model_state", after.model_state)
        up += bits_of(model | messages.values("params", after.params, after.masks))
    return {0: (up, bits_of(down))}


def received(name, stage, algorithm, before, masks, version):
    """Encode what a client that holds a version of the masks receives, in bits."""
    is_stale = version != int(before.masks_id)
    if stage == "curvature" and name == "grasp/of_clients":  # the model came with the one before
        return bits_of(messages.whole("direction", before.method))
    if stage.startswith("score") or stage in ("gradient", "curvature", "explore"):
        model = messages.whole("model_state", before.model_state)
        model |= messages.values("params", before.params, before.masks)
        own = messages.personal_masks(before.masks, flags_of(algorithm, before.params))
        return bits_of(model) + is_stale * bits_of(own)
    if stage in ("calibrate", "compare"):
        statistics = before.method.statistics
        if stage == "calibrate" or name in ("fedtiny/vanilla_selection", "fedtiny+clients"):
            statistics = [leaf[0] for leaf in statistics]
        needs = stage == "compare" or name == "fedtiny+moving"
        bits = bits_of(messages.whole("statistics", statistics)) if needs else 0
        return bits + is_stale * bits_of(candidates(before))
    message = {}
    if jax.tree.leaves(before.correction):
        message |= messages.values("drift", before.correction, at_large(name, masks))
    message |= messages.whole("model_state", before.model_state)
    sees = at_large(name, before.masks)
    message |= messages.values("params", algorithm.deployed_params(before), sees)
    if rows.family(name) == "fedsgc" and int(before.round) - 1 in (1, 3, 5):  # of training
        for field, sign in (("rising", 1), ("falling", -1)):
            marks = trees.items(jax.tree.map(lambda leaf, sign=sign: leaf == sign, before.method))
            message |= {f"{field}/{path}": wire_format.counted(leaf) for path, leaf in marks}
    pool = before.method
    holds_all = "fedtiny" in name and (pool.held_id, pool.chosen_id) == (version, before.masks_id)
    if is_stale and holds_all:
        is_stale = False
        message = messages.whole("chosen", np.asarray(pool.chosen, np.uint8)) | message
    in_force = messages.masks_in_force(before.masks, flags_of(algorithm, before.params))
    return bits_of(message) + is_stale * bits_of(in_force)


def flags_of(algorithm, params):
    return masks.prunable_leaves(params, algorithm.prunable)


def at_large(name, masks):
    """Leave out of masks what clients keep for themselves, if they do."""
    own = name == "personal_parameters"
    return personal_lib.shared(masks, is_own=is_own) if own else masks


def bits_by_filter(field, keep):
    """Make a message of one bit a filter."""
    return {f"{field}/{i}": wire_format.counted(np.asarray(bits)) for i, bits in enumerate(keep)}


def received_by_filter(stage, algorithm, before, is_stale, is_new):
    """Encode what a client receives where filters are pruned, in bits."""
    keep, bits = before.method.keep, 0
    if is_stale and not all(np.all(line) for line in keep):
        bits += bits_of(bits_by_filter("masks", keep))
    if is_new or stage in ("start", "train"):
        message = messages.whole("model_state", before.model_state)
        message |= messages.values("params", algorithm.deployed_params(before), before.masks)
        if jax.tree.leaves(before.correction):
            message |= messages.values("drift", before.correction, before.masks)
        bits += bits_of(message)
    return bits


def apply(masks, tree):
    return jax.tree.map(lambda mask, leaf: np.where(mask, leaf, np.float32(0)), masks, tree)


def coefficient_bits(state, is_told):
    """Say by how much a penalty's coefficient lengthens the model's message."""
    model = messages.values("params", state.params, state.masks)
    model |= messages.whole("model_state", state.model_state)
    number = messages.whole("coefficient", state.method.coefficient)
    return 0 if is_told else bits_of(model | number) - bits_of(model)


def candidates(state):
    """Make the message of FedTiny's pool."""
    values = [
        np.asarray(leaf)
        for leaf, flag in zip(jax.tree.leaves(state.params), FLAGS, strict=True)
        if flag
    ]
    message = {}
    own = []
    for counts in np.asarray(state.method.counts):
        own.append([])
        for leaf, count in zip(values, counts, strict=True):
            order = np.argsort(-np.abs(leaf).ravel(), kind="stable")
            mask = np.zeros(leaf.size, np.bool_)
            mask[order[:count]] = True
            own[-1].append(mask.reshape(leaf.shape))
    for j, masks_of_one in enumerate(own):
        for i, mask in enumerate(masks_of_one):
            message[f"masks/{j}/{i}"] = wire_format.counted(mask)
    for j, masks_of_one in enumerate(own):
        for i, mask in enumerate(masks_of_one):
            message[f"params/{j}/{i}"] = wire_format.kept(values[i], None if mask.all() else mask)
    rest = [
        leaf for leaf, flag in zip(jax.tree.leaves(state.params), FLAGS, strict=True) if not flag
    ]
    return message | messages.whole("unpruned", rest)


def kernels(tree):
    """Put None in the place of what is no kernel."""
    return trees.map_with_path(lambda path, leaf: leaf if is_kernel(path, leaf) else None, tree)


def scored(name, before, after):
    """Say of which weights a client sends scores, by its masks before and after."""
    if name in ("fedfit/union", "fedfit/dense_start"):
        return before
    return after if name == "fedfit+fresh" else jax.tree.map(np.logical_or, before, after)


def written(uplink, fields, sent, masks, weight, *, as_pairs):
    """Encode a client's messages for real, and see that they arrive."""
    held, masks = masks if isinstance(masks, tuple) else ((), masks)
    delta = fields["delta"]
    kept = [int(leaf.sum()) for leaf in jax.tree.leaves(sent)]
    payloads = [uplink.payload(n) for n in kept]
    parts = {"delta": messages.delta(delta, sent, payloads, seed=0)}
    for name in BESIDE:
        if name not in fields:
            continue
        if name != "model_state" and not np.any(trees_flat(fields[name])):
            continue
        if name == "model_state" and gated_updates.SALIENT in fields:
            known = jax.device_get(
                gated_updates.of_state(fields[gated_updates.SALIENT], fields[name])
            )
            sent_state, known = (without_density(tree) for tree in (fields[name], known))
            parts[name] = messages.values(name, sent_state, known)
        elif name == "control":
            parts[name] = messages.values(name, fields[name], masks)
        elif name == "grads" and as_pairs:
            pruned = jax.tree.map(np.logical_not, masks)
            parts[name] = messages.pairs(name, fields[name], pruned)
        elif name == "places":
            pruned = jax.tree.map(np.logical_not, masks)
            parts[name] = messages.places(name, fields[name], pruned)
        elif name == "gains":
            parts[name] = messages.whole(name, kernels(fields[name]))
        elif name == "scores":
            parts[name] = messages.values(name, kernels(fields[name]), kernels(held))
        elif name == "model_state":
            parts[name] = messages.whole(name, without_density(fields[name]))
        else:
            parts[name] = messages.whole(name, fields[name])
    message = {}
    for name in sorted(parts):
        message |= parts[name]
    known = {
        name: part.known
        for name, part in message.items()
        if isinstance(part, wire_format.Part) and part.known is not None
    }
    data = wire_format.encode({**message, **messages.weight(weight)})
    named = {
        f"{field}/{path}" if path else field: leaf
        for field in parts
        for path, leaf in zip(
            trees.paths(fields[field]), jax.tree.leaves(fields[field]), strict=True
        )
    }
    pruned = dict(zip(trees.paths(masks), map(np.logical_not, jax.tree.leaves(masks)), strict=True))
    in_a_row = {
        name: named.pop(name)[pruned[name.partition("/")[2]]]
        for name in list(named)
        if name.startswith("places/")
    }
    for name, arrived in wire_format.decode(data, known=known).items():
        if name in (messages.SEED, messages.WEIGHT):
            continue
        if name.startswith("places/"):
            np.testing.assert_array_equal(arrived, in_a_row.pop(name))
        elif isinstance(arrived, np.ndarray):
            np.testing.assert_array_equal(arrived, named.pop(name))
        else:
            found = dequantized(arrived)
            found = np.where(known.get(name, True), found, 0.0)
            np.testing.assert_allclose(found, named.pop(name), atol=1e-6)
    left = (*named.values(), *in_a_row.values())
    assert not any(np.any(leaf) for leaf in left)  # all that stayed away is zero
    bits = 8 * len(data)
    if gated_updates.SALIENT in fields:
        layers = fields[gated_updates.SALIENT]
        marks = {
            f"{gated_updates.SALIENT}/{name}": wire_format.counted(layers[name])
            for name in sorted(layers)
        }
        bits += bits_of(marks)
    if "masks" in fields and np.any(trees_flat(fields["masks"]) != trees_flat(masks)):
        bits += bits_of(messages.personal_masks(fields["masks"], FLAGS))
    return bits


def dequantized(arrived):
    if len(arrived.scales) == 1:
        return np.where(arrived.levels == 1, arrived.scales[0], -arrived.scales[0])
    low, high = arrived.scales.astype(np.float64)
    return low + arrived.levels * (high - low) / (2**arrived.level_bits - 1)


def test_who_dropped_out_has_received_and_filling_has_not():
    present = np.array([True, False, False, False, True, False])
    ids = np.array([3, 1, 3, 1, 5, -1])  # 1 dropped out; 3, 1 again and -1 are filling
    reached = ledger.received(present, ids)
    np.testing.assert_array_equal(reached, [True, True, False, False, True, False])


def test_counts_of_who_did_not_take_part_may_be_anything():
    algorithm = plain()(setup())
    states, _, rounds = simulate(algorithm, some, num_rounds=2)
    metrics = jax.device_get(rounds[1])
    absent = ~np.asarray(metrics.participated)
    assert absent.any()

    def garble(counts):
        counts = np.array(counts)
        counts[absent] = -7
        return counts

    reply = dict(metrics.sent.up["reply"])
    reply["delta"] = reply["delta"]._replace(live_counts=garble(reply["delta"].live_counts))
    sent = metrics.sent._replace(up={**metrics.sent.up, "reply": reply})
    garbled = metrics._replace(sent=sent, num_uploaded=garble(metrics.num_uploaded))
    assert ledger.account(garbled, states[-1], algorithm) == ledger.account(
        metrics, states[-1], algorithm
    )


def test_the_appendix_of_fedrts_and_what_its_figures_really_follow():
    """MB (10^6) a round and client on ResNet-18 for CIFAR-10, density 0.2, both ways."""
    init = models.resnet18(input_shape=(32, 32, 3), num_classes=10, norm="batch").init
    params, _ = jax.eval_shape(init, jax.random.key(0))
    paths, sizes = trees.paths(params), trees.sizes(params)
    shapes = [leaf.shape for leaf in jax.tree.leaves(params)]
    pruned = {
        path: leaf
        for path, leaf in zip(paths, jax.tree.leaves(params), strict=True)
        if len(leaf.shape) == 4  # biases, normalization and the output layer stay dense
    }
    size = sum(trees.sizes(pruned))
    sparsity = 0.8 * sum(sizes) / size  # of what may be pruned, for a density of 0.2 in all
    with jax.enable_x64(True):
        shares = np.asarray(allocation.erk_densities(pruned, jnp.float64(sparsity)))
    densities = dict(zip(pruned, shares, strict=True))

    def megabytes(name, density):
        kept = [
            math.floor(density(path) * n) if path in pruned else n
            for path, n in zip(paths, sizes, strict=True)
        ]
        return 2 * storage_models.STORAGE[name](kept, shapes) / 8e6

    erk, uniform = densities.__getitem__, lambda path: 1 - sparsity
    assert round(megabytes("dense", erk), 1) == 89.4
    assert round(megabytes("values", erk), 1) == 17.9
    assert round(megabytes("fedrts_f4", erk), 1) == 26.1
    assert round(megabytes("fedrts_f4", uniform), 1) == 29.6
    assert round(megabytes("fedrts_bitmap", erk), 1) == 20.6
    assert round(megabytes("fedrts_bitmap", uniform), 1) == 20.7
    assert abs(megabytes("fedrts_bitmap", uniform) / 20.85 - 1) < 0.01  # as published


@pytest.mark.parametrize(
    ("density", "feddst", "fedsgc", "fedmef"),
    [(0.5, 138.30, 207.45, 165.96), (0.3, 86.26, 129.39, 103.51), (0.2, 60.22, 90.33, 72.26)],
)
def test_fedrts_published_traffic_of_a_language_model(density, feddst, fedsgc, fedmef):
    # 32 million parameters count the matrix twice that is embedding and output; biases and half of
    # the normalization are left out: 2 * 50257 * 256 + 2048 * 256 + 8 * 12 * 256**2 + 17 * 256.
    size = 2 * 50257 * 256 + 2048 * 256 + 8 * 12 * 256**2 + 17 * 256
    dense = 2 * storage_models.dense([size], [(size,)]) / 8e6
    np.testing.assert_allclose(dense, 260.41, atol=0.005)
    sparse = storage_models.fedrts_bitmap([round(density * size)], [(size,)]) / 8e6
    # FedDST two sparse models; FedSGC three; FedMef two and 0.4 of one.
    for published, number in ((feddst, 2), (fedsgc, 3), (fedmef, 2.4)):
        np.testing.assert_allclose(number * sparse, published, rtol=5e-4)
    once = size - 50257 * 256 + 4352 + 8 * 9 * 256  # as it is: the matrix once, and all leaves
    assert once == 19_708_672
    assert round(2 * 32 * once / 8e6, 1) == 157.7


def test_fedrts_published_arithmetic_takes_a_sparse_pass_for_its_density():
    # 8 batches, 5 epochs; 3.8e12 of 1.78e13 FLOPs are published.
    share = storage_models.fedrts_flops(1.0, 0.2, 40) / (3 * 40)
    assert 3.75 / 17.85 < share < 3.85 / 17.75
    assert storage_models.fedrts_flops(1.0, 1.0, 40) == 3 * 40
    assert storage_models.prunefl_flops(1.0, 1.0, 40) == 3 * 40
    assert storage_models.prunefl_flops(1.0, 0.2, 40) == pytest.approx(2.2 * 40)


def test_the_rule_of_fedrts_by_hand():
    shapes = [(10, 100)]
    by_density = {900: 32_000, 300: 1000 + 32 * 300, 100: 100 * 10 + 3200}
    by_density[50] = 50 * 4 + 100 * 6 + 1600  # 10 columns: 4 bits; 100 rows, ceil(log2 50) = 6
    for kept, bits in by_density.items():
        assert storage_models.fedrts_f4([kept], shapes) == bits
        # PruneFL's squares go up dense: 1000 weights of 32 bits. The live weights go both ways.
        assert storage_models.prunefl_published([kept], shapes) == 32_000 + bits
        assert storage_models.prunefl_corrected([kept], shapes) == 32_000 + 2 * bits
    # A bias of 10 that is not pruned, beside them: 320 bits in each of the three transfers.
    both = ([50, 10], [*shapes, (10,)])
    assert storage_models.prunefl_corrected(*both) == 32_000 + 2 * 2400 + 3 * 320


def test_a_summary_adds_up_the_ledger():
    clients = [{"up_bits": 3, "down_bits": 4, "client_ids": "0 2"}]
    first = {"traffic.by_client": clients, "traffic.published": {"f": {"up_bits": 1}}}
    then = {"traffic.by_client": [{"up_bits": 0, "down_bits": 1, "client_ids": "2"}]}
    lines = [folders.line(1, stage="explore", changes=first), folders.line(2, changes=then)]
    found = summary.summarize({}, lines)["traffic"]
    assert found["up"]["values"] == 2 * lines[0]["traffic"]["up"]["values"]
    assert found["by_client"] == {"num_clients": 2, "mean_bits": 7.5, "largest_bits": 8}
    assert found["published"] == {"f": {"up_bits": 1}}
    bits = {f"{way}_bits": lines[0]["traffic"][way]["total_bits"] for way in ("up", "down")}
    assert found["by_stage"] == {"explore": bits, "train": bits}


def test_masks_travel_as_the_encoder_would_write_them():
    rng = np.random.default_rng(0)
    tree = {"a": {"kernel": rng.random([40, 30]) < 0.1, "bias": np.ones(30, np.bool_)}}
    packed = jax.device_get(masks.pack((jnp.asarray(tree["a"]["kernel"]),)))
    spec = messages.Spec("masks/a/kernel", np.dtype(bool), (40, 30))
    message = messages.unpack_masks([spec], [np.asarray(bits).tobytes() for bits in packed])
    flags = masks.prunable_leaves(tree, masks.is_kernel)
    assert wire_format.encode(message) == wire_format.encode(messages.masks_in_force(tree, flags))


def test_feddip_reports_zeros_and_charges_nothing_for_it():
    algorithm = dip()(setup())
    _, _, history = simulate(algorithm, cohorts, num_rounds=1)
    sent = history[0].sent
    assert isinstance(sent, accounts.Sent)
    assert feddip.ZEROS not in sent.up["reply"]
    assert np.asarray(sent.reports[feddip.ZEROS]).shape == (4, len(FLAGS))
