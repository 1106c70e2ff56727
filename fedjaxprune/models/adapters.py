"""Make a `Model` from a flax linen module, a flax nnx module or plain functions."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from fedjaxprune import metrics
from fedjaxprune.errors import first_line
from fedjaxprune.models import _arguments, _flax, _state, calls, heads, precision
from fedjaxprune.models.heads import Head
from fedjaxprune.types import Batch, Key, Metrics, Model, Params, State

LossFn = Callable[[jax.Array, jax.Array], jax.Array]  # (logits [B, classes], labels [B]) -> [B]

_SOWN = "metrics"  # collection in which a linen module's layers leave accumulators
# What else a step's key is folded with, beyond a module's streams, which are numbered.
_CALL, _STREAMS = 2**31 - 1, 2**31 - 2


def from_linen(
    module: nn.Module,
    *,
    input_shape: Any,
    input_dtype: Any = jnp.float32,
    loss: LossFn | None = None,
    train_kwargs: calls.Kwargs | None = None,
    eval_kwargs: calls.Kwargs | None = None,
    call: calls.CallFn | None = None,
    streams: Sequence[str] = ("dropout",),
) -> Model:
    """Make a model from a flax linen module.

    Its `params` collection becomes the parameters, all other collections become the state, but for
    `metrics`: what layers sow there (accumulators, one a name) is added to the loss's metrics as
    ``metrics["layers"]``, by path. What is sown elsewhere is no state: the next call makes it anew,
    and a loss that is sown is not added to the model's.

    The training flag is found by the names of its arguments: ``train``,
    ``training``, ``is_training``, ``deterministic``, ``use_running_average``, ``inference`` and
    some more (`calls.TRAINING`, `calls.INFERENCE`). One named ``mask`` gets ``[B]`` booleans in
    training, False for padding, so that statistics leave it out; one that is the mask of an
    attention layer is left at its default. One named ``key`` or ``rng`` gets a key in training and
    None in predictions. A boolean of another name is refused, and so is an argument of another name
    without a default: `train_kwargs` and `eval_kwargs`, or `call`, say what it is.

    Args:
      module: takes ``[B, *input_shape]`` and gives logits ``[B, classes]``, or ``[B, T, classes]``
        for a label at each of ``T`` positions.
      input_shape: of one example; a mapping of shapes where the inputs are a mapping of arrays.
      input_dtype: of the inputs, an integer one for tokens; a mapping likewise.
      loss: of each label, from logits and labels; None is that of the data's task, which is
        cross-entropy for classes (`heads`).
      train_kwargs: values of the module's arguments in training, before those of convention.
      eval_kwargs: the same in predictions.
      call: ``(module, inputs, mode) -> logits``, which says all (`calls.Mode`): for a module of
        several arguments, ``lambda module, x, mode: module(x["a"], x["b"], train=mode.train)``.
      streams: names of random streams that a step of training has. A module that asks for another
        gets one; `has_rng` is true of these alone.

    Raises:
      TypeError: it is no linen module.
      ValueError: an argument is not known (above); while tracing, if the state does not keep its
        shapes and types.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"it must be a flax linen module, got {type(module).__name__}.")
    options = {"own": call, "train_kwargs": train_kwargs, "eval_kwargs": eval_kwargs}
    what, way = _flax.way_to_call(module, **options)

    def run(variables: Any, inputs: Any, mode: calls.Mode, **others: Any) -> Any:
        with _flax.lenient():
            return module.apply(variables, inputs, mode, method=_flax.method(way), **others)

    def example():
        shapes, types = input_shape, input_dtype
        if not isinstance(shapes, Mapping):
            return jnp.zeros((1, *shapes), types)
        types = types if isinstance(types, Mapping) else dict.fromkeys(shapes, types)
        return {name: jnp.zeros((1, *shape), types[name]) for name, shape in shapes.items()}

    def init_fn(key: Key) -> tuple[Params, State]:
        with _flax.lenient():
            found = module.init(key, example(), calls.Mode(train=False), method=_flax.method(way))
        state = nn.unbox({name: found[name] for name in found if name not in _state.SOWN})
        state.pop(_SOWN, None)
        params = state.pop("params", {})
        if _state.has_tuples(state):
            after = jax.eval_shape(lambda p, s: train(p, s, example(), None, key)[1], params, state)
            state = _state.without_sown(state, after)
        return params, _state.check(state)

    def train(params, state, inputs, mask, key):
        mode = calls.Mode(train=True, mask=mask, key=jax.random.fold_in(key, _CALL))
        given = {"params": params, **state}, inputs, mode
        rngs = {n: jax.random.fold_in(key, i) if i else key for i, n in enumerate(streams)}
        mutable = [*state, _SOWN]
        try:
            return run(*given, rngs=rngs, mutable=mutable)
        except flax.errors.InvalidRngError:  # it asks for a stream of another name
            rngs = {"params": jax.random.fold_in(key, _STREAMS), **rngs}
            return run(*given, rngs=rngs, mutable=mutable)

    def apply_fn(params, state, inputs, mask, key):
        mask = _arguments.settle_mask(train, way, (params, state, inputs, mask, key), what=what)
        logits, after = train(params, state, inputs, mask, key)
        layers = _flax.by_path(dict(after).get(_SOWN, {}))
        return logits, _state.keep_like(state, nn.unbox(dict(after))), layers

    def predict_fn(params: Params, state: State, inputs: Any) -> jax.Array:
        try:
            return run({"params": params, **state}, inputs, calls.Mode(train=False))
        except flax.errors.InvalidRngError as error:
            raise ValueError(
                f"{what} draws random numbers in predictions, which must not be random: "
                f"{first_line(error)}"
            ) from None

    def inspect_fn(params: Params, state: State, inputs: Any, counts: jax.Array) -> Metrics:
        mode = calls.Mode(train=False, mask=counts)
        _, said = run({"params": params, **state}, inputs, mode, mutable=[_SOWN])
        return {"layers": _flax.by_path(dict(said).get(_SOWN, {}))}

    return make_model(init_fn, apply_fn, predict_fn, loss, inspect_fn)


def from_nnx(
    make: Callable[[nnx.Rngs], nnx.Module],
    *,
    loss: LossFn | None = None,
    train_kwargs: calls.Kwargs | None = None,
    eval_kwargs: calls.Kwargs | None = None,
    call: calls.CallFn | None = None,
) -> Model:
    """Make a model from a flax nnx module.

    Its variables of type ``nnx.Param`` become the parameters, all others but its random streams
    (batch statistics, for instance) the state; both as plain dictionaries. What a call sows is no
    state. The loss switches the module to training by ``train()`` and gives each of its streams a
    key of its own, derived from the loss's; predictions switch it to inference by ``eval()``.
    Arguments of its ``__call__`` are treated as in `from_linen`; one named ``rngs`` gets streams of
    the call's own in training, and None in predictions.

    Args:
      make: builds the module, which takes ``[B, ...]`` and gives logits ``[B, classes]``.
      loss: as in `from_linen`, and so are the others.
    """

    def build(key: Key) -> Any:
        return make(nnx.Rngs(key))

    def split(module: Any) -> Any:
        return nnx.split(module, nnx.Param, nnx.RngState, ...)

    with _flax.lenient():
        abstract = nnx.eval_shape(lambda: build(jax.random.key(0)))
    graph, like_params, like_streams, like_state = split(abstract)
    options = {"own": call, "train_kwargs": train_kwargs, "eval_kwargs": eval_kwargs}
    what, way = _flax.way_to_call(abstract, make_rngs=nnx.Rngs, **options)

    def assemble(params: Params, state: State, key: Key) -> Any:
        return nnx.merge(
            graph,
            _flax.restore(like_params, params),
            _flax.make_streams(key, like_streams),
            _flax.restore(like_state, state),
        )

    def init_fn(key: Key) -> tuple[Params, State]:
        with _flax.lenient():
            _, params, _, state = split(build(key))
        return nnx.to_pure_dict(params), _state.check(nnx.to_pure_dict(state))

    def train(params, state, inputs, mask, key):
        module = assemble(params, state, key)
        module.train()
        mode = calls.Mode(train=True, mask=mask, key=jax.random.fold_in(key, _CALL))
        with _flax.lenient():
            logits = way.call(module, inputs, mode)
        return logits, nnx.to_pure_dict(split(module)[3])

    def apply_fn(params, state, inputs, mask, key):
        mask = _arguments.settle_mask(train, way, (params, state, inputs, mask, key), what=what)
        logits, after = train(params, state, inputs, mask, key)
        return logits, _state.keep_like(state, after), {}

    def predict_fn(params: Params, state: State, inputs: Any) -> jax.Array:
        module = assemble(params, state, jax.random.key(0))  # inference draws nothing
        module.eval()
        with _flax.lenient():
            return way.call(module, inputs, calls.Mode(train=False))

    return make_model(init_fn, apply_fn, predict_fn, loss)


def from_functions(
    init: Callable[[Key], Params],
    apply: Callable[..., jax.Array],
    *,
    loss: LossFn | None = None,
    train_kwargs: calls.Kwargs | None = None,
    eval_kwargs: calls.Kwargs | None = None,
) -> Model:
    """Make a model without state from two plain functions.

    Args:
      init: ``key -> params``.
      apply: ``(params, inputs [B, ...]) -> logits [B, classes]``; its other arguments are treated
        as in `from_linen`.
      loss: as in `from_linen`, and so are the others.
    """
    way = _arguments.of(
        apply,
        what="apply",
        num_given=2,
        train_kwargs=train_kwargs,
        eval_kwargs=eval_kwargs,
        mask=True,
        strict=True,
    )

    def init_fn(key: Key) -> tuple[Params, State]:
        return init(key), {}

    def train(params, state, inputs, mask, key):
        mode = calls.Mode(train=True, mask=mask, key=key)
        return way.call(functools.partial(apply, params), inputs, mode), state

    def apply_fn(params, state, inputs, mask, key):
        mask = _arguments.settle_mask(train, way, (params, state, inputs, mask, key), what="apply")
        return *train(params, state, inputs, mask, key), {}

    def predict_fn(params: Params, state: State, inputs: Any) -> jax.Array:
        del state
        return way.call(functools.partial(apply, params), inputs, calls.Mode(train=False))

    return make_model(init_fn, apply_fn, predict_fn, loss)


def make_model(
    init: Any, apply: Any, predict: Any, loss: LossFn | None, inspect: Any = None
) -> Model:
    """Make a model; without a loss of its own it can be given the head of any task."""

    def apply_fn(params, state, inputs, mask, key):
        logits, after, layers = apply(params, state, inputs, mask, key)
        return _one_array(logits), after, layers

    def predict_fn(params: Params, state: State, inputs: Any) -> jax.Array:
        return _one_array(predict(params, state, inputs))

    made = Model(init=init, loss=apply, predict=predict_fn, inspect=inspect)
    if loss is not None:
        own = Head(loss=loss, test_loss=loss, hits=heads.is_largest)
        return made._replace(loss=_training_loss(apply_fn, own))

    def with_head(head: Head) -> Model:
        return made._replace(loss=_training_loss(apply_fn, head), head=head, with_head=with_head)

    return with_head(heads.CLASSES)


def _one_array(logits: Any) -> jax.Array:
    """Refuse an output that is no array."""
    if not hasattr(logits, "dtype"):
        raise TypeError(
            f"the network gives a {type(logits).__name__}, and must give one array of logits: a "
            "call function (call=) can take it out."
        )
    return logits


def _training_loss(apply_fn: Callable[..., tuple[jax.Array, State, Metrics]], head: Head) -> Any:
    """Make a model's loss: the weighted mean over the batch's labels, and its metrics.

    Logits of fewer bits are widened to float32 first. A loss gives a number for each example,
    ``[B]``, or for each of its labels, ``[B, T]``: then every one has the example's weight, and a
    class that is negative, which marks the filling of a short sequence, has none.
    """

    def loss_fn(params: Params, state: State, batch: Batch, key: Key) -> Any:
        logits, state, layers = apply_fn(params, state, batch.inputs, batch.weights > 0, key)
        logits, labels = precision.widen(logits), batch.labels
        values = head.loss(logits, labels)
        weights = _label_weights(labels, batch.weights)
        losses = metrics.mean(values, _loss_weights(values, weights, batch.weights))
        report = {"loss": losses}
        if head.are_known is not None:
            all_known = jnp.all(head.are_known(labels) | (weights <= 0))
            report["loss"] = losses._replace(total=jnp.where(all_known, losses.total, jnp.nan))
        if head.hits is not None and heads.counts_hits(head, logits, labels):
            correct = head.hits(logits, labels)
            report["accuracy"] = metrics.mean(correct.astype(jnp.float32), weights)
        # Zero, with zero gradients, for a batch that is all filling.
        mean = losses.total / jnp.where(losses.weight > 0, losses.weight, 1)
        return mean, (state, {**report, "layers": layers} if layers else report)

    return loss_fn


def _label_weights(labels: Any, weights: jax.Array) -> jax.Array:
    """Give each label of an array its example's weight; a negative class among several has none."""
    if not hasattr(labels, "dtype") or labels.ndim == 1:
        return weights
    own = jnp.broadcast_to(weights.reshape(-1, *[1] * (labels.ndim - 1)), labels.shape)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        return own
    return jnp.where(labels >= 0, own, jnp.zeros_like(own))


def _loss_weights(values: Any, labels: jax.Array, examples: jax.Array) -> jax.Array:
    """Choose the weights ``[B]`` or ``[B, T]`` that fit a loss, or say what it should give."""
    shape, dtype = jnp.shape(values), jnp.result_type(values)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"a loss must give real floating numbers, got {dtype}.")
    for weights in (examples, labels):
        if shape == weights.shape:
            return weights
    each = f", or for each label, shape {labels.shape}" if labels.shape != examples.shape else ""
    raise ValueError(
        f"a loss must give one number for each example, shape {examples.shape}{each}, and take no "
        f"mean over the batch, got the shape {shape}."
    )
