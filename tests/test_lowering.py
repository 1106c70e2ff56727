"""One trace serves all platforms: rounds lower for GPUs and TPUs on a machine that has neither."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend import core

from fedjaxprune import models
from fedjaxprune.kernels import blocked, chosen, convolution, dense, side_by_side
from fedjaxprune.models import ways
from fedjaxprune.testing import scenario
from fedjaxprune.types import Batch, Cohort
from tests import draws
from tests.laws import rows

KEY = jax.random.key(0)
LAYOUT = ("NHWC", "HWIO", "NHWC")
PLATFORMS = ("cuda", "tpu")
# Sums over weights in float64: gains and times of PruneFL's choice of the model's size.
SUMS_IN_FLOAT64 = ("prunefl",)


def rounds_of(made):
    """Trace the rounds of all stages, on shapes alone."""
    state, row = jax.eval_shape(
        lambda: (
            made.algorithm.init(made.params, made.model_state),
            made.algorithm.init_client(made.params),
        )
    )
    of_four = jax.tree.map(lambda x: jax.ShapeDtypeStruct((4, *x.shape), x.dtype), row)
    cohort = jax.eval_shape(
        lambda states: Cohort(jnp.zeros(4, jnp.int32), jnp.ones(4, jnp.bool_), states), of_four
    )
    people = jax.eval_shape(scenario.population)
    shapes = (jax.eval_shape(lambda: KEY), state, cohort, people)
    for stage in made.algorithm.stages:
        yield stage.name, jax.jit(stage.round).trace(*shapes)


def wide_sizes(text):
    """List the sizes of all arrays in float64 of a lowered program."""
    return {
        int(np.prod([int(n) for n in shape.split("x") if n], dtype=np.int64))
        for shape in re.findall(r"tensor<((?:\d+x)*)f64>", text)
    }


def by_method():
    for name in rows.names():
        usual = name in ("fedavg", "feddip")
        yield pytest.param(name, marks=() if usual else pytest.mark.slow)


@pytest.mark.parametrize("name", list(by_method()))
def test_every_round_lowers_for_other_platforms(name):
    method, settings = rows.row(name)
    made = scenario.make(method, settings, adapt=lambda given: given._replace(chunk_size=2))
    num_leaves = len(jax.tree.leaves(made.params))
    for _, traced in rounds_of(made):
        for platform in PLATFORMS:
            text = traced.lower(lowering_platforms=(platform,)).as_text()
            assert "callback" not in text
            if rows.family(name) not in SUMS_IN_FLOAT64:
                assert max(wide_sizes(text), default=0) <= num_leaves
            assert set(group_counts(text)) <= {1}


def group_counts(text):
    return [int(n) for n in re.findall(r"(?:feature|batch)_group_count = (\d+)", text)]


def test_what_is_looked_for_is_found():
    with jax.enable_x64(True):
        wide = jax.jit(lambda x: x.astype(jnp.float64) + jnp.float64(1)).lower(jnp.ones((3, 2)))
    assert max(wide_sizes(wide.as_text())) == 6
    called = jax.jit(lambda x: jax.pure_callback(np.sin, x, x)).lower(jnp.float32(1))
    assert "callback" in called.as_text()


def network(name):
    image = (16, 16, 3)
    model = models.resnet20(input_shape=image, num_classes=3, norm="group")
    if name == "lenet5":
        image = (28, 28, 1)
        model = models.lenet5(input_shape=image, num_classes=3)
    batch = jax.eval_shape(
        lambda: Batch(
            inputs=jnp.zeros((4, 2, *image)),
            labels=jnp.zeros((4, 2), jnp.int32),
            weights=jnp.ones((4, 2)),
        )
    )
    params, state = jax.eval_shape(model.init, KEY)
    clients = jax.tree.map(lambda x: jax.ShapeDtypeStruct((4, *x.shape), x.dtype), params)
    return model, (clients, state, batch)


@pytest.mark.usual("lenet5")
@pytest.mark.parametrize("name", ["lenet5", "resnet20"])
def test_groups_grow_with_the_chunk_only_where_that_is_chosen(name):
    model, shapes = network(name)
    found = {}
    for way in (None, *side_by_side.WAYS):
        own = model if way is None else ways.convolve(model, way)

        def gradient(params, state, batch, own=own):
            return jax.grad(lambda params: own.loss(params, state, batch, KEY)[0])(params)

        step = jax.jit(jax.vmap(gradient, in_axes=(0, None, 0))).trace(*shapes)
        for platform in ("cpu", *PLATFORMS):
            text = step.lower(lowering_platforms=(platform,)).as_text()
            found[way, platform] = max(group_counts(text), default=0)
            assert wide_sizes(text) == set()
    assert {most for (way, _), most in found.items() if way not in (None, "grouped")} <= {0, 1}
    assert found[None, "cuda"] == found["patches", "cuda"]
    if name == "resnet20":  # LeNet-5's layers have a form of their own
        assert {found["grouped", platform] for platform in PLATFORMS} == {4}
        assert found["grouped", "cpu"] <= 1


CASES = {
    "plain": ((2, 6, 7, 3), (3, 3, 3, 4), (1, 1), [(1, 1), (1, 1)], 1),
    "strides": ((2, 6, 7, 3), (3, 2, 3, 4), (2, 1), [(1, 0), (2, -1)], 1),
    "groups": ((2, 6, 6, 4), (3, 3, 2, 6), (2, 2), [(1, 1), (0, 1)], 2),
    "depthwise": ((2, 5, 6, 3), (3, 3, 1, 6), (1, 1), [(1, 1), (1, 1)], 3),
    "pixels": ((2, 5, 6, 3), (1, 1, 3, 2), (2, 2), [(0, 0), (0, 0)], 1),
}


def off_the_cpu(function, *args):
    """Compute what other platforms are given, on this one."""
    graph, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    run = jax.jit(core.jaxpr_as_fun(chosen.opened(graph, on_cpu=False)))
    return jax.tree.unflatten(jax.tree.structure(shapes), run(*jax.tree.leaves(args)))


def alike(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5 * float(np.max(np.abs(b))))


def both_gradients(convolve, case):
    _, _, strides, padding, groups = CASES[case]

    def loss(x, kernel):
        out = convolve(
            x, kernel, strides, padding, dimension_numbers=LAYOUT, feature_group_count=groups
        )
        return jnp.sum(jnp.sin(out))

    return jax.value_and_grad(loss, argnums=(0, 1))


@pytest.mark.usual("groups-patches", "plain-sequential", "strides-patches")
@pytest.mark.parametrize("way", side_by_side.WAYS)
@pytest.mark.parametrize("case", sorted(CASES))
def test_all_ways_compute_the_convolution(case, way):
    x_shape, kernel_shape, *_ = CASES[case]
    x = draws.normal(0, 3, *x_shape)
    kernel = draws.normal(1, 3, *kernel_shape)
    with side_by_side.convolved(way):
        ours = jax.vmap(both_gradients(convolution.conv_general_dilated, case))
        found = off_the_cpu(ours, x, kernel)
    alike(found, jax.jit(jax.vmap(both_gradients(lax.conv_general_dilated, case)))(x, kernel))


@pytest.mark.parametrize("way", ["grouped", "sequential"])
def test_a_blocked_layer_goes_back_the_way_that_it_came(way):
    def loss(kernel, x):
        with side_by_side.convolved(way):
            out = blocked.conv_relu_max_pool(x, kernel, jnp.zeros(2), padding=1, block=2)
        return jnp.sum(out)

    shapes = [jax.ShapeDtypeStruct((3, *one), jnp.float32) for one in ((3, 3, 1, 2), (2, 8, 8, 1))]
    traced = jax.jit(jax.vmap(jax.grad(loss))).trace(*shapes)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "convolution" in text
    assert "dot_general" not in text  # of patches, the default


@pytest.mark.parametrize("name", ["blocked", "dense"])
def test_other_forms_compute_the_same(name):
    image, taps = draws.normal(0, 3, 2, 8, 8, 1), draws.normal(1, 3, 3, 3, 1, 2)
    rows_, matrix = draws.normal(2, 3, 4, 5), draws.normal(3, 3, 5, 2)

    def loss(first, second):
        if name == "dense":
            out = dense.dot_general(first, second, (((1,), (0,)), ((), ())))
        else:
            out = blocked.conv_relu_max_pool(first, second, jnp.ones(2), padding=1, block=2)
        return jnp.sum(jnp.sin(out))

    step = jax.vmap(jax.value_and_grad(loss, argnums=(0, 1)))
    given = (rows_, matrix) if name == "dense" else (image, taps)
    alike(off_the_cpu(step, *given), jax.jit(step)(*given))


def test_a_convolution_has_all_derivatives():
    x = draws.normal(0, 1, 3, 3, 2)
    kernel = draws.normal(1, 2, 2, 2, 1)

    def total(convolve, x, kernel):
        out = convolve(x, kernel, (1, 1), "VALID", dimension_numbers=LAYOUT)
        return jnp.sum(jnp.sin(out))

    for transform in (jax.jacfwd, jax.hessian):
        ours, theirs = (
            jax.jit(transform(functools.partial(total, convolve), argnums=(0, 1)))(x, kernel)
            for convolve in (convolution.conv_general_dilated, lax.conv_general_dilated)
        )
        alike(ours, theirs)


def test_one_program_is_exported_for_two_platforms():
    x, kernel = jnp.ones((2, 6, 6, 4)), jnp.ones((3, 3, 4, 8))

    def run(x, kernel):
        return convolution.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT)

    made = jax.export.export(jax.jit(run), platforms=("cpu", "cuda"))(x, kernel)
    np.testing.assert_array_equal(made.call(x, kernel), jax.jit(run)(x, kernel))


def test_products_keep_the_precision_of_where_they_were_traced():
    x, kernel = jnp.ones((2, 5)), jnp.ones((5, 3))

    def traced():
        step = jax.grad(lambda k: jnp.sum(dense.dot_general(x, k, (((1,), (0,)), ((), ())))))
        return jax.jit(step).trace(kernel)

    with jax.default_matmul_precision("highest"):
        highest = traced()
    assert "HIGHEST" in highest.lower(lowering_platforms=("cuda",)).as_text()
    assert "HIGHEST" not in traced().lower(lowering_platforms=("cuda",)).as_text()


def test_a_way_that_is_not_there_is_refused():
    way: Any = "fast"
    with pytest.raises(ValueError, match="grouped, patches, sequential, got 'fast'"):
        ways.convolve(scenario.network(), way)
    with pytest.raises(ValueError, match="must be one of grouped"), side_by_side.convolved(way):
        pass
