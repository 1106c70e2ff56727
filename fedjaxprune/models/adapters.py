"""Make a `Model` from a flax linen module, a flax nnx module or plain functions."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from fedjaxprune import metrics
from fedjaxprune.models import heads, precision
from fedjaxprune.models.heads import Head
from fedjaxprune.types import Batch, Key, Metrics, Model, Params, State

LossFn = Callable[[jax.Array, jax.Array], jax.Array]  # (logits [B, classes], labels [B]) -> [B]

_SOWN = "metrics"  # collection in which a linen module's layers leave accumulators


def from_linen(
    module: nn.Module,
    *,
    input_shape: Sequence[int],
    input_dtype: Any = jnp.float32,
    loss: LossFn | None = None,
) -> Model:
    """Make a model from a flax linen module.

    Its `params` collection becomes the parameters, all other collections become the state, but for
    `metrics`: what layers sow there (accumulators, one a name) joins the loss's metrics as
    ``metrics["layers"]``, by path. The loss calls the module in training mode, predictions in
    inference mode, by whichever of the arguments ``train``, ``training`` or ``deterministic`` its
    ``__call__`` has. If it has one named
    ``mask``, the loss passes ``[B]`` booleans there that are False for padding, so that statistics
    leave it out. The key of the loss feeds the `dropout` stream.

    Args:
      module: takes ``[B, *input_shape]`` and gives logits ``[B, classes]``, or ``[B, T, classes]``
        for a label at each of ``T`` positions.
      input_shape: of one example.
      input_dtype: of the inputs, an integer one for tokens.
      loss: of each label, from logits and labels; None is that of the data's task, which is
        cross-entropy for classes (`heads`).
    """
    names = inspect.signature(type(module).__call__).parameters

    def options(train: bool, **mask: jax.Array) -> dict[str, Any]:
        known = {"train": train, "training": train, "deterministic": not train, **mask}
        return {name: value for name, value in known.items() if name in names}

    def init_fn(key: Key) -> tuple[Params, State]:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            state = module.init(key, jnp.zeros((1, *input_shape), input_dtype), **options(False))
        state = dict(state)
        state.pop(_SOWN, None)
        return state.pop("params"), state

    def apply_fn(params, state, inputs, mask, key):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            logits, new_state = module.apply(
                {"params": params, **state},
                inputs,
                rngs={"dropout": key},
                mutable=[*state, _SOWN],
                **options(True, mask=mask),
            )
        new_state = dict(new_state)
        return logits, new_state, _by_path(new_state.pop(_SOWN, {}))

    def predict_fn(params: Params, state: State, inputs: Any) -> jax.Array:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return module.apply({"params": params, **state}, inputs, **options(False))  # pyright: ignore[reportReturnType]

    def inspect_fn(params: Params, state: State, inputs: Any, counts: jax.Array) -> Metrics:
        variables, given = {"params": params, **state}, options(False, mask=counts)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            _, said = module.apply(variables, inputs, mutable=[_SOWN], **given)
        return {"layers": _by_path(dict(said).pop(_SOWN, {}))}

    return make_model(init_fn, apply_fn, predict_fn, loss, inspect_fn)


def from_nnx(make: Callable[[nnx.Rngs], nnx.Module], *, loss: LossFn | None = None) -> Model:
    """Make a model from a flax nnx module.

    Its variables of type ``nnx.Param`` become the parameters, all others but its random streams
    (batch statistics, for instance) the state; both as plain dictionaries. The loss switches the
    module to training by ``train()`` and gives each of its streams a key of its own, derived from
    the loss's; predictions switch it to inference by ``eval()``. An argument ``mask`` is passed as
    in `from_linen`.

    Args:
      make: builds the module, which takes ``[B, ...]`` and gives logits ``[B, classes]``.
      loss: as in `from_linen`.
    """

    def build(key: Key) -> Any:
        return make(nnx.Rngs(key))

    def split(module: Any) -> Any:
        return nnx.split(module, nnx.Param, nnx.RngState, ...)

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        abstract = nnx.eval_shape(lambda: build(jax.random.key(0)))
    graph, like_params, like_streams, like_state = split(abstract)
    has_mask = "mask" in inspect.signature(type(abstract).__call__).parameters

    def assemble(params: Params, state: State, key: Key) -> Any:
        return nnx.merge(
            graph,
            _restore(like_params, params),
            _make_streams(like_streams, key),
            _restore(like_state, state),
        )

    def init_fn(key: Key) -> tuple[Params, State]:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            _, params, _, state = split(build(key))
        return nnx.to_pure_dict(params), nnx.to_pure_dict(state)

    def apply_fn(params, state, inputs, mask, key):
        module = assemble(params, state, key)
        module.train()
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            logits = module(inputs, mask=mask) if has_mask else module(inputs)
        return logits, nnx.to_pure_dict(split(module)[3]), {}

    def predict_fn(params: Params, state: State, inputs: Any) -> jax.Array:
        module = assemble(params, state, jax.random.key(0))  # inference draws nothing
        module.eval()
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return module(inputs)

    return make_model(init_fn, apply_fn, predict_fn, loss)


def from_functions(
    init: Callable[[Key], Params],
    apply: Callable[[Params, Any], jax.Array],
    *,
    loss: LossFn | None = None,
) -> Model:
    """Make a model without state from two plain functions.

    Args:
      init: ``key -> params``.
      apply: ``(params, inputs [B, ...]) -> logits [B, classes]``, in training and inference alike.
      loss: as in `from_linen`.
    """

    def init_fn(key: Key) -> tuple[Params, State]:
        return init(key), {}

    def apply_fn(params, state, inputs, mask, key):
        del mask, key  # nothing here is random or shared between examples
        return apply(params, inputs), state, {}

    def predict_fn(params: Params, state: State, inputs: Any) -> jax.Array:
        del state
        return apply(params, inputs)

    return make_model(init_fn, apply_fn, predict_fn, loss)


def _restore(like: Any, values: Any) -> Any:
    """Put plain values into a copy of an abstract nnx state."""
    restored = jax.tree.map(lambda leaf: leaf, like)
    nnx.replace_by_pure_dict(restored, values)
    return restored


def _make_streams(like: Any, key: Key) -> Any:
    """Start every random stream of an abstract nnx state: a key of its own, and counts of zero."""
    leaves, structure = jax.tree.flatten(like)
    started = []
    for i, leaf in enumerate(leaves):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            own = jax.random.fold_in(key, i)
            started.append(jax.random.split(own, leaf.shape) if leaf.shape else own)
        else:
            started.append(jnp.zeros(leaf.shape, leaf.dtype))
    return jax.tree.unflatten(structure, started)


def _by_path(sown: Any) -> dict[str, Any]:
    """Flatten nested dictionaries to one, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(
        sown, is_leaf=lambda node: not isinstance(node, dict)
    )
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def make_model(
    init: Any, apply: Any, predict: Any, loss: LossFn | None, inspect: Any = None
) -> Model:
    """Make a model; without a loss of its own it can be given the head of any task."""
    made = Model(init=init, loss=apply, predict=predict, inspect=inspect)
    if loss is not None:
        own = Head(loss=loss, test_loss=loss, hits=heads.is_largest)
        return made._replace(loss=_training_loss(apply, own))

    def with_head(head: Head) -> Model:
        return made._replace(loss=_training_loss(apply, head), head=head, with_head=with_head)

    return with_head(heads.CLASSES)


def _training_loss(apply_fn: Callable[..., tuple[jax.Array, State, Metrics]], head: Head) -> Any:
    """Make a model's loss: the weighted mean over the batch's labels, and its metrics.

    Logits of fewer bits are widened to float32 first.

    With several classes an example (``[B, T]``) every one has the example's weight, and a negative
    one, which marks the filling of a short sequence, has none.
    """

    def loss_fn(params: Params, state: State, batch: Batch, key: Key) -> Any:
        logits, state, layers = apply_fn(params, state, batch.inputs, batch.weights > 0, key)
        logits = precision.widen(logits)
        labels, weights = batch.labels, batch.weights
        are_classes = jnp.issubdtype(labels.dtype, jnp.integer)
        if labels.ndim > 1 and are_classes:
            weights = jnp.broadcast_to(weights.reshape(-1, *[1] * (labels.ndim - 1)), labels.shape)
            weights = jnp.where(labels >= 0, weights, jnp.zeros_like(weights))
        losses = metrics.mean(head.loss(logits, labels), weights)
        report = {"loss": losses}
        if head.hits is not None and are_classes:
            correct = head.hits(logits, labels)
            report["accuracy"] = metrics.mean(correct.astype(jnp.float32), weights)
        # Zero, with zero gradients, for a batch that is all filling.
        mean = losses.total / jnp.where(losses.weight > 0, losses.weight, 1)
        return mean, (state, {**report, "layers": layers} if layers else report)

    return loss_fn
