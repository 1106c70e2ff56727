"""FedTiny: choose a sparse start by BatchNorm statistics, then exchange weights block by block.

Four stages of one run:

1. ``prepare``, at the server: a short training on held-out data, and a pool of candidates (layer
   densities with noise around the target; in each layer the largest weights);
2. ``calibrate``: clients measure each candidate's BatchNorm statistics on a share of their data, by
   forward passes only, and the server averages them;
3. ``compare``: clients report each candidate's loss under these statistics, and the one of lowest
   loss becomes the start;
4. ``train``: sparse training; every `period` rounds one block of layers, from output to input,
   exchanges its smallest weights for pruned ones whose gradients are largest. Clients send only the
   few largest gradients, from their last local batch.

We follow the paper where the authors' public codes differ from it: statistics are averaged over all
clients (the first code keeps one client's), gradients weigh by examples (there equally), blocks
take turns by a counter of readjustments (there by the round modulo four, which skips blocks), only
the block's pairs travel (there every layer's), and the server's examples come out of the training
set (there out of the test set). Statistics are exact means of one pass without augmentation;
`calibration_passes` gives the code's moving averages. The density counts every kernel, the ones
kept whole included.

References:
  Huang et al., `Distributed Pruning Towards Tiny Neural Networks in Federated Learning
  <https://arxiv.org/abs/2212.01977>`_, 2023.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjaxprune import masks as masks_lib
from fedjaxprune import trees
from fedjaxprune.federated import aggregators, batch_norm, local_training, sparse_gradients
from fedjaxprune.methods import _fedtiny_traffic
from fedjaxprune.pruning import candidates as pools
from fedjaxprune.pruning import drop_and_grow
from fedjaxprune.rounds import server_work
from fedjaxprune.rounds.protocol import FieldSpec, Protocol
from fedjaxprune.rounds.reporting import Exchange, reporting_round
from fedjaxprune.rounds.stages import in_order
from fedjaxprune.rounds.training import training
from fedjaxprune.types import Algorithm, Batcher, Broadcast, Model, Params, PrunableFn, Stage


class Pool(NamedTuple):
    """The candidates, and what is known of them.

    Attributes:
      counts: ``[candidates, layers]`` int32, live weights of each prunable leaf.
      statistics: list of ``[candidates, ...]`` float32, the normalization statistics.
      losses: ``[candidates]`` float32, mean losses over the clients; infinite before.
      chosen: ``[]`` int32, the candidate that training starts from.
    """

    counts: jax.Array
    statistics: list[jax.Array]
    losses: jax.Array
    chosen: jax.Array


def fedtiny(
    model: Model,
    setup: Protocol,
    *,
    density: float,
    source: server_work.SourceFn,
    pretraining: Batcher,
    development: Batcher,
    blocks: drop_and_grow.BlockFn,
    prunable: PrunableFn = masks_lib.is_kernel,
    pool_size: int | None = None,
    layer_densities: pools.DensityFn = pools.uniform,
    noise: float = 0.5,
    selection: Literal["adaptive", "vanilla"] = "adaptive",
    calibration_passes: int | None = None,
    variance: Literal["within", "total"] = "within",
    gradient_weights: Literal["examples", "clients"] = "examples",
    swap_fraction: float = 0.3,
    period: int = 10,
    until: int = 100,
    order: Literal["backward", "forward"] = "backward",
) -> Algorithm:
    """Choose one of several sparse models by all clients' data, and let its mask follow gradients.

    Args:
      model: a network with BatchNorm.
      setup: what every method shares (published code: 5 local epochs of batches of 64, Adam);
        `num_rounds` counts the rounds of training alone.
      density: live share of all kernels, in (0, 1]; those that are not `prunable` count as live.
      source: the server's own examples (`server_work.server_examples`).
      pretraining: the server's local steps on them (published code: 3 epochs).
      development: the part of a client's data that chooses, without augmentation, the same in every
        round (published code: a tenth).
      blocks: which layers change places together (published: a residual network's stages).
      prunable: which leaves may be pruned (published: all kernels but the first convolution's).
      pool_size: number of candidates; None takes `pools.pool_size`.
      layer_densities: around which candidates are drawn (`pools.uniform`, or `pools.erk` with a
        noise of 1).
      noise: largest relative deviation of a layer's density.
      selection: ``"vanilla"`` compares candidates under the server's statistics, without the stage
        ``calibrate``: the paper's ablation.
      calibration_passes: None measures statistics exactly in one pass; a number makes so many
        passes by the model's own momentum from the server's statistics (published code: 10).
      variance: ``"within"`` averages the clients' variances (published); ``"total"`` adds the
        variance of their means.
      gradient_weights: ``"clients"`` averages gradients equally (published code).
      swap_fraction: share of a layer's live weights that change places in the first readjustments,
        fading along a cosine; 0 keeps the mask.
      period: rounds from one readjustment to the next.
      until: last round, counted from 1, in which one may fall.
      order: in which blocks take turns.

    Raises:
      ValueError: if an option is out of range; in `init`, if the network has no normalization
        statistics, or the density leaves nothing for the prunable layers.
    """
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density must lie in (0, 1], got {density}.")
    if not 0.0 <= noise <= 1.0:
        raise ValueError(f"noise must lie in [0, 1], got {noise}.")
    if selection not in ("adaptive", "vanilla"):
        raise ValueError(f"selection must be 'adaptive' or 'vanilla', got {selection!r}.")
    if variance not in ("within", "total"):
        raise ValueError(f"variance must be 'within' or 'total', got {variance!r}.")
    if gradient_weights not in ("examples", "clients"):
        raise ValueError(
            f"gradient_weights must be 'examples' or 'clients', got {gradient_weights!r}."
        )
    num_candidates = pools.pool_size(density) if pool_size is None else pool_size
    if num_candidates < 1:
        raise ValueError(f"pool_size must be at least 1, got {num_candidates}.")

    # Training is an ordinary method: what precedes it only decides its start.
    swaps = swap_fraction > 0.0
    client = local_training.local_sgd(
        model.loss,
        batcher=setup.batcher,
        optimizer=setup.optimizer,
        learning_rate_scale=setup.learning_rate_scale,
        report_grads=drop_and_grow.every(period=period, until=until) if swaps else None,
        report_steps=local_training.last_step if swaps else None,
    )
    pruner = None
    if swaps:  # else period, until and order decide nothing
        num_swapped = drop_and_grow.counts(
            fraction=drop_and_grow.cosine_decay(initial=swap_fraction, until=until),
            period=period,
            until=until,
            blocks=blocks,
            order=order,
            prunable=prunable,
        )
        client = sparse_gradients.top_gradients(client, num_pairs=num_swapped)
        pruner = drop_and_grow.drop_and_grow(num_swapped)
    equally = aggregators.unweighted_sum() if gradient_weights == "clients" else None
    trained = training(
        setup,
        client=client,
        pruner=pruner,
        prunable=prunable,
        fields={"grads": FieldSpec(equally, send="pairs")},
    )._replace(published={"fedtiny": _fedtiny_traffic.formula})

    def init_fn(state):
        params = state.params
        statistics = batch_norm.pick(state.model_state, batch_norm.normalization)
        if not statistics:
            raise ValueError(
                "FedTiny chooses its start by BatchNorm statistics, but the network has none: "
                "take one with BatchNorm, such as a ResNet."
            )
        sizes, _ = _share(params, density, prunable)
        blocks(_paths(params, prunable))  # complains if layers do not fit
        pool = Pool(
            counts=jnp.zeros((num_candidates, len(sizes)), jnp.int32),
            statistics=[
                jnp.zeros((num_candidates, *leaf.shape), jnp.float32) for leaf in statistics
            ],
            losses=jnp.full(num_candidates, jnp.inf, jnp.float32),
            chosen=jnp.int32(0),
        )
        return state._replace(method=pool)

    pretrain = server_work.train_at(
        local_training.local_sgd(model.loss, batcher=pretraining, optimizer=setup.optimizer), source
    )

    def prepare_fn(key, state, population):
        train_key, pool_key = jax.random.split(key)
        state, train = pretrain(train_key, state, population)
        sizes, share = _share(state.params, density, prunable)
        base = layer_densities(state.params, share, prunable)

        def draw(candidate_key):
            return pools.noisy_counts(
                candidate_key,
                sizes,
                base,
                noise=noise,
                num_wanted=share * float(sizes.sum()),
                tolerance=pools.TOLERANCE * density * _num_weights(state.params, prunable),
            )

        counts = jax.lax.map(draw, jax.random.split(pool_key, num_candidates))
        own = batch_norm.pick(state.model_state, batch_norm.normalization)
        pool = state.method._replace(
            counts=counts,
            statistics=[
                jnp.broadcast_to(leaf[None], (num_candidates, *leaf.shape)).astype(jnp.float32)
                for leaf in own
            ],
        )
        # Until the clients have spoken, the first candidate is in force; the weights stay dense.
        masks = pools.magnitude_masks(state.params, counts[0], prunable)
        return state._replace(masks=masks, method=pool), train

    def candidates(state) -> Broadcast:
        pool: Pool = state.method
        return Broadcast(
            params=state.params,
            masks=jax.lax.map(
                lambda counts: pools.magnitude_masks(state.params, counts, prunable), pool.counts
            ),
            model_state=jax.vmap(
                lambda statistics: batch_norm.put(
                    state.model_state, statistics, batch_norm.normalization
                )
            )(pool.statistics),
            round=state.round,
        )

    def calibrate_download(state, masks_held):
        one = [leaf[:, 0] for leaf in trees.shape_only(state.method.statistics)]
        # Exact statistics start from nothing.
        return _fedtiny_traffic.download(
            state, masks_held, [] if calibration_passes is None else one, prunable=prunable
        )

    def compare_download(state, masks_held):
        every = trees.shape_only(state.method.statistics)
        one = [leaf[:, 0] for leaf in every]
        return _fedtiny_traffic.download(
            state, masks_held, every if selection == "adaptive" else one, prunable=prunable
        )

    def look(state):
        return _fedtiny_traffic.looked(state, prunable=prunable)

    def calibrated(key, state, fields):
        del key  # deterministic
        found = fields["statistics"]
        if variance == "total":
            found = batch_norm.add_spread(state.model_state, found, fields["squares"])
        usable = trees.all_finite(found)
        statistics = trees.tree_where(usable, found, state.method.statistics)
        return state._replace(method=state.method._replace(statistics=statistics))

    def compared(key, state, fields):
        del key  # deterministic
        losses = fields["losses"]
        chosen = jnp.argmin(losses).astype(jnp.int32)
        pool = state.method._replace(losses=losses, chosen=chosen)
        masks = pools.magnitude_masks(state.params, pool.counts[chosen], prunable)
        statistics = [leaf[chosen] for leaf in pool.statistics]
        return state._replace(
            params=masks_lib.apply(masks, state.params),
            masks=masks,
            model_state=batch_norm.put(state.model_state, statistics, batch_norm.normalization),
            method=pool,
        )

    if calibration_passes is None:
        measure = batch_norm.statistics(model.loss, batcher=development)
    else:
        measure = batch_norm.moving_statistics(
            model.loss, batcher=development, num_passes=calibration_passes
        )
    if variance == "total":
        measure = batch_norm.with_squares(measure)
    mean, exchange = aggregators.weighted_mean(), Exchange(cohort="same", compute=look)
    calibrate = reporting_round(
        setup,
        name="calibrate",
        client=batch_norm.each_candidate(measure),
        fields={
            "statistics": FieldSpec(mean),
            "squares": FieldSpec(mean, send="nothing"),
        },
        broadcast=candidates,
        server_update=calibrated,
        download=calibrate_download,
        exchange=exchange,
    )
    compare = reporting_round(
        setup,
        name="compare",
        client=batch_norm.each_candidate(batch_norm.losses(model.predict, batcher=development)),
        fields={"losses": FieldSpec(mean)},
        broadcast=candidates,
        server_update=compared,
        download=compare_download,
        exchange=exchange,
    )
    # Nobody is taken to hold the candidates, even where they are dense and masks full.
    prepare = server_work.server_round("prepare", prepare_fn, masks_known_to="nobody")
    before: tuple[Stage, ...] = (prepare,)
    before += (calibrate, compare) if selection == "adaptive" else (compare,)
    return in_order(trained, before, init=init_fn)


def _paths(params: Params, prunable: PrunableFn) -> list[str]:
    flags = masks_lib.prunable_leaves(params, prunable)
    return [path for path, flag in zip(trees.paths(params), flags, strict=True) if flag]


def _num_weights(params: Params, prunable: PrunableFn) -> int:
    """Count the weights that the density is a share of: all kernels, prunable or not."""
    return int(pools.sizes_of(params, _counted(prunable)).sum())


def _counted(prunable: PrunableFn) -> PrunableFn:
    return lambda path, leaf: prunable(path, leaf) or masks_lib.is_kernel(path, leaf)


def _share(params: Params, density: float, prunable: PrunableFn) -> tuple[np.ndarray, float]:
    """Find the prunable layers' sizes, and the share of them that the density leaves live."""
    sizes = pools.sizes_of(params, prunable)
    num_prunable, num_weights = int(sizes.sum()), _num_weights(params, prunable)
    num_whole = num_weights - num_prunable
    share = (density * num_weights - num_whole) / max(num_prunable, 1)
    if num_prunable == 0 or share * num_prunable < len(sizes):
        least = (num_whole + len(sizes)) / max(num_weights, 1)
        raise ValueError(
            f"density must be at least {least:.4g} in this network, whose {num_whole} kernel "
            f"weights outside the prunable layers stay, with one weight in each of {len(sizes)} "
            f"prunable layers; got {density:.4g}."
        )
    return sizes, min(share, 1.0)
