"""Finds out how a network is called in training and in predictions, by the arguments it has."""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjaxprune.errors import near_miss
from fedjaxprune.models import calls

MASK, RNGS = "mask", "rngs"
_LEFT = object()  # in place of a value: the argument keeps its default
# What an argument is called that may say whether the network trains, whatever its default is.
_FLAG = re.compile(
    "(^|_)(train(ing)?|eval(uation)?|infer(ence)?|predict(ing|ion)?|det(erministic)?|mode|phase|"
    "test(ing)?|fit(ting)?|learn(ing|s)?|stochastic|use_dropout)(_|$)"
)
_PROBE = 97  # examples; a prime that no network has as a width


class Call(NamedTuple):
    """How one network is called.

    Attributes:
      call: ``(network, inputs, mode) -> logits``.
      mask: its argument for padding, or None.
    """

    call: calls.CallFn
    mask: inspect.Parameter | None = None


def of(
    function: Callable[..., Any],
    *,
    what: str,
    num_given: int,
    own: calls.CallFn | None = None,
    train_kwargs: calls.Kwargs | None = None,
    eval_kwargs: calls.Kwargs | None = None,
    make_rngs: Callable[[Any], Any] | None = None,
    mask: bool,
    strict: bool,
) -> Call:
    """Find out how a network is called.

    Arguments after the inputs are recognized by the names in `calls`; ``rngs`` are nnx streams,
    ``mask`` is booleans ``[B]``. One that is none of these is left at its default, but a boolean
    must be said, as a network would else train in inference mode.

    Args:
      function: the network's method or function.
      what: its name, for errors.
      num_given: how many arguments come before those that are looked at.
      own: the user's way to call it, which takes the place of all this.
      train_kwargs: values of arguments in training, before those of convention.
      eval_kwargs: the same in predictions.
      make_rngs: ``key -> rngs``, where there is such a thing.
      mask: whether ``mask`` can be one of examples.
      strict: whether an argument that is not known is refused.

    Raises:
      ValueError: an argument is not known, or one was said that the network does not have.
    """
    if own is not None:
        if train_kwargs is not None or eval_kwargs is not None:
            raise ValueError(
                f"{what}: a call function says all, so train_kwargs and eval_kwargs must be left "
                "out beside it."
            )
        return Call(own)
    given = {True: dict(train_kwargs or {}), False: dict(eval_kwargs or {})}
    roles = {
        **dict.fromkeys(calls.KEYS, "key"),
        **dict.fromkeys(calls.TRAINING + calls.INFERENCE, "flag"),
    }
    roles |= {MASK: "mask"} if mask else {}
    roles |= {} if make_rngs is None else {RNGS: "rngs"}
    parameters = arguments_of(function, num_given)
    is_silent = train_kwargs is None and eval_kwargs is None
    open_ = [p for p in parameters if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if strict and is_silent and open_:
        word = "keyword" if open_[-1].kind is inspect.Parameter.VAR_KEYWORD else "argument"
        raise ValueError(
            f"{what} takes any {word}, so that nothing says which one is the training flag: give "
            "train_kwargs and eval_kwargs, {} where it needs none."
        )
    named = _check(parameters, what=what, roles=roles, given=given, strict=strict)
    keys = [one.name for one in named if roles.get(one.name) == "key"]

    def value(one: inspect.Parameter, inputs: Any, mode: calls.Mode) -> Any:
        """Give the value of an argument, or `_LEFT` if it is left at its default."""
        name = one.name
        if name in given[True] or name in given[False]:
            return given[mode.train].get(name, _LEFT)
        role = roles[name] if _fits(one, roles) else None
        if role == "flag":
            return mode.train == (name in calls.TRAINING)
        if role == "mask" and (mode.mask is not None or one.default is one.empty):
            size = jax.tree.leaves(inputs)[0].shape[0]
            return jnp.ones(size, jnp.bool_) if mode.mask is None else mode.mask
        if role in ("key", "rngs") and mode.key is not None:
            index = keys.index(name) if role == "key" else len(keys)
            key = jax.random.fold_in(mode.key, index) if index else mode.key
            return make_rngs(key) if role == "rngs" and make_rngs is not None else key
        return None if role in ("key", "rngs") and one.default is one.empty else _LEFT

    def call(network: Any, inputs: Any, mode: calls.Mode) -> Any:
        """Pass by position what can be, as static arguments of `nn.remat` are counted so."""
        args, kwargs, left = [], {}, []
        for one in named:
            found = value(one, inputs, mode)
            if one.kind is one.KEYWORD_ONLY:
                kwargs |= {} if found is _LEFT else {one.name: found}
            elif found is _LEFT:
                left.append(one.default)  # passed only if another follows
            else:
                args, left = [*args, *left, found], []
        extra = {n: v for n, v in given[mode.train].items() if n not in {p.name for p in named}}
        return network(inputs, *args, **kwargs, **extra)

    taken = [p for p in named if _fits(p, roles) and roles[p.name] == "mask"]
    said = given[True].keys() | given[False].keys()
    return Call(call, next((p for p in taken if p.name not in said), None))


def method_of(module: Any) -> Callable[..., Any]:
    """Give a module's ``__call__``.

    Raises:
      TypeError: it has none.
    """
    if not callable(module):
        raise TypeError(f"{type(module).__name__} has no method __call__, so nothing calls it.")
    return type(module).__call__


def of_library(value: Any) -> bool:
    """Tell whether a layer comes with flax or Equinox, whose arguments have sensible defaults."""
    return type(value).__module__.startswith(("flax.", "equinox."))


def settle_mask(
    run: Callable[..., Any], way: Call, given: tuple[Any, Any, Any, Any, Any], *, what: str
) -> Any:
    """Give the mask of a training step, or None where the network's ``mask`` is not of examples.

    It is traced once with a number of examples that no network has as a width: the mask of an
    attention layer fits none of ``[B]``, and would pass unseen if `B` were the length.

    Args:
      run: ``(params, state, inputs, mask, key)``, one forward pass in training.
      way: how the network is called.
      given: these arguments.
      what: the network's name.

    Raises:
      ValueError: the mask does not fit, and the network has statistics that should not see padding
        or no default for it.
    """
    params, state, inputs, mask, key = given
    if way.mask is None:
        return mask
    size = jax.tree.leaves(inputs)[0].shape[0]

    def shape(leaf: jax.Array) -> jax.ShapeDtypeStruct:
        first = (_PROBE,) if leaf.shape[:1] == (size,) else leaf.shape[:1]
        return jax.ShapeDtypeStruct((*first, *leaf.shape[1:]), leaf.dtype)

    def works(mask: Any) -> bool:
        try:
            jax.eval_shape(run, params, state, jax.tree.map(shape, inputs), mask, key)
        except Exception:  # whatever a network raises on arrays that do not fit
            return False
        return True

    optional = way.mask.default is not inspect.Parameter.empty
    if works(shape(mask)) or (optional and not works(None)):
        return mask
    if optional and not jax.tree.leaves(state):
        return None
    raise ValueError(
        f"the argument 'mask' of {what} does not take booleans [B] that are False for padding "
        "examples: say what it is with train_kwargs, such as {'mask': None}, or give a call "
        "function."
    )


def arguments_of(function: Callable[..., Any], num_given: int) -> list[inspect.Parameter]:
    """List the arguments after those that are given."""
    try:
        found = list(inspect.signature(function).parameters.values())
    except (ValueError, TypeError):  # written in another language, and nothing is known
        return []
    return [
        p
        for i, p in enumerate(found)
        if i >= num_given or p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]


def _fits(one: inspect.Parameter, roles: Mapping[str, str]) -> bool:
    """Tell whether an argument is one of convention; the default of a flag is a truth value."""
    if roles.get(one.name) != "flag":
        return one.name in roles
    is_open = one.default is one.empty or one.default is None
    return is_open or is_boolean(one) or is_truth(one.default)


def _check(
    parameters: list[inspect.Parameter],
    *,
    what: str,
    roles: Mapping[str, str],
    given: Mapping[bool, calls.Kwargs],
    strict: bool,
) -> list[inspect.Parameter]:
    """Refuse arguments of which nobody knows what they are; give those that have a name."""
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    said = given[True].keys() | given[False].keys()
    names = [p.name for p in named]
    is_open = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for name in () if is_open else sorted(said - set(names)):
        has = ", ".join(names) or "none"
        raise ValueError(
            f"{what} has no argument {name!r} after its inputs, but {has}{near_miss(name, names)}"
        )
    for one in named:
        has_default = one.default is not one.empty
        missing = [mode for mode in (True, False) if one.name not in given[mode]]
        if one.name in said and missing and not has_default:
            option = "train_kwargs" if missing[0] else "eval_kwargs"
            raise ValueError(f"{what} needs {one.name!r}, which {option} must have, too.")
        looks_so = roles.get(one.name) == "flag" or is_flag(one.name)
        is_unclear = is_boolean(one) or not has_default or looks_so
        if strict and one.name not in said and not _fits(one, roles) and is_unclear:
            raise ValueError(
                f"{what} has an argument {one.name!r} whose meaning is not known: say what it is "
                f"in training and in predictions, such as train_kwargs={{{one.name!r}: True}}, "
                f"eval_kwargs={{{one.name!r}: False}}, or give a call function."
            )
    return named


def is_flag(name: str) -> bool:
    """Tell whether a name is like that of a training flag."""
    return _FLAG.search(name) is not None


def is_truth(value: Any) -> bool:
    """Tell a truth value: a boolean of any library, or the number 0 or 1."""
    is_array = isinstance(value, np.generic | np.ndarray | jax.Array)
    is_number = isinstance(value, int) and value in (0, 1)
    return is_number or (is_array and value.dtype == np.bool_)


def is_boolean(one: inspect.Parameter) -> bool:
    """Tell whether an argument is a boolean, by its default or its annotation."""
    default = one.default
    is_array = isinstance(default, np.generic | np.ndarray | jax.Array)
    return (
        isinstance(default, bool)
        or (is_array and default.dtype == np.bool_)
        or bool(re.search(r"\bbool\b", str(one.annotation)))
    )
