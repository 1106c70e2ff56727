"""Every setting that is listed for a method reaches it, and every method runs by name alone."""

import functools
import re
import typing

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from fedjaxprune.experiment import methods
from fedjaxprune.experiment.config.flat import identity
from fedjaxprune.experiment.config.flat.sections import RunConfig
from fedjaxprune.experiment.run import build, loop

METHODS = typing.get_args(methods.Name)
SIZES = {"rounds": 3, "num_clients": 6, "cohort_size": 2, "local_steps": 1}
PLAIN = {"devices": 1, "chunk_size": 1}  # whatever machine the tests run on

# Two values of every setting that is a method's own. A method is built with the first of all its
# settings, and then with the second of one of them.
VALUES = {
    "sparsity": (0.5, 0.6),
    "initial_sparsity": (0.3, 0.4),
    "prune_every": (1, 2),
    "max_penalty": (1e-3, 2e-3),
    "feddip_mode": ("masked", "regrow"),
    "proximal_mu": (0.01, 0.02),
    "layer_sparsity": ("uniform", "erk"),
    "mask_client": (0, 1),
    "mask_start": ("initial", "trained"),
    "pretrain_epochs": (1, 2),
    "pool_size": (2, 3),
    "fedtiny_selection": ("adaptive", "vanilla"),
    "development_share": (0.2, 0.3),
    "swap_fraction": (0.3, 0.2),
    "prune_until": (3, 2),
    "explore_epochs": (4, 5),
    "explore_patience": (2, 3),
    "explore_watch": ("validation", "epoch"),  # a development_share needs validation
    "explorers": (3, 4),
    "explorer_weights": ("clients", "examples"),
    "explore_start": ("initial", "explored"),
    "guidance_scale": ("min_max", "ranks"),
    "agreement": ("none", "majority"),
    "refresh_every": (1, 2),
    "channel_threshold": (0.2, 0.4),
    "mask_iterations": (2, 3),
    "filter_factor": (None, 0.3),  # without one the sparsity decides
    "consensus": ("ascending", "top_k"),
    "votes": ("clients", "examples"),
    "start_rounds": (0, 1),
    "drops": ("filters", "channels"),
    "gate_density": (0.7, 0.5),
    "gate_warm_up": (0.1, 0.5),  # of three rounds
    "gate_gradient": ("strict", "plain"),
    "gate_upload": ("salient", "touched"),
    "gates": ("global", "personal"),
    "weight_threshold": (1e-3, 2e-3),
}
CASES = [(method, name) for method in METHODS for name in identity.knobs(method)]
# Where one of these shares a setting with another method, it is tested in full only when asked.
DEAR = ("random_channels", "fedtiny", "averaged_filters", "pooled_filters", "mpfl", "autoflip")


def owner(name):
    """Choose the method on which a setting is tested by default."""
    owners = [method for method, other in CASES if other == name]
    return min(owners, key=lambda method: (method in DEAR, owners.index(method)))


OWNERS = {owner(name) for _, name in CASES}


def marked(*case, quick):
    return pytest.param(*case, marks=[] if quick else pytest.mark.slow)


def config_of(method, **changes):
    """Set the first value of all that is the method's own, but for some changes."""
    network = {"model": "pooled_cnn"} if method in methods.CONVOLUTIONAL else {}
    first = {name: VALUES[name][0] for name in identity.knobs(method)}
    return {"algorithm": method, **SIZES, **PLAIN, **network, **first, **changes}


class Run:
    """A run that was built but not checked; its stages are traced when they are asked for."""

    def __init__(self, config):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "check", lambda parts: None)  # would trace everything first
            self.parts = build.build(RunConfig(**config))
        self.key = jax.random.key(0)
        self.before = jax.eval_shape(lambda key: loop.start(key, self.parts), self.key)
        self.names = [(stage.name, stage.num_rounds) for stage in self.parts.algorithm.stages]

    @functools.cache  # noqa: B019, a run lives as long as the module
    def stage(self, index):
        """Trace a round of a stage: its text, and the arrays in it, which the text leaves out."""
        advance = self.parts.advance[index]
        traced = jax.make_jaxpr(advance)(self.key, self.before, self.parts.population)
        text = re.sub(r" at 0x[0-9a-f]+", "", str(traced))
        return text, [(x.dtype, x.shape, x.tobytes()) for x in arrays_in(traced)]


def arrays_in(value):
    """List the constants of a trace and of whatever is traced within it."""
    if isinstance(value, jax.extend.core.ClosedJaxpr):
        constants = [np.asarray(plain(x)) for x in value.consts]
        return constants + arrays_in(value.jaxpr)
    if isinstance(value, jax.extend.core.Jaxpr):
        found = []
        for equation in value.eqns:
            literals = [v for v in equation.invars if isinstance(v, jax.extend.core.Literal)]
            found += [np.asarray(plain(literal.val)) for literal in literals]
            found += arrays_in(list(equation.params.values()))
        return found
    if isinstance(value, (list, tuple)):
        return [array for each in value for array in arrays_in(each)]
    return []


def plain(value):
    """Take keys for the numbers that they are."""
    is_key = isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(value) if is_key else value


def difference(one, two):
    """Name the first thing in which two runs differ, or None."""
    if one.names != two.names:
        return "stages"
    stages = enumerate(one.names)
    return next((name for i, (name, _) in stages if one.stage(i) != two.stage(i)), None)


@functools.cache
def first_run(method):
    return Run(config_of(method))


def test_every_setting_of_a_method_has_two_values_here():
    assert {name for _, name in CASES} == set(VALUES)
    assert {method for method, _ in CASES} < set(METHODS)


@pytest.mark.parametrize("method", [marked(m, quick=m in OWNERS - {*DEAR}) for m in METHODS])
def test_the_same_settings_make_the_same_run(method):
    """Else a difference would say nothing."""
    assert difference(first_run(method), Run(config_of(method))) is None


@pytest.mark.parametrize(
    ("method", "name"),
    [marked(method, name, quick=method == owner(name)) for method, name in CASES],
)
def test_a_setting_of_a_method_reaches_it(method, name):
    other = Run(config_of(method, **{name: VALUES[name][1]}))
    assert difference(first_run(method), other) is not None


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_by_name_alone(method):
    """With the network that is chosen for it, and whatever else."""
    run = Run({"algorithm": method, **SIZES})
    for advance in run.parts.advance:
        after, _ = jax.eval_shape(advance, run.key, run.before, run.parts.population)
        assert jax.tree.structure(after) == jax.tree.structure(run.before)


@pytest.mark.parametrize(
    ("method", "stage"),
    [("mpfl", "agree"), ("averaged_filters", "average"), ("autoflip", "explore")],
)
def test_everybody_is_asked_before_training_and_a_cohort_in_training(method, stage):
    network = {"model": "pooled_cnn"} if method in methods.CONVOLUTIONAL else {}
    run = Run({"algorithm": method, **SIZES, **PLAIN, **network})
    asked = {}
    for (name, _), advance in zip(run.names, run.parts.advance, strict=True):
        _, metrics = jax.eval_shape(advance, run.key, run.before, run.parts.population)
        asked[name] = metrics.participated.shape
    assert asked == {stage: (6,), "train": (2,)}
