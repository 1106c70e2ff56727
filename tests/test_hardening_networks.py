"""Networks of other libraries are told that they train, or are refused in a sentence."""

import functools
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fedjaxprune.federated import _steps, server_optimizers
from fedjaxprune.models import _arguments, _state, adapters, calls, outside
from fedjaxprune.types import Batch

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
BATCH = Batch(
    inputs=jnp.asarray(RNG.normal(size=(4, 6)), jnp.float32),
    labels=jnp.asarray([0, 1, 2, 0], jnp.int32),
    weights=jnp.asarray([1.0, 1.0, 1.0, 0.0]),
)
TRAINING = ["train", "training", "is_training", "is_train", "update_stats"]
INFERENCE = ["deterministic", "use_running_average", "inference", "is_eval", "test"]


class Body(nn.Module):
    """BatchNorm and dropout, both by one flag."""

    @nn.compact
    def __call__(self, x, train, mask=None):
        mask = None if mask is None else mask[:, None]
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(8)(x), mask=mask)
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(x))


def step(model, batch=BATCH, *, seed=1):
    """Take the loss of one step: its value, and the state before and after it."""
    params, before = jax.jit(model.init)(KEY)
    loss, (after, _) = jax.jit(model.loss)(params, before, batch, jax.random.key(seed))
    return float(loss), before, after


def distance(before, after):
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)


def moved(model):
    """Say how far a step moves the state."""
    return distance(*step(model)[1:])


@pytest.mark.parametrize("name", TRAINING + INFERENCE)
def test_a_flag_by_any_usual_name_is_a_flag(name):
    for default in ("", " = False", " = True", " = None"):
        for star in ("", "*, "):
            scope = {}
            exec(f"def apply(params, x, {star}{name}{default}): return {name}", scope)
            way = _arguments.of(scope["apply"], what="apply", num_given=2, mask=True, strict=True)
            for train in (True, False):
                found = way.call(functools.partial(scope["apply"], {}), 0, calls.Mode(train=train))
                assert found is (train if name in TRAINING else not train)


class IsTraining(nn.Module):
    @nn.compact
    def __call__(self, x, is_training: bool = False):
        return Body(name="body")(x, is_training)


class Averages(nn.Module):
    @nn.compact
    def __call__(self, x, use_running_average=True):
        return Body(name="body")(x, not use_running_average)


def test_a_network_trains_by_its_flag():
    losses = []
    for module in (IsTraining(), Averages()):
        model = adapters.from_linen(module, input_shape=(6,))
        loss, before, after = step(model)
        assert distance(before, after) > 0
        losses.append(loss)
    assert losses[0] == losses[1]


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.dense, self.out = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)
        self.norm, self.drop = nnx.BatchNorm(8, rngs=rngs), nnx.Dropout(0.5)

    def __call__(self, x, is_training: bool = False, *, rngs: nnx.Rngs | None = None):
        x = self.norm(self.dense(x), use_running_average=not is_training)
        return self.out(self.drop(x, deterministic=not is_training, rngs=rngs))


def test_an_nnx_call_gets_its_flag_and_its_streams():
    model = adapters.from_nnx(Nnx)
    assert moved(model) > 0
    assert step(model, seed=1)[0] == step(model, seed=1)[0] != step(model, seed=2)[0]
    params, state = jax.jit(model.init)(KEY)
    assert jax.jit(model.predict)(params, state, BATCH.inputs).shape == (4, 3)


class Equinox(eqx.Module):
    first: eqx.nn.Linear

    def __init__(self, key):
        self.first = eqx.nn.Linear(6, 3, key=key)

    def __call__(self, x, *, rng=None, training: bool = False):
        if not training:
            return self.first(x)
        assert rng is not None
        return self.first(x) + jax.random.normal(rng, (3,))


def test_an_equinox_call_gets_its_flag_and_its_key():
    model = outside.from_equinox(Equinox)
    assert step(model, seed=1)[0] == step(model, seed=1)[0] != step(model, seed=2)[0]
    params, state = jax.jit(model.init)(KEY)
    kernel, bias = params["first"]["weight"], params["first"]["bias"]
    expected = BATCH.inputs @ kernel.T + bias[None]
    found = jax.jit(model.predict)(params, state, BATCH.inputs)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_function_gets_flag_mask_and_key():
    def apply(params, x, mask, key, *, train):
        assert (key is None) is not train
        x = x + jax.random.normal(key, x.shape) if train else x
        return jnp.where(mask[:, None], x, 0.0) @ params["kernel"]

    def init(key):
        return {"kernel": jnp.ones((6, 3))}

    model = adapters.from_functions(init, apply)
    assert step(model, seed=1)[0] == pytest.approx(np.log(3), rel=1e-5)
    params, _ = jax.jit(model.init)(KEY)
    row = BATCH.inputs.sum(axis=1)
    np.testing.assert_allclose(
        jax.jit(model.predict)(params, {}, BATCH.inputs)[:, 0], row, rtol=1e-5
    )


class Unknown(nn.Module):
    @nn.compact
    def __call__(self, x, is_learning: bool = False):
        return Body(name="body")(x, is_learning)


class Needed(nn.Module):
    @nn.compact
    def __call__(self, x, temperature):
        return nn.Dense(3)(x) / temperature


class Perhaps(nn.Module):
    @nn.compact
    def __call__(self, x, learns: bool | None = None):
        return nn.Dense(3)(x)


class Passing(nn.Module):
    @nn.compact
    def __call__(self, x, **kwargs):
        return Body(name="body")(x, **kwargs)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return Body(name="body")(x, train)


REFUSED = [
    (Unknown(), {}, "argument 'is_learning' whose meaning is not known"),
    (Needed(), {}, "argument 'temperature' whose meaning is not known"),
    (Perhaps(), {}, "argument 'learns' whose meaning is not known"),
    (Passing(), {}, "takes any keyword"),
    (nn.Sequential([nn.Dense(4), Block()]), {}, "passes Block no argument 'train'"),
    (Needed(), {"train_kwargs": {"temperature": 2.0}}, "which eval_kwargs must have, too"),
    (Unknown(), {"train_kwargs": {"is_lerning": True}}, "did you mean 'is_learning'"),
    (Block(), {"call": lambda net, x, mode: net(x), "eval_kwargs": {}}, "says all"),
]


@pytest.mark.parametrize(("module", "options", "sentence"), REFUSED)
def test_an_argument_that_nobody_knows_is_one_sentence(module, options, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        adapters.from_linen(module, input_shape=(6,), **options)
    assert str(caught.value).count(". ") == 0


@pytest.mark.parametrize("default", ["0", "np.bool_(False)", "None", "jnp.bool_(False)"])
def test_the_default_of_a_known_flag_may_be_any_truth_value(default):
    scope: dict[str, Any] = {"np": np, "jnp": jnp}
    exec(f"def apply(params, x, train={default}): return train", scope)
    way = _arguments.of(scope["apply"], what="apply", num_given=2, mask=True, strict=True)
    for train in (True, False):
        assert way.call(functools.partial(scope["apply"], {}), 0, calls.Mode(train=train)) is train


@pytest.mark.parametrize(
    "argument",
    [
        "fit=np.bool_(False)",
        "is_train_phase: int = 0",
        "mode='eval'",
        "det=None",
        "train='no'",
        "stochastic=None",
        "use_dropout=0",
        "learning=0",
    ],
)
def test_what_looks_like_a_flag_must_be_said(argument):
    scope: dict[str, Any] = {"np": np}
    exec(f"def apply(params, x, {argument}): return x", scope)
    with pytest.raises(ValueError, match="whose meaning is not known: say what it is"):
        _arguments.of(scope["apply"], what="apply", num_given=2, mask=True, strict=True)


class Frozen(nn.Module):
    deterministic: bool = True

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=self.deterministic)(x))


def test_a_flag_that_is_an_attribute_is_refused():
    said = "Frozen has the attribute 'deterministic', which is True in training and in predictions"
    with pytest.raises(ValueError, match=said):
        adapters.from_linen(Frozen(), input_shape=(6,))
    chosen = adapters.from_linen(Frozen(), input_shape=(6,), call=lambda module, x, mode: module(x))
    assert jax.tree.leaves(chosen.init(KEY))


class Wrapping(nn.Module):
    inner: Any

    @nn.compact
    def __call__(self, x):
        return (self.inner[0] if isinstance(self.inner, tuple) else self.inner)(x)


class Modal(nn.Module):
    mode: str

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x)


class Numbered(nn.Module):
    train: Any = 0

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x)


FIXED = [
    (Wrapping(Frozen()), "Frozen has the attribute 'deterministic'"),
    (Wrapping((Frozen(),)), "Frozen has the attribute 'deterministic'"),
    (nn.Sequential([nn.Dense(4), Frozen()]), "Frozen has the attribute 'deterministic'"),
    (Modal("eval"), "Modal has the attribute 'mode', which is eval in training"),
    (Numbered(), "Numbered has the attribute 'train', which is 0 in training"),
    (Numbered(np.bool_(True)), "Numbered has the attribute 'train', which is True in training"),
]


@pytest.mark.parametrize(("module", "sentence"), FIXED)
def test_an_attribute_of_any_layer_is_looked_at(module, sentence):
    with pytest.raises(ValueError, match=sentence):
        adapters.from_linen(module, input_shape=(6,))


def test_what_is_no_flag_may_be_an_attribute():
    for module in (Modal("bilinear"), Numbered(3), Wrapping(nn.Dropout(0.5, deterministic=True))):
        adapters.from_linen(module, input_shape=(6,))


class Holding(nnx.Module):
    def __init__(self, inner):
        self.inner = inner

    def __call__(self, x):
        return self.inner(x)


class NnxAttribute(nnx.Module):
    def __init__(self, name):
        setattr(self, name, False)

    def __call__(self, x):
        return x


class EquinoxAttribute(eqx.Module):
    training: Any = False

    def __call__(self, x):
        return x


class EquinoxFlag(eqx.Module):
    def __call__(self, x, *, key=None, training=False):
        return x


def test_an_attribute_that_nnx_or_equinox_does_not_switch_is_refused():
    for module in (NnxAttribute("is_training"), Holding(NnxAttribute("is_training"))):
        with pytest.raises(ValueError, match="NnxAttribute has the attribute 'is_training'"):
            adapters.from_nnx(lambda rngs, module=module: module)
    adapters.from_nnx(lambda rngs: Holding(NnxAttribute("deterministic")))
    sequence = eqx.nn.Sequential([eqx.nn.Lambda(jnp.tanh), EquinoxAttribute()])
    for module in (EquinoxAttribute(), sequence):
        with pytest.raises(ValueError, match="EquinoxAttribute has the attribute 'training'"):
            outside.from_equinox(lambda key, module=module: module)
    outside.from_equinox(lambda key: EquinoxAttribute(training=None))


class OfTruth(nn.Module):
    @nn.compact
    def __call__(self, x, train=0):
        return x


class OfNothing(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool | None = None):
        return x


def test_no_sequence_leaves_a_flag_at_its_default():
    for layer in (OfTruth(), OfNothing(), Block(), lambda x, train=False: x):
        for module in (
            nn.Sequential([nn.Dense(4), layer]),
            nn.Sequential([nn.Dense(4), nn.Sequential([layer])]),
            nn.Sequential([nn.Sequential([nn.Dense(4), layer]), nn.Dense(3)]),
            Wrapping(nn.Sequential([nn.Dense(4), layer])),
        ):
            with pytest.raises(ValueError, match=r"Sequential passes .* no argument 'train'"):
                adapters.from_linen(module, input_shape=(6,))
    nested = nnx.Sequential(lambda x: x, nnx.Sequential(lambda x, training=False: x))
    for module in (nested, Holding(nested)):
        with pytest.raises(ValueError, match=r"passes <lambda> no argument 'training'"):
            adapters.from_nnx(lambda rngs, module=module: module)
    for layers in ([EquinoxFlag()], [eqx.nn.Lambda(jnp.tanh), eqx.nn.Sequential([EquinoxFlag()])]):
        sequence = eqx.nn.Sequential(layers)
        with pytest.raises(ValueError, match="passes EquinoxFlag no argument 'training'"):
            outside.from_equinox(lambda key, sequence=sequence: sequence)
    plain = [nn.relu, jnp.tanh, functools.partial(nn.max_pool, window_shape=(2,)), jnp.squeeze]
    adapters.from_linen(nn.Sequential([nn.Dense(4), *plain]), input_shape=(6,))


def test_a_function_of_any_arguments_is_refused():
    def apply(*given):
        return given[1]

    with pytest.raises(ValueError, match="takes any argument, so that nothing says which one"):
        adapters.from_functions(lambda key: {}, apply)
    adapters.from_functions(lambda key: {}, apply, train_kwargs={}, eval_kwargs={})


def test_the_same_is_refused_of_nnx_equinox_and_functions():
    class NnxNet(nnx.Module):
        def __call__(self, x, learns=False):
            return x

    class Silent(eqx.Module):
        layer: eqx.nn.Linear

    class EquinoxNet(eqx.Module):
        def __call__(self, x, mask):
            return x

    with pytest.raises(ValueError, match="'learns'"):
        adapters.from_nnx(lambda rngs: NnxNet())
    with pytest.raises(ValueError, match="'mask'"):
        outside.from_equinox(lambda key: EquinoxNet())
    with pytest.raises(ValueError, match="'x'"):  # of Haiku, say
        adapters.from_functions(lambda key: {}, lambda params, rng, x: x)
    with pytest.raises(TypeError, match="no method __call__"):
        outside.from_equinox(lambda key: Silent(eqx.nn.Linear(2, 2, key=key)))


def test_the_user_says_how_a_call_is_made():
    said: Any = {"train_kwargs": {"is_learning": True}, "eval_kwargs": {"is_learning": False}}
    assert moved(adapters.from_linen(Unknown(), input_shape=(6,), **said)) > 0
    assert (
        moved(adapters.from_linen(Unknown(), input_shape=(6,), train_kwargs=said["train_kwargs"]))
        > 0
    )
    open_: Any = {"train_kwargs": {"train": True}, "eval_kwargs": {"train": False}}
    assert moved(adapters.from_linen(Passing(), input_shape=(6,), **open_)) > 0
    model = adapters.from_linen(Block(), input_shape=(6,), train_kwargs={"train": False})
    assert moved(model) == 0  # frozen, on purpose


def test_a_call_function_says_all():
    def call(net, x, mode):
        return net(x["a"] + x["b"], mode.train, mask=mode.mask)

    shapes = {"a": (6,), "b": (6,)}
    model = adapters.from_linen(Body(), input_shape=shapes, call=call)
    half = BATCH.inputs / 2
    found = step(model, BATCH._replace(inputs={"a": half, "b": half}))
    whole = step(adapters.from_linen(Body(), input_shape=(6,)))
    assert found[0] == pytest.approx(whole[0], rel=1e-6)
    params, state = jax.jit(model.init)(KEY)
    assert model.predict(params, state, {"a": half, "b": half}).shape == (4, 3)


def test_a_first_layer_of_a_sequence_gets_the_flag():
    model = adapters.from_linen(nn.Sequential([Block(), nn.Dense(3)]), input_shape=(6,))
    assert moved(model) > 0
    plain = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(3)])
    assert step(adapters.from_linen(plain, input_shape=(6,)))[1] == {}


class Attention(nn.Module):
    norm: bool = False

    @nn.compact
    def __call__(self, x, mask=None, train: bool = False):
        x = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=4)(x, x, mask=mask)
        if self.norm:
            x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(3)(x[:, 0])


def test_an_attention_mask_is_not_the_mask_of_a_batch():
    """As many positions as examples, so that the wrong mask would fit."""
    model = adapters.from_linen(Attention(), input_shape=(4, 5))
    inputs = jnp.asarray(RNG.normal(size=(4, 4, 5)), jnp.float32)
    params, state = jax.jit(model.init)(KEY)
    loss, _ = jax.jit(model.loss)(params, state, BATCH._replace(inputs=inputs), KEY)
    logits = np.asarray(jax.jit(model.predict)(params, state, inputs), np.float64)[:3]
    chosen = logits[np.arange(3), np.asarray(BATCH.labels)[:3]]
    expected = np.mean(np.log(np.exp(logits).sum(axis=1)) - chosen)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_a_mask_that_does_not_fit_is_refused_where_statistics_need_one():
    model = adapters.from_linen(Attention(norm=True), input_shape=(4, 5))
    batch = BATCH._replace(inputs=jnp.ones((4, 4, 5)))
    with pytest.raises(ValueError, match="the argument 'mask' of Attention"):
        step(model, batch)
    said: Any = {"train_kwargs": {"mask": None}}
    model = adapters.from_linen(Attention(norm=True), input_shape=(4, 5), **said)
    assert np.isfinite(step(model, batch)[0])


def test_flags_of_lifted_modules_stay_static():
    for lifted in (
        nn.remat(Body, static_argnums=(2,))(),
        nn.remat(Block, static_argnums=(2,))(),
        nn.jit(Body, static_argnums=(2,))(),
        nn.jit(Block, static_argnums=(2,))(),
    ):
        loss, _, after = step(adapters.from_linen(lifted, input_shape=(6,)))
        assert np.isfinite(loss)
        assert jax.tree.leaves(after)


class Noisy(nn.Module):
    stream: str = "noise"
    asks: bool = False

    @nn.compact
    def __call__(self, x, train: bool):
        if train and (not self.asks or self.has_rng(self.stream)):
            x = x + jax.random.normal(self.make_rng(self.stream), x.shape)
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(x))


def test_a_module_draws_from_streams_of_any_name():
    model = adapters.from_linen(Noisy(), input_shape=(6,))
    assert step(model, seed=1)[0] == step(model, seed=1)[0] != step(model, seed=2)[0]
    quiet = step(adapters.from_linen(Noisy(asks=True), input_shape=(6,)))[0]
    streams = ("dropout", "noise")
    assert (
        step(adapters.from_linen(Noisy(asks=True), input_shape=(6,), streams=streams))[0] != quiet
    )


def test_a_prediction_that_draws_is_refused():
    class Always(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(x + jax.random.normal(self.make_rng("noise"), x.shape))

    model = adapters.from_linen(Always(), input_shape=(6,))
    params, state = jax.jit(model.init)(KEY)
    with pytest.raises(ValueError, match="draws random numbers in predictions"):
        model.predict(params, state, BATCH.inputs)


class Sowing(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))
        self.sow("losses", "l2", jnp.sum(x**2))
        self.sow("intermediates", "x", x)
        self.sow("seen", "x", x)
        self.variable("counts", "pair", lambda: (jnp.zeros(()), jnp.zeros(2)))
        return nn.Dense(3)(self.perturb("hidden", x))


def test_what_is_sown_is_no_state():
    loss, before, after = step(adapters.from_linen(Sowing(), input_shape=(6,)))
    assert np.isfinite(loss)
    assert set(before) == set(after) == {"batch_stats", "counts"}
    assert len(before["counts"]["pair"]) == 2


class SowingNnx(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(6, 3, rngs=rngs)
        self.started = nnx.Variable(jnp.bool_(False))

    def __call__(self, x):
        self.sow(nnx.Intermediate, "seen", x)
        self.started[...] = jnp.bool_(True)
        return self.dense(x)


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
def test_what_nnx_sows_is_no_state():
    _, before, after = step(adapters.from_nnx(SowingNnx))
    assert set(before) == set(after) == {"started"}
    assert bool(after["started"])


class Remembering(nn.Module):
    kind: str

    @nn.compact
    def __call__(self, x, train: bool):
        start = {"bool": jnp.bool_(False), "int": jnp.int32(7), "key": jax.random.key(0)}.get(
            self.kind, jnp.int32(7)
        )
        seen = self.variable("stats", "seen", lambda: start)
        if train:
            wrong = {"grows": jnp.zeros(3, jnp.int32), "float": jnp.float32(1.0)}
            right = {"bool": jnp.bool_(True), "int": seen.value, "key": seen.value}
            seen.value = (wrong | right)[self.kind]
        return nn.Dense(3)(x)


def test_a_state_of_booleans_and_integers_is_kept():
    for kind, found in (("bool", True), ("int", 7)):
        _, before, after = step(adapters.from_linen(Remembering(kind), input_shape=(6,)))
        assert after["stats"]["seen"].dtype == before["stats"]["seen"].dtype
        assert after["stats"]["seen"] == found


@pytest.mark.parametrize(
    ("kind", "error", "sentence"),
    [
        ("key", TypeError, "state 'stats/seen' is key<fry>, and must be real numbers"),
        ("grows", ValueError, r"is int32\[\] before a step of training and int32\[3\] after it"),
        ("float", ValueError, r"is int32\[\] before a step of training and float32\[\] after it"),
    ],
)
def test_a_state_that_changes_its_kind_is_one_sentence(kind, error, sentence):
    with pytest.raises(error, match=sentence):
        step(adapters.from_linen(Remembering(kind), input_shape=(6,)))


def test_a_state_that_is_gone_is_one_sentence():
    with pytest.raises(ValueError, match="state 'a' is gone"):
        _state.keep_like({"a": jnp.zeros(())}, {})


CHANGES = [  # before, after by client, their mean
    (np.bool_(False), [True, True, False], True),
    (np.bool_(False), [True, False, False], False),
    (np.bool_(True), [False, False, True], False),
    (np.uint8(200), [100, 100, 100], 100),
    (np.uint8(3), [5, 5, 9], 6),
    (np.uint32(2**32 - 5), [2**32 - 3] * 3, 2**32 - 3),
    (np.int8(-100), [100, 100, 100], 100),
    (np.int32(2**30), [2**30 + 3] * 3, 2**30 + 3),
    (np.float32(0.5), [1.5, 1.5, 1.5], 1.5),
]


@pytest.mark.parametrize(("before", "after", "mean"), CHANGES)
def test_a_mean_change_of_any_kind_of_state(before, after, mean):
    state = {"leaf": jnp.asarray(before)}
    told = [
        _steps.changes({}, {}, {"leaf": jnp.asarray(one, before.dtype)}, state)["model_state"]
        for one in after
    ]
    assert all(one["leaf"].dtype == jnp.float32 for one in told)
    change = {"leaf": jnp.mean(jnp.stack([one["leaf"] for one in told]))}
    shifted = server_optimizers.shift(state, change)["leaf"]
    assert shifted.dtype == before.dtype
    assert shifted == np.asarray(mean, before.dtype)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int32", "uint32"])
def test_an_integer_state_does_not_wrap_around(dtype):
    limits = np.iinfo(dtype)
    for before, change in (
        (limits.max - 3, 1e10),
        (limits.min + 3, -1e10),
        (limits.max, 1.0),
        (limits.min, -1.0),
        (3, 1e18),
        (limits.max - 3, 2.0),
        (limits.min + 3, -2.0),
    ):
        state = {"leaf": jnp.asarray(before, dtype)}
        got = server_optimizers.shift(state, {"leaf": jnp.float32(change)})["leaf"]
        most = 2**31 - 128  # a float32 below 2**31
        wanted = before + min(max(int(change), -most), most)
        assert int(got) == min(max(wanted, limits.min), limits.max)


class Fixed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x[:, :3] * 2


def test_a_module_without_parameters_has_none():
    for model in (
        adapters.from_linen(Fixed(), input_shape=(6,)),
        adapters.from_nnx(lambda rngs: nnx.Sequential(lambda x: x[:, :3] * 2)),
    ):
        params, state = jax.jit(model.init)(KEY)
        assert not jax.tree.leaves((params, state))
        loss, (after, _) = jax.jit(model.loss)(params, state, BATCH, KEY)
        assert np.isfinite(loss)
        assert jax.tree.structure(after) == jax.tree.structure(state)


def test_parameters_with_metadata_are_plain_arrays():
    class Boxed(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
            return nn.Dense(3, kernel_init=init)(x)

    params, _ = adapters.from_linen(Boxed(), input_shape=(6,)).init(KEY)
    assert isinstance(params["Dense_0"]["kernel"], jax.Array)


def test_a_linen_adapter_takes_linen_modules():
    with pytest.raises(TypeError, match="it must be a flax linen module, got Nnx"):
        adapters.from_linen(Nnx(nnx.Rngs(0)), input_shape=(6,))  # pyright: ignore


def test_an_output_that_is_no_array_is_one_sentence():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(x), x

    model = adapters.from_linen(Two(), input_shape=(6,))
    params, state = jax.jit(model.init)(KEY)
    with pytest.raises(TypeError, match="the network gives a tuple, and must give one array"):
        model.predict(params, state, BATCH.inputs)
    with pytest.raises(TypeError, match="the network gives a tuple, and must give one array"):
        model.loss(params, state, BATCH, KEY)
    first = adapters.from_linen(Two(), input_shape=(6,), call=lambda net, x, mode: net(x)[0])
    assert np.isfinite(step(first)[0])
