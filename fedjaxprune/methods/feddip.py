"""FedDIP: extreme dynamic pruning with error feedback and an incremental penalty.

One global mask tightens along a cubic schedule by global magnitude; clients take gradients at the
masked weights and apply them to the dense ones; a penalty on the layers' norms grows in steps.

Three readings of "dynamic pruning" are offered as `mode`:

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

from fedjaxprune import masks as masks_lib
from fedjaxprune import trees
from fedjaxprune.costs import storage_models
from fedjaxprune.federated import local_training
from fedjaxprune.methods.fedavg import fedavg
from fedjaxprune.pruning import allocation, pruners, schedules, scores
from fedjaxprune.rounds.protocol import FieldSpec, Masking, Protocol
from fedjaxprune.rounds.training import training
from fedjaxprune.traffic import PublishedBits
from fedjaxprune.types import (
    Algorithm,
    Client,
    FormulaFn,
    Key,
    Masks,
    Model,
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


def prunable_without_shortcuts(path: str, leaf: jax.Array) -> bool:
    """Call prunable all kernels but those of ResNets' 1x1 shortcut convolutions, as FedDIP does."""
    return masks_lib.is_kernel(path, leaf) and "shortcut" not in path


def feddip(
    model: Model,
    setup: Protocol,
    *,
    final_sparsity: float,
    initial_sparsity: float = 0.5,
    period: int = 5,
    max_penalty: float = 1e-3,
    num_segments: int = NUM_SEGMENTS,
    mode: Literal["masked", "regrow", "dense"] = "masked",
    prunable: PrunableFn = prunable_without_shortcuts,
) -> Algorithm:
    """Prune ever more of one global model while it is trained.

    Args:
      model: the network.
      setup: what every method shares (published: SGD 0.1 with weight decay 5e-4 and no momentum,
        learning rate times 0.998 a round, 5 local epochs of batches of 128).
      final_sparsity: pruned fraction of the prunable weights that the cubic curve leads to.
      initial_sparsity: the same after the first revision, at the end of round 0.
      period: rounds between revisions; they fall at the end of rounds 0, `period`, ...
      max_penalty: where the penalty's staircase leads (see `stepped_penalty`); 0 switches the
        penalty off, which is the paper's ablation without it.
      num_segments: the staircase's number of steps (published: 20).
      mode: how dynamic the masks are, as the module says.
      prunable: which leaves may be pruned (published: all kernels but 1x1 shortcuts).

    Raises:
      ValueError: if a sparsity lies outside [0, 1) or falls, the mode is unknown, or there are
        fewer rounds than segments of the penalty.
    """
    for option, value in (
        ("final_sparsity", final_sparsity),
        ("initial_sparsity", initial_sparsity),
    ):
        if not 0.0 <= value < 1.0:
            raise ValueError(f"{option} must lie in [0, 1), got {value}.")
    if final_sparsity < initial_sparsity:
        raise ValueError(
            f"final_sparsity must be at least initial_sparsity, as FedDIP only tightens its masks; "
            f"got {final_sparsity} and {initial_sparsity}."
        )
    if mode not in ("masked", "regrow", "dense"):
        raise ValueError(f"mode must be 'masked', 'regrow' or 'dense', got {mode!r}.")

    sparsity = schedules.cubic(
        initial_sparsity=initial_sparsity,
        final_sparsity=final_sparsity,
        begin_round=0,
        end_round=setup.num_rounds,
    )
    due = schedules.every(period)
    tighten = pruners.prune_to(sparsity)
    if mode != "masked":  # forget the old masks first, so that all weights compete
        tighten = pruners.chain(pruners.grow_to(0.0, score=scores.magnitude), tighten)
    draw = erk_start(sparsity=initial_sparsity, prunable=prunable)

    def train_masks(key, state):
        return jax.lax.cond(
            state.round == 0,
            lambda: jax.tree.map(jnp.logical_and, state.masks, draw(key, state.params)),
            lambda: state.masks,
        )

    def sent_masks(state):
        if mode == "masked":
            return state.masks
        dense = jnp.bool_(True) if mode == "dense" else due(state.round)
        return jax.tree.map(lambda mask: mask | dense, state.masks)

    penalties = ()
    if max_penalty:
        coefficient = stepped_penalty(
            max_penalty=max_penalty, num_rounds=setup.num_rounds, num_segments=num_segments
        )
        penalties = (local_training.layer_norms(coefficient=coefficient, prunable=prunable),)
    client = local_training.dense_feedback_sgd(
        model.loss,
        batcher=setup.batcher,
        optimizer=setup.optimizer,
        learning_rate_scale=setup.learning_rate_scale,
        penalties=penalties,
    )
    algorithm = training(
        setup,
        client=_count_zeros(client),
        pruner=pruners.when(due, tighten),
        prunable=prunable,
        masking=Masking(train=train_masks, upload=sent_masks, server_is_dense=mode == "dense"),
        fields={ZEROS: FieldSpec(send="nothing")},
    )
    charge = code_formula(
        final_sparsity=final_sparsity,
        initial_sparsity=initial_sparsity,
        num_rounds=setup.num_rounds,
    )
    return algorithm._replace(published={"feddip_code": charge})


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


def feddip_without_pruning(
    model: Model, setup: Protocol, *, max_penalty: float = 1e-3
) -> Algorithm:
    """Do FedAvg with a constant penalty on the norms of *all* tensors: FedDIP's other ablation.

    Args:
      model: the network.
      setup: what every method shares.
      max_penalty: the penalty's coefficient, the same in every round.
    """
    if max_penalty < 0.0:
        raise ValueError(f"max_penalty must not be negative, got {max_penalty}.")
    penalty = local_training.layer_norms(
        coefficient=lambda round_index: jnp.float32(max_penalty), prunable=lambda path, leaf: True
    )
    return fedavg(model, setup, penalties=(penalty,))
