"""GraSP: masks at the start that keep the weights through which gradients flow.

1. The gradient `g` of the initial network is taken, then the Hessian `H` times `g`; a weight's
   score is ``w * (H g)`` with its sign. What is pruned first are weights without which the squared
   norm of the gradient is largest. One step, one pool of all layers.
2. ``train``: plain training under the mask, from the initial weights.

At the server both passes are one round (``prepare``). Over clients (``grasp/of_clients``) they are
two exchanges with the same cohort: the dense model goes down and gradients come up (``gradient``);
their mean goes down and products with the clients' Hessians come up (``curvature``). The mean of
these is the product of the mean, so that, with all clients and without BatchNorm, it is the score
on the pooled data. ``grasp/one_exchange`` is cheaper and another score: each client takes the
product with its own gradient. What no client answers is pruned by magnitude. The federated forms
are ours [inferred].

As in the public code, logits are divided by 200 before the loss, for the score alone. This brings
the softmax near uniform, and ranks change with it. The code draws as many examples of each class,
sums two halves, draws dense layers anew for the score and keeps one weight too many; here the loss
is the mean over all examples, nothing is drawn anew, counts are exact, and products are computed by
forward over reverse differentiation. BatchNorm is in training mode.

References:
  Wang et al., `Picking Winning Tickets Before Training by Preserving Gradient Flow
  <https://arxiv.org/abs/2002.07376>`_, 2020.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from fedjaxprune import metrics, trees
from fedjaxprune.federated import derivatives
from fedjaxprune.federated.derivatives import Given
from fedjaxprune.federated.local_training import LossFn
from fedjaxprune.method import Method, Needs, Paper
from fedjaxprune.methods import _scored_masks
from fedjaxprune.pruning import scores
from fedjaxprune.rounds import reporting
from fedjaxprune.rounds.protocol import FieldSpec, broadcast_of
from fedjaxprune.rounds.task import Task
from fedjaxprune.settings import Positive, setting
from fedjaxprune.traffic import BACKPROPAGATED, FieldLength
from fedjaxprune.types import Algorithm, Client, RoundState, Stage

_TEMPERATURE = 200.0  # of the public code


class Grasp(_scored_masks.ScoredSettings):
    """Settings of GraSP."""

    exchanges: Literal["two", "one"] = setting(
        "two",
        "With examples 'clients': two exchanges, of the gradient and of products with its mean, or "
        "one, of products with each client's own gradient.",
    )
    temperature: Positive | None = setting(
        None,
        "What logits are divided by before the loss, for the score alone.",
        unit="no unit",
        unset="200 for classes, 1 for numbers and for a network whose loss is its own",
    )


def build(settings: Grasp, task: Task) -> Algorithm:
    """Score the weights of the initial network, and train under the mask of the best.

    Raises:
      ValueError: a temperature other than 1 for a network whose loss is its own.
    """
    loss, batcher = _loss(settings, task), _scored_masks.batches(settings, task)
    gradient = derivatives.report(
        loss, batcher=batcher, name="grads", derivative=derivatives.gradient()
    )
    curvature = derivatives.report(
        loss, batcher=batcher, name="curvature", derivative=derivatives.curvature()
    )
    own = _along_own(gradient, curvature)
    tighten = _scored_masks.tighten(settings, task, scores.gradient_flow, reads="curvature")
    if settings.examples != "clients":

        def look(key, state, data):
            given: Any = Given(broadcast_of(state))
            message, _ = own.update(key, given, (), data)
            return message.fields["curvature"], message.fields["metrics"]

        stage = _scored_masks.at_server(look, _scored_masks.source(settings, task), tighten)
        return _scored_masks.train_under(settings, task, stage)

    settle = _scored_masks.settle(settings, task)
    if settings.exchanges == "one":
        asked = reporting.Exchange(compute=_differentiates(3))
        exchange = _ask(task, own, tighten, asked, reporting.dense_download)
        return _scored_masks.train_under(settings, task, exchange, settle)
    asked = reporting.Exchange(cohort="same", compute=_differentiates(2), is_over=_has_no_gradient)
    first = reporting.reporting_round(
        task.protocol,
        name="gradient",
        client=gradient,
        fields={"grads": FieldSpec()},
        server_update=lambda key, state, fields: state._replace(method=fields["grads"]),
        broadcast=lambda state: Given(broadcast_of(state)),
        exchange=reporting.Exchange(cohort="same", compute=_differentiates(1)),
    )
    second = _ask(task, curvature, tighten, asked, _direction_download)
    return _scored_masks.train_under(
        settings,
        task,
        first,
        second,
        settle,
        method=lambda params: jax.tree.map(jnp.zeros_like, params),
    )


def _ask(
    task: Task,
    client: Client,
    tighten: _scored_masks.TightenFn,
    asked: reporting.Exchange,
    download: reporting.DownloadFn,
) -> Stage:
    """Ask clients for products with their Hessians, along `RoundState.method` if that is known."""

    def server_update(key, state, fields):
        step = jnp.int32(0)
        masks = tighten(key, state.masks, state.params, fields["curvature"], step)
        return state._replace(masks=masks)

    return reporting.reporting_round(
        task.protocol,
        name="curvature",
        client=client,
        fields={"curvature": FieldSpec()},
        server_update=server_update,
        broadcast=lambda state: Given(broadcast_of(state), state.method),
        download=download,
        exchange=asked,
    )


def _along_own(gradient: Client, curvature: Client) -> Client:
    """Take a client's gradient, and then the product with it, each in a pass of its own."""

    def update_fn(key, given, state, data):
        first_key, second_key = jax.random.split(key)
        before, _ = gradient.update(first_key, given, state, data)
        given = given._replace(direction=before.fields["grads"])
        message, state = curvature.update(second_key, given, state, data)
        seen = metrics.merge(before.fields["metrics"], message.fields["metrics"])
        return message._replace(fields={**message.fields, "metrics": seen}), state

    return Client(init=curvature.init, update=update_fn)


def _direction_download(state: RoundState, masks_held: jax.Array) -> reporting.Download:
    """Send the mean gradient to the cohort, which holds the model."""
    download = reporting.dense_download(state, masks_held)
    return download._replace(messages={"broadcast": {"direction": FieldLength()}})


def _differentiates(num_gradients: int) -> Callable[[RoundState], dict[str, jax.Array]]:
    """Say that a client differentiates the dense model so many times."""

    def compute(state: RoundState) -> dict[str, jax.Array]:
        sizes = jnp.asarray(trees.sizes(state.params), jnp.int32)
        return {BACKPROPAGATED: jnp.broadcast_to(sizes[None], (num_gradients, *sizes.shape))}

    return compute


def _has_no_gradient(state: RoundState) -> jax.Array:
    """Tell whether no client has answered the first exchange."""
    leaves = [jnp.any(leaf != 0) for leaf in jax.tree.leaves(state.method)]
    return ~jnp.any(jnp.stack(leaves))


def _loss(settings: Grasp, task: Task) -> LossFn:
    """Divide logits by the temperature."""
    head, with_head = task.model.head, task.model.with_head
    is_classifier = head is not None and with_head is not None and head.hits is not None
    temperature = settings.temperature or (_TEMPERATURE if is_classifier else 1.0)
    if temperature == 1.0:
        return task.model.loss
    if head is None or with_head is None:
        raise ValueError(
            "method.temperature must be 1 for a network whose loss is its own, as its logits are "
            f"not known, got {temperature}."
        )

    def cooled(outputs, labels):
        return head.loss(outputs / temperature, labels)

    return with_head(head._replace(loss=cooled)).loss


METHOD = Method(
    build=build,
    settings=Grasp,
    paper=Paper(
        "Wang et al.",
        2020,
        "Picking Winning Tickets Before Training by Preserving Gradient Flow",
        arxiv="2002.07376",
        code="https://github.com/alecwangcq/GraSP",
    ),
    needs=lambda settings: Needs(server_examples=settings.examples == "server"),
    variants={
        "of_clients": {"examples": "clients"},
        "one_exchange": {"examples": "clients", "exchanges": "one"},
    },
    law_settings={"sparsity": 0.5},
    nothing_pruned={"sparsity": 0.0},
)
