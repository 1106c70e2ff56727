"""What is held to the laws: every method and variant that is listed, and some settings beside."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from fedjaxprune import registry
from fedjaxprune.method import Method
from fedjaxprune.pruning import pruners, schedules, scores
from fedjaxprune.rounds import controls
from fedjaxprune.rounds.training import training
from fedjaxprune.settings import Settings
from fedjaxprune.testing import history, scenario


def _dynamic_sparse(settings, task):
    """Drop and grow by gradients in every second round: pruned weights return."""
    del settings  # there are none
    due = schedules.every(2)
    revise = pruners.chain(
        pruners.prune_to(0.6), pruners.drop(0.3), pruners.grow_to(0.6, score=scores.gradient)
    )
    client = task.local_client(report_grads=due)
    return training(task.protocol, client=client, pruner=pruners.when(due, revise))


def _controlled(name, control):
    """Put a control around a method."""
    method = registry.find("method", name).part

    def build(settings, task):
        algorithm = method.build(settings, task)
        if control == "reinitialize":
            return controls.reinitialized(algorithm, task)
        start = functools.partial(task.model.init, jax.random.key(0))
        return controls.shuffled(algorithm, task, initial=start)

    return method._replace(build=build, nothing_pruned=None)


DYNAMIC_SPARSE = Method(build=_dynamic_sparse, settings=Settings)
SCAFFOLD, FEDNOVA = {"client.correction": "scaffold"}, {"client.correction": "fednova"}
# Settings that take methods other ways; all but the usual are slow.
BESIDE: Mapping[str, tuple[str | Method, Mapping[str, Any]]] = {
    "adaptive_dynamic_pruning+scaffold": (
        "adaptive_dynamic_pruning",
        {"upload": "touched", **SCAFFOLD},
    ),
    "autoflip+channels": (
        "autoflip",
        {
            "channel_threshold": 0.6,
            "agreement": "majority",
            "prune_every": 2,
            "start_from": "explored",
        },
    ),
    "dynamic_sparse": (DYNAMIC_SPARSE, {}),
    "dynamic_sparse+scaffold": (DYNAMIC_SPARSE, SCAFFOLD),
    "feddip+dense": ("feddip", {"mode": "dense"}),
    "feddip+regrow": ("feddip", {"mode": "regrow"}),
    "feddip+scaffold": ("feddip", SCAFFOLD),
    "fedfit+fresh": ("fedfit", {"decision": "fresh"}),
    "fedsgc+old": ("fedsgc", {"absent": "old", "direction": "last_step"}),
    "flpqsu+scaffold": ("flpqsu", SCAFFOLD),
    "fedtiny+clients": (
        "fedtiny/vanilla_selection",
        {"gradient_weights": "clients", "block_order": "forward"},
    ),
    "fedtiny+fednova": ("fedtiny", FEDNOVA),
    "fedtiny+moving": ("fedtiny", {"calibration_passes": 2}),
    "mpfl+started": (
        "mpfl",
        {"dense_rounds": 1, "votes": "examples", "remove": "channels", "consensus": "top_k"},
    ),
    "rigl+shuffle": (_controlled("rigl", "shuffle"), {}),
    "snip+reinitialize": (_controlled("snip", "reinitialize"), {}),
    "pooled_filters+channels": ("pooled_filters", {"remove": "channels"}),
    "prunefl+since_last": ("prunefl", {"accumulate": "since_last"}),
    "wanda+blocks": ("wanda", {"blocks": 2}),
}
USUAL = ("dynamic_sparse", "rigl+shuffle")  # of these
DENSE_SERVER = (  # keep the values of pruned entries
    "dpf",
    "dpf/straight_through",
    "feddip+dense",
    "sr_ste",
    "sr_ste/without_decay",
    "top_kast",
)
HALF = (  # of the weights are pruned in all rounds of training
    "autoflip",
    "feddst",
    "fedfit",
    "fedmef",
    "fedrts",
    "fedsgc",
    "force_masks",
    "grasp",
    "magnitude_masks",
    "random_masks",
    "snip",
    "sr_ste",
    "ssfl",
    "synflow",
    "top_kast",
    "wanda",
)
BY_FILTER = ("averaged_filters", "flpqsu", "mpfl", "pooled_filters", "random_filters")
DROP_CHANNELS = (
    "flpqsu",
    "flpqsu+scaffold",
    "flpqsu/quantized",
    "mpfl+started",
    "pooled_filters+channels",
)


class Row(NamedTuple):
    """A method under some settings."""

    method: Method
    settings: Mapping[str, Any]


def names() -> list[str]:
    """List all rows; nothing is imported for it."""
    listed = registry.names("method")
    variants = [f"{name}/{variant}" for name in listed for variant in listed[name].variants]
    return sorted([*listed, *variants, *BESIDE])


def family(name: str) -> str:
    """Name the method of a row: what is compiled of it is much the same."""
    return name.partition("/")[0].partition("+")[0]


def row(name: str) -> Row:
    """Find a method and its settings."""
    what, own = BESIDE.get(name, (name, {}))
    if isinstance(what, Method):
        return Row(what, {**what.law_settings, **own})
    found = registry.find("method", what)
    return Row(found.part, {**found.part.law_settings, **found.variant, **own})


@functools.lru_cache(maxsize=4)
def recorded(name: str) -> history.History:
    """Play a row once; its laws are read off that."""
    return history.record(*row(name))


def make(name: str, *, adapt=None, **settings: Any) -> scenario.Scenario:
    """Build a row's method under another protocol, without memory where nothing else is said."""
    method, own = row(name)
    return scenario.make(method, {**own, **settings}, scenario.PLAIN, adapt=adapt)


def num_live(name: str, index: int) -> int | range | None:
    """Say by hand what is left of the 32 prunable weights after a round of training."""
    method = family(name)
    if name == "autoflip+channels" or method == "feddp_threshold":
        return range(1, 32 + 1)  # no set size: channels go too, a threshold decides
    if method in BY_FILTER:  # half of the filters, of 6 and 4 weights
        wanted = 2 * 6 + 1 * 4 - (name in DROP_CHANNELS) * 2
        return range(1, wanted + 1) if name == "mpfl" else wanted  # whose clients may disagree
    if method == "prunetrain":
        return range(1, 32 + 1)
    if method == "prunefl":  # gains decide, beside a bound
        return range(1, 32 - round(0.8 * 32) + 1 if name == "prunefl/random_start" else 33)
    if method in ("fedtiny", "dynamic_sparse"):
        return 32 - round(0.6 * 32)
    if name in ("fedavg", "autoflip/explored_start", "feddip/without_pruning"):
        return 32
    if method in HALF:
        return 32 - round(0.5 * 32)
    if method == "feddip_prunetrain":
        return 32 - round((0.75 - 0.5 * (1 - index / 6) ** 3) * 32)
    if method in ("dpf", "feddip", "gradual_magnitude"):
        initial = 0.0 if method == "gradual_magnitude" else 0.25
        due = index - index % 2
        return 32 - round((0.75 + (initial - 0.75) * (1 - due / 6) ** 3) * 32)
    return 32 if method in ("fedavg", "adaptive_dynamic_pruning") else None
