"""Which runs are seeds of one configuration, and what tells configurations apart."""

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from fedjaxprune.errors import RunFolderError
from fedjaxprune.experiment.config import identity
from fedjaxprune.experiment.folder import load
from fedjaxprune.experiment.folder.load import RunData

DATASET = "data.dataset."  # accuracies are of its test set
_COMPARED = ("name", "task", "label", "labels", "keys")  # settings that decide what is learned
METHOD, MODEL = "method.name", "model.name"


class Group(NamedTuple):
    """Runs that differ only in their seed."""

    label: str  # method, and the settings by path that tell the configuration from the others
    runs: tuple[RunData, ...]  # by seed, ascending


def group(found: Sequence[RunData]) -> tuple[list[Group], list[str]]:
    """Put the seeds of each configuration together, in the order of their first runs.

    The notes are on runs that are left out because another one has the same settings and seed, and
    on what makes a comparison doubtful.
    """
    first = identity.flat(found[0].config)
    for run in found[1:]:
        other = identity.flat(run.config)
        for path in (f"{DATASET}{name}" for name in _COMPARED):
            if first.get(path) != other.get(path):
                raise RunFolderError(
                    f"{str(found[0].folder)!r} and {str(run.folder)!r} cannot be compared: "
                    f"{path.removesuffix('.name')} is {first.get(path)!r} in the one and "
                    f"{other.get(path)!r} in the other."
                )
    by_key: dict[str, dict[Any, RunData]] = {}
    notes = []
    for run in found:
        key = json.dumps(_settings(run), sort_keys=True, default=str)
        seeds = by_key.setdefault(key, {})
        other = seeds.setdefault(seed(run), run)
        if other is not run:
            left, kept = sorted((run, other), key=_rank)
            seeds[seed(run)] = kept
            notes.append(
                f"{str(left.folder)!r} is left out: it has the settings and the seed of "
                f"{str(kept.folder)!r}."
            )
    members = [
        sorted(seeds.values(), key=lambda run: seed(run) if isinstance(seed(run), int) else -1)
        for seeds in by_key.values()
    ]
    labels = _labels([_settings(runs[0]) for runs in members])
    groups = [Group(label, tuple(runs)) for label, runs in zip(labels, members, strict=True)]
    return groups, [*notes, *_doubts(groups)]


def seed(run: RunData) -> Any:
    """Give the seed of a run."""
    return run.config.get(identity.SEED)


def counted(members: Group) -> tuple[RunData, ...]:
    """Choose the runs whose numbers stand for a group: the finished ones, or all if none is."""
    return tuple(run for run in members.runs if run.state == "finished") or members.runs


def is_finished(members: Group) -> bool:
    """Tell whether finished runs stand for a group."""
    return counted(members)[0].state == "finished"


def states(members: Group) -> str:
    """Describe the runs of a group that are not finished; empty if all are."""
    return "; ".join(
        f"seed {seed(run)} {load.standing(run)}" for run in members.runs if run.state != "finished"
    )


def differing(groups: Sequence[Group]) -> set[str]:
    """List the settings by path that can change a run's numbers and differ among groups."""
    several = [_settings(members.runs[0]) for members in groups]
    paths = {path for settings in several for path in settings}
    return {path for path in paths if len({repr(one.get(path)) for one in several}) > 1}


def name_of(run: RunData) -> str:
    """Give the name of a run's method."""
    return str(identity.flat(run.config).get(METHOD))


def dataset_of(run: RunData) -> str | None:
    """Give the name of a run's data set."""
    return identity.flat(run.config).get(f"{DATASET}name")


def _settings(run: RunData) -> dict[str, Any]:
    """Give the settings that tell configurations apart, and whose code ran."""
    code = {
        f"code of {path}": origin.get("version") or origin.get("sha256", "")[:8]
        for path, origin in run.parts.items()
        if isinstance(origin, dict)
    }
    return identity.configuration(run.config) | code


def _rank(run: RunData) -> tuple[bool, int]:
    """Prefer finished runs, then longer ones."""
    return run.state == "finished", len(run.lines)


def _labels(several: Sequence[dict[str, Any]]) -> list[str]:
    """Name configurations by their methods and the other settings in which they differ.

    A method's own settings count where configurations of that method differ: what distinguishes two
    methods follows from their names.
    """

    def differs(path: str, settings: dict[str, Any]) -> bool:
        is_own = path.startswith("method.") or path == "code of method"
        others = (s for s in several if not is_own or s.get(METHOD) == settings.get(METHOD))
        return len({repr(one[path]) for one in others if path in one}) > 1

    paths = dict.fromkeys(path for settings in several for path in settings)
    ordered = sorted(paths, key=lambda path: not path.startswith("method."))
    labels = []
    for settings in several:
        own = (p for p in ordered if p != METHOD and p in settings and differs(p, settings))
        parts = [f"{path.removesuffix('.name')} {settings[path]}" for path in own]
        labels.append(", ".join([str(settings.get(METHOD)), *parts]))
    return [
        label if labels.count(label) == 1 else f"{label} ({number})"
        for number, label in enumerate(labels, start=1)
    ]


def _doubts(groups: Sequence[Group]) -> list[str]:
    """Name what makes a comparison of methods doubtful."""
    notes = []
    if paths := sorted(path for path in differing(groups) if path.startswith(DATASET)):
        notes.append(
            f"the runs differ in {_listed(paths)}: their accuracies can be compared only if the "
            "test set is the same."
        )
    if networks := networks_differ(groups):
        notes.append(f"the methods ran different networks: {networks}.")
    return notes


def networks_differ(groups: Sequence[Group]) -> str:
    """Name the networks of each method; empty if all methods ran the same ones."""
    by_method: dict[str, dict[str, None]] = {}
    for members in groups:
        settings = identity.flat(members.runs[0].config)
        by_method.setdefault(str(settings.get(METHOD)), {})[str(settings.get(MODEL))] = None
    if len({frozenset(models) for models in by_method.values()}) <= 1:
        return ""
    return ", ".join(f"{name} with {_listed(models)}" for name, models in by_method.items())


def _listed(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
