"""PruneTrain: train from scratch with a penalty on channels, and prune those that it empties.

The published method trains on one machine; this is a federated form of it.

1. ``measure``: each client says its mean loss at the initial weights, one number. The server
   chooses the coefficient of the penalty once, so that the penalty is the share `penalty_ratio` of
   the objective at the start;
2. ``train``: clients add a group lasso to their loss, over the output channels and the input
   channels of every kernel. Every `prune_every` rounds the server prunes the filters of the
   averaged model whose weights have all come to `threshold` or less. Only live channels travel, and
   one bit a filter when the masks change.

Penalty, coefficient and threshold follow the paper's code: channels of the network's inputs and
outputs, and of depthwise kernels, have no penalty. We differ in five points:

- The code takes the loss of the first batch; here it is the mean over clients, by examples, of the
  loss over one pass.
- The code's threshold forgets the sign, so negative weights look like zeros. Here it is of
  magnitudes.
- The code keeps a channel that a layer makes or that another reads. Here a filter goes for good
  with its bias and normalization, what reads a channel goes when all filters that make it are gone,
  and a layer keeps one filter.
- The code makes the network smaller while it trains. Here shapes stay, masks say what is live, and
  ``fedjaxprune export`` removes what is pruned.
- Batch size and learning rate do not grow as the network shrinks.

Gradient steps lead close to zero and never there, and averaging blurs what is zero for one client
alone. ``step: proximal`` shortens each block of weights after every local step instead, by the
learning rate times the coefficient, which makes exact zeros. Outputs and inputs of a kernel are
shortened one after the other. The learning rate is how far a gradient of 1 moves a weight in the
optimizer's first step, times the decay of the round.

References:
  Lym et al., `PruneTrain: Fast Neural Network Training by Dynamic Sparse Model Reconfiguration
  <https://arxiv.org/abs/1901.09290>`_, 2019.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjaxprune import masks as masks_lib
from fedjaxprune import trees
from fedjaxprune.federated import derivatives, group_lasso, optimizers
from fedjaxprune.method import Method, Paper
from fedjaxprune.methods import _filter_rounds
from fedjaxprune.pruning import drop_and_grow, pruners
from fedjaxprune.pruning.structured import channel_pruning, filters
from fedjaxprune.rounds import reporting
from fedjaxprune.rounds.protocol import Announcement, FieldSpec, Hooks, Masking, add_reports
from fedjaxprune.rounds.stages import in_order
from fedjaxprune.rounds.task import Task
from fedjaxprune.rounds.training import training
from fedjaxprune.settings import Fraction, NonNegative, Rounds, Settings, setting
from fedjaxprune.traffic import EVALUATED
from fedjaxprune.types import Algorithm, Client, RoundMetrics, Stage

COEFFICIENT = "coefficient"  # that clients are told, once each


class PruneTrain(Settings):
    """Settings of PruneTrain."""

    penalty_ratio: Fraction = setting(
        0.1,
        "Share of the penalty in the objective at the start, which decides its coefficient (the "
        "paper's experiments: 0.2 to 0.3); 0 is FedAvg.",
        unit="fraction",
    )
    group_weights: group_lasso.Weights = setting(
        "equal",
        "Whether the norm of a channel counts as it is, or times the square root of its number of "
        "weights.",
    )
    step: Literal["gradient", "proximal"] = setting(
        "gradient",
        "How a local step follows the penalty: by its gradient (public code), or by shortening "
        "channels, which makes exact zeros.",
    )
    threshold: NonNegative = setting(
        1e-4, "Largest magnitude of a weight that counts as zero.", unit="magnitude"
    )
    prune_every: Rounds = setting(
        1, "Rounds from one removal of channels to the next, and up to the first.", unit="rounds"
    )


class LassoState(NamedTuple):
    """What the stages hand on beside weights and masks."""

    keep: filters.Keep  # [F] bool a layer: the filters in force
    coefficient: jax.Array  # [] float32


def build(settings: PruneTrain, task: Task) -> Algorithm:
    """Build PruneTrain.

    Raises:
      ValueError: the network has no channels that it is free to lose, no round would remove any, or
        the proximal step cannot tell the learning rate.
    """
    if settings.penalty_ratio == 0.0:
        dense = training(task.protocol, client=task.local_client())
        return dense._replace(has_fixed_masks=True)
    period, num_rounds = settings.prune_every, task.protocol.num_rounds
    if period > num_rounds:
        raise ValueError(
            f"method.prune_every must be at most the rounds of training ({num_rounds}), or no "
            f"channel is ever removed, got {period}."
        )
    is_due = drop_and_grow.every(period=period, until=num_rounds)
    channels, params = task.facts.channels(), task.facts.params
    cuts = group_lasso.blocks(channels, params, weights=settings.group_weights)
    layers = filters.layers(channels, params, prunable=masks_lib.is_kernel)
    prune = channel_pruning.prune_small(layers, channels, threshold=settings.threshold)

    def after_round(before, after, metrics):
        keep = filters.of_masks(layers, after.masks)
        reports = {
            _filter_rounds.NUM_FILTERS: filters.num_kept(keep),
            COEFFICIENT: after.method.coefficient,
        }
        after = after._replace(method=after.method._replace(keep=keep))
        return after, add_reports(metrics, reports)

    def init(state):
        start = LassoState(keep=filters.full(layers), coefficient=jnp.float32(0.0))
        return state._replace(method=start)

    announcement = Announcement(
        fields=lambda state: {COEFFICIENT: state.method.coefficient},
        is_due=lambda state: jnp.bool_(True),
        versions={COEFFICIENT: lambda state: jnp.int32(1)},
    )
    trained = training(
        task.protocol,
        client=_client(settings, task, cuts),
        pruner=pruners.when(is_due, prune),
        prunable=channel_pruning.reaches((*channels.groups, *layers), masks_lib.is_kernel),
        masking=Masking(transport=_filter_rounds.mask_transport()),
        hooks=Hooks(after_round=after_round, announcement=announcement),
    )
    measured = measure(task, cuts, ratio=settings.penalty_ratio)
    trained = trained._replace(counted=masks_lib.is_kernel, diagnostics=diagnostics)
    return in_order(trained, (measured,), init=init)


def diagnostics(metrics: RoundMetrics) -> dict[str, Any]:
    """Report the penalty's coefficient, and the filters that each layer has after the round."""
    reports = metrics.sent.reports
    if COEFFICIENT not in reports:
        return {}
    return {
        COEFFICIENT: float(np.asarray(reports[COEFFICIENT])[0]),
        _filter_rounds.NUM_FILTERS: np.asarray(reports[_filter_rounds.NUM_FILTERS])[0].tolist(),
    }


def measure(task: Task, cuts: tuple[group_lasso.Blocks, ...], *, ratio: float) -> Stage:
    """Make the exchange that chooses the penalty's coefficient of the clients' losses.

    All clients answer, also where clients drop out in training, as the coefficient is chosen once.
    Nothing comes down for it: the initial weights follow from the run's seed.
    """

    def server_update(key, state, fields):
        del key  # deterministic
        total = group_lasso.total(state.params, cuts)
        found = group_lasso.coefficient(fields["loss"], total, ratio=ratio)
        return state._replace(method=state.method._replace(coefficient=found))

    def download(state, masks_held):
        none = jnp.zeros((*masks_held.shape, 1, len(trees.sizes(state.params))), jnp.int32)
        return reporting.Download({}, none, jnp.zeros_like(masks_held))

    return reporting.reporting_round(
        task.protocol,
        name="measure",
        client=derivatives.mean_loss(task.model.loss, batcher=task.batches()),
        fields={"loss": FieldSpec()},
        server_update=server_update,
        download=download,
        exchange=reporting.Exchange(
            cohort="population",
            compute=lambda state: {EVALUATED: masks_lib.num_kept(state.masks)[None]},
        ),
    )


def _client(settings: PruneTrain, task: Task, cuts: tuple[group_lasso.Blocks, ...]) -> Client:
    """Make the local training, with the coefficient that the server has announced."""

    def announced(broadcast):
        return broadcast.announced[COEFFICIENT]

    if settings.step == "gradient":
        lasso = group_lasso.penalty(cuts, coefficient=announced)
        return task.local_client(penalties=(lasso,))
    rate, decay = optimizers.first_step(task.protocol.optimizer), task.protocol.learning_rate_scale

    def update_fn(key, broadcast, state, data):
        amount = rate * announced(broadcast)
        if decay is not None:
            amount = amount * jnp.asarray(decay(broadcast.round), jnp.float32)

        def post_step(step):
            params = group_lasso.shrink(step.after.params, cuts, amount)
            return step.after._replace(params=params)

        return task.local_client(post_step=post_step).update(key, broadcast, state, data)

    return Client(init=lambda params: (), update=update_fn)


METHOD = Method(
    build=build,
    settings=PruneTrain,
    paper=Paper(
        "Lym et al.",
        2019,
        "PruneTrain: Fast Neural Network Training by Dynamic Sparse Model Reconfiguration",
        arxiv="1901.09290",
    ),
    default_model="resnet8",
    variants={"proximal": {"step": "proximal"}},
    law_settings={"penalty_ratio": 0.3, "threshold": 0.5, "prune_every": 2},
    nothing_pruned={"penalty_ratio": 0.0},
)
