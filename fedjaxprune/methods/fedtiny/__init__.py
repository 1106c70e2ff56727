"""FedTiny: choose a sparse start by BatchNorm statistics, then exchange weights block by block.

Four stages of one run:

1. ``prepare``, at the server: a short training on the server's own data, and a pool of candidates
   (layer densities with noise around the target; in each layer the largest weights are kept);
2. ``calibrate``: clients measure each candidate's BatchNorm statistics on a share of their data, by
   forward passes only, and the server averages them;
3. ``compare``: clients report each candidate's loss under these statistics. The candidate of lowest
   loss becomes the start;
4. ``train``: sparse training. Every `prune_every` rounds, one block of layers exchanges its
   smallest weights for pruned ones whose gradients are largest; blocks take turns from output to
   input. Clients send only the few largest gradients, from their last local batch.

Blocks are the stages of a residual network, or five blocks of consecutive layers elsewhere. The
first convolution is never pruned.

We follow the paper where the authors' public codes differ from it: statistics are averaged over all
clients (the first code keeps one client's), gradients weigh by examples (there equally), blocks
take turns by a counter of exchanges (there by the round modulo four, which skips blocks), only the
block's pairs are sent (there every layer's), and the server's examples are part of the training set
(there of the test set). Statistics are exact means of one pass without augmentation;
`calibration_passes` gives the code's moving averages. The sparsity counts every kernel, also those
that are never pruned.

References:
  Huang et al., `Distributed Pruning Towards Tiny Neural Networks in Federated Learning
  <https://arxiv.org/abs/2212.01977>`_, 2023.
"""

from typing import Literal

from fedjaxprune import masks as masks_lib
from fedjaxprune.federated import local_training, sparse_gradients
from fedjaxprune.method import Method, Needs, Paper
from fedjaxprune.methods.fedtiny import selection, traffic
from fedjaxprune.pruning import drop_and_grow
from fedjaxprune.rounds import facts as facts_lib
from fedjaxprune.rounds import stages
from fedjaxprune.rounds.protocol import FieldSpec, Masking, MaskTransport, joining
from fedjaxprune.rounds.task import Task
from fedjaxprune.rounds.training import training
from fedjaxprune.settings import Count, Epochs, Fraction, Rounds, Settings, Share, Sparsity, setting
from fedjaxprune.types import Algorithm, PrunableFn

NUM_BLOCKS = 5  # of networks that are not residual


class FedTiny(Settings):
    """Settings; all defaults but the sparsity are the published ones."""

    sparsity: Sparsity = setting(
        0.92, "Pruned fraction of all kernels, constant from the start.", unit="fraction"
    )
    pool_size: int | None = setting(
        None,
        "Number of candidates among which the clients choose.",
        unit="candidates",
        unset="0.1 / (1 - sparsity), which costs a tenth of a dense model; at least 1",
        ge=1,
        le=10_000,
    )
    allocation: Literal["uniform", "erk"] = setting(
        "uniform",
        "Layer densities around which candidates are drawn: equal, or higher in small layers.",
    )
    noise: float = setting(
        0.5, "Largest relative deviation of a layer's density.", unit="fraction", ge=0, le=1
    )
    server_epochs: Epochs = setting(
        3, "Passes of the server over its examples before it makes the candidates.", unit="epochs"
    )
    selection: Literal["adaptive", "vanilla"] = setting(
        "adaptive",
        "Statistics under which clients compare candidates: adaptive takes the clients' own, "
        "vanilla the server's (the paper's ablation, without the stage calibrate).",
    )
    validation_fraction: Share = setting(
        0.1, "Share of a client's examples on which it compares candidates.", unit="fraction"
    )
    calibration_passes: Count | None = setting(
        None,
        "Passes in which statistics follow the data by the network's momentum, from the server's "
        "statistics (10 in the published code).",
        unit="passes",
        unset="exact means of one pass",
    )
    variance: Literal["within", "total"] = setting(
        "within",
        "Variance of the averaged statistics: within averages the clients' variances, total adds "
        "the variance of their means.",
    )
    gradient_weights: Literal["examples", "clients"] = setting(
        "examples", "Whether gradients are averaged by examples or equally (the published code)."
    )
    drop_fraction: Fraction = setting(
        0.3,
        "Share of a layer's live weights that the first exchanges drop and grow; it decays along a "
        "cosine to last_prune_round. 0 keeps the mask.",
        unit="fraction",
    )
    prune_every: Rounds | None = setting(
        None,
        "Rounds from one exchange of weights to the next.",
        unit="rounds",
        unset="10, or last_prune_round if less",
    )
    last_prune_round: Rounds | None = setting(
        None,
        "Last round of training, counted from 1, in which weights may be exchanged.",
        unit="rounds",
        unset="100, or the last round if less",
    )
    block_order: Literal["backward", "forward"] = setting(
        "backward", "Order in which blocks take turns: from output to input, or reversed."
    )


def build(settings: FedTiny, task: Task) -> Algorithm:
    """Choose one of several sparse models by all clients' data; exchange weights by gradients.

    Raises:
      ValueError: the network has no BatchNorm statistics, or too few weights for the sparsity; the
        server has no examples; or no exchange would take place.
    """
    prunable = _all_but_first_convolution(task.facts)
    plan = selection.make_plan(task.facts, prunable, settings)
    server = local_training.local_sgd(
        task.model.loss,
        batcher=task.batches(epochs=settings.server_epochs),
        optimizer=task.protocol.optimizer,
    )
    before = [selection.prepare(plan, client=server, source=task.server_source())]
    if settings.selection == "adaptive":
        before.append(selection.calibrate(plan, task, settings))
    before.append(selection.compare(plan, task, settings))
    train = _train(settings, task, prunable)
    return stages.in_order(
        train._replace(published={"fedtiny": traffic.formula}, counted=masks_lib.is_kernel),
        before=before,
        init=lambda state: state._replace(method=selection.empty_pool(plan, state.model_state)),
    )


def _train(settings: FedTiny, task: Task, prunable: PrunableFn) -> Algorithm:
    """Build sparse training, in which one block at a time exchanges weights."""
    masking = Masking(transport=MaskTransport(choose=traffic.choose))
    if settings.drop_fraction == 0.0 or settings.sparsity == 0.0:
        client = task.local_client()
        train = training(task.protocol, client=client, prunable=prunable, masking=masking)
        return train._replace(has_fixed_masks=True)
    period, until = exchange_rounds(settings, task.protocol.num_rounds)
    num_exchanged = drop_and_grow.counts(
        fraction=drop_and_grow.cosine_decay(initial=settings.drop_fraction, until=until),
        period=period,
        until=until,
        blocks=_blocks(task.facts, prunable),
        order=settings.block_order,
        prunable=prunable,
    )
    client = task.local_client(
        report_grads=drop_and_grow.every(period=period, until=until),
        report_steps=local_training.last_step,
    )
    mean = joining(task.protocol, by=settings.gradient_weights)
    return training(
        task.protocol,
        client=sparse_gradients.top_gradients(client, num_pairs=num_exchanged),
        pruner=drop_and_grow.drop_and_grow(num_exchanged),
        prunable=prunable,
        fields={"grads": FieldSpec(aggregate=mean, send="pairs")},
        masking=masking,
    )


def exchange_rounds(settings: FedTiny, num_rounds: int) -> tuple[int, int]:
    """Resolve the rounds from one exchange of weights to the next, and the last such round.

    Raises:
      ValueError: no exchange would take place.
    """
    until = min(settings.last_prune_round or 100, num_rounds)
    period = settings.prune_every or min(10, until)
    if period > until:
        raise ValueError(
            f"method.prune_every must be at most {until}, the last round in which weights may be "
            f"exchanged, got {period}."
        )
    return period, until


def _all_but_first_convolution(facts: facts_lib.Facts) -> PrunableFn:
    first = facts_lib.first_convolution(facts)
    return masks_lib.is_kernel if first is None else masks_lib.excluding(masks_lib.is_kernel, first)


def _blocks(facts: facts_lib.Facts, prunable: PrunableFn) -> drop_and_grow.BlockFn:
    """Make blocks of a residual network's stages, else of consecutive layers."""
    layers = facts.reading_order()
    if any("stage_" in path for path in layers):
        return drop_and_grow.by_stage(layers)
    num_layers = len(facts_lib.sizes(facts, prunable))
    return drop_and_grow.consecutive(layers, num_blocks=min(NUM_BLOCKS, num_layers))


METHOD = Method(
    build=build,
    settings=FedTiny,
    paper=Paper(
        "Huang et al.",
        2023,
        "Distributed Pruning Towards Tiny Neural Networks in Federated Learning",
        arxiv="2212.01977",
        code="https://github.com/Little0o0/FedML",
    ),
    needs=Needs(batch_norm=True, server_examples=True),
    default_model="resnet8",
    variants={"vanilla_selection": {"selection": "vanilla"}},
    law_settings={
        "sparsity": 0.6,
        "pool_size": 3,
        "server_epochs": 1,
        "drop_fraction": 0.6,
        "prune_every": 2,
    },
    nothing_pruned={"sparsity": 0.0},
)
