"""What a run's rounds cost in arithmetic, and who trained what: figures for the record.

The network is counted once, before the first round; a round's figures are a few sums over its
layers on the host.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjaxprune import masks as masks_lib
from fedjaxprune import traffic, trees
from fedjaxprune.costs import flops
from fedjaxprune.experiment.run import composing
from fedjaxprune.models import gates
from fedjaxprune.types import Model, Params, PrunableFn, RoundMetrics

PARTS = flops.Cost._fields  # forward, input_gradient, weight_gradient


class RoundCosts(NamedTuple):
    """Figures of one round, as fields of the record."""

    # two per multiply-add of the clients' work, all together, by pass: `forward`, `input_gradient`
    # and `weight_gradient` under the masks, the last dense where a method looks at all of it; and
    # the same with ``dense_`` before it as if nothing were pruned. None if the network cannot be
    # counted
    training_flops: dict[str, int] | None
    clients_per_weight: float  # measured: how many clients trained a prunable weight, on average
    # measured: share of the prunable mask bits that the round did not flip
    unchanged_fraction: float


class Profile(NamedTuple):
    """What is known of the network before the run."""

    # multiply-adds of one example, by layer; None if it cannot be counted
    layers: tuple[flops.Layer, ...] | None
    paths: tuple[str, ...]  # of the parameters
    sizes: tuple[int, ...]  # of the parameters
    flags: tuple[bool, ...]  # which of them are prunable


def profile(
    model: Model,
    params: Params,
    inputs: Any,
    *,
    preprocess: Callable[..., Any],
    prunable: PrunableFn,
    warn: Callable[[str], object],
) -> Profile:
    """Count a network once."""
    example = jax.eval_shape(preprocess, jax.random.key(0), composing.rows(inputs, 1))
    try:
        layers = flops.of_model(model, None, example)
    except ValueError as error:
        warn(f"the network's multiply-adds are not in the record: {error}")
        layers = None
    return Profile(
        layers=layers,
        paths=tuple(trees.paths(params)),
        sizes=tuple(trees.sizes(params)),
        flags=tuple(masks_lib.prunable_leaves(params, prunable)),
    )


def of_round(profile: Profile, metrics: RoundMetrics) -> RoundCosts:
    """Make a round's figures from its metrics, read to the host.

    FLOPs are of the examples that count (no filling) of the clients that were heard or had nothing
    to say (`traffic.SILENT`; these train what they receive). They are under the masks that the
    round began with; under personal masks, if those leave fewer weights; of what the loss sees,
    where that is less than clients receive (`traffic.SEEN`). Stages that
    send no delta have none, unless they say what was trained (`traffic.TRAINED`) or only looked at
    (`traffic.EVALUATED`, `traffic.BACKPROPAGATED`). Where there are gates, FLOPs are of what these
    let through, forward and backward. The weight gradient is that of all entries that a client may
    send, where these are more than live ones (error feedback whose residue travels), and dense at
    the examples of which all of it was wanted (`traffic.DENSE_GRADIENT`), those of a pass beside
    the local steps included (`traffic.EXTRA_GRADIENT`).
    """
    flags = np.asarray(profile.flags, bool)
    sizes = np.asarray(profile.sizes, np.int64)
    num_prunable = max(1, int(sizes[flags].sum()))
    told = metrics.sent.reports.get(traffic.TRAINED)
    counts = _num_trained(metrics) if told is None else told[:, 0]
    trained = np.asarray(counts, np.int64)[np.asarray(metrics.participated)]
    sends_delta = "delta" in metrics.sent.up.get("reply", {})
    trains = sends_delta or told is not None
    kept = _num_received(metrics) if sends_delta else sizes * trains
    if traffic.SEEN in metrics.sent.reports:  # the same number for all clients
        kept = np.asarray(metrics.sent.reports[traffic.SEEN], np.int64)[0]
    through = gates.through(metrics.train)
    moved = kept
    if through:
        kept = moved = np.asarray(metrics.num_live, np.int64)
    elif len(trained):
        moved = np.round(trained.mean(axis=0)).astype(np.int64)
        kept = np.minimum(kept, moved)
    work = _Work(
        models=kept[None],
        moved=moved,
        parts=PARTS if trains else (),
        num_examples=_num_examples(metrics) + _num_extra(metrics),
        num_dense=_num_dense(profile, metrics),
    )
    for name, parts in {traffic.EVALUATED: PARTS[:1], traffic.BACKPROPAGATED: PARTS}.items():
        if name in metrics.sent.reports:  # the same models for all clients
            models = np.asarray(metrics.sent.reports[name], np.int64)[0]
            work = work._replace(models=models, moved=None, parts=parts)
    return RoundCosts(
        training_flops=_flops(profile, work, through),
        clients_per_weight=int(trained[:, flags].sum()) / num_prunable,
        unchanged_fraction=1.0 - int(metrics.num_changed) / num_prunable,
    )


def _num_trained(metrics: RoundMetrics) -> np.ndarray:
    """Count by leaf what each client trained: what it sends, or received if silent: ``[C, L]``."""
    field = metrics.sent.up.get(traffic.SILENT, {}).get(traffic.SILENT)
    if field is None:
        return np.asarray(metrics.num_uploaded)
    is_silent = np.asarray(field.clients)[:, None]
    return np.where(is_silent, np.asarray(metrics.num_downloaded)[:, 0], metrics.num_uploaded)


def _num_examples(metrics: RoundMetrics) -> float:
    """Count the examples that clients passed over, silent ones included."""
    unheard = metrics.sent.reports.get(traffic.SILENT_EXAMPLES, ())
    present = np.asarray(metrics.participated)
    silent = np.asarray(unheard, np.float64)[present].sum() if len(unheard) else 0.0
    return float(metrics.train["loss"].weight) + float(silent)


def _num_received(metrics: RoundMetrics) -> np.ndarray:
    """Count by leaf what a client that took part received, on average: ``[L]``."""
    received = np.asarray(metrics.num_downloaded, np.int64)[:, 0]
    present = received[np.asarray(metrics.participated)]
    return np.round((present if len(present) else received).mean(axis=0)).astype(np.int64)


class _Work(NamedTuple):
    """What the clients of a round computed, all together."""

    # ``[T, L]`` live entries per leaf of the models that the examples passed through
    models: np.ndarray
    # ``[L]`` entries per leaf whose gradient was wanted; None for the live ones
    moved: np.ndarray | None
    parts: tuple[str, ...]  # the passes that were made
    num_examples: float  # how many, through all models together
    # of them, by path, those at which the leaf's weight gradient was dense
    num_dense: Mapping[str, int]


def _num_dense(profile: Profile, metrics: RoundMetrics) -> Mapping[str, int]:
    found, extra = metrics.train.get(traffic.DENSE_GRADIENT), _num_extra(metrics)
    if found is None and not extra:
        return {}
    total = 0.0 if found is None else np.asarray(found.total, np.float64)
    totals = np.broadcast_to(total + extra, len(profile.paths))
    return dict(zip(profile.paths, np.round(totals).astype(np.int64).tolist(), strict=True))


def _num_extra(metrics: RoundMetrics) -> float:
    found = metrics.train.get(traffic.EXTRA_GRADIENT)
    return 0.0 if found is None else float(found.total)


def _flops(profile: Profile, work: _Work, through: Mapping[str, Any]) -> dict[str, int] | None:
    total = dict.fromkeys((*PARTS, *(f"dense_{part}" for part in PARTS)), 0)
    num_each = round(work.num_examples / len(work.models)) if work.num_examples > 0 else 0
    for kept in work.models.tolist():
        layers = _masked(profile, tuple(kept))
        if layers is None:
            return None
        if through:
            layers = flops.gated(layers, _shares(layers, through))
        counts = _totals(layers)
        for part in work.parts:
            for name in (part, f"dense_{part}"):
                total[name] += num_each * counts[name]
        if "weight_gradient" not in work.parts:
            continue
        if work.moved is not None and np.any(work.moved > np.asarray(kept)):
            wider = _masked(profile, tuple(work.moved.tolist())) or ()
            further = _totals(wider)["weight_gradient"] - counts["weight_gradient"]
            total["weight_gradient"] += num_each * further
        if any(work.num_dense.values()):
            total["weight_gradient"] += _further(layers, work.num_dense)
    return {name: flops.FLOPS_PER_MULTIPLY_ADD * count for name, count in total.items()}


def _further(layers: Sequence[flops.Layer], num_dense: Mapping[str, int]) -> int:
    """Count what dense weight gradients take beyond those of live weights."""
    return sum(
        max((num_dense[path] for paths in layer.weights for path in paths), default=0)
        * (layer.dense.weight_gradient - layer.sparse.weight_gradient)
        for layer in layers
    )


@functools.lru_cache(maxsize=8)
def _totals(layers: tuple[flops.Layer, ...]) -> dict[str, int]:
    """Add the layers up, under the record's names; once for each version of the masks."""
    dense = {f"dense_{part}": count for part, count in flops.dense(layers)._asdict().items()}
    return flops.sparse(layers)._asdict() | dense


def of_inference(
    profile: Profile, metrics: RoundMetrics, through: Mapping[str, Any]
) -> dict[str, int] | None:
    """Count the FLOPs of a prediction, an example, by what the gates let through in the test.

    `gated` and `open` are under the masks, without and with what gates close; `without_gates` is
    the network without masks, gates, and what these compute. None if it has no gates or cannot be
    counted.
    """
    masked = _masked(profile, tuple(np.asarray(metrics.num_live).tolist()))
    if masked is None or not through:
        return None
    own = [layer for layer in masked if any(map(_is_gate, layer.weights))]
    counts = {
        "gated": flops.sparse(flops.gated(masked, _shares(masked, through))).forward,
        "open": flops.sparse(masked).forward,
        "without_gates": flops.dense([layer for layer in masked if layer not in own]).forward,
    }
    return {name: flops.FLOPS_PER_MULTIPLY_ADD * count for name, count in counts.items()}


@functools.lru_cache(maxsize=8)
def _masked(profile: Profile, kept: tuple[int, ...]) -> tuple[flops.Layer, ...] | None:
    """Put masks on the network, by counts, once for each version; None if it cannot be counted."""
    if profile.layers is None:
        return None
    by_path = dict(zip(profile.paths, kept, strict=True))
    sizes = dict(zip(profile.paths, profile.sizes, strict=True))
    return flops.reweigh(profile.layers, by_path, sizes)


def _shares(layers: Sequence[flops.Layer], through: Mapping[str, Any]) -> dict[str, float]:
    """Match what gates let through to the layers whose output they choose from."""
    return {
        layer.path: min(1.0, float(value.total) / float(value.weight))
        for layer in layers
        for name, value in through.items()
        if layer.path.startswith(f"{name}/")
        and not any(map(_is_gate, layer.weights))
        and float(value.weight) > 0
    }


def _is_gate(paths: Sequence[str]) -> bool:
    return any(path.rsplit("/", 1)[-1] in gates.GATE for path in paths)
