"""What the controls share whose masks are chosen once, before FedAvg trains under them."""

from collections.abc import Callable
from typing import Any, Literal

from fedjaxprune import masks as masks_lib
from fedjaxprune.pruning import allocation as allocations
from fedjaxprune.pruning import pruners, scores
from fedjaxprune.rounds import facts as facts_lib
from fedjaxprune.rounds import server_work
from fedjaxprune.rounds.protocol import Hooks
from fedjaxprune.rounds.stages import in_order
from fedjaxprune.rounds.task import Task
from fedjaxprune.rounds.training import training
from fedjaxprune.settings import INT_MAX, Settings, Sparsity, setting
from fedjaxprune.types import (
    Algorithm,
    Key,
    Params,
    PrunableFn,
    Pruner,
    PrunerInputs,
    RoundState,
    Schedule,
    Stage,
)

ChooseFn = Callable[[Key, RoundState, Params, Any], RoundState]


Allocation = Literal["uniform", "uniform_but_first", "uniform_but_depthwise", "er", "erk", "global"]


def allocation_setting(default: Allocation) -> Any:
    """Declare how layers share the live weights, with the method's own default."""
    return setting(
        default,
        "How layers share the live weights: the same share of each, the same of each but the first "
        "convolution or the depthwise ones, which stay dense, a larger share of small ones (er "
        "goes by inputs and outputs, erk also by the size of convolutions), or one pool.",
    )


def least_setting(default: int) -> Any:
    """Declare the guard against layers without any weight, with the method's own default."""
    return setting(
        default,
        "Weights that every layer keeps whatever their scores; small layers take them from the "
        "largest one. 0 is no guard.",
        unit="weights",
        ge=0,
        le=INT_MAX,
    )


class FixedMaskSettings(Settings):
    """Settings of masks that are chosen once."""

    sparsity: Sparsity = setting(
        0.92,
        "Pruned fraction of the prunable weights, the same in all rounds of training.",
        unit="fraction",
    )
    allocation: Allocation = allocation_setting("uniform")
    least_per_layer: int = least_setting(0)


def chooser(settings: FixedMaskSettings, task: Task, score: scores.ScoreFn) -> ChooseFn:
    """Make ``(key, state, params, grads) -> state`` with tighter masks, and weights under them."""
    return choose_at(settings.sparsity, share_out(settings, task), score)


def pruner(
    sparsity: Schedule | float, allocation: allocations.AllocationFn, score: scores.ScoreFn
) -> Pruner:
    """Make the pruner of kernels that reaches a sparsity; a schedule's rounds are steps."""
    return pruners.exempt(
        pruners.prune_to(sparsity, score=score, allocation=allocation), masks_lib.is_kernel
    )


def choose_at(
    sparsity: float, allocation: allocations.AllocationFn, score: scores.ScoreFn
) -> ChooseFn:
    """Make the same for one sparsity on the way to the one that is asked for."""
    tighter = pruner(sparsity, allocation, score)

    def choose(key, state, params, grads):
        inputs = PrunerInputs(params=params, grads=grads, round=state.round)
        masks, _ = tighter.update(key, state.masks, tighter.init(params), inputs)
        return state._replace(masks=masks, params=masks_lib.apply(masks, state.params))

    return choose


def share_out(settings: FixedMaskSettings, task: Task) -> allocations.AllocationFn:
    """Choose how layers share the live weights; something is left of each.

    Raises:
      ValueError: nothing would be left of the network, or of a layer under ``uniform``, or
        `least_per_layer` asks for more than the sparsity leaves.
    """
    sizes = facts_lib.sizes(task.facts, masks_lib.is_kernel)
    check_something_left(task, masks_lib.is_kernel, settings.sparsity)
    least = settings.least_per_layer
    if least:
        _check_least(settings, sizes)
    if settings.allocation == "global":
        return allocations.global_pool(least=least)
    shared = _by_layer(settings, task, sizes)
    return allocations.at_least(shared, least=least) if least else shared


def _check_least(settings: FixedMaskSettings, sizes: dict[str, int]) -> None:
    """Refuse a guard that alone keeps more than the sparsity leaves."""
    total, least = sum(sizes.values()), settings.least_per_layer
    num_left = total - round(settings.sparsity * total)
    num_least = sum(min(size, least) for size in sizes.values())
    if num_least > num_left:
        raise ValueError(
            f"method.least_per_layer keeps {num_least} weights of {len(sizes)} layers, more than "
            f"the {num_left} that method.sparsity {settings.sparsity} leaves, got {least}: lower "
            "one of them."
        )


def _by_layer(
    settings: FixedMaskSettings, task: Task, sizes: dict[str, int]
) -> allocations.AllocationFn:
    """Choose an allocation that goes by the layers' shapes alone."""
    if settings.allocation.startswith("uniform_but"):
        return _uniform_but(settings, task, sizes)
    if settings.allocation != "uniform":
        return allocations.er() if settings.allocation == "er" else allocations.erk()
    if not settings.least_per_layer:
        check_layers_left(
            task,
            masks_lib.is_kernel,
            settings.sparsity,
            advice=" with method.allocation 'uniform' (er, erk and global keep more of small "
            "layers, and method.least_per_layer 1 keeps one)",
        )
    return allocations.uniform()


def _uniform_but(
    settings: FixedMaskSettings, task: Task, sizes: dict[str, int]
) -> allocations.AllocationFn:
    """Share alike but for some convolutions, which are kept whole."""
    if settings.allocation == "uniform_but_first":
        first = facts_lib.first_convolution(task.facts)
        paths, what, verb = [] if first is None else [first], "first convolution", "is"
    else:
        paths = facts_lib.depthwise_convolutions(task.facts)
        what, verb = "depthwise convolutions", "are"
    if not paths:
        raise ValueError(
            f"method.allocation {settings.allocation!r} keeps the {what} dense, and the network "
            "has none."
        )
    total, num_dense = sum(sizes.values()), sum(sizes[path] for path in paths)
    if num_dense >= (1.0 - settings.sparsity) * total:
        raise ValueError(
            f"method.sparsity must be less than {1.0 - num_dense / total:.4g} with "
            f"method.allocation {settings.allocation!r}, as the {what} {verb} kept dense, got "
            f"{settings.sparsity}."
        )
    return allocations.erk(power=0.0, dense=lambda path, leaf: path in paths)


def check_something_left(task: Task, prunable: PrunableFn, sparsity: float) -> None:
    """Refuse a sparsity under which no prunable weight is left."""
    total = sum(facts_lib.sizes(task.facts, prunable).values())
    if total and _is_emptied(total, sparsity):
        raise ValueError(
            f"method.sparsity must leave at least one of the {total} prunable weights of the "
            f"network, got {sparsity}."
        )


def check_layers_left(
    task: Task, prunable: PrunableFn, sparsity: float, *, advice: str = ""
) -> None:
    """Refuse a sparsity under which nothing is left of a layer, if it is the same for all."""
    sizes = facts_lib.sizes(task.facts, prunable)
    path = min(sizes, key=lambda path: sizes[path], default="")
    if path and _is_emptied(sizes[path], sparsity):
        raise ValueError(
            f"method.sparsity must leave at least one of the {sizes[path]} weights of {path!r}, or "
            f"nothing passes; got {sparsity}{advice}."
        )


def _is_emptied(size: int, sparsity: float) -> bool:
    return size - round(sparsity * size) < 1


def draw(
    settings: FixedMaskSettings, task: Task, *, score: scores.ScoreFn = scores.random
) -> Stage:
    """Make one mask of the initial weights, at random unless a score is given.

    It follows from the run's seed and does not travel.
    """
    choose = chooser(settings, task, score)

    def work(key, state, population):
        del population  # no data decides
        return choose(key, state, state.params, None), server_work.no_loss()

    return server_work.server_round("draw", work, masks_known_to="everybody")


def train_under(
    task: Task,
    sparsity: float,
    *before: Stage,
    init: Callable[[RoundState], RoundState] | None = None,
    hooks: Hooks | None = None,
) -> Algorithm:
    """Let plain training under the masks in force follow the stages that choose them."""
    train = training(task.protocol, client=task.local_client(), hooks=hooks)
    return in_order(train, before, init=init, sparsity=sparsity)._replace(has_fixed_masks=True)
