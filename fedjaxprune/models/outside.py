"""Any network as a `Model`: flax linen, flax nnx, Equinox, plain functions."""

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from fedjaxprune import trees
from fedjaxprune.models import _arguments, _fixed_flags, _state, adapters, calls
from fedjaxprune.types import Key, Model, Params, State

_ALLOWED = (
    "a Model, a flax linen module, a function of `rngs` that gives a flax nnx module, a function "
    "of `key` that gives an Equinox module, or a pair of functions (init, apply)"
)


def as_model(value: Any, *, input_shape: Sequence[int], input_dtype: Any = jnp.float32) -> Model:
    """Take a network of any of the libraries for a `Model`.

    Args:
      value: a `Model`; a linen module; ``rngs -> nnx module``; ``key -> Equinox module`` or ``key
        -> (module, equinox.nn.State)``; or functions ``(key -> params, (params, inputs) ->
        outputs)``.
      input_shape: of one example.
      input_dtype: of the inputs, an integer one for tokens.

    Raises:
      TypeError: it is none of them; the sentence says what it is.
    """
    if isinstance(value, Model):
        return value
    if isinstance(value, nn.Module):
        return adapters.from_linen(value, input_shape=input_shape, input_dtype=input_dtype)
    if isinstance(value, tuple) and len(value) == 2 and all(map(callable, value)):
        return adapters.from_functions(*value)
    if isinstance(value, type):
        raise TypeError(f"it is the class {value.__name__}, which must be called: {_ALLOWED}.")
    is_nnx = isinstance(value, nnx.Module)
    if is_nnx or _is_equinox(value):
        library, key = ("nnx", "rngs") if is_nnx else ("Equinox", "key")
        raise TypeError(
            f"it is one {library} module, but every seed starts from its own: give the function "
            f"`lambda {key}: {type(value).__name__}(..., {key}={key})`."
        )
    names = list(inspect.signature(value).parameters) if inspect.isroutine(value) else []
    function: Any = value
    if names == ["rngs"]:
        return adapters.from_nnx(function)
    if names == ["key"]:
        return from_equinox(function)
    given = f"a function of {', '.join(names) or 'nothing'}" if names else type(value).__name__
    raise TypeError(f"it must be {_ALLOWED}, got {given}.")


def from_equinox(
    make: Callable[[Key], Any],
    *,
    loss: adapters.LossFn | None = None,
    train_kwargs: calls.Kwargs | None = None,
    eval_kwargs: calls.Kwargs | None = None,
    call: Callable[..., Any] | None = None,
) -> Model:
    """Make a model from an Equinox module, which takes one example, as Equinox's layers do.

    Its inexact arrays become the parameters, as nested dictionaries; an `equinox.nn.State` (of
    BatchNorm, say) the model state. Examples are mapped with ``axis_name="batch"``, the name that
    Equinox's own BatchNorm is usually given. Where the module takes a `key`, every example of a
    training step has one of its own. Predictions use `equinox.nn.inference_mode`. Other arguments
    are treated as in `adapters.from_linen`, but for ``mask``, which Equinox has no place for.

    Args:
      make: ``key -> module`` or ``key -> (module, state)``.
      loss: as in `adapters.from_linen`, and so are the next two.
      train_kwargs: values of the module's arguments in training.
      eval_kwargs: values of them in predictions.
      call: ``(module, example, mode) -> output``, or with a state ``(module, example, state, mode)
        -> (output, state)``, which says all (`calls.Mode`); its mask is None.

    Raises:
      TypeError: `make` gives no Equinox module.
      ValueError: an argument of the module is not known, or a layer cannot learn whether it trains.
    """
    import equinox as eqx

    def build(key: Key) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            made = make(key)
        module, state = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
        if not isinstance(module, eqx.Module):
            raise TypeError(f"it must give an Equinox module, got {type(module).__name__}.")
        return module, state

    module, like_state = eqx.filter_eval_shape(build, jax.random.key(0))
    like_params, _ = eqx.partition(module, _is_param)
    has_state = like_state is not None
    layers = list(_fixed_flags.nested(module, eqx.Module))
    if call is None:
        for one in (each for each in layers if isinstance(each, eqx.nn.Sequential)):
            _fixed_flags.refuse_arguments(one, (eqx.nn.Sequential,), passes_first=False)
    if call is train_kwargs is eval_kwargs is None:
        _fixed_flags.refuse_attributes(layers, followed=("inference",))
    way = _arguments.of(
        _arguments.method_of(module),
        what=f"{type(module).__name__}.__call__",
        num_given=3 if has_state else 2,
        own=call,
        train_kwargs=train_kwargs,
        eval_kwargs=eval_kwargs,
        mask=False,
        strict=not _arguments.of_library(module),
    )

    def init_fn(key: Key) -> tuple[Params, State]:
        module, state = build(key)
        params, _ = eqx.partition(module, eqx.is_inexact_array)
        return _nested(params), _state.check(_nested(state)) if has_state else {}

    # What is neither trained nor state (sizes, functions, integer tables) follows from no key.
    _, static = eqx.partition(build(jax.random.key(0))[0], eqx.is_inexact_array)

    def run(params: Params, state: State, inputs: Any, key: Key | None) -> tuple[jax.Array, State]:
        module = eqx.combine(_restored(like_params, params), static)
        if key is None:
            module = eqx.nn.inference_mode(module)
        own = _restored(like_state, state) if has_state else None

        def one(example: Any, index: jax.Array) -> Any:
            key_ = None if key is None else jax.random.fold_in(key, index)
            mode = calls.Mode(train=key is not None, key=key_)
            if not has_state:
                return way.call(module, example, mode)
            if call is not None:
                return call(module, example, own, mode)
            return way.call(lambda x, *args, **kw: module(x, own, *args, **kw), example, mode)

        size = jax.tree.leaves(inputs)[0].shape[0]
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            out_axes = (0, None) if has_state else 0
            mapped = jax.vmap(one, out_axes=out_axes, axis_name="batch")
            outputs = mapped(inputs, jnp.arange(size, dtype=jnp.int32))
        if not has_state:
            return outputs, {}
        return outputs[0], _nested(outputs[1])

    def apply_fn(params, state, inputs, mask, key):
        del mask  # Equinox's layers have no place for it
        outputs, after = run(params, state, inputs, key)
        return outputs, _state.keep_like(state, after), {}

    def predict_fn(params: Params, state: State, inputs: Any) -> jax.Array:
        return run(params, state, inputs, None)[0]

    return adapters.make_model(init_fn, apply_fn, predict_fn, loss)


def _is_equinox(value: Any) -> bool:
    """Tell whether a value is an Equinox module, without importing Equinox."""
    equinox = sys.modules.get("equinox")
    return equinox is not None and isinstance(value, equinox.Module)


def _is_param(leaf: Any) -> bool:
    """Tell whether a leaf, or its shape, is an inexact array."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)


def _nested(tree: Any) -> dict[str, Any]:
    """Turn any tree of arrays into nested dictionaries by the parts of its paths."""
    nested: dict[str, Any] = {}
    for path, leaf in zip(trees.paths(tree), jax.tree.leaves(tree), strict=True):
        *parents, name = path.split("/")
        inside = nested
        for parent in parents:
            inside = inside.setdefault(parent, {})
        inside[name] = leaf
    return nested


def _restored(like: Any, nested: Any) -> Any:
    """Turn nested dictionaries back into the tree that they were made of."""
    by_path = dict(zip(trees.paths(nested), jax.tree.leaves(nested), strict=True))
    return jax.tree.unflatten(jax.tree.structure(like), [by_path[p] for p in trees.paths(like)])
