"""Checkpoints by orbax: atomic, written in the background, the newest few kept.

A checkpoint is a tree of arrays and the number of rounds that made it. It is stored as nested
dicts of names, so that it can be opened without this package. A checksum guards the contents: the
format itself notices missing and shortened files, but not every flipped bit. A fingerprint of the
config says whose checkpoint it is. No checkpoint that cannot be used is deleted: it is put aside.
"""

import contextlib
import errno
import json
import os
import pathlib
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp


@contextlib.contextmanager
def open_manager(folder: pathlib.Path, *, keep: int) -> Iterator[ocp.CheckpointManager]:
    """Open the checkpoints in `folder`, of which the newest `keep` stay, and wait for writes.

    Raises:
      OSError: they cannot be written.
    """
    if folder.exists() and not folder.is_dir():  # orbax would notice at the first save
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
    )
    manager = ocp.CheckpointManager(folder.absolute(), options=options)
    try:
        yield manager
    except BaseException:
        with contextlib.suppress(Exception):  # what happened first is to be told
            manager.close()
        raise
    with _writing(folder):
        manager.close()


@contextlib.contextmanager
def _writing(folder: pathlib.Path) -> Iterator[None]:
    """Make an OSError of whatever orbax raises when it cannot write, maybe what it began before."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(None, _reason(error), str(folder)) from error


def _reason(error: Exception) -> str:
    """Say briefly what is wrong: what the system said, if that is in it, else its first line."""
    if found := re.search(r"\[OS error \d+: (?:E[A-Z0-9]+ )?([^\]]+)\]", str(error)):
        return found[1]
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def save(manager: ocp.CheckpointManager, num_rounds: int, tree: Any, *, fingerprint: int) -> None:
    """Copy `tree` to the host now and write it in the background as the state after `num_rounds`.

    The copy is our own, since the next round overwrites the donated buffers.

    Args:
      manager: of the run's checkpoints.
      num_rounds: how many rounds made the tree.
      tree: of arrays.
      fingerprint: of the run's config.

    Raises:
      OSError: this checkpoint, or the one before it, cannot be written.
    """
    host = [np.array(leaf, copy=True) for leaf in jax.device_get(jax.tree.leaves(tree))]
    names = _names(tree)
    about = {"num_rounds": num_rounds, "checksum": _checksum(host), "fingerprint": fingerprint}
    with _writing(pathlib.Path(manager.directory)):
        manager.save(
            num_rounds,
            args=ocp.args.Composite(
                arrays=ocp.args.PyTreeSave(_nest(names, host)), about=ocp.args.JsonSave(about)
            ),
            force=True,
        )


def fingerprints(folder: pathlib.Path) -> dict[int, int]:
    """Read whose the checkpoints in `folder` are: number of rounds to fingerprint.

    Only the small files beside the arrays are read, and nothing is touched. A checkpoint whose file
    cannot be read is left out: `restore` finds out that it is damaged.
    """
    found = {}
    for step in folder.glob("[0-9]*"):
        try:
            about = json.loads((step / "about" / "metadata").read_text(encoding="utf-8"))
            found[int(step.name)] = about["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def restore(
    manager: ocp.CheckpointManager,
    like: Any,
    *,
    usable: Callable[[int], bool],
    aside: pathlib.Path,
    warn: Callable[[str], None],
) -> tuple[int, Any] | None:
    """Read the newest checkpoint that is whole, and put aside those that are newer.

    Args:
      manager: of the run's checkpoints.
      like: tree of arrays or shapes, as was saved.
      usable: whether the record reaches up to that round.
      aside: folder for the checkpoints that are skipped; made if there are any.
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
                warn(
                    f"the checkpoint of round {num_rounds} is damaged and skipped "
                    f"({_reason(error)})."
                )
        # Else orbax would refuse to write this round again.
        _put_aside(pathlib.Path(manager.directory) / str(num_rounds), aside)
    manager.reload()
    return found


def read_newest(
    folder: pathlib.Path, like: Any, *, warn: Callable[[str], None]
) -> tuple[int, Any] | None:
    """Read the newest checkpoint in `folder` that is whole, and touch nothing.

    Args:
      folder: of a run's checkpoints.
      like: tree of arrays or shapes, as was saved.
      warn: takes one sentence for every checkpoint that cannot be read.

    Returns:
      The number of rounds and the tree; None where no checkpoint can be used.
    """
    # Said in full, as orbax warns of what it has to change by itself.
    options = ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0, create=False)
    with ocp.CheckpointManager(folder.absolute(), options=options) as manager:
        for num_rounds in sorted(manager.all_steps(), reverse=True):
            try:
                return num_rounds, _read(manager, num_rounds, like)
            except Exception as error:  # whatever orbax makes of a damaged file
                warn(f"the checkpoint of round {num_rounds} cannot be read ({_reason(error)}).")
    return None


def _put_aside(checkpoint: pathlib.Path, aside: pathlib.Path) -> None:
    """Move a checkpoint to the folder `aside`, under a name that is free there."""
    aside.mkdir(exist_ok=True)
    target, number = aside / checkpoint.name, 2
    while target.exists():
        target, number = aside / f"{checkpoint.name}-{number}", number + 1
    checkpoint.rename(target)


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
