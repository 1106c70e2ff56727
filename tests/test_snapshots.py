"""Copies for checkpoints: exact, apart from what the next round overwrites, summed up in pieces."""

import copy
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fedjaxprune.experiment.folder import checkpoints, snapshots
from fedjaxprune.federated import cohort

ARRAYS = {
    "rows": jnp.arange(700, dtype=jnp.float32).reshape(7, 100),
    "masks": jnp.arange(33) % 3 == 0,
    "half": jnp.arange(9, dtype=jnp.bfloat16).reshape(3, 3),
    "number": jnp.int32(7),
    "bytes": jnp.arange(5, dtype=jnp.uint8),
    "empty": jnp.zeros((3, 0)),
}


@pytest.fixture
def by_file(monkeypatch):
    """Copy by a file whatever has elements, and look at few bytes at a time."""
    monkeypatch.setattr(snapshots, "_SMALL", 0)
    monkeypatch.setattr(snapshots, "_LARGE", 0)
    monkeypatch.setattr(snapshots, "_BLOCK", 16)


@pytest.mark.usefixtures("by_file")
@pytest.mark.parametrize("name", ARRAYS)
def test_a_copy_is_exact_and_its_checksum_that_of_all_bytes(tmp_path, name):
    array = ARRAYS[name]
    scratch = snapshots.scratch(tmp_path)
    scratch.prepare([jax.ShapeDtypeStruct((9,), jnp.float32), jnp.ones(30)])
    scratch.take(jnp.ones(17))
    scratch.reuse()
    other, taken = scratch.take(jnp.arange(9)), scratch.take(array)
    assert (taken.dtype, taken.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(taken, array)
    np.testing.assert_array_equal(other, np.arange(9))
    assert copy.deepcopy(taken) is taken
    assert snapshots.checksum(taken) == zlib.crc32(np.asarray(array).tobytes())
    scratch.close()
    assert list(tmp_path.iterdir()) == []  # the file has no name
    blocks = list(snapshots._blocks(array))  # of an array that stays on its device
    assert b"".join(blocks) == np.asarray(array).tobytes()


@pytest.mark.usefixtures("by_file")
def test_an_array_that_devices_share_is_copied_whole(tmp_path):
    mesh = cohort.make_mesh(devices=jax.devices()[:4], model_devices=2)
    scratch = snapshots.scratch(tmp_path)
    for spec in (PartitionSpec(None, cohort.MODEL_AXIS), PartitionSpec(cohort.MODEL_AXIS)):
        shared = jax.device_put(np.arange(96.0).reshape(8, 12), NamedSharding(mesh, spec))
        np.testing.assert_array_equal(scratch.take(shared), shared)
    scratch.close()


@pytest.mark.usefixtures("by_file")
def test_a_checkpoint_has_what_was_there_when_it_was_saved(tmp_path):
    rows = {"a": jnp.arange(700.0).reshape(7, 100)}
    step = jax.jit(lambda rows: {"a": rows["a"].at[:2].set(-1.0)}, donate_argnums=0)
    with checkpoints.open_manager(tmp_path / "saved", keep=2) as manager:
        for number in (1, 2):
            checkpoints.save(manager, number, rows, fingerprint=0, deployed={})  # pyright: ignore
            rows = step(rows)
    with checkpoints.open_manager(tmp_path / "saved", keep=2) as manager:
        found = checkpoints.restore(
            manager, rows, usable=lambda step: step == 1, aside=tmp_path, warn=lambda said: None
        )
    assert found is not None
    np.testing.assert_array_equal(found[1]["a"], np.arange(700.0).reshape(7, 100))


def test_a_disk_that_is_full_is_said_at_the_save(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(snapshots, "_SMALL", 0)
    monkeypatch.setattr(snapshots.tempfile, "TemporaryFile", full)
    with (
        checkpoints.open_manager(tmp_path / "saved", keep=1) as manager,
        pytest.raises(OSError, match="No space left"),
    ):
        checkpoints.save(manager, 1, ARRAYS, fingerprint=0, deployed={})  # pyright: ignore
