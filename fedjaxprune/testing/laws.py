"""Laws that are read off one recorded history of a method; each raises a sentence if broken."""

import json
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjaxprune import masks as masks_lib
from fedjaxprune import trees as tree_lib
from fedjaxprune.costs import ledger
from fedjaxprune.experiment.folder import checkpoints
from fedjaxprune.rounds.simulation import Simulation
from fedjaxprune.testing import history as history_lib
from fedjaxprune.testing import scenario, trees
from fedjaxprune.testing.history import History, Members, Step
from fedjaxprune.types import RoundState
from fedjaxprune.wire import format as wire_format
from fedjaxprune.wire import messages

ORDER = {"rtol": 1e-4, "atol": 1e-5}  # another order of sums


def masks_are_total(history: History) -> None:
    """Masks are boolean, one for each entry, and clients learn of all that is pruned.

    The masks of prunable leaves travel. A method whose masks are fields of a message may prune more
    with them (a filter's bias).
    """
    prunable = history.scenario.algorithm.prunable
    for step in history.steps:
        masks, params = step.after.masks, step.after.params
        same = jax.tree.structure(masks) == jax.tree.structure(params)
        law(same, step, "the masks are not the tree of the parameters")
        flags = masks_lib.prunable_leaves(params, prunable)
        leaves = jax.tree.leaves(masks), jax.tree.leaves(params)
        for mask, leaf, flag, path in zip(*leaves, flags, tree_lib.paths(params), strict=True):
            law(mask.dtype == jnp.bool_, step, f"the mask of {path} is {mask.dtype}, not bool")
            law(mask.shape == leaf.shape, step, f"the mask of {path} has shape {mask.shape}")
            known = flag or np.all(mask) or not len(step.metrics.sent.packed_masks)
            law(known, step, f"{path} is pruned and not `prunable`")


def masks_are_versioned(history: History) -> None:
    """It can be told who holds old masks: `masks_id` grows whenever clients change the masks.

    Masks that the server draws alone may be known to everybody.
    """
    for step in _of_clients(history):
        before, after = int(step.before.masks_id), int(step.after.masks_id)
        changed = bool(trees.difference(step.before.masks, step.after.masks))
        what = f"masks_id goes from {before} to {after} in a round that changes masks"
        law(after >= before + changed, step, what)


def pruned_is_zero(history: History) -> None:
    """What is deployed is exact zero where it is pruned; so are parameters and server memory.

    A server may keep dense values on purpose in training, and then its memory is dense, too; and
    before training, what later stages still choose from.
    """
    algorithm = history.scenario.algorithm
    server: Any = history.scenario.task.protocol.server
    for step in history.steps:
        params, masks = step.after.params, step.after.masks
        deployed = algorithm.deployed_params(step.after)
        law(not trees.held(deployed, masks), step, "deployed_params are not zero where pruned")
        if step.index >= history.num_before and not is_dense(history):
            law(not trees.held(params, masks), step, "parameters are not zero where pruned")
            hidden = optax.tree.map_params(server, trees.pruned, step.after.server, masks)
            clean = optax.tree.map_params(server, np.zeros_like, hidden)
            law(not trees.difference(hidden, clean), step, "server memory is not zero where pruned")


def is_dense(history: History) -> bool:
    """Tell whether the server keeps values of pruned entries: where FedAvg's masks would not be."""
    trained = history.steps[history.num_before :]
    return all(trees.held(step.after.params, step.after.masks) for step in trained)


def live_weights_are_counted(history: History) -> None:
    """What a round reports is what its masks, or without masks its parameters, say."""
    for step in history.steps:
        masks = jax.device_get(step.after.masks)
        said = [int(count) for count in step.metrics.num_live]
        by_mask = [int(np.sum(mask)) for mask in jax.tree.leaves(masks)]
        by_value = [int(np.count_nonzero(leaf)) for leaf in jax.tree.leaves(step.after.params)]
        right = by_value if by_mask == tree_lib.sizes(masks) and said != by_mask else by_mask
        law(said == right, step, f"num_live is {said}, and {right} are live")
        old = jax.tree.leaves(jax.device_get(step.before.masks))
        flips = sum(int(np.sum(a != b)) for a, b in zip(old, jax.tree.leaves(masks), strict=True))
        if by_mask == said:
            given = int(step.metrics.num_changed)
            law(given == flips, step, f"num_changed is {given}, and {flips} entries changed")


def is_traced_once(history: History) -> None:
    """Rounds, absent clients and masks change, and nothing is compiled again."""
    names = [stage.name for stage in history.scenario.algorithm.stages]
    for name, count in zip(names, history.num_traces, strict=True):
        assert count == 1, f"the round of the stage {name!r} was traced {count} times, not once."


def resumes(history: History) -> None:
    """All that the next round needs is in the state and the rows, as a checkpoint keeps them."""
    for step, following in zip(history.steps, history.steps[1:], strict=False):
        saved = jax.device_get((step.after, step.rows))
        copied = jax.tree.map(lambda leaf: jnp.array(np.array(leaf)), saved[0])
        _replay(history, following, copied, step.rows)
    middle = history.steps[history.num_before]
    now = Simulation(middle.after, middle.rows)
    warnings: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        place = pathlib.Path(name)
        with checkpoints.open_manager(place / "saved", keep=1) as manager:
            shipped = history.scenario.algorithm.deployed_params(middle.after)
            checkpoints.save(manager, 1, now, fingerprint=0, deployed=shipped)
        with checkpoints.open_manager(place / "saved", keep=1) as manager:
            shapes, aside = jax.eval_shape(lambda: now), place / "aside"
            found = checkpoints.restore(
                manager, shapes, usable=lambda number: True, aside=aside, warn=warnings.append
            )
    law(found is not None, middle, f"the checkpoint cannot be read: {warnings}")
    assert found is not None
    rows = jax.device_get(found[1].rows)
    _replay(history, history.steps[middle.index + 1], found[1].state, rows)


def _replay(history: History, step: Step, state: RoundState, rows: Any) -> None:
    after, rows, _ = history.run(step.index, state, rows, step.members)
    same(step, (after, rows), (step.after, step.rows), "a resumed run gives other bits")


def order_is_irrelevant(history: History) -> None:
    """A cohort in another order gives the same up to rounding, and the same charges."""
    for step in history.steps:
        if not all(step.members.participated):
            continue
        members = step.members._replace(client_ids=tuple(reversed(step.members.client_ids)))
        after, rows, metrics = history.run(step.index, step.before, step.rows_before, members)
        what = "a cohort in another order gives another result"
        same(step, (after, rows), (step.after, step.rows), what, **ORDER)
        one, two = charged(history, step, step.metrics), charged(history, step, metrics)
        law(one == two, step, "a cohort in another order is charged otherwise")


def absent_change_nothing(history: History) -> None:
    """Those who drop out do not count, whoever they are, and lose nothing that they remember."""
    for step in history.steps:
        members = history_lib.beside_others(step.members)
        after, rows, metrics = history.run(step.index, step.before, step.rows_before, members)
        what = "other absent clients give another result"
        same(step, (after, rows), (step.after, step.rows), what)
        away = [i for i, here in zip(*step.members, strict=True) if not here]
        kept = [trees.take(tree, away) for tree in (step.rows, step.rows_before)]
        same(step, kept[0], kept[1], "absent clients lose what they remember")
        one, two = (_charged_present(history, step, each) for each in (step.metrics, metrics))
        law(one == two, step, "other absent clients change what those present are charged")


def nobody_moves_nothing(history: History) -> None:
    """A round that everybody drops out of leaves everything as it was, but for its number."""
    for step in _of_clients(history):
        members = Members(step.members.client_ids, (False,) * 4)
        after, rows, metrics = history.run(step.index, step.before, step.rows_before, members)
        after = after._replace(round=step.before.round)
        same(step, (after, rows), (step.before, step.rows_before), "nobody moves something")
        law(int(metrics.num_participating) == 0, step, "absent clients count as participants")
        traffic = ledger.account(metrics, after, history.scenario.algorithm)
        law(traffic.uplink_bits == 0, step, "absent clients are charged for what they send")


def not_finite_is_left_out(history: History) -> None:
    """A client that diverges is as good as absent to the server, and in training is counted.

    What it sends before training may be finite all the same.
    """
    people = scenario.population()
    for step in _of_clients(history):
        bad = step.members.client_ids[1]
        begin, end = np.asarray(people.offsets)[bad : bad + 2]
        rows = np.asarray(people.order)[begin:end]
        inputs = np.array(people.examples["inputs"])
        inputs[rows] = np.nan
        spoiled = people._replace(examples={**people.examples, "inputs": inputs})
        given = (step.index, step.before, step.rows_before)
        after, _, metrics = history.run(*given, step.members, spoiled)
        here = tuple(h and i != bad for i, h in zip(*step.members, strict=True))
        without, _, _ = history.run(*given, step.members._replace(participated=here))
        what = "a message that is not finite moves the model"
        same(step, (after.params, after.masks), (without.params, without.masks), what)
        counted = int(metrics.num_rejected) == 1 or step.index < history.num_before
        law(counted, step, "a message that is not finite is not counted")


def place_is_irrelevant(history: History) -> None:
    """Where clients' examples are stored changes no bit: draws follow from ids, not from places."""
    people = scenario.population()
    places = np.roll(np.arange(people.order.shape[0]), 5)
    stored = {n: jnp.asarray(np.asarray(leaf)[places]) for n, leaf in people.examples.items()}
    order = jnp.asarray(np.argsort(places)[np.asarray(people.order)], jnp.int32)
    moved = people._replace(examples=stored, order=order)
    for step in history.steps:
        after, rows, _ = history.run(step.index, step.before, step.rows_before, step.members, moved)
        what = "examples that are stored elsewhere give another result"
        same(step, (after, rows), (step.after, step.rows), what)


def dropped_changes_nothing(history: History) -> None:
    """A round of training whose messages lead to an infinity changes nothing but its number.

    The server's memory is made infinite before it. What clients remember is left alone as well:
    residuals are not spent, control variates do not move.
    """
    for step in history.steps[history.num_before :][:3]:
        before = step.before._replace(server=_infinite(step.before.server))
        if not tree_lib.paths(before.server):
            continue
        after, rows, metrics = history.run(step.index, before, step.rows_before, step.members)
        after = after._replace(round=before.round)
        what = "a round that is dropped changes something"
        same(step, after, before, what)
        for name in ("client", "uplink"):
            found, wanted = (getattr(each, name) for each in (rows, step.rows_before))
            same(step, found, wanted, f"{what} that clients remember")
        counted = int(metrics.num_rejected) == int(metrics.num_participating)
        law(counted, step, "a round that is dropped does not count its clients as rejected")


def _infinite(tree: Any) -> Any:
    """Make all floating-point leaves infinite."""

    def leaf(value):
        is_float = jnp.issubdtype(value.dtype, jnp.floating)
        return jnp.full_like(value, jnp.inf) if is_float else value

    return jax.tree.map(leaf, tree)


def _of_clients(history: History) -> list[Step]:
    """Give the rounds in which the clients that are asked take part, not the server alone."""
    return [
        step
        for step in history.steps
        if step.metrics.participated.tolist() == list(step.members.participated)
    ]


def charges_are_written(history: History) -> None:
    """The ledger charges what an encoder writes, and its sums are right."""
    for step in history.steps:
        traffic = ledger.account(step.metrics, step.before, history.scenario.algorithm)
        by_client = charged(history, step, step.metrics).values()
        up, down = (sum(bits[way] for bits in by_client) for way in (0, 1))
        law(traffic.uplink_bits == sum(traffic.uplink) == up, step, "uploads do not add up")
        adds_up = traffic.downlink_bits == sum(traffic.downlink) == down
        law(adds_up, step, "downloads do not add up")
        json.dumps(history.scenario.algorithm.diagnostics(step.metrics))
        for name, message in step.metrics.sent.up.items():
            if "delta" in message:
                _check_deltas(history, step, name)


def _check_deltas(history: History, step: Step, name: str) -> None:
    """Encode what each client's uplink let through, and compare with its part of the charge."""
    algorithm, sent = history.scenario.algorithm, step.metrics.sent
    rest = {field: one for field, one in sent.up[name].items() if field != "delta"}
    without = step.metrics._replace(sent=sent._replace(up={**sent.up, name: rest}))
    whole, partial = charged(history, step, step.metrics), charged(history, step, without)
    for client, here in zip(*step.members, strict=True):
        if not here:
            continue
        charge = whole[client][0] - partial[client][0]
        speakers = sent.up[name]["delta"].clients
        slot = step.members.client_ids.index(client)
        if not isinstance(speakers, tuple) and not speakers[slot]:
            law(
                charge == 0,
                step,
                f"client {client} is silent, and charged {charge} bits of a delta",
            )
            continue
        memory = step.rows.uplink
        delta, masks = (trees.take(tree, client) for tree in (memory.delta, memory.sent))
        stray = trees.held(delta, masks)
        law(not stray, step, f"client {client} sends entries that it may not send")
        payloads = [algorithm.payload(int(np.sum(mask))) for mask in jax.tree.leaves(masks)]
        if shaped := algorithm.shaped_payload:
            payloads = [shaped(int(np.sum(mask)), mask.shape) for mask in jax.tree.leaves(masks)]
        message = messages.delta(delta, masks, payloads, seed=0)
        written = 8 * (len(wire_format.encode(message)) - wire_format.frame_bytes(len(message)))
        what = f"the delta of client {client} takes {written} bits, and {charge} are charged"
        law(written == charge, step, what)


def charged(history: History, step: Step, metrics: Any) -> dict[int, tuple[int, int]]:
    """Say what each client is charged, by its id: bits up and down."""
    traffic = ledger.account(metrics, step.before, history.scenario.algorithm)
    return {
        client: (entry.uplink_bits, entry.downlink_bits)
        for entry in traffic.clients
        for client in entry.client_ids
    }


def _charged_present(history: History, step: Step, metrics: Any) -> Any:
    """Say what goes up in all, and what those who are present are charged."""
    traffic = ledger.account(metrics, step.before, history.scenario.algorithm)
    by_client = charged(history, step, metrics)
    here = {i: by_client.get(i) for i, present in zip(*step.members, strict=True) if present}
    return traffic.uplink, {n: bits.uplink for n, bits in traffic.published.items()}, here


def law(holds: Any, step: Step, sentence: str) -> None:
    """Raise a sentence about a round where a law does not hold."""
    assert holds, f"round {step.index + 1} ({step.stage}): {sentence}."


def same(
    step: Step, found: Any, wanted: Any, what: str, *, rtol: float = 0.0, atol: float = 0.0
) -> None:
    """Raise a sentence where two trees differ."""
    difference = trees.difference(found, wanted, rtol=rtol, atol=atol)
    law(not difference, step, f"{what}: {difference}")


LAWS: Mapping[str, Callable[[History], None]] = {
    "masks are total, boolean, and of prunable leaves": masks_are_total,
    "masks that change have a new id": masks_are_versioned,
    "pruned entries are exact zeros in parameters and server memory": pruned_is_zero,
    "live and changed weights are counted": live_weights_are_counted,
    "every round is traced once": is_traced_once,
    "a resumed run gives the same bits": resumes,
    "the order of the cohort is irrelevant": order_is_irrelevant,
    "absent clients change nothing": absent_change_nothing,
    "a round without anybody moves nothing": nobody_moves_nothing,
    "messages that are not finite are left out": not_finite_is_left_out,
    "where examples are stored is irrelevant": place_is_irrelevant,
    "a round that is dropped changes nothing": dropped_changes_nothing,
    "the ledger charges what an encoder writes": charges_are_written,
}
