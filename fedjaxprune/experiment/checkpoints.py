"""Checkpoints by orbax: atomic, written in the background, the newest few kept.

A checkpoint is a tree of arrays and the number of rounds that made it. It is stored as nested
dicts of names, so that it can be opened without this package. A checksum guards the contents: the
format itself notices missing and shortened files, but not every flipped bit.
"""

import contextlib
import pathlib
import shutil
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp


@contextlib.contextmanager
def open_manager(folder: pathlib.Path, *, keep: int) -> Iterator[ocp.CheckpointManager]:
    """Open the checkpoints in `folder`, of which the newest `keep` stay, and wait for writes."""
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
    )
    with ocp.CheckpointManager(folder.absolute(), options=options) as manager:
        yield manager


def save(manager: ocp.CheckpointManager, num_rounds: int, tree: Any) -> None:
    """Copy `tree` to the host now and write it in the background as the state after `num_rounds`.

    The copy is our own, since the next round overwrites the donated buffers.
    """
    host = [np.array(leaf, copy=True) for leaf in jax.device_get(jax.tree.leaves(tree))]
    names = _names(tree)
    manager.save(
        num_rounds,
        args=ocp.args.Composite(
            arrays=ocp.args.PyTreeSave(_nest(names, host)),
            about=ocp.args.JsonSave({"num_rounds": num_rounds, "checksum": _checksum(host)}),
        ),
        force=True,
    )


def restore(
    manager: ocp.CheckpointManager,
    like: Any,
    *,
    usable: Callable[[int], bool],
    warn: Callable[[str], None],
) -> tuple[int, Any] | None:
    """Read the newest checkpoint that is whole, and remove those that are newer.

    Args:
      manager: of the run's checkpoints.
      like: tree of arrays or shapes, as was saved.
      usable: whether the record reaches up to that round.
      warn: takes one sentence for every checkpoint that is skipped.

    Returns:
      The number of rounds and the tree, on the device; None where no checkpoint can be used.
    """
    found = None
    for num_rounds in sorted(manager.all_steps(), reverse=True):
        if not usable(num_rounds):
            warn(f"the record does not reach the checkpoint of round {num_rounds}: it is skipped.")
        else:
            try:
                found = num_rounds, _read(manager, num_rounds, like)
                break
            except Exception as error:  # whatever orbax makes of a damaged file
                reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
                warn(f"the checkpoint of round {num_rounds} is damaged and skipped ({reason}).")
        # Else orbax would refuse to write this round again.
        shutil.rmtree(pathlib.Path(manager.directory) / str(num_rounds), ignore_errors=True)
    manager.reload()
    return found


def _read(manager: ocp.CheckpointManager, num_rounds: int, like: Any) -> Any:
    """Read one checkpoint whole, or raise whatever is wrong with it."""
    leaves, treedef = jax.tree.flatten(like)
    names = _names(like)
    about = manager.restore(num_rounds, args=ocp.args.Composite(about=ocp.args.JsonRestore()))
    # One leaf at a time: of many in flight, all but the first to fail would complain on stderr.
    host = [_read_leaf(manager, num_rounds, *pair) for pair in zip(names, leaves, strict=True)]
    for name, array, leaf in zip(names, host, leaves, strict=True):
        if array.shape != leaf.shape or array.dtype != leaf.dtype:
            raise ValueError(
                f"{'/'.join(name)} is {array.dtype}{array.shape}, expected {leaf.dtype}{leaf.shape}"
            )
    if about["about"]["checksum"] != _checksum(host):
        raise ValueError("its checksum does not fit its contents")
    return jax.tree.unflatten(treedef, [jnp.array(array) for array in host])


def _names(tree: Any) -> list[tuple[str, ...]]:
    """Name every leaf by the keys that lead to it."""
    return [
        tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _nest(names: list[tuple[str, ...]], leaves: list[Any]) -> dict[str, Any]:
    """Build nested dicts of the leaves; those without elements are left out, as orbax has none."""
    nested: dict[str, Any] = {}
    for name, leaf in zip(names, leaves, strict=True):
        if leaf.size:
            inner = nested
            for part in name[:-1]:
                inner = inner.setdefault(part, {})
            inner[name[-1]] = leaf
    return nested


def _read_leaf(
    manager: ocp.CheckpointManager, num_rounds: int, name: tuple[str, ...], like: Any
) -> np.ndarray:
    """Read one array; one without elements was never written."""
    empty = np.empty(like.shape, like.dtype)
    if not empty.size:
        return empty
    args = ocp.args.PyTreeRestore(item=_nest([name], [empty]), partial_restore=True)
    found = manager.restore(num_rounds, args=ocp.args.Composite(arrays=args))["arrays"]
    for part in name:
        found = found[part]
    return np.asarray(found)


def _checksum(leaves: list[np.ndarray]) -> int:
    """Sum up the bytes of all leaves, in order."""
    checksum = 0
    for leaf in leaves:
        checksum = zlib.crc32(leaf.tobytes(), checksum)
    return checksum
