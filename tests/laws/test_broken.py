"""A history in which something is wrong breaks the law about it, with a sentence that says so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjaxprune.testing import laws
from tests.laws import rows

pytestmark = [pytest.mark.laws, pytest.mark.xdist_group("dynamic_sparse")]


@pytest.fixture(scope="module")
def history():
    return rows.recorded("dynamic_sparse")


def tampered(history, change):
    """Change each step; training begins at once in this history."""
    return history._replace(steps=tuple(change(step) for step in history.steps))


def after(change):
    return lambda step: step._replace(after=change(step.after))


def moved(params, by):
    return jax.tree.map(lambda leaf: leaf + jnp.asarray(by).astype(leaf.dtype), params)


def with_bias_pruned(state):
    bias = jnp.zeros_like(state.masks["dense"]["bias"])
    return state._replace(masks={**state.masks, "dense": {**state.masks["dense"], "bias": bias}})


def with_memory(state):
    server = jax.tree.map(jnp.ones_like, state.server)
    return state._replace(server=server)


def one_value(step):
    """Keep one value of a pruned entry in the first round."""
    if step.index:
        return step
    kernel, mask = (np.array(x["dense"]["kernel"]) for x in (step.after.params, step.after.masks))
    kernel[tuple(np.argwhere(~mask)[0])] = 1.0
    dense = {**step.after.params["dense"], "kernel": kernel}
    return step._replace(after=step.after._replace(params={**step.after.params, "dense": dense}))


def charged_more(step):
    reply = step.metrics.sent.up["reply"]
    delta = reply["delta"]._replace(live_counts=np.asarray(reply["delta"].live_counts) + 1)
    sent = step.metrics.sent._replace(up={"reply": {**reply, "delta": delta}})
    return step._replace(metrics=step.metrics._replace(sent=sent))


def miscounted(step):
    return step._replace(metrics=step.metrics._replace(num_live=step.metrics.num_live + 1))


READ = {  # what is read off the record
    "of prunable leaves": (after(with_bias_pruned), "dense/bias is pruned and not `prunable`"),
    "new id": (
        after(lambda state: state._replace(masks_id=jnp.int32(0))),
        "masks_id goes from 0 to 0 in a round that changes masks",
    ),
    "exact zeros": (one_value, "deployed_params are not zero where pruned"),
    "server memory": (after(with_memory), "server memory is not zero where pruned"),
    "counted": (miscounted, "num_live is .*, and .* are live"),
    "encoder writes": (charged_more, "the delta of client 0 takes .* bits, and .* are charged"),
}


@pytest.mark.parametrize("name", sorted(READ))
def test_a_record_that_breaks_a_law_is_noticed(history, name):
    change, sentence = READ[name]
    law = next(law for words, law in laws.LAWS.items() if name in words)
    law(history)
    with pytest.raises(AssertionError, match=sentence):
        law(tampered(history, change))


def adds(count):
    """Let a round move the parameters by something that must not matter."""

    def wrap(run):
        def again(index, state, rows, members, population=None):
            state, rows, metrics = run(index, state, rows, members, population)
            moves = count(members, metrics, population)
            return state._replace(params=moved(state.params, 0.01 * moves)), rows, metrics

        return again

    return wrap


PLAYED = {  # what is played again
    "resumed": (adds(lambda members, metrics, people: 1), "resumed run gives other bits"),
    "order": (adds(lambda members, metrics, people: members.client_ids[0]), "another order"),
    "absent": (adds(lambda members, metrics, people: sum(members.client_ids)), "other absent"),
    "without anybody": (adds(lambda members, metrics, people: 1), "nobody moves something"),
    "is dropped": (
        adds(lambda members, metrics, people: int(metrics.num_rejected)),
        "a round that is dropped changes something: params",
    ),
    "not finite": (
        adds(lambda members, metrics, people: int(metrics.num_rejected)),
        "a message that is not finite moves the model",
    ),
}


@pytest.mark.parametrize("name", sorted(PLAYED))
def test_a_round_that_breaks_a_law_is_noticed(history, name):
    wrap, sentence = PLAYED[name]
    law = next(law for words, law in laws.LAWS.items() if name in words)
    law(history)
    with pytest.raises(AssertionError, match=sentence):
        law(history._replace(run=wrap(history.run)))


def test_a_round_that_is_traced_again_is_noticed(history):
    with pytest.raises(AssertionError, match=r"'train' was traced 2 times, not once"):
        laws.is_traced_once(history._replace(num_traces=(2,)))
