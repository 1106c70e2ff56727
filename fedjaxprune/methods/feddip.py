"""FedDIP: dynamic pruning with error feedback and an incremental penalty.

One global mask tightens along a cubic schedule by global magnitude; clients take gradients at the
masked weights and apply them to the dense ones; a penalty on the layers' norms grows in steps.

Three readings of "dynamic pruning" are offered as `mode`, beside `unpruned`, an ablation:

- ``masked``, what the authors' public code does: what is pruned never returns, and the dense
  entries of a delta have no effect once a mask is in force, so they are not sent;
- ``regrow``: revisions rank the aggregate before it is masked, so weights can return; clients send
  dense deltas in the revision rounds, and only in those;
- ``dense``: the server keeps dense parameters and broadcasts them masked (federated DPF, with the
  penalty); clients send dense deltas in every round.

Where we differ from the public code: the masks of round 0 are one draw for all clients (theirs
differ by client), clients weigh by their numbers of examples (theirs equally under an IID
partition), BatchNorm statistics come from the masked forward pass, and losses are reported
of the masked model, without penalty.

References:
  Long et al., `FedDIP <https://arxiv.org/abs/2309.06805>`_, 2023; Lin et al., `Dynamic Model
  Pruning with Feedback <https://arxiv.org/abs/2006.07253>`_, 2020.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pydantic

from fedjaxprune import masks as masks_lib
from fedjaxprune import trees
from fedjaxprune.costs import storage_models
from fedjaxprune.federated import penalties
from fedjaxprune.method import Method, Paper
from fedjaxprune.methods import _gradual
from fedjaxprune.pruning import allocation, pruners, scores
from fedjaxprune.rounds.protocol import FieldSpec
from fedjaxprune.rounds.task import Task
from fedjaxprune.rounds.training import training
from fedjaxprune.settings import INT_MAX, NonNegative, Sparsity, setting
from fedjaxprune.traffic import PublishedBits
from fedjaxprune.types import (
    Algorithm,
    Client,
    FormulaFn,
    Key,
    Masks,
    Params,
    PrunableFn,
    PrunerInputs,
    Schedule,
)

NUM_SEGMENTS = 20  # of the penalty's staircase, fixed in the public code
ZEROS = "num_zeros"  # report of a client: exact zeros of its dense model, by leaf
MIN_PENALTY = 5e-4  # its first step, fixed in the public code


def stepped_penalty(
    *,
    max_penalty: float,
    num_rounds: int,
    min_penalty: float = MIN_PENALTY,
    num_segments: int = NUM_SEGMENTS,
) -> Schedule:
    """Make the coefficient of the penalty: a staircase of `num_segments` equal segments.

    Zero in the first segment, `min_penalty` in the second, then up in equal steps. As in the public
    code the last step is one short of `max_penalty`: the step height is the difference divided by
    ``num_segments - 1``, and the last segment stands ``num_segments - 2`` steps up. Rounds left
    over by the division belong to the last segment. The public code fixes `min_penalty` and
    `num_segments`.

    Raises:
      ValueError: if there are fewer rounds than segments, or the penalties are not ordered.
    """
    if num_segments < 2:
        raise ValueError(f"num_segments must be at least 2, got {num_segments}.")
    if num_rounds < num_segments:
        raise ValueError(
            f"FedDIP's penalty climbs in {num_segments} segments, which need at least as many "
            f"rounds; got num_rounds={num_rounds}."
        )
    if not 0.0 <= min_penalty <= max_penalty:
        raise ValueError(
            f"max_penalty must be at least {min_penalty}, where the staircase starts; "
            f"got {max_penalty}."
        )
    length = num_rounds // num_segments
    step = (max_penalty - min_penalty) / (num_segments - 1)

    def schedule(round_index):
        segment = jnp.minimum(round_index // length, num_segments - 1)
        risen = min_penalty + (segment - 1).astype(jnp.float32) * step
        return jnp.where(segment == 0, jnp.zeros_like(risen), risen)

    return schedule


def erk_start(*, sparsity: float, prunable: PrunableFn) -> Callable[[Key, Params], Masks]:
    """Draw random masks with ERK layer densities: ``(key, params) -> masks``.

    Clients train under them in round 0, before any magnitude has been learnt. As in the public code
    the budget is shared out over all kernels and normalization scales, where the scales are kept
    whole; afterwards what is not prunable is switched back on. The masks are drawn from the round's
    key, which everybody holds, so they do not travel.

    References:
      Evci et al., `RigL <https://arxiv.org/abs/1911.11134>`_, 2020 (the ERK allocation).
    """

    def is_scale(path, leaf):
        return path.rsplit("/", 1)[-1] == "scale" and not prunable(path, leaf)

    def shares_budget(path, leaf):
        return prunable(path, leaf) or masks_lib.is_kernel(path, leaf) or is_scale(path, leaf)

    shares = allocation.erk(dense=is_scale)
    draw = pruners.exempt(
        pruners.prune_to(sparsity, score=scores.random, allocation=shares), shares_budget
    )

    def start(key, params):
        inputs = PrunerInputs(params=params, grads=None, round=jnp.int32(0))
        masks, _ = draw.update(key, masks_lib.full(params), draw.init(params), inputs)
        return masks_lib.restrict(masks, prunable)

    return start


def without_shortcuts(path: str, leaf: jax.Array) -> bool:
    """Call prunable all kernels but those of ResNets' 1x1 shortcut convolutions, as FedDIP does."""
    return masks_lib.is_kernel(path, leaf) and "shortcut" not in path


class FedDIP(_gradual.GradualSettings):
    """Settings of FedDIP; the defaults are the published ones."""

    sparsity: Sparsity = _gradual.sparsity_setting(0.9)
    max_penalty: NonNegative = setting(
        1e-3,
        "Coefficient that the staircase of the penalty on the layers' norms leads to; 0 switches "
        "the penalty off.",
        unit="loss per norm",
    )
    num_segments: int | None = setting(
        None,
        "Steps of the penalty's staircase.",
        unit="steps",
        unset="20, or one a round in a run of fewer rounds",
        ge=2,
        le=INT_MAX,
    )
    mode: Literal["masked", "regrow", "dense", "unpruned"] = setting(
        "masked",
        "What is ranked: the masked aggregate (the public code), the aggregate before masking "
        "(pruned weights can return), or a dense server model; unpruned prunes nothing and keeps "
        "a constant penalty on the norms of all tensors.",
    )
    prune_shortcuts: bool = setting(
        False, "Whether the 1x1 shortcut convolutions of residual networks are pruned, too."
    )

    @pydantic.model_validator(mode="after")
    def _check_penalty(self):
        if self.mode != "unpruned" and 0.0 < self.max_penalty < MIN_PENALTY:
            raise ValueError(
                f"max_penalty must be 0 or at least {MIN_PENALTY}, where FedDIP's staircase "
                f"starts, got {self.max_penalty}."
            )
        return self


def build(settings: FedDIP, task: Task) -> Algorithm:
    """Prune ever more of one global model while it is trained."""
    prunable = masks_lib.is_kernel if settings.prune_shortcuts else without_shortcuts
    if settings.mode == "unpruned":
        penalty = penalties.layer_norms(
            coefficient=lambda round_index: jnp.float32(settings.max_penalty),
            prunable=lambda path, leaf: True,
        )
        client = task.local_client(penalties=(penalty,))
        return training(task.protocol, client=client, prunable=prunable)
    num_rounds = task.protocol.num_rounds
    curve = _gradual.plan(settings, task, end_round=num_rounds, prunable=prunable)
    revise, masking = _gradual.feedback(curve, settings.mode)
    draw = erk_start(sparsity=curve.initial_sparsity, prunable=prunable)

    def train_masks(key, state):
        return jax.lax.cond(
            state.round == 0,
            lambda: jax.tree.map(jnp.logical_and, state.masks, draw(key, state.params)),
            lambda: state.masks,
        )

    terms = _staircase(settings, num_rounds, prunable)
    algorithm = training(
        task.protocol,
        client=_count_zeros(task.dense_feedback_client(penalties=terms)),
        pruner=revise,
        prunable=prunable,
        masking=masking._replace(train=train_masks),
        fields={ZEROS: FieldSpec(send="nothing")},
    )
    charge = code_formula(
        final_sparsity=settings.sparsity,
        initial_sparsity=curve.initial_sparsity,
        num_rounds=num_rounds,
    )
    return algorithm._replace(published={"feddip_code": charge}, notes=curve.notes)


def _staircase(
    settings: FedDIP, num_rounds: int, prunable: PrunableFn
) -> tuple[penalties.PenaltyFn, ...]:
    """Choose the penalty of a run; one of a single round has none."""
    if not settings.max_penalty or num_rounds == 1:
        return ()
    coefficient = stepped_penalty(
        max_penalty=settings.max_penalty,
        num_rounds=num_rounds,
        num_segments=settings.num_segments or min(NUM_SEGMENTS, num_rounds),
    )
    return (penalties.layer_norms(coefficient=coefficient, prunable=prunable),)


def code_formula(*, final_sparsity: float, initial_sparsity: float, num_rounds: int) -> FormulaFn:
    """Make the charge of the public code for a round: nothing for masks, all values alike.

    Down it takes the sparsity that the schedule has in the round, whatever masks are in force (and
    in round 0, which is dense, the initial one); up it takes the mean fraction of exact zeros in
    the clients' dense models.
    """

    def charge(metrics, state):
        num_params = sum(trees.sizes(state.params))
        num_clients = int(metrics.num_participating)
        left = 1 - int(metrics.sent.round) / num_rounds
        scheduled = final_sparsity + (initial_sparsity - final_sparsity) * left**3
        zeros = np.asarray(metrics.sent.reports[ZEROS])[np.asarray(metrics.participated)]
        measured = int(zeros.sum(dtype=np.int64)) / (num_params * max(num_clients, 1))
        return PublishedBits(
            uplink=num_clients * storage_models.feddip_code(measured, num_params),
            downlink=num_clients * storage_models.feddip_code(scheduled, num_params),
        )

    return charge


def _count_zeros(inner: Client) -> Client:
    """Let a client report, leaf by leaf, the exact zeros of the dense model that it ends with."""

    def update_fn(key, broadcast, state, data):
        message, state = inner.update(key, broadcast, state, data)
        after = jax.tree.map(jnp.add, broadcast.params, message.fields["delta"])
        zeros = masks_lib.num_kept(jax.tree.map(lambda leaf: leaf == 0, after))
        return message._replace(fields={**message.fields, ZEROS: zeros}), state

    return Client(init=inner.init, update=update_fn)


METHOD = Method(
    build=build,
    settings=FedDIP,
    paper=Paper(
        "Long et al.",
        2023,
        "FedDIP: Federated Learning with Extreme Dynamic Pruning and Incremental Regularization",
        arxiv="2309.06805",
        code="https://github.com/EricLoong/feddip",
    ),
    variants={"without_penalty": {"max_penalty": 0.0}, "without_pruning": {"mode": "unpruned"}},
    law_settings={
        "sparsity": 0.75,
        "initial_sparsity": 0.25,
        "prune_every": 2,
        "num_segments": 3,
        "max_penalty": 0.01,
    },
    nothing_pruned={"sparsity": 0.0, "initial_sparsity": 0.0, "max_penalty": 0.0},
)
