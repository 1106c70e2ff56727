"""What the controls share whose masks are chosen once, before FedAvg trains under them."""

from collections.abc import Callable
from typing import Any, Literal

from fedjaxprune import masks as masks_lib
from fedjaxprune.pruning import allocation as allocations
from fedjaxprune.pruning import pruners, scores
from fedjaxprune.rounds import facts as facts_lib
from fedjaxprune.rounds import server_work
from fedjaxprune.rounds.stages import in_order
from fedjaxprune.rounds.task import Task
from fedjaxprune.rounds.training import training
from fedjaxprune.settings import Settings, Sparsity, setting
from fedjaxprune.types import Algorithm, Key, Params, PrunableFn, PrunerInputs, RoundState, Stage

ChooseFn = Callable[[Key, RoundState, Params, Any], RoundState]


Allocation = Literal["uniform", "uniform_but_first", "erk", "global"]


def allocation_setting(default: Allocation) -> Any:
    """Declare how layers share the live weights, with the method's own default."""
    return setting(
        default,
        "How layers share the live weights: the same share of each, the same of each but the first "
        "convolution, which stays dense, a larger share of small ones, or one pool.",
    )


class FixedMaskSettings(Settings):
    """Settings of masks that are chosen once."""

    sparsity: Sparsity = setting(
        0.92,
        "Pruned fraction of the prunable weights, the same in all rounds of training.",
        unit="fraction",
    )
    allocation: Allocation = allocation_setting("uniform")


def chooser(settings: FixedMaskSettings, task: Task, score: scores.ScoreFn) -> ChooseFn:
    """Make ``(key, state, params, grads) -> state`` with tighter masks, and weights under them."""
    return choose_at(settings.sparsity, share_out(settings, task), score)


def choose_at(
    sparsity: float, allocation: allocations.AllocationFn, score: scores.ScoreFn
) -> ChooseFn:
    """Make the same for one sparsity on the way to the one that is asked for."""
    pruner = pruners.exempt(
        pruners.prune_to(sparsity, score=score, allocation=allocation), masks_lib.is_kernel
    )

    def choose(key, state, params, grads):
        inputs = PrunerInputs(params=params, grads=grads, round=state.round)
        masks, _ = pruner.update(key, state.masks, pruner.init(params), inputs)
        return state._replace(masks=masks, params=masks_lib.apply(masks, state.params))

    return choose


def share_out(settings: FixedMaskSettings, task: Task) -> allocations.AllocationFn:
    """Choose how layers share the live weights; something is left of each."""
    sizes = facts_lib.sizes(task.facts, masks_lib.is_kernel)
    check_something_left(task, masks_lib.is_kernel, settings.sparsity)
    if settings.allocation == "uniform_but_first":
        return _uniform_but_first(settings.sparsity, task, sizes)
    path = min(sizes, key=lambda path: sizes[path], default="")
    if settings.allocation == "uniform" and path:
        if _is_emptied(sizes[path], settings.sparsity):
            raise ValueError(
                f"method.sparsity must leave at least one of the {sizes[path]} weights of "
                f"{path!r}, or nothing passes; got {settings.sparsity} with method.allocation "
                "'uniform' (erk and global keep more of small layers)."
            )
        return allocations.uniform()
    return allocations.erk() if settings.allocation == "erk" else allocations.global_pool()


def _uniform_but_first(
    sparsity: float, task: Task, sizes: dict[str, int]
) -> allocations.AllocationFn:
    first = facts_lib.first_convolution(task.facts)
    if first is None:
        raise ValueError(
            "method.allocation 'uniform_but_first' keeps the first convolution dense, and the "
            "network has none."
        )
    limit = 1.0 - sizes[first] / sum(sizes.values())
    if sizes[first] >= (1.0 - sparsity) * sum(sizes.values()):
        raise ValueError(
            f"method.sparsity must be less than {limit:.4g} with method.allocation "
            f"'uniform_but_first', as the first convolution is kept dense, got {sparsity}."
        )
    return allocations.erk(power=0.0, dense=lambda path, leaf: path == first)


def check_something_left(task: Task, prunable: PrunableFn, sparsity: float) -> None:
    """Refuse a sparsity under which no prunable weight is left."""
    total = sum(facts_lib.sizes(task.facts, prunable).values())
    if total and _is_emptied(total, sparsity):
        raise ValueError(
            f"method.sparsity must leave at least one of the {total} prunable weights of the "
            f"network, got {sparsity}."
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


def train_under(task: Task, sparsity: float, *before: Stage) -> Algorithm:
    """Let plain training under the masks in force follow the stages that choose them."""
    train = training(task.protocol, client=task.local_client())
    return in_order(train, before, sparsity=sparsity)
