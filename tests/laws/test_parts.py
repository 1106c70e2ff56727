"""Laws of servers, uplinks and chunk sizes, on the cheapest method that can break them."""

import functools

import jax
import numpy as np
import pytest

from fedjaxprune import registry
from fedjaxprune.testing import downlink_laws, history, laws, scenario
from tests.laws import rows

pytestmark = [pytest.mark.laws, pytest.mark.xdist_group("fedavg")]

UPLINKS = [(name, {}) for name in registry.names("uplink")]
UPLINKS += [("sign", {"error_feedback": True, "whole_below": 6})]  # the smallest of 2, 4, 8 and 24
UPLINKS += [("top_k", {"error_feedback": True})]
SLOW = ("fedadam", "random_k")  # like another one


def case(name, *rest):
    return pytest.param(name, *rest, marks=[pytest.mark.slow] if name in SLOW else [])


def without(protocol, section):
    """Leave out the settings of a section's part."""
    return {path: one for path, one in protocol.items() if not path.startswith(section)}


@pytest.mark.usual("fedyogi")  # all rows of laws have "fedavgm"
@pytest.mark.parametrize("name", [case(name) for name in registry.names("server_optimizer")])
def test_any_server_forgets_what_is_pruned_and_rests_where_nobody_is_heard(name, subtests):
    server = {"server.optimizer": name, "server.optimizer.server_learning_rate": 0.1}
    protocol = {**without(scenario.PROTOCOL, "server.optimizer"), **server}
    played = history.record(*rows.row("gradual_magnitude"), protocol)
    for law in (laws.pruned_is_zero, laws.nobody_moves_nothing, laws.not_finite_is_left_out):
        with subtests.test(law.__name__):
            law(played)


# All rows of laws have top-k with error feedback.
@pytest.mark.usual("unbiased_random_k-options3", "quantize-options5", "sign-options6")
@pytest.mark.parametrize(("name", "options"), [case(*each) for each in UPLINKS])
def test_any_uplink_is_charged_for_what_is_written_in_any_order(name, options, subtests):
    protocol = without(scenario.PROTOCOL, "uplink")
    uplink = {"uplink": name, **{f"uplink.{one}": value for one, value in options.items()}}
    played = history.record(*rows.row("fedavg"), {**protocol, **uplink})
    for law in (
        laws.order_is_irrelevant,
        laws.absent_change_nothing,
        laws.charges_are_written,
        laws.resumes,
    ):
        with subtests.test(law.__name__):
            law(played)


# Two methods by default: one whose weights are pruned and grow back, and one without masks.
DOWNLINKS = [("dynamic_sparse", "top_k"), ("fedavg", "quantize")]
DOWNLINKS += [
    pytest.param(name, "top_k", marks=pytest.mark.slow)
    for name in rows.names()
    if name != "dynamic_sparse" and (name not in rows.BESIDE or name in rows.USUAL)
]


@functools.lru_cache(maxsize=1)
def shown(name, downlink):
    """Play a method under a downlink once."""
    return history.record(*rows.row(name), {**scenario.PROTOCOL, "downlink": downlink})


def charged_less(step):
    """Charge an entry less of each leaf."""
    sent = step.metrics.sent
    field = sent.down["downlink"]["params"]
    field = field._replace(sent_counts=np.maximum(field.sent_counts - 1, 0))
    down = {**sent.down, "downlink": {**sent.down["downlink"], "params": field}}
    return step._replace(metrics=step.metrics._replace(sent=sent._replace(down=down)))


def held_more(step):
    """Let clients hold a later version than they do."""
    held = {"params": step.rows_before.held["params"] + 1}
    return step._replace(rows_before=step.rows_before._replace(held=held))


def held_less(step):
    held = {"params": np.maximum(step.rows_before.held["params"] - 1, 0)}
    return step._replace(rows_before=step.rows_before._replace(held=held))


@pytest.mark.parametrize(
    ("change", "law", "sentence"),
    [
        (
            charged_less,
            downlink_laws.clients_see_what_is_sent,
            "is sent .* bits of parameters",
        ),
        (held_more, downlink_laws.clients_see_what_is_sent, "bits of parameters, and charged"),
        (held_less, downlink_laws.nothing_is_sent_twice, "is sent entries that it holds, or not"),
    ],
)
def test_a_record_that_breaks_a_law_of_downlinks_is_noticed(change, law, sentence):
    played = shown("dynamic_sparse", "top_k")
    with pytest.raises(AssertionError, match=sentence):
        law(played._replace(steps=tuple(map(change, played.steps))))


@pytest.mark.parametrize(("name", "downlink"), DOWNLINKS)
def test_clients_of_any_method_see_what_any_downlink_sends_and_charges(name, downlink, subtests):
    played = shown(name, downlink)
    own = [downlink_laws.clients_see_what_is_sent]
    own += [downlink_laws.nothing_is_sent_twice] if downlink == "top_k" else []
    for law in (
        *own,
        laws.pruned_is_zero,
        laws.is_traced_once,
        laws.order_is_irrelevant,
        laws.absent_change_nothing,
        laws.nobody_moves_nothing,
        laws.dropped_changes_nothing,
        laws.charges_are_written,
        laws.resumes,
    ):
        with subtests.test(law.__name__):
            law(played)


@pytest.mark.slow  # for a chunk by default see test_laws.py, and test_cohort.py
@pytest.mark.parametrize("chunk_size", [2, 3, 4])
def test_every_chunk_size_gives_the_same_result(chunk_size):
    method, settings = rows.row("fedavg")
    one, many = rows.recorded("fedavg"), history.record(method, settings, chunk_size=chunk_size)
    for step, again in zip(one.steps, many.steps, strict=True):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
            (step.after.params, step.rows),
            (again.after.params, again.rows),
        )
