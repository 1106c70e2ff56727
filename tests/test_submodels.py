"""Sub-models by client: what each receives, trains and sends, and who counts for an entry."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjaxprune import masks as masks_lib
from fedjaxprune import trees
from fedjaxprune.costs import ledger
from fedjaxprune.federated import downlinks, uplinks
from fedjaxprune.rounds.protocol import Masking
from fedjaxprune.rounds.training import training
from fedjaxprune.wire import format as wire_format
from fedjaxprune.wire import messages
from tests import quadratic
from tests.test_downloads import CLIENT, KEY, PEOPLE, SHARED, STATE

SHARES = jnp.array([1.0, 0.5, 0.25, 0.5, 1.0, 0.25])  # of each leaf's entries, the first ones


def first_entries(broadcast, client_id, state):
    """Give a client the first entries of each leaf, one more in every round, with wrap-around."""
    del state

    def leaf(mask):
        places = (jnp.arange(mask.size) - broadcast.round) % mask.size
        count = jnp.ceil(SHARES[client_id] * mask.size).astype(jnp.int32)
        return (places < count).reshape(mask.shape)

    return jax.tree.map(leaf, broadcast.masks)


def everything(broadcast, client_id, state):
    del client_id, state
    return jax.tree.map(jnp.ones_like, broadcast.masks)


def play(of_client, *, rounds=1, present=(True, True, True, True), **changes):
    algorithm = training(
        SHARED._replace(**changes), client=CLIENT, masking=Masking(of_client=of_client)
    )
    state = algorithm.init(quadratic.PARAMS, STATE)
    members = quadratic.cohort(algorithm, range(4), present)
    run = jax.jit(algorithm.stages[0].round)
    for index in range(rounds):
        before = state
        state, rows, metrics = run(jax.random.fold_in(KEY, index), state, members, PEOPLE)
        members = members._replace(states=rows)
        yield algorithm, before, state, jax.device_get(metrics)


def own_masks(state, client):
    broadcast = type("Seen", (), {"masks": state.masks, "round": state.round})
    return jax.device_get(first_entries(broadcast, client, ()))


def test_an_entry_is_the_mean_over_the_clients_that_hold_it():
    """Two steps of rate .1 lead from `w` to ``.81 w + .19 c`` where held, `c` the center."""
    sizes = np.diff(PEOPLE.offsets)
    for _, before, after, _ in play(first_entries, rounds=2, present=(True, True, False, True)):
        begin, found = (np.asarray(quadratic.flatten(one.params)) for one in (before, after))
        total, weight = np.zeros_like(begin), np.zeros_like(begin)
        for client in (0, 1, 3):
            held = np.asarray(quadratic.flatten(own_masks(before, client)))
            move = 0.19 * (quadratic.mean_point(PEOPLE, client) - begin)
            total += np.where(held, sizes[client] * move, 0.0)
            weight += np.where(held, sizes[client], 0)
        wanted = begin + total / np.maximum(weight, 1)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_what_nobody_holds_stays_to_the_bit():
    [(_, before, after, _)] = play(first_entries, present=(False, True, True, True))
    held = [own_masks(before, client) for client in (1, 2, 3)]
    union = jax.tree.map(lambda *leaves: np.any(leaves, axis=0), *held)
    assert not all(np.all(leaf) for leaf in jax.tree.leaves(union))
    kept = jax.tree.map(lambda mask, a, b: (a == b) | mask, union, before.params, after.params)
    assert all(np.all(leaf) for leaf in jax.tree.leaves(kept))


def test_whole_models_for_all_are_fedavg_at_the_same_price():
    plain, whole = (list(play(one, rounds=2)) for one in (None, everything))
    for (algorithm, before, after, metrics), (_, _, again, others) in zip(
        plain, whole, strict=True
    ):
        found, wanted = (quadratic.flatten(one.params) for one in (again, after))
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-7)  # fused otherwise
        one, two = (ledger.account(each, before, algorithm) for each in (metrics, others))
        assert one == two


@pytest.mark.parametrize(
    "changes",
    [{}, {"uplink": uplinks.top_k(fraction=0.5), "downlink": downlinks.quantize(bits=8)}],
    ids=["plain", "coded"],
)
def test_each_client_is_charged_for_its_own_entries_and_no_masks(changes):
    present = (True, True, True, False)
    for algorithm, before, _, metrics in play(first_entries, rounds=2, present=present, **changes):
        traffic = ledger.account(metrics, before, algorithm)
        assert traffic.uplink.masks == traffic.downlink.masks == 0
        charged = {i: one for one in traffic.clients for i in one.client_ids}
        for client in range(4):
            held = own_masks(before, client)
            counts = [int(np.sum(leaf)) for leaf in jax.tree.leaves(held)]
            np.testing.assert_array_equal(metrics.num_downloaded[client, 0], counts)
            state = messages.whole("model_state", STATE)
            down = state | messages.values("params", before.params, held)
            if changes:
                for name, part in down.items():
                    if name.startswith("params"):
                        blank = np.zeros(part.values.shape, np.uint16)
                        down[name] = wire_format.levels(
                            blank, bits=8, scales=np.zeros(2), known=part.known
                        )
            assert charged[client].downlink_bits == 8 * len(wire_format.encode(down))
            delta = masks_lib.apply(held, jax.tree.map(jnp.ones_like, before.params))
            payloads = [algorithm.payload(count) for count in counts]
            up = messages.delta(jax.device_get(delta), held, payloads, seed=None)
            up |= state | messages.weight(1.0)
            length = 8 * len(wire_format.encode(up)) if present[client] else 0
            assert charged[client].uplink_bits == length


def test_changes_cannot_be_sent_where_clients_hold_different_entries():
    with pytest.raises(ValueError, match="the downlink must send all entries in every round"):
        next(play(first_entries, downlink=downlinks.top_k(fraction=0.5)))


def test_counts_of_a_round_are_of_the_leaves():
    [(_, _, _, metrics)] = play(first_entries)
    sizes = np.asarray(trees.sizes(quadratic.PARAMS))
    wanted = np.ceil(np.asarray(SHARES)[:4, None] * sizes[None])
    np.testing.assert_array_equal(metrics.num_uploaded, wanted)
