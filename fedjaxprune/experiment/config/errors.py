"""What is wrong with a configuration, in one sentence: the full path, what was given, what may be.

An unknown name is explained, too: a setting of another section or part, an old name, a misspelling.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import pydantic

from fedjaxprune import registry
from fedjaxprune.errors import ConfigError, near_miss, shown
from fedjaxprune.experiment.config import sections
from fedjaxprune.registry.listing import mentions
from fedjaxprune.settings import Settings, allowed, alternatives, nested

# Names of schema 1 that are called otherwise, or that a section would not tell.
RENAMED: Mapping[str, str] = {
    "algorithm": "method",
    "drift": "client.correction",
    "normalise": "data.normalize",
    "rounds": "federation.num_rounds",
    "participation": "federation.sampling",
    "dropout_probability": "federation.dropout_rate",
    "server": "server.optimizer",
    "server_share": "server.data_fraction",
    "local_epochs": "client.epochs",
    "local_steps": "client.steps",
    "uplink_fraction": "uplink.fraction",
    "uplink_bits_per_value": "uplink.bits",
    "eval_every": "evaluation.every",
    "eval_from": "evaluation.start",
    "checkpoint_every": "checkpoints.every",
    "keep_checkpoints": "checkpoints.keep",
    "development_share": "method.validation_fraction",
    "pretrain_epochs": "method.server_epochs or method.vote_epochs",
    "swap_fraction": "method.drop_fraction",
    "prune_until": "method.last_prune_round",
    "feddip_mode": "method.mode",
    "fedtiny_selection": "method.selection",
    "mask_start": "method.start_from",
    "mask_client": "method.client_id",
    "explore_start": "method.start_from",
    "mask_iterations": "method.num_prune_steps",
    "filter_factor": "method.prune_fraction_per_step",
    "drops": "method.remove",
    "start_rounds": "method.dense_rounds",
    "layer_sparsity": "method.allocation",
    "explore_watch": "method.stop_on",
    "explore_patience": "method.patience",
    "explorers": "method.num_explorers",
    "guidance_scale": "method.layer_scaling",
    "refresh_every": "method.prune_every",
    "gates": "method.gate_sharing",
    "gate_upload": "method.upload",
    "gate_warm_up": "method.warm_up_fraction",
    "weight_threshold": "method.threshold",
}
# What other tools call a setting.
_SHORT: Mapping[str, str] = {
    "lr": "learning_rate",
    "wd": "weight_decay",
    "bs": "batch_size",
    "n_clients": "num_clients",
    "clients": "num_clients",
    "local_epochs": "epochs",
    "network": "model",
    "arch": "model",
}


class Hint(NamedTuple):
    """What an unknown name may have meant."""

    paths: tuple[str, ...] = ()  # of settings of this run; without any, the rest says why
    renamed: str = ""  # its path since schema 2
    # parts that have such a setting, by the name of the chosen one of their kind, which has not
    owners: Mapping[str, tuple[str, ...]] = {}


def refuse(
    error: pydantic.ValidationError, config_type: type[Settings], sources: Mapping[str, str]
) -> ConfigError:
    """Turn pydantic's first complaint into one sentence."""
    first: Any = error.errors()[0]
    owner, name, path = _find(config_type, [str(part) for part in first["loc"]])
    source = source_of(path, sources)
    if first["type"] == "value_error":
        return ConfigError(_prefixed(str(first["ctx"]["error"]), owner, path))
    given = shown(first["input"])
    if first["loc"] and isinstance(first["loc"][-1], int):
        given += f" as item {first['loc'][-1] + 1}"
    is_huge = first["type"] in ("less_than_equal", "int_parsing_size", "finite_number", "too_long")
    if not name:
        return ConfigError(f"{path} must be settings as `name: value`, got {given}{source}.")
    may_be = allowed(owner, name, machine_limits=is_huge)
    if first["type"] == "missing":
        return ConfigError(f"{path} must be set: {may_be}.")
    words = alternatives(owner, name)
    hint = near_miss(first["input"], words) if words else "."
    return ConfigError(f"{path} must be {may_be}, got {given}{source}{hint}")


def _find(kind: type[Settings], loc: list[str]) -> tuple[type[Settings], str, str]:
    """Follow a location through nested sections: the last section, the setting in it, its path."""
    path: list[str] = []
    for step in loc:
        if step not in kind.model_fields:
            break
        path.append(step)
        inner = nested(kind.model_fields[step].annotation)
        if not inner:
            return kind, step, ".".join(path)
        kind = inner
    return kind, "", ".".join(path)


def _prefixed(sentence: str, owner: type[Settings], path: str) -> str:
    """Give a section's own complaint the path of the setting that it begins with."""
    begin = sentence.partition(" ")[0]
    if not path or begin.startswith(f"{path}."):
        return sentence
    if begin in owner.model_fields:
        section, _, last = path.rpartition(".")
        return f"{section if last in owner.model_fields else path}.{sentence}"
    return f"{path}: {sentence}"


def source_of(path: str, sources: Mapping[str, str]) -> str:
    """Say where a setting came from: ``" (from --sparsity)"``; empty where that is not known."""
    source = sources.get(path) or sources.get(f"{path}.name") or ""
    return f" (from {source})" if source else ""


def unknown(path: str, hint: Hint, source: str) -> ConfigError:
    """Refuse a setting that this run does not have."""
    start = f"unknown setting {path!r}{source}"
    if hint.renamed:
        return ConfigError(f"{start}: since schema 2 it is {hint.renamed}.")
    if hint.owners:
        return ConfigError(f"{start}: {whose(hint)}.")
    if hint.paths:
        return ConfigError(f"{start}; did you mean {' or '.join(hint.paths)}?")
    return ConfigError(
        f"{start}: `fedjaxprune run --help` lists the shared settings and `fedjaxprune describe` "
        "those of a part."
    )


def whose(hint: Hint) -> str:
    """Say which parts have a setting that the chosen ones do not have."""
    texts = []
    for chosen, names in hint.owners.items():
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        texts.append(f"{', '.join(names[:4])}{more}, not of {chosen}")
    return f"it is a setting of {', and of '.join(texts)}"


def explain(path: str, known: Iterable[str], parts: Mapping[str, registry.Found]) -> Hint:
    """Guess what an unknown setting, a path or a name alone, was meant to be among the known."""
    known = [one for one in known if not one.endswith(".name")] + list(sections.PLACES)
    section, _, name = path.rpartition(".")
    if not section and name in RENAMED:
        return Hint(renamed=_renamed(name, known))
    for wanted in (name, _SHORT.get(name, name)):
        if same := tuple(one for one in known if one.rpartition(".")[2] == wanted):
            return Hint(paths=same)
    owners: dict[str, tuple[str, ...]] = {}
    for place, found in parts.items():
        if (not section or section == place) and (own := _owners(found, name)):
            others = owners.get(found.name, ())  # two kinds may have a part of this name
            owners[found.name] = tuple(dict.fromkeys((*others, *own)))
    if owners:
        return Hint(owners=owners)
    near = [one for one in known if one.rpartition(".")[0] == section] if section else []
    for among in (near, known):
        names = {one.rpartition(".")[2]: one for one in reversed(among)}
        if close := difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.6):
            return Hint(paths=(names[close[0]],))
    close = difflib.get_close_matches(path, RENAMED, n=1, cutoff=0.8)
    return Hint(renamed=_renamed(close[0], known)) if close else Hint()


def _renamed(name: str, known: Iterable[str]) -> str:
    """Say what an old name is called now, in this run where methods differ in that."""
    return next((one for one in RENAMED[name].split(" or ") if one in known), RENAMED[name])


def _owners(found: registry.Found, name: str) -> tuple[str, ...]:
    """List the built-in parts of the same kind that have a setting of this name."""
    owners = []
    if not mentions(found.kind, f"{name}:"):  # importing takes a second
        return ()
    for other, listed in registry.names(found.kind).items():
        if listed.origin.source == "built-in":
            try:
                part = registry.find(found.kind, other).part
            except ConfigError:  # it cannot be imported here
                continue
            if name in part.settings.model_fields:
                owners.append(other)
    return tuple(owners)
