"""Every method and variant, a new file in ``methods/`` included, is held to every law."""

import jax
import numpy as np
import pytest

from fedjaxprune import masks, testing
from fedjaxprune.testing import laws
from fedjaxprune.testing.history import Members, player
from tests.laws import rows

pytestmark = pytest.mark.laws

# Where laws for which more is compiled are held by default, one method a family; others are slow.
SIDE = "clients that train side by side change nothing"
DEVICES = "two devices give the result of one"
LEFT_OUT = "absent clients may be left out"
FED = "rounds that are fed their cohort alone give the same bits"
NOTHING = "where nothing is pruned it is FedAvg, to the bit"
DEFAULT = {
    SIDE: ("feddip",),
    DEVICES: ("mpfl",),
    LEFT_OUT: ("autoflip", "dynamic_sparse", "fedavg"),
    FED: ("fedtiny",),
}
# Usual methods and controls with one part replaced or left out.
SLOW_VARIANTS = (
    "adaptive_dynamic_pruning/random_channels",
    "adaptive_dynamic_pruning/squeeze_excitation",
    "autoflip/explored_start",
    "dpf/straight_through",
    "fedavg/fednova",
    "fedavg/fedprox",
    "feddip/without_penalty",
    "feddip/without_pruning",
    "fedfit/dense_start",
    "fedfit/joint",
    "fedfit/union",
    "fedmef/pruned_activations",
    "fedmef/without_extrusion",
    "fedrts/posterior_mean",
    "fedtiny/vanilla_selection",
    "flpqsu/quantized",
    "magnitude_masks/one_client",
    "magnitude_masks/pooled",
    "prunefl/initial_only",
    "prunefl/random_start",
    "prunetrain/proximal",
    "force_masks",
    "grasp",
    "grasp/one_exchange",
    "magnitude_masks",
    "pooled_filters",
    "random_filters",
    "rigl/set",
    "rigl/static",
    "snip",
    "snip/gradient_norm",
    "snip/iterative",
    "sr_ste/without_decay",
)
SLOW_NOTHING = (  # they share the parts that count with a method without an ending
    "averaged_filters",
    "autoflip/explored_start",
    "fedtiny",
    "fedtiny/vanilla_selection",
    "feddip",
    "feddip/without_pruning",
    "fedmef",
    "magnitude_masks/one_client",
    "magnitude_masks/pooled",
    "force_masks",
    "force_masks/of_clients",
    "grasp",
    "grasp/of_clients",
    "grasp/one_exchange",
    "pooled_filters",
    "snip",
    "snip/gradient_norm",
    "snip/iterative",
    "sr_ste",
    "ssfl",
    "synflow",
    "top_kast",
)


def by_row(*, slow):
    """Make a case of each row, all rows of a method for one worker."""
    for name in rows.names():
        marks = [pytest.mark.xdist_group(rows.family(name))]
        is_beside = name in rows.BESIDE and name not in rows.USUAL
        if slow or is_beside or name in SLOW_VARIANTS:
            marks.append(pytest.mark.slow)
        yield pytest.param(name, marks=marks)


def is_usual(name, law):
    if law in laws.LAWS:
        return True
    if law == NOTHING:
        return name not in SLOW_NOTHING and name not in rows.BESIDE
    return name in DEFAULT[law]


@pytest.mark.parametrize("name", list(by_row(slow=False)))
def test_a_method_keeps_the_laws(name, subtests):
    history = rows.recorded(name)
    for law, check in testing.laws_of(*rows.row(name), history=history):
        if is_usual(name, law):
            with subtests.test(law):
                check()
    with subtests.test("the server keeps pruned values only where that is said"):
        assert laws.is_dense(history) == (name in rows.DENSE_SERVER)
    with subtests.test("as much is live as is specified, after every round"):
        for step in history.steps[history.num_before :]:
            check_num_live(name, step, step.index - history.num_before)


def check_num_live(name, step, index):
    """Hold a round of training against `rows.num_live`."""
    wanted = rows.num_live(name, index)
    kernels = masks.prunable_leaves(step.after.params, masks.is_kernel)
    kept = int(np.asarray(step.metrics.num_live)[kernels].sum())
    if wanted is not None:
        assert kept in wanted if isinstance(wanted, range) else kept == wanted
    if rows.family(name) in rows.BY_FILTER:
        first, second = (int(np.sum(bits)) for bits in step.after.method.keep)
        assert min(first, second) > 0
        assert kept == 6 * first + (first if name in rows.DROP_CHANNELS else 4) * second


@pytest.mark.parametrize("name", list(by_row(slow=True)))
def test_a_method_keeps_the_laws_that_take_long(name, subtests):
    for law, check in testing.laws_of(*rows.row(name), history=rows.recorded(name)):
        if not is_usual(name, law):
            with subtests.test(law):
                check()


@pytest.mark.xdist_group("dynamic_sparse")
def test_weights_grow_back_where_the_method_has_them_grow():
    history = rows.recorded("dynamic_sparse")
    grown = [
        np.any(after & ~before)
        for step in history.steps
        for before, after in zip(
            *(map(np.asarray, jax.tree.leaves(s.masks)) for s in (step.before, step.after)),
            strict=True,
        )
    ]
    assert any(grown)


@pytest.mark.xdist_group("fedavg")
def test_a_round_that_is_traced_again_is_noticed():
    history = rows.recorded("fedavg")
    members = Members((0, 1), (True, True))
    step = history.steps[0]
    run, traces = player(history.scenario)
    for each in (step.members, members):
        run(0, step.before, step.rows_before, each)
    assert list(traces) == [2]


def test_rows_that_are_named_here_exist():
    named = {
        *SLOW_NOTHING,
        *SLOW_VARIANTS,
        *rows.USUAL,
        *(name for some in DEFAULT.values() for name in some),
    }
    assert named <= set(rows.names())
    assert {rows.family(name) for name in named} <= {rows.family(name) for name in rows.names()}


def test_the_laws_have_the_names_that_are_used_here():
    found = {law for law, _ in testing.laws_of(*rows.row("feddip"))}
    assert found == {*laws.LAWS, SIDE, DEVICES, LEFT_OUT, FED, NOTHING}
