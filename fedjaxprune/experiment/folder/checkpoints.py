"""Checkpoints by orbax: atomic, written in the background, the newest few kept.

A checkpoint is a tree of arrays and the number of rounds that made it. It is stored as nested
dicts of names, so that it can be opened without this package, and in part. A checksum of each array
guards the contents: the format itself notices missing and shortened files, but not every flipped
bit. A fingerprint of the config says whose checkpoint it is. Parameters to be deployed are stored
besides, where they are not those of the state under its masks. No checkpoint that cannot be used is
deleted: it is put aside.
"""

import contextlib
import errno
import os
import pathlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from fedjaxprune import masks as masks_lib
from fedjaxprune.errors import RunFolderError, first_line
from fedjaxprune.experiment import reading
from fedjaxprune.experiment.folder import declared, layout, snapshots, stored
from fedjaxprune.experiment.folder.manager import Manager, of_this_process
from fedjaxprune.rounds.simulation import Simulation
from fedjaxprune.types import Masks, Params, State

ARRAYS = "arrays"  # the item of a checkpoint, and its folder
DEPLOYED = "deployed"  # beside the arrays of a simulation
_SPARE = 100  # files or folders that may lie beside the checkpoints that are kept
_CHUNK = 2**23  # bytes of an array that are compressed together
_FILE = 2**25  # bytes of a file: what is compressed waits in memory until there are as many
RESTART = "restart"  # what must be allowed to start again at round 1 if rounds were saved


@contextlib.contextmanager
def open_manager(folder: pathlib.Path, *, keep: int) -> Iterator[Manager]:
    """Open the checkpoints in `folder`, of which the newest `keep` stay, and wait for writes."""
    if folder.exists() and not folder.is_dir():  # orbax would notice at the first save
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        cleanup_tmp_directories=True,
        enable_async_checkpointing=True,
        **of_this_process(folder),
    )
    manager = _open(folder, options)
    try:
        yield manager
    except BaseException:
        with contextlib.suppress(Exception):  # the first error matters
            manager.close()
        raise
    with _writing(folder):
        manager.close()
    layout.sync_names(folder)


def _open(folder: pathlib.Path, options: ocp.CheckpointManagerOptions) -> Manager:
    """Open the checkpoints in `folder`; what orbax raises of odd files becomes a sentence."""
    try:
        return Manager(folder.absolute(), options)
    except OSError:
        raise
    except Exception as error:
        raise RunFolderError(
            f"the checkpoints in {str(folder)!r} cannot be read ({_reason(error)})."
        ) from None


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
    return first_line(error)[:200].rstrip(".")


def finish(manager: Manager) -> None:
    """Wait until the last checkpoint is written, so that the manager counts it.

    Raises:
      OSError: it could not be written.
    """
    with _writing(pathlib.Path(manager.directory)):
        manager.finish()


def prepare(manager: Manager, *saved: Any) -> None:
    """Make room for copies of trees of such shapes, in the background, so that the first is fast.

    Nothing else is being written; whatever hinders is said at the save.
    """

    def prepare_fn():
        with contextlib.suppress(OSError):
            manager.scratch.prepare(jax.tree.leaves(saved))

    manager.begin(prepare_fn)


def save(
    manager: Manager,
    num_rounds: int,
    now: Simulation,
    *,
    fingerprint: int,
    deployed: Params,
    first: Callable[[], None] | None = None,
) -> None:
    """Copy a simulation now and write it in the background, as it is after `num_rounds`.

    The copy is our own, since the next round overwrites the donated buffers. It is made when the
    checkpoint before has been written, so that there is one copy at a time.

    Args:
      manager: of the folder.
      num_rounds: rounds that made it.
      now: the simulation.
      fingerprint: of the run's config.
      deployed: parameters to be deployed.
      first: writes what belongs to the checkpoint, in the background, before it is written.

    Raises:
      OSError: this one or the one before cannot be written.
    """
    finish(manager)
    folder = pathlib.Path(manager.directory)
    scratch = manager.scratch
    with _writing(folder):
        scratch.reuse()
        host = {name: scratch.take(leaf) for name, leaf in _leaves(now)}
        shipped = {name: scratch.take(leaf) for name, leaf in _leaves(deployed)}

    def write_fn():
        if first is not None:
            with _writing(folder):
                first()
        _write(manager, num_rounds, host, shipped, fingerprint)

    manager.begin(write_fn)


def _write(
    manager: Manager,
    num_rounds: int,
    host: dict[tuple[str, ...], snapshots.Kept],
    shipped: Mapping[tuple[str, ...], snapshots.Kept],
    fingerprint: int,
) -> None:
    """Write one checkpoint and wait until it is there; what is shipped only if it differs."""
    state = {name[2:]: leaf for name, leaf in host.items() if name[:2] == ("state", "params")}
    masks = {name[2:]: leaf for name, leaf in host.items() if name[:2] == ("state", "masks")}
    if any(
        name not in state or not np.array_equal(leaf, np.where(masks[name], state[name], 0))
        for name, leaf in shipped.items()
    ):
        host |= {(DEPLOYED, *name): leaf for name, leaf in shipped.items()}
    about = reading.sealed(
        num_rounds=num_rounds,
        checksums={"/".join(name): snapshots.checksum(leaf) for name, leaf in host.items()},
        kinds={"/".join(name): _kind(leaf) for name, leaf in host.items()},
        fingerprint=fingerprint,
    )
    arrays = _nest(host)
    how = jax.tree.map(lambda leaf: ocp.SaveArgs(chunk_byte_size=_CHUNK), arrays)
    with _writing(pathlib.Path(manager.directory)):
        manager.save(
            num_rounds,
            args=ocp.args.Composite(
                arrays=ocp.args.PyTreeSave(
                    arrays, save_args=how, ocdbt_target_data_file_size=_FILE
                ),
                about=ocp.args.JsonSave(about),
            ),
            force=True,
        )
        manager.wait_until_finished()


def _leaves(tree: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """List the leaves by the names that lead to them."""
    return zip(_names(tree), jax.tree.leaves(tree), strict=True)


def check_number(folder: pathlib.Path, keep: Any) -> None:
    """Refuse many more checkpoints than a run keeps, which would take long to look at."""
    found = len(os.listdir(folder)) if folder.is_dir() else 0
    kept = keep if isinstance(keep, int) else 0
    if found > 2 * kept + _SPARE:
        raise RunFolderError(
            f"{str(folder)!r} holds {found:,} files or folders, and the run keeps {kept} "
            "checkpoints: take away what is not one of them."
        )


def fingerprints(folder: pathlib.Path) -> dict[int, int]:
    """Read whose the checkpoints in `folder` are: number of rounds to fingerprint.

    Only the small files beside the arrays are read, and nothing is touched. A checkpoint whose file
    cannot be read is left out: `restore` finds out that it is damaged.
    """
    found = {}
    for step in folder.glob("[0-9]*"):
        try:
            about = reading.from_json(reading.text(step / "about" / "metadata", may_link=False))
            found[int(step.name)] = reading.unsealed(about)["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def restore(
    manager: ocp.CheckpointManager,
    like: Any,
    *,
    usable: Callable[[int], bool],
    aside: pathlib.Path,
    warn: Callable[[str], object],
    allow: Collection[str] = (RESTART,),
    lacks: Callable[[int], str] = lambda num_rounds: "",
) -> tuple[int, Any] | None:
    """Read the newest checkpoint that is whole and `usable`, and put aside those that are newer.

    `lacks` says in words what is wrong with what belongs to one; nothing where it can be used.
    Returns its number of rounds and a tree like `like`, or None where there is none.

    Raises:
      RunFolderError: a whole checkpoint is not like `like`, or there are checkpoints of which none
        can be used, unless `allow` has `RESTART`; nothing was put aside.
    """
    found, skipped = None, {}
    folder = pathlib.Path(manager.directory)
    for num_rounds in sorted(manager.all_steps(), reverse=True):
        if not usable(num_rounds):
            skipped[num_rounds] = "skipped, as the record does not reach it"
            continue
        if missing := lacks(num_rounds):
            skipped[num_rounds] = f"skipped, as {missing}"
            continue
        try:
            kinds = _about(manager, num_rounds)["kinds"]
            if not (difference := _difference(kinds, like)):
                found = num_rounds, _read(manager, num_rounds, like)
                break
        except Exception as error:  # whatever orbax makes of a damaged file
            skipped[num_rounds] = f"damaged and skipped ({_reason(error)})"
            continue
        raise RunFolderError(
            f"the checkpoint of round {num_rounds} in {str(folder)!r} is whole and does not fit "
            f"this run, in which {difference} (nothing was changed)."
        )
    if found is None and skipped and RESTART not in allow:
        each = "; ".join(f"that of round {step} is {why}" for step, why in skipped.items())
        raise RunFolderError(
            f"no checkpoint in {str(folder)!r} can be used: {each}; nothing was changed, and "
            f"`--allow {RESTART}` starts the run again at round 1."
        )
    for num_rounds, why in skipped.items():
        warn(f"the checkpoint of round {num_rounds} is {why}.")
        # Else orbax would refuse to write this round again.
        aside.mkdir(exist_ok=True)
        checkpoint = folder / str(num_rounds)
        checkpoint.rename(layout.free(aside / checkpoint.name))
    manager.reload()
    return found


def _difference(kinds: Mapping[str, list[Any]], like: Any) -> str:
    """Say in what arrays of these `kinds` are not those of `like`; empty where they are."""
    leaves = zip(_names(like), jax.tree.leaves(like), strict=True)
    wanted = {"/".join(name): _kind(leaf) for name, leaf in leaves}
    stored = {name: kind for name, kind in kinds.items() if not name.startswith(f"{DEPLOYED}/")}
    for name in dict.fromkeys([*wanted, *stored]):
        if wanted.get(name) != stored.get(name):
            return f"{name} is {_worded(wanted.get(name))} and not {_worded(stored.get(name))}"
    return ""


def _kind(leaf: Any) -> list[Any]:
    """Give type and shape of an array as JSON has them."""
    return [str(leaf.dtype), list(leaf.shape)]


def _worded(kind: list[Any] | None) -> str:
    return "absent" if kind is None else f"{kind[0]} {tuple(kind[1])}"


class Finished(NamedTuple):
    """A network as the newest checkpoint has it."""

    num_rounds: int  # that made it
    params: Params  # to be deployed, pruned entries exact zeros
    masks: Masks  # in force
    state: State  # what is not trained


def read_network(
    folder: pathlib.Path, params: Params, state: State, *, warn: Callable[[str], object]
) -> Finished | None:
    """Read the network of the newest whole checkpoint, or None, and touch nothing."""
    masks = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bool_), params)
    like = {"state": {"params": params, "masks": masks, "model_state": state}}
    # Said in full, as orbax warns of what it has to change by itself.
    options = ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0, create=False)
    with _open(folder, options) as manager:
        for num_rounds in sorted(manager.all_steps(), reverse=True):
            try:
                declared.check_room(folder / str(num_rounds) / ARRAYS, _num_bytes(like))
                found = _read(manager, num_rounds, like)["state"]
                own = masks_lib.apply(found["masks"], found["params"])
                names = _about(manager, num_rounds)["checksums"]
                if any(name.startswith(f"{DEPLOYED}/") for name in names):
                    own = _read(manager, num_rounds, {DEPLOYED: params})[DEPLOYED]
                return Finished(num_rounds, own, found["masks"], found["model_state"])
            except Exception as error:  # whatever orbax makes of a damaged file
                warn(f"the checkpoint of round {num_rounds} cannot be read ({_reason(error)}).")
    return None


def _num_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _about(manager: ocp.CheckpointManager, num_rounds: int) -> dict[str, Any]:
    found = manager.restore(num_rounds, args=ocp.args.Composite(about=ocp.args.JsonRestore()))
    return reading.unsealed(found["about"])


def _read(manager: ocp.CheckpointManager, num_rounds: int, like: Any) -> Any:
    """Read one checkpoint, or the part that `like` has, or raise whatever is wrong with it."""
    leaves, treedef = jax.tree.flatten(like)
    about = _about(manager, num_rounds)
    names, checksums, kinds = _names(like), about["checksums"], about["kinds"]
    for name, leaf in zip(names, leaves, strict=True):
        if kinds.get("/".join(name)) != _kind(leaf):
            path, there = "/".join(name), _worded(kinds.get("/".join(name)))
            raise ValueError(f"{path} is {there}, expected {_worded(_kind(leaf))}")
    folder = pathlib.Path(manager.directory) / str(num_rounds) / ARRAYS
    declared.check(folder, kinds)
    read, found = stored.reader(folder), []
    # One leaf at a time, so that none is twice in memory but this one.
    for name, leaf in zip(names, leaves, strict=True):
        # One without elements was never written.
        array = read(name) if leaf.size else np.empty(leaf.shape, leaf.dtype)
        if array.shape != leaf.shape or array.dtype != leaf.dtype:
            given = _worded(_kind(array))
            raise ValueError(f"{'/'.join(name)} is {given}, expected {_worded(_kind(leaf))}")
        if checksums["/".join(name)] != snapshots.checksum(array):
            raise ValueError("its checksum does not fit its contents")
        found.append(jnp.array(array))
        del array
    return jax.tree.unflatten(treedef, found)


def _names(tree: Any) -> list[tuple[str, ...]]:
    """Name every leaf by the keys that lead to it."""
    return [
        tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _nest(leaves: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """Build nested dicts of the leaves; those without elements are left out, as orbax has none."""
    nested: dict[str, Any] = {}
    for name, leaf in leaves.items():
        if leaf.size:
            inner = nested
            for part in name[:-1]:
                inner = inner.setdefault(part, {})
            inner[name[-1]] = leaf
    return nested
