"""What flax's modules need to be called: leniency, arguments, streams and plain trees."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from fedjaxprune.models import _arguments, _fixed_flags, calls
from fedjaxprune.types import Key

_SEQUENCES = (nn.Sequential, nnx.Sequential)
_FOLLOWED = ("deterministic", "use_running_average")  # what `train` and `eval` of nnx set


@contextlib.contextmanager
def lenient() -> Iterator[None]:
    """Let other libraries' code mix dtypes and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def method(way: _arguments.Call) -> Callable[..., Any]:
    """Make of a way to call a module what linen takes for a method."""

    def method(module: Any, inputs: Any, mode: calls.Mode) -> Any:
        return way.call(module, inputs, mode)

    return method


def way_to_call(module: Any, **options: Any) -> tuple[str, _arguments.Call]:
    """Find out how a linen or nnx module is called, by the layer that takes the arguments."""
    layer, is_first = module, False
    if options["own"] is None:
        for one in (each for each in _layers(module) if isinstance(each, _SEQUENCES)):
            _fixed_flags.refuse_arguments(one, _SEQUENCES, passes_first=True)
    while isinstance(layer, _SEQUENCES) and options["own"] is None:
        layer, is_first = next(iter(layer.layers), nn.relu), True
    what = f"{type(layer).__name__}.__call__"
    is_module = isinstance(layer, nn.Module | nnx.Module)
    if not is_module or (is_first and _arguments.of_library(layer)):
        layer, function = None, lambda inputs: inputs
    else:
        function = _arguments.method_of(layer)
    way = _arguments.of(
        function,
        what=what,
        num_given=1 if layer is None else 2,
        mask=True,
        strict=not _arguments.of_library(layer),
        **options,
    )
    if options["own"] is options["train_kwargs"] is options["eval_kwargs"] is None:
        followed = _FOLLOWED if isinstance(module, nnx.Module) else ()
        _fixed_flags.refuse_attributes(_layers(module), followed=followed)
    is_ours = type(module).__module__.startswith(f"{__name__.partition('.')[0]}.")
    return what, way._replace(mask=None) if is_ours else way


def _layers(module: Any) -> Iterator[Any]:
    """List what a module is made of, as far as it can be seen before it is called."""
    if isinstance(module, nnx.Module):
        yield from (one for _, one in nnx.iter_graph(module) if isinstance(one, nnx.Module))
    else:
        yield from _fixed_flags.nested(module, nn.Module)


def restore(like: Any, values: Any) -> Any:
    """Put plain values into a copy of an abstract nnx state."""
    restored = jax.tree.map(lambda leaf: leaf, like)
    nnx.replace_by_pure_dict(restored, values)
    return restored


def make_streams(key: Key, like: Any) -> Any:
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


def by_path(sown: Any) -> dict[str, Any]:
    """Flatten nested dictionaries to one, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(
        sown, is_leaf=lambda node: not isinstance(node, dict)
    )
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
