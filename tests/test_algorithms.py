"""One conformance table: every law over every method, uplink and server."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjaxprune import masks, trees
from fedjaxprune.costs import ledger
from fedjaxprune.experiment.folder import checkpoints
from fedjaxprune.experiment.run import build as catalog
from fedjaxprune.federated import (
    aggregators,
    cohort,
    local_training,
    server_optimizers,
    uplinks,
)
from fedjaxprune.federated.corrections import fednova, scaffold
from fedjaxprune.methods import (
    adaptive_dynamic_pruning,
    autoflip,
    averaged_filters,
    fedavg,
    feddip,
    feddp_threshold,
    fedtiny,
    gradual_magnitude,
    magnitude_masks,
    mpfl,
    pooled_filters,
    random_filters,
    random_masks,
    snip,
)
from fedjaxprune.models import gates
from fedjaxprune.pruning import pruners, schedules, scores
from fedjaxprune.rounds import protocol, training
from fedjaxprune.types import ClientData
from tests import quadratic

KEY = jax.random.key(3)
PEOPLE = quadratic.population()
ROUNDS = 6
STATE = {"steps": jnp.float32(0.0), **quadratic.NORMALIZED_STATE, **quadratic.GATED_STATE}


def setup(**changes):
    base = protocol.Protocol(
        num_rounds=ROUNDS, batcher=quadratic.full_batches(2), optimizer=optax.sgd(0.1)
    )
    return base._replace(**changes)


def dip(*, model=quadratic.MODEL, **options):
    settings = feddip.FedDIP(**{**feddip.METHOD.law_settings, **options})
    return lambda s: feddip.build(settings, quadratic.task(s, model=model))


def plain(model=quadratic.MODEL, **changes):
    return lambda s: fedavg.build(fedavg.FedAvg(), quadratic.task(s, model=model, **changes))


def fixed(method, *, max_size=8, **options):
    settings = method.METHOD.settings(**{**method.METHOD.law_settings, **options})
    return lambda s: method.build(settings, quadratic.task(s, max_size=max_size))


def dynamic_sparse(s):
    revise = pruners.chain(
        pruners.prune_to(0.6), pruners.drop(0.3), pruners.grow_to(0.6, score=scores.gradient)
    )
    due = schedules.every(2)
    client = local_training.local_sgd(
        quadratic.MODEL.loss, batcher=s.batcher, optimizer=s.optimizer, report_grads=due
    )
    return training.training(s, client=client, pruner=pruners.when(due, revise))


def tiny(**options):
    settings = {**fedtiny.METHOD.law_settings, **options}
    return lambda s: fedtiny.build(
        fedtiny.FedTiny.model_validate(settings), quadratic.task(s, model=quadratic.NORMALIZED)
    )


def flip(**options):
    settings = {**autoflip.METHOD.law_settings, **options}
    units = quadratic.CHANNELS._replace(groups=quadratic.CHANNELS.groups[:1])
    return lambda s: autoflip.build(
        autoflip.AutoFLIP.model_validate(settings), quadratic.task(s, channels=units)
    )


def by_law(module, *, model=quadratic.MODEL, num_epochs=1, **options):
    """Build a method that describes itself, with the settings of its laws."""
    settings = module.METHOD.settings(**{**module.METHOD.law_settings, **options})
    return lambda s: module.build(settings, quadratic.task(s, model=model, num_epochs=num_epochs))


def dynamic(model, **options):
    make = by_law(adaptive_dynamic_pruning, model=model, **options)
    return lambda s: make(s._replace(optimizer=optax.sgd(0.1, momentum=0.9)))


def squeeze_excitation(s):
    """Open all gates: the variant, on the network that it asks for."""
    options = dict(adaptive_dynamic_pruning.METHOD.variants["squeeze_excitation"])
    density = jnp.float32(options.pop("model.density"))
    algorithm = by_law(
        adaptive_dynamic_pruning, model=quadratic.GATED, warm_up_fraction=0.0, **options
    )(s)

    def init_fn(params, model_state):
        return algorithm.init(params, gates.with_density(model_state, density))

    return algorithm._replace(init=init_fn)


ALGORITHMS = {
    "autoflip": flip(),
    "autoflip_channels": flip(
        channel_threshold=0.6, agreement="majority", prune_every=2, start_from="explored"
    ),
    "explored_start": flip(**autoflip.METHOD.variants["explored_start"]),
    "fedavg": plain(),
    "fedprox": plain(penalties=(local_training.proximal(mu=0.1),)),
    "scaffold": lambda s: plain()(s._replace(correction=scaffold.control_variates())),
    "fednova": lambda s: plain()(
        s._replace(correction=fednova.normalized_averaging(batcher=s.batcher))
    ),
    "feddip": dip(),
    "feddip_scaffold": lambda s: dip()(s._replace(correction=scaffold.control_variates())),
    "dynamic_sparse_scaffold": lambda s: dynamic_sparse(
        s._replace(correction=scaffold.control_variates())
    ),
    "feddip_regrow": dip(mode="regrow"),
    "feddip_dense": dip(mode="dense"),
    "feddip_without_penalty": dip(max_penalty=0.0),
    "feddip_without_pruning": dip(mode="unpruned", max_penalty=1e-3),
    "dynamic_sparse": dynamic_sparse,
    "random_masks": fixed(random_masks),
    "magnitude_masks": fixed(magnitude_masks),
    "one_client_masks": fixed(magnitude_masks, examples="one_client", client_id=2),
    "pooled_masks": fixed(magnitude_masks, examples="pooled", max_size=28),
    "snip_masks": fixed(snip, examples="pooled"),
    "snip_masks_of_clients": fixed(snip, examples="clients", num_prune_steps=1),
    "gradual_magnitude": fixed(gradual_magnitude),
    "fedtiny": tiny(),
    "fedtiny_fednova": lambda s: tiny()(
        s._replace(correction=fednova.normalized_averaging(batcher=s.batcher))
    ),
    "fedtiny_vanilla": tiny(selection="vanilla", gradient_weights="clients", block_order="forward"),
    "fedtiny_moving": tiny(calibration_passes=2),
    "mpfl": by_law(mpfl),
    "mpfl_started": by_law(
        mpfl, dense_rounds=1, votes="examples", remove="channels", consensus="top_k"
    ),
    "random_filters": by_law(random_filters),
    "pooled_filters": by_law(pooled_filters, remove="channels"),
    "averaged_filters": by_law(averaged_filters),
    "adaptive_dynamic_pruning": dynamic(quadratic.GATED),
    "random_channels": dynamic(quadratic.DRAWING),
    "squeeze_excitation": squeeze_excitation,
    "feddp_threshold": by_law(feddp_threshold, num_epochs=2),
}
BY_FILTER = [name for name in ALGORITHMS if name.startswith("mpfl") or name.endswith("_filters")]
DROPS_CHANNELS = ("mpfl_started", "pooled_filters")  # what reads them goes with the filters
SERVERS = {
    "fedavg": server_optimizers.fedavg(),
    "fedavgm": server_optimizers.fedavgm(learning_rate=0.5, momentum=0.9),
    "fedadam": server_optimizers.fedadam(learning_rate=0.1),
    "fedyogi": server_optimizers.fedyogi(learning_rate=0.1),
}
UPLINKS = {
    "top_k": uplinks.top_k(fraction=0.25),
    "sign": uplinks.sign(),
    "unbiased_random_k": uplinks.unbiased_random_k(fraction=0.5),
    "identity": uplinks.identity(),
    "feedback_top_k": uplinks.error_feedback(uplinks.top_k(fraction=0.25)),
    "feedback_sign": uplinks.error_feedback(uplinks.sign()),
    "random_k": uplinks.random_k(fraction=0.5),
    "quantize": uplinks.quantize(bits=4),
}
AT_SERVER = ("prepare", "draw")  # stages in which no client takes part
# Variants and controls that share their parts with others: theirs are the slow cases.
DEAR = (
    "autoflip_channels",
    "averaged_filters",
    "dynamic_sparse_scaffold",
    "explored_start",
    "feddip_regrow",
    "feddip_scaffold",
    "feddip_without_penalty",
    "feddip_without_pruning",
    "fedtiny_fednova",
    "fedtiny_moving",
    "fedtiny_vanilla",
    "mpfl_started",
    "one_client_masks",
    "pooled_filters",
    "pooled_masks",
    "random_channels",
    "random_filters",
    "snip_masks",
    "squeeze_excitation",
)


def case(name, *rest):
    """Make a case of a table, a slow one of a dear algorithm."""
    return pytest.param(name, *rest, marks=[pytest.mark.slow] if name in DEAR else [])


EVERY = [case(name) for name in sorted(ALGORITHMS)]
every_algorithm = pytest.mark.parametrize("name", EVERY)
# Dear ones that the command offers: each shows most laws by default, in one go.
IN_ONE_GO = sorted(set(DEAR) & set(catalog.ALGORITHMS))
# On a mesh compiling takes longest: by default those whose rounds have most parts of their own.
MESHED = ("adaptive_dynamic_pruning", "dynamic_sparse", "mpfl")


def each_once(name, others, usual):
    """Pair every algorithm with the usual part, and FedDIP with every part: not the product."""
    pairs = {(algorithm, usual) for algorithm in ALGORITHMS} | {("feddip", o) for o in others}
    return pytest.mark.parametrize(("name", name), [case(*pair) for pair in sorted(pairs)])


def traced_once(function):
    """Let a function be traced once; chex counts by the function's name, which all rounds share."""
    traces = []

    def wrapper(*arguments):
        assert not traces, "the round is traced again"
        traces.append(True)
        return function(*arguments)

    return wrapper


@functools.cache
def built(name, *, server="fedavgm", wire="feedback_top_k", chunk_size=1):
    """Build and jit once for all tests, since they spend their time on compiling.

    Server and clients remember by default, so that there is something to lose. Whoever uses it
    shows on the way that the round is traced once, whatever changes.
    """
    parts = setup(server=SERVERS[server], uplink=UPLINKS[wire], chunk_size=chunk_size)
    algorithm = ALGORITHMS[name](parts)
    return algorithm, player(algorithm, traced_once)


def player(algorithm, wrap=lambda function: function):
    """Play any round of any stage: which one it is, the state knows."""
    ends = np.cumsum([stage.num_rounds for stage in algorithm.stages])
    rounds = [jax.jit(wrap(stage.round)) for stage in algorithm.stages]

    def run(key, state, members, people):
        stage = np.searchsorted(ends, int(state.round), side="right")
        return rounds[min(stage, len(rounds) - 1)](key, state, members, people)

    return run


def play(algorithm, run, cohorts, rounds, start=None):
    """Play rounds from a `start`, state and everybody's rows; give both and metrics after each."""
    everyone = quadratic.cohort(algorithm, range(6)).states
    state, everyone = start or (algorithm.init(quadratic.PARAMS, STATE), everyone)
    for index in rounds:
        ids, present = cohorts(index)
        ids = jnp.asarray(ids, jnp.int32)
        members = quadratic.cohort(algorithm, ids, present)._replace(
            states=trees.take_rows(everyone, ids)
        )
        state, rows, metrics = run(jax.random.fold_in(KEY, index), state, members, PEOPLE)
        everyone = jax.tree.map(lambda all_, new, ids=ids: all_.at[ids].set(new), everyone, rows)
        yield state, everyone, metrics


def simulate(algorithm, cohorts, *, num_rounds=ROUNDS, start=None, run=None):
    """Run all stages before the last, and `num_rounds` of it; or `num_rounds` from a `start`.

    Gives all states, the last rows and all metrics.
    """
    run = player(algorithm) if run is None else run
    if start is None:
        num_rounds += sum(stage.num_rounds for stage in algorithm.stages[:-1])
    else:
        start = start, quadratic.cohort(algorithm, range(6)).states
    played = list(play(algorithm, run, cohorts, range(num_rounds), start))
    return [state for state, _, _ in played], played[-1][1], [metrics for _, _, metrics in played]


def num_before_training(algorithm):
    return sum(stage.num_rounds for stage in algorithm.stages[:-1])


def play_all(algorithm, run, cohorts, num_rounds=3):
    """Play all stages before training and some rounds of it: what `play` yields, as a list."""
    return list(play(algorithm, run, cohorts, range(num_before_training(algorithm) + num_rounds)))


def charged(algorithm, metrics, state):
    """Say what each client is charged, by its id: bits up and down."""
    return {
        client: (entry.uplink_bits, entry.downlink_bits)
        for entry in ledger.account(metrics, state, algorithm).clients
        for client in entry.client_ids
    }


def assert_alike(first, second, *, rtol, atol):
    """Compare numbers with a tolerance; masks and counts must be equal."""
    chex.assert_trees_all_equal_shapes_and_dtypes(first, second)
    exact = [
        [leaf for leaf in jax.tree.leaves(tree) if not jnp.issubdtype(leaf.dtype, jnp.floating)]
        for tree in (first, second)
    ]
    chex.assert_trees_all_equal(*exact)
    chex.assert_trees_all_close(first, second, rtol=rtol, atol=atol)


def test_every_method_of_the_command_has_a_row_and_runs_by_default():
    missing = set(catalog.ALGORITHMS) - set(ALGORITHMS)  # what `fedjaxprune list` shows
    assert not missing, f"the conformance table lacks {sorted(missing)}"
    usual = {row.values[0] for row in EVERY if not row.marks}
    assert set(catalog.ALGORITHMS) <= usual | set(IN_ONE_GO)


def test_what_is_dear_is_in_the_table():
    assert set(DEAR) <= set(ALGORITHMS)
    assert len(DEAR) == len(set(DEAR))


def some(index):
    ids = [(index + j) % 6 for j in range(4)]
    return ids, [True, index % 3 != 1, True, True]


def half(index):
    """Let everybody take part, then half of them, so that absentees have something to lose."""
    ids = [(index + j) % 6 for j in range(4)]
    return ids, [index % 2 == 0, True, index % 2 == 0, True]


def half_beside_others(index):
    """Put the two clients that are not asked in `half` in the places of those who are absent."""
    ids, present = half(index)
    return [(index + 4 + j // 2) % 6 if not here else ids[j] for j, here in enumerate(present)], (
        present
    )


@pytest.mark.parametrize("name", IN_ONE_GO)
def test_a_dear_method_keeps_the_laws_of_all_in_one_go(name):
    algorithm, run = built(name)  # which sees that every round is traced once
    played = play_all(algorithm, run, half)
    assert_pruned_entries_are_zeros(name, algorithm, SERVERS["fedavgm"], played)
    assert_as_much_is_live_as_is_specified(name, algorithm, played)
    assert_absent_clients_change_nothing(algorithm, run, played)
    for num_done, (state, everyone, _) in enumerate(played, start=1):
        assert_it_goes_on_to_the_same_bits(
            algorithm, run, half, played[num_done:], num_done, (state, everyone)
        )


def assert_pruned_entries_are_zeros(name, algorithm, server, played):
    for state, _, _ in played:
        chex.assert_trees_all_equal_shapes(state.masks, state.params)
        assert all(leaf.dtype == jnp.bool_ for leaf in jax.tree.leaves(state.masks))
        pruned = jax.tree.map(jnp.logical_not, state.masks)
        assert not np.any(quadratic.flatten(masks.apply(pruned, algorithm.deployed_params(state))))
        if name != "feddip_dense":  # whose server keeps dense values on purpose
            optax.tree.map_params(
                server,
                lambda leaf, hidden: np.testing.assert_array_equal(leaf[hidden], 0.0),
                state.server,
                pruned,
            )
        if name not in (*BY_FILTER, "autoflip_channels"):  # which prune a filter's bias with it
            assert np.all(state.masks["dense"]["bias"])


@each_once("server", SERVERS, "fedavgm")
def test_pruned_entries_are_exact_zeros_in_parameters_and_server_memory(name, server):
    algorithm, run = built(name, server=server)
    played = play_all(algorithm, run, some, ROUNDS)
    assert_pruned_entries_are_zeros(name, algorithm, SERVERS[server], played)


def num_live(name, index):
    """Say by hand what is left of the 32 prunable weights after a round of training."""
    if name in ("autoflip_channels", "feddp_threshold"):
        return range(1, 32 + 1)  # no set size: channels go too, a threshold decides
    if name in BY_FILTER:  # half of the filters, of 6 and 4 weights
        wanted = 2 * 6 + 1 * 4 - (name in DROPS_CHANNELS) * 2
        return range(1, wanted + 1) if name == "mpfl" else wanted  # whose clients may disagree
    if name.startswith("fedtiny"):
        return round(0.4 * 32)
    if name.startswith("dynamic_sparse"):
        return 32 - round(0.6 * 32)
    if name.endswith("_masks") or name in ("autoflip", "snip_masks_of_clients"):
        return 32 - round(0.5 * 32)
    if (name.startswith("feddip") and name != "feddip_without_pruning") or "gradual" in name:
        initial = 0.0 if "gradual" in name else 0.25
        due = index - index % 2
        return 32 - round((0.75 + (initial - 0.75) * (1 - due / ROUNDS) ** 3) * 32)
    return 32


def assert_as_much_is_live_as_is_specified(name, algorithm, played):
    """Hold what is reported against the masks, in training against `num_live` too."""
    kernels = masks.prunable_leaves(quadratic.PARAMS, masks.is_kernel)
    for index, (state, _, metrics) in enumerate(played, start=-num_before_training(algorithm)):
        live = state.masks
        if name == "feddp_threshold":  # which has no masks
            live = jax.tree.map(lambda leaf: leaf != 0, state.params)
        np.testing.assert_array_equal(metrics.num_live, masks.num_kept(live))
        kept = int(np.asarray(metrics.num_live)[kernels].sum())
        if name in BY_FILTER:
            first, second = (int(np.sum(bits)) for bits in state.method.keep)
            assert min(first, second) > 0
            assert kept == 6 * first + (first if name in DROPS_CHANNELS else 4) * second
        if index >= 0:
            wanted = num_live(name, index)
            assert kept in wanted if isinstance(wanted, range) else kept == wanted


@every_algorithm
def test_as_much_is_live_as_is_specified_after_every_round(name):
    algorithm, run = built(name)
    assert_as_much_is_live_as_is_specified(name, algorithm, play_all(algorithm, run, some, ROUNDS))


@every_algorithm
def test_a_round_is_traced_once_whatever_changes(name):
    algorithm, run = built(name)
    simulate(algorithm, some, run=run)
    with pytest.raises(AssertionError, match="traced again"):  # the counter does count
        simulate(algorithm, lambda r: ([0, 1], None), num_rounds=1, run=run)


def assert_it_goes_on_to_the_same_bits(algorithm, run, cohorts, rest, num_done, start):
    rounds = range(num_done, num_done + len(rest))
    for here, there in zip(play(algorithm, run, cohorts, rounds, start), rest, strict=True):
        chex.assert_trees_all_equal(here, there)


@every_algorithm
def test_killed_after_any_round_of_any_stage_it_goes_on_to_the_same_bits(name, tmp_path):
    """What is needed to go on is in the checkpoint; `resuming` stops whole runs of the command."""
    algorithm, run = built(name)
    whole = play_all(algorithm, run, some, num_rounds=2)
    saved = [(state, everyone) for state, everyone, _ in whole]
    with checkpoints.open_manager(tmp_path, keep=1) as manager:
        checkpoints.save(manager, 1, saved, fingerprint=0)
    with checkpoints.open_manager(tmp_path, keep=1) as manager:
        options = {"usable": lambda number: True, "aside": tmp_path / "aside", "warn": pytest.fail}
        found = checkpoints.restore(manager, jax.eval_shape(lambda: saved), **options)
    assert found is not None
    chex.assert_trees_all_equal(found[1], jax.device_get(saved))
    for num_done, start in enumerate(found[1], start=1):
        assert_it_goes_on_to_the_same_bits(algorithm, run, some, whole[num_done:], num_done, start)


@each_once("wire", UPLINKS, "feedback_top_k")
def test_the_order_of_the_cohort_is_irrelevant(name, wire):
    algorithm, run = built(name, wire=wire)
    first = play_all(algorithm, run, lambda r: ([0, 1, 2, 5], None), num_rounds=2)
    second = play_all(algorithm, run, lambda r: ([5, 2, 0, 1], None), num_rounds=2)
    for (one, one_rows, one_metrics), (two, two_rows, two_metrics) in zip(
        first, second, strict=True
    ):
        assert_alike((one, one_rows), (two, two_rows), rtol=1e-4, atol=1e-5)
        assert charged(algorithm, one_metrics, one) == charged(algorithm, two_metrics, two)


def assert_absent_clients_change_nothing(algorithm, run, played):
    """Play what was played with `half` beside others: they do not count, nor lose what they had."""
    others = play_all(
        algorithm, run, half_beside_others, len(played) - num_before_training(algorithm)
    )
    rows_before = quadratic.cohort(algorithm, range(6)).states
    for index, (one, two) in enumerate(zip(played, others, strict=True)):
        chex.assert_trees_all_equal(one[:2], two[:2])
        ids, present = half(index)
        # Who dropped out is charged for the broadcast, by name: for more if its masks are old.
        assert charged_for(ids, present, algorithm, one) == charged_for(
            ids, present, algorithm, two
        )
        away = jnp.array([i for i, here in zip(ids, present, strict=True) if not here], jnp.int32)
        chex.assert_trees_all_equal(
            trees.take_rows(one[1], away), trees.take_rows(rows_before, away)
        )
        rows_before = one[1]


def charged_for(ids, present, algorithm, step):
    """Say what goes up in all, and what those who are present are charged."""
    state, _, metrics = step
    traffic, to = ledger.account(metrics, state, algorithm), charged(algorithm, metrics, state)
    here = {i: to.get(i) for i, is_here in zip(ids, present, strict=True) if is_here}
    modeled = {name: bits.uplink for name, bits in traffic.published.items()}
    return traffic.uplink_bits, traffic.uplink, modeled, here


@every_algorithm
def test_absent_clients_change_nothing(name):
    algorithm, run = built(name)
    assert_absent_clients_change_nothing(algorithm, run, play_all(algorithm, run, half))


@every_algorithm
def test_a_cohort_with_absent_clients_is_the_cohort_without_them(name):
    algorithm, run = built(name)
    few = play_all(algorithm, player(algorithm), lambda r: ([1, 4], None))
    many = play_all(algorithm, run, lambda r: ([0, 1, 2, 4], [False, True, False, True]))
    for (one, one_rows, _), (two, two_rows, _) in zip(few, many, strict=True):
        assert_alike((one, one_rows), (two, two_rows), rtol=1e-5, atol=1e-6)


@each_once("server", SERVERS, "fedavgm")
def test_a_round_without_anybody_moves_nothing(name, server):
    algorithm, run = built(name, server=server)
    nobody = [0, 1, 2, 3], [False] * 4
    alone = sum(stage.num_rounds for stage in algorithm.stages if stage.name in AT_SERVER)
    for before, rows, _ in play_all(algorithm, run, some)[max(alone - 1, 0) :]:
        [(after, rows_after, metrics)] = play(
            algorithm, run, lambda r: nobody, range(1), (before, rows)
        )
        chex.assert_trees_all_equal(after._replace(round=before.round), before)
        chex.assert_trees_all_equal(rows_after, rows)
        assert metrics.num_participating == 0
        traffic = ledger.account(metrics, after, algorithm)
        assert traffic.uplink_bits == 0
        if traffic.clients:  # else nothing had to travel to anybody
            lost = charged(algorithm, metrics, after)
            assert sorted(lost) == [0, 1, 2, 3]
            assert traffic.downlink_bits == sum(down for _, down in lost.values())


@pytest.mark.parametrize(
    ("name", "chunk_size"),
    [
        ("feddip", 3),
        ("feddip", 4),
        ("dynamic_sparse", 3),
        pytest.param("feddip", 2, marks=pytest.mark.slow),
        pytest.param("fedavg", 3, marks=pytest.mark.slow),
        pytest.param("fedtiny", 3, marks=pytest.mark.slow),
        pytest.param("autoflip_channels", 3, marks=pytest.mark.slow),
        pytest.param("mpfl", 3, marks=pytest.mark.slow),
    ],
)
def test_every_chunk_size_gives_the_same_result(name, chunk_size):
    def final(size):
        algorithm, run = built(name, chunk_size=size)
        return simulate(algorithm, some, num_rounds=3, run=run)[0][-1]

    chex.assert_trees_all_close(final(chunk_size), final(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in MESHED else [pytest.mark.slow])
        for name in sorted(ALGORITHMS)
    ],
)
def test_two_devices_give_the_result_of_one(name):
    """Whatever a client's work needs from a round reaches it on any device, in every stage."""

    def play(mesh):
        algorithm = ALGORITHMS[name](setup(mesh=mesh))
        states, rows, history = simulate(algorithm, some, num_rounds=3)
        return (
            states[-1],
            rows,
            [ledger.account(metrics, states[-1], algorithm) for metrics in history],
        )

    state, rows, charged = play(cohort.make_mesh(devices=jax.devices()[:2]))
    alone, alone_rows, alone_charged = play(None)
    chex.assert_trees_all_close(jax.device_get(state), alone, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(jax.device_get(rows), alone_rows, rtol=1e-4, atol=1e-5)
    assert charged == alone_charged


@pytest.mark.parametrize("mode", ["masked", "regrow", "dense"])
def test_nothing_pruned_and_no_penalty_is_fedavg_to_the_bit(mode):
    nothing = dip(sparsity=0.0, initial_sparsity=0.0, max_penalty=0.0, mode=mode)
    algorithm, run = built("fedavg", server="fedavg", wire="identity")
    expected = simulate(algorithm, some, run=run)[0][-1]
    result = simulate(nothing(setup()), some)[0][-1]
    chex.assert_trees_all_equal(result.params, expected.params)
    chex.assert_trees_all_equal(result.masks, expected.masks)


def test_fedprox_without_pull_is_fedavg_to_the_bit():
    without_pull = plain(penalties=(local_training.proximal(mu=0.0),))(setup())
    algorithm, run = built("fedavg", server="fedavg", wire="identity")
    expected = simulate(algorithm, some, run=run)[0][-1]
    chex.assert_trees_all_equal(simulate(without_pull, some)[0][-1].params, expected.params)


def test_fedavg_gives_the_known_answer():
    states, _, history = simulate(
        ALGORITHMS["fedavg"](setup()), lambda r: ([0, 3], None), num_rounds=3
    )
    mean = (3 * quadratic.mean_point(PEOPLE, 0) + 8 * quadratic.mean_point(PEOPLE, 3)) / 11
    start = np.asarray(quadratic.flatten(quadratic.PARAMS))
    expected = mean + 0.9 ** (2 * 3) * (start - mean)  # two steps a round, three rounds
    np.testing.assert_allclose(quadratic.flatten(states[-1].params), expected, rtol=1e-4, atol=1e-6)
    assert states[-1].model_state["steps"] == 6.0  # BatchNorm-like state is averaged too
    assert history[0].train["loss"].weight == 2 * 11  # every example, in each of two steps


def test_error_feedback_forgets_nothing_over_rounds():
    algorithm = ALGORITHMS["fedavg"](setup(uplink=UPLINKS["feedback_top_k"]))
    dense = ALGORITHMS["fedavg"](setup())
    run = jax.jit(algorithm.stages[0].round)
    state = algorithm.init(quadratic.PARAMS, STATE)
    members = quadratic.cohort(algorithm, [2])
    after, rows, _ = run(KEY, state, members, PEOPLE)
    exact, _, _ = jax.jit(dense.stages[0].round)(
        KEY, dense.init(quadratic.PARAMS, STATE), quadratic.cohort(dense, [2]), PEOPLE
    )
    sent = jax.tree.map(jnp.subtract, after.params, quadratic.PARAMS)
    computed = jax.tree.map(jnp.subtract, exact.params, quadratic.PARAMS)
    held_back = jax.tree.map(lambda leaf: leaf[0], rows.uplink.residual)
    assert np.count_nonzero(quadratic.flatten(held_back)) == 28  # 6+18 of kernels, 3+1 of biases
    chex.assert_trees_all_close(
        jax.tree.map(jnp.add, sent, held_back), computed, rtol=1e-5, atol=1e-6
    )


def test_personal_masks_are_averaged_over_their_holders():
    inner = local_training.local_sgd(
        quadratic.MODEL.loss, batcher=quadratic.full_batches(1), optimizer=optax.sgd(0.1)
    )

    def personal_masks(data: ClientData):
        odd = (data.size % 2) == 1  # clients 0 and 1 hold even positions, the others odd ones
        return jax.tree.map(
            lambda leaf: (jnp.arange(leaf.size).reshape(leaf.shape) % 2 == 0) == odd,
            quadratic.PARAMS,
        )

    def update(key, broadcast, state, data):
        mine = personal_masks(data)
        message, state = inner.update(key, broadcast._replace(masks=mine), state, data)
        return message._replace(fields={**message.fields, "masks": mine}), state

    algorithm = training.training(
        setup(aggregator=aggregators.holder_mean()), client=inner._replace(update=update)
    )
    state, _, metrics = jax.jit(algorithm.stages[0].round)(
        KEY, algorithm.init(quadratic.PARAMS, STATE), quadratic.cohort(algorithm, [0, 2]), PEOPLE
    )
    even = np.concatenate(
        [np.arange(leaf.size) % 2 == 0 for leaf in jax.tree.leaves(quadratic.PARAMS)]
    )
    start = np.asarray(quadratic.flatten(quadratic.PARAMS))

    def stepped(client_id, mine):
        seen = np.where(mine, start, 0.0)
        return 0.1 * (quadratic.mean_point(PEOPLE, client_id) - seen)

    expected = start + np.where(even, stepped(0, even), stepped(2, ~even))
    np.testing.assert_allclose(quadratic.flatten(state.params), expected, rtol=1e-4, atol=1e-6)
    assert np.asarray(metrics.num_uploaded).sum() == quadratic.NUM_WEIGHTS
    charged = ledger.account(metrics, state, algorithm).uplink
    assert charged.values == 32 * quadratic.NUM_WEIGHTS
    assert charged.masks == 2 * quadratic.NUM_PRUNABLE


@pytest.mark.parametrize("aggregator", ["median", "trimmed_mean"])
def test_robust_aggregation_ignores_the_absent_and_the_order(aggregator):
    rule = {"median": aggregators.median(), "trimmed_mean": aggregators.trimmed_mean(fraction=0.3)}
    algorithm = ALGORITHMS["feddip"](setup(aggregator=rule[aggregator], chunk_size=3))
    run = jax.jit(algorithm.stages[0].round)
    every = [True, True, True, False]
    first, _, _ = simulate(algorithm, lambda r: ([0, 1, 2, 5], every), num_rounds=2, run=run)
    second, _, _ = simulate(algorithm, lambda r: ([2, 0, 1, 4], every), num_rounds=2, run=run)
    chex.assert_trees_all_close(first[-1], second[-1], rtol=1e-4, atol=1e-5)


def test_dropping_and_growing_keep_the_sparsity():
    algorithm, run = built("dynamic_sparse")
    _, _, history = simulate(algorithm, some, run=run)
    kernels = masks.prunable_leaves(quadratic.PARAMS, masks.is_kernel)
    for metrics in history:
        assert np.asarray(metrics.num_live)[kernels].sum() == 32 - round(0.6 * 32)
    assert sum(int(metrics.num_changed) for metrics in history[1:]) > 0


def test_a_pruner_that_finds_nothing_to_prune_is_refused():
    params = [jnp.ones([3, 4]), jnp.ones([4])]
    with pytest.raises(ValueError, match="nothing to prune: none of the leaves 0, 1 is prunable"):
        ALGORITHMS["feddip"](setup()).init(params, STATE)


def test_finite_messages_that_overflow_move_nothing_and_are_counted():
    def update(key, broadcast, state, data):
        inner = local_training.local_sgd(
            quadratic.MODEL.loss, batcher=quadratic.full_batches(1), optimizer=optax.sgd(0.1)
        )
        message, state = inner.update(key, broadcast, state, data)
        huge = jax.tree.map(lambda leaf: jnp.full_like(leaf, 3e38), message.fields["delta"])
        return message._replace(fields={**message.fields, "delta": huge}), state

    algorithm = training.training(
        setup(), client=local_training.Client(init=lambda params: (), update=update)
    )
    states, _, history = simulate(algorithm, lambda r: ([0, 1, 2], None), num_rounds=1)
    chex.assert_trees_all_equal(states[-1].params, quadratic.PARAMS)
    assert history[-1].num_rejected == 3


def test_integer_state_follows_the_mean_to_the_nearest_count():
    def loss(params, state, batch, key):
        value, (_, metrics) = quadratic.MODEL.loss(params, {}, batch, key)
        return value, ({"count": state["count"] + 3}, metrics)

    algorithm = plain(quadratic.MODEL._replace(loss=loss))(setup())
    state = algorithm.init(quadratic.PARAMS, {"count": jnp.int32(1)})
    states, _, _ = simulate(algorithm, some, num_rounds=1, start=state)
    assert states[-1].model_state["count"] == 1 + 2 * 3
    assert states[-1].model_state["count"].dtype == jnp.int32


def test_half_precision_parameters_go_through_a_round():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), quadratic.PARAMS)

    def loss(params, state, batch, key):
        full = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
        value, aux = quadratic.MODEL.loss(full, state, batch, key)
        return value.astype(jnp.bfloat16), aux

    model = quadratic.MODEL._replace(loss=loss)
    algorithm = feddip.build(
        feddip.FedDIP(sparsity=0.75, num_segments=3),
        quadratic.task(setup(uplink=UPLINKS["quantize"]), model=model),
    )
    state = algorithm.init(params, STATE)
    run = jax.jit(algorithm.stages[0].round)
    after, _, _ = run(KEY, state, quadratic.cohort(algorithm, [0, 1], params=params), PEOPLE)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(after.params))
    assert np.any(quadratic.flatten(after.params) != quadratic.flatten(params))
