"""A mesh of clients × model: rounds are those of one device, and clients gather no whole leaf."""

import functools
import re

import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fedjaxprune import models, topk, trees
from fedjaxprune.data import batching, partitions, transforms
from fedjaxprune.federated import cohort, local_training, sampling, uplinks
from fedjaxprune.pruning import pruners
from fedjaxprune.rounds import placement, simulation, training
from fedjaxprune.rounds.protocol import Protocol

KEY = jax.random.key(0)
NUM_CLIENTS, SIZE, WIDTH = 6, 8, 128


@functools.cache
def population():
    rng = np.random.default_rng(0)
    total = NUM_CLIENTS * SIZE
    examples = {
        "inputs": rng.normal(size=(total, WIDTH)).astype(np.float32),
        "labels": rng.integers(0, 4, total).astype(np.int32),
    }
    return partitions.population(examples, np.split(np.arange(total), NUM_CLIENTS), num_classes=4)


def algorithm_of(mesh):
    model = models.mlp(input_shape=(WIDTH,), num_classes=4, hidden_sizes=(WIDTH,))
    protocol = Protocol(
        num_rounds=2,
        batcher=batching.steps(num_steps=2, batch_size=4, preprocess=transforms.chain()),
        optimizer=optax.sgd(0.1, momentum=0.9),
        server=optax.sgd(1.0, momentum=0.5),
        uplink=uplinks.error_feedback(uplinks.top_k(fraction=0.2)),
        mesh=mesh,
    )
    client = local_training.local_sgd(
        model.loss, batcher=protocol.batcher, optimizer=protocol.optimizer
    )
    pruner = pruners.prune_to(0.5)
    return model, training.training(protocol, client=client, pruner=pruner)


def rounds_on(mesh):
    """Play two rounds; give the last simulation, its placement, and the compiled round."""
    model, algorithm = algorithm_of(mesh)
    now = simulation.start(
        algorithm, *jax.jit(model.init)(jax.random.key(0)), num_clients=NUM_CLIENTS
    )
    everyone, given = population(), jax.random.key(1)
    where = None
    if mesh is not None:
        where = placement.of_simulation(now, mesh)
        whole = NamedSharding(mesh, PartitionSpec())
        now, (everyone, given) = (
            jax.device_put(now, where),
            jax.device_put((everyone, given), whole),
        )
    draw = sampling.uniform(num_clients=NUM_CLIENTS, cohort_size=4)
    advance = simulation.advance(algorithm.stages[0], draw)
    step = jax.jit(advance, out_shardings=None if where is None else (where, None))
    compiled = step.lower(given, now, everyone).compile()
    for _ in range(2):
        now, _ = compiled(given, now, everyone)
    return now, where, compiled


def test_a_round_on_devices_that_share_a_model_is_that_of_one_device():
    alone, _, _ = rounds_on(None)
    mesh = cohort.make_mesh(devices=jax.devices()[:4], model_devices=2)
    shared, where, compiled = rounds_on(mesh)
    for path, leaf in trees.items(shared.state.params):
        wanted = dict(trees.items(alone.state.params))[path]
        np.testing.assert_allclose(leaf, wanted, rtol=0, atol=1e-6, err_msg=path)
    for one, other in zip(
        jax.tree.leaves(shared.state.masks), jax.tree.leaves(alone.state.masks), strict=True
    ):
        np.testing.assert_array_equal(one, other)

    # The kernel, its mask, its residuals and its momentum lie in halves.
    half = {path for path, place in trees.items(where) if "model" in str(place.spec)}
    wide = {path for path, leaf in trees.items(alone) if leaf.size >= placement.SMALLEST}
    assert half == {path for path in wide if path.endswith("dense_1/kernel")}
    assert len(half) == 4
    leaves = dict(trees.items(shared))
    for path in half:
        shape = leaves[path].shape
        assert leaves[path].addressable_shards[0].data.shape == (*shape[:-1], shape[-1] // 2)

    # No client puts a leaf together that lies in halves.
    gathered = [
        np.prod([int(size) for size in found[1].split(",")])
        for line in (compiled.as_text() or "").splitlines()
        if "shard_map" in line and (found := re.search(r"\[([\d,]+)\]\S* all-gather", line))
    ]
    assert all(size < placement.SMALLEST for size in gathered)


def test_a_leaf_is_shared_out_along_its_largest_axis_that_divides():
    assert placement.largest_axis("a/kernel", (256, 128), 2) == PartitionSpec("model")
    assert placement.largest_axis("a/kernel", (128, 256), 2) == PartitionSpec(None, "model")
    assert placement.largest_axis("a/kernel", (257, 128), 2) == PartitionSpec(None, "model")
    assert placement.largest_axis("a/kernel", (129, 257), 2) == PartitionSpec()
    assert placement.largest_axis("a/bias", (256,), 2) == PartitionSpec()


def test_a_rule_that_does_not_fit_is_refused():
    mesh = cohort.make_mesh(devices=jax.devices()[:4], model_devices=2)
    _, algorithm = algorithm_of(mesh)
    model, _ = algorithm_of(None)
    now = simulation.start(
        algorithm, *jax.jit(model.init)(jax.random.key(0)), num_clients=NUM_CLIENTS
    )
    with pytest.raises(ValueError, match=r"placement of 'dense_1/bias' must divide .*\(128,\)"):
        placement.of_simulation(now, mesh, rule=lambda *_: PartitionSpec(None, "model"))
    with pytest.raises(ValueError, match="model_devices must divide the number of devices"):
        cohort.make_mesh(devices=jax.devices()[:4], model_devices=3)


def test_a_search_where_clients_work_waits_for_no_devices_of_other_clients():
    mesh = cohort.make_mesh(devices=jax.devices()[:4], model_devices=2)
    whole, parts = PartitionSpec(), PartitionSpec(cohort.MODEL_AXIS)
    search = jax.shard_map(
        lambda scores, k: topk.tree_top_k({"a": scores}, k),
        mesh=mesh,
        in_specs=(whole, whole),
        out_specs=whole,
        axis_names={cohort.AXIS},
        check_vma=False,
    )
    given = [
        jax.ShapeDtypeStruct((200, 100), np.float32, sharding=NamedSharding(mesh, parts)),
        jax.ShapeDtypeStruct((), np.int32, sharding=NamedSharding(mesh, whole)),
    ]
    program = str(jax.jit(search).lower(*given).compile().as_text())
    assert "all-reduce" in program  # within the devices of a client
    assert "collective-permute" not in program  # for which a CPU waits for all
