"""Training in bfloat16: what is computed is narrow, what is kept is not."""

import functools

import chex
import flax.linen as nn
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjaxprune import masks, models, registry
from fedjaxprune.costs import flops, ledger
from fedjaxprune.federated import penalties, sampling, uplinks
from fedjaxprune.federated.corrections import scaffold
from fedjaxprune.kernels import convolution
from fedjaxprune.models import adapters, layers, precision
from fedjaxprune.rounds import protocol, simulation
from fedjaxprune.types import Batch
from tests import draws, quadratic
from tests.playing import dip, plain

KEY = jax.random.key(5)
BFLOAT16 = jnp.dtype(jnp.bfloat16)
TOKENS = ("char_lstm", "gpt")


def dtypes(tree):
    return jax.tree.map(lambda leaf: leaf.dtype, tree)


def batch_of(model_name, size=4):
    if model_name in TOKENS:
        inputs = jnp.arange(size * 5, dtype=jnp.int32).reshape(size, 5) % 10
    else:
        inputs = draws.normal(1, size, 32, 32, 3)
    return Batch(inputs, jnp.arange(size, dtype=jnp.int32) % 10, jnp.ones(size))


def gradient(model):
    return jax.value_and_grad(model.loss, has_aux=True)


def products(jaxpr):
    """List the types that products and convolutions of a graph read."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield tuple(variable.aval.dtype for variable in equation.invars)
        for sub in jax.extend.core.jaxprs_in_params(equation.params):
            yield from products(sub)


def make(name, shape, **settings):
    """Build a network of the package, of ten classes; settings that it lacks are left out."""
    part = registry.find("model", name).part
    own = {n: value for n, value in settings.items() if n in part.settings.model_fields}
    return part.build(part.settings(**own), input_shape=shape, num_classes=10)


DEEP = ("vgg16_bn", "resnet18", "resnet32", "resnet34", "resnet50", "gated_resnet32", "gated_vgg16")
DEEP += ("shufflenet_v2", "mobilenet_v2", "wide_resnet", "vgg9")


@pytest.mark.usual("lenet5", "alexnet", "gated_resnet8", "char_lstm", "resnet8", "vgg11_bn")
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in DEEP else n for n in registry.names("model")],
)
def test_every_network_multiplies_in_bfloat16_and_keeps_float32(name):
    shape = (5,) if name in TOKENS else (32, 32, 3)
    norm = "group" if name == "resnet20" else "batch"
    wide = make(name, shape, norm=norm)
    model = precision.compute_in(wide, "bfloat16")
    params, state = jax.eval_shape(model.init, KEY)
    batch = batch_of(name)

    graph, seen = jax.make_jaxpr(gradient(model), return_shape=True)(params, state, batch, KEY)
    (value, (after, metrics)), grads = seen
    assert value.dtype == jnp.float32
    assert dtypes((after, grads)) == dtypes((state, params))
    assert BFLOAT16 not in jax.tree.leaves(dtypes(metrics))
    found = set(products(graph.jaxpr))
    assert found == {(BFLOAT16, BFLOAT16)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lenet5", pytest.param("resnet8", marks=pytest.mark.slow)])
def test_losses_and_gradients_are_near_float32(name):
    wide = make(name, (32, 32, 3))
    params, state = jax.jit(wide.init)(KEY)
    results = [
        jax.jit(gradient(model))(params, state, batch_of(name), KEY)
        for model in (wide, precision.compute_in(wide, jnp.bfloat16))
    ]
    (exact, (exact_state, _)), exact_grads = results[0]
    (value, (after, _)), grads = results[1]
    # A number keeps 8 bits: it is off by 2^-9 at most, and a sum of some of them by little more.
    np.testing.assert_allclose(value, exact, rtol=2**-6)
    chex.assert_trees_all_close(after, exact_state, rtol=2**-5, atol=2**-7)
    here, there = (
        np.concatenate([g.ravel() for g in jax.tree.leaves(g)]) for g in (grads, exact_grads)
    )
    cosine = here @ there / np.linalg.norm(here) / np.linalg.norm(there)
    assert 0.97 < cosine < 1 - 1e-9  # near, and yet another number


@pytest.mark.parametrize("make", [layers.BatchNorm(), layers.GroupNorm(num_groups=1)])
def test_normalization_takes_its_statistics_in_float32(make):
    # Around 100, neighbours in bfloat16 are 0.5 apart: means and squares of it would lose all.
    x = (100 + draws.normal(0, 64, 4, 4, 2)).astype(jnp.bfloat16)
    args = (x, True, None) if isinstance(make, layers.BatchNorm) else (x,)
    variables = make.init(KEY, *args)
    narrow = {**variables, "params": jax.tree.map(lambda p: p.astype(x.dtype), variables["params"])}
    with jax.numpy_dtype_promotion("standard"):
        output, changed = make.apply(narrow, *args, mutable=["batch_stats"])
        exact, expected = make.apply(
            variables, x.astype(jnp.float32), *args[1:], mutable=["batch_stats"]
        )
    assert output.dtype == jnp.bfloat16
    chex.assert_trees_all_equal(output, exact.astype(jnp.bfloat16))
    chex.assert_trees_all_equal(changed, expected)


METHODS = {
    "fedavg": plain,
    "fedprox": functools.partial(plain, penalties=(penalties.proximal(mu=0.1),)),
    "scaffold": lambda model: lambda s: plain(model)(s._replace(drift=scaffold.control_variates())),
    **{
        f"feddip_{mode}": functools.partial(
            lambda mode, model: lambda s: dip(model=model, mode=mode)(s), mode
        )
        for mode in ("masked", "regrow", "dense")
    },
}
ROUNDS = 4


def played(make, model):
    """Play some rounds: the simulation, the last round's metrics and the traffic of all."""
    setup = protocol.Protocol(
        num_rounds=ROUNDS,
        batcher=quadratic.full_batches(3),
        optimizer=optax.sgd(0.1, momentum=0.5),
        uplink=uplinks.error_feedback(uplinks.top_k(fraction=0.5)),
        chunk_size=2,
    )
    algorithm = make(model)(setup)
    people = quadratic.population()
    run = simulation.start(algorithm, *jax.jit(model.init)(KEY), num_clients=6)
    advance = jax.jit(
        simulation.advance(algorithm.stages[0], sampling.uniform(num_clients=6, cohort_size=3))
    )
    told = []
    for _ in range(ROUNDS):
        run, metrics = advance(KEY, run, people)
        told.append(jax.device_get(metrics))
    return run, told[-1], [ledger.account(metrics, run.state, algorithm) for metrics in told]


DEAR = ("fedavg", "fedprox", "scaffold", "feddip_regrow", "feddip_dense")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in DEAR else n for n in METHODS]
)
def test_methods_keep_float32_exact_zeros_and_counts(name):
    # The model has a loss of its own, and is strict about types.
    exact, exact_metrics, exact_bits = played(METHODS[name], quadratic.MODEL)
    run, metrics, bits = played(METHODS[name], precision.compute_in(quadratic.MODEL, jnp.bfloat16))
    assert dtypes(run) == dtypes(exact)
    assert BFLOAT16 not in jax.tree.leaves(dtypes((run, metrics)))
    for leaf, mask in zip(
        jax.tree.leaves(run.state.params), jax.tree.leaves(run.state.masks), strict=True
    ):
        if name != "feddip_dense":
            assert not np.asarray(leaf)[~np.asarray(mask)].any()
    chex.assert_trees_all_equal(metrics.num_live, exact_metrics.num_live)
    sums, exact_sums = ([(b.uplink_bits, b.downlink_bits) for b in x] for x in (bits, exact_bits))
    if name == "fedavg":  # masks that rank otherwise may pack otherwise
        assert sums == exact_sums

    # Deltas are of float32 parameters: most of them could not be written in bfloat16.
    values = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(run.state.params)])
    assert np.mean(values != values.astype(BFLOAT16).astype(np.float32)) > 0.2
    if "feddip" not in name:  # there, a mask may turn on a rounding
        moved = [quadratic.flatten(r.state.params) for r in (exact, run)]
        start = quadratic.flatten(quadratic.PARAMS)
        distance = jnp.linalg.norm(moved[1] - moved[0]) / jnp.linalg.norm(moved[0] - start)
        assert 1e-6 < distance < 0.05


class OwnNetwork(nn.Module):
    """As users write it, with flax's own layers and statistics."""

    @nn.compact
    def __call__(self, x, train):
        conv = convolution.conv_general_dilated
        x = nn.Conv(8, (3, 3), conv_general_dilated=conv)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(10)(jnp.mean(x, axis=(1, 2)))


def test_a_users_network_needs_no_changes():
    wide = adapters.from_linen(OwnNetwork(), input_shape=(32, 32, 3))
    model = precision.compute_in(wide, jnp.bfloat16)
    params, state = jax.eval_shape(model.init, KEY)
    batch = batch_of("own")
    graph, seen = jax.make_jaxpr(gradient(model), return_shape=True)(params, state, batch, KEY)
    assert set(products(graph.jaxpr)) == {(BFLOAT16, BFLOAT16)}
    (_, (after, _)), grads = seen
    assert dtypes((after, grads)) == dtypes((state, params))
    assert set(jax.tree.leaves(dtypes(after))) == {jnp.dtype(jnp.float32)}
    assert model.predict is wide.predict


def test_a_network_costs_the_same_arithmetic():
    wide = models.lenet5(input_shape=(32, 32, 3), num_classes=10)
    params, _ = jax.eval_shape(wide.init, KEY)
    example = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    half = jax.tree.map(lambda leaf: np.arange(leaf.size).reshape(leaf.shape) % 2 == 0, params)
    totals = [
        flops.sparse(flops.of_model(model, masks.restrict(half, masks.is_kernel), example))
        for model in (wide, precision.compute_in(wide, jnp.bfloat16))
    ]
    assert totals[0] == totals[1]


def test_float32_is_the_model_itself_and_other_types_are_refused():
    assert precision.compute_in(quadratic.MODEL, "float32") is quadratic.MODEL
    for dtype in (jnp.int8, jnp.float64):
        with pytest.raises(ValueError, match="a floating type of at most 32 bits, got"):
            precision.compute_in(quadratic.MODEL, dtype)
