"""The laws of a method: those of its history, and those for which more has to be compiled."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from fedjaxprune.data import stores
from fedjaxprune.federated import cohort
from fedjaxprune.method import Method, Needs, needs_of
from fedjaxprune.rounds import feeding
from fedjaxprune.rounds.training import training
from fedjaxprune.settings import Settings
from fedjaxprune.testing import history as history_lib
from fedjaxprune.testing import laws, scenario, trees
from fedjaxprune.testing.history import History, Members

Check = Callable[[], None]


def laws_of(
    method: Method,
    settings: Mapping[str, Any] | None = None,
    *,
    cost: Literal["any", "low"] = "any",
    history: History | None = None,
) -> list[tuple[str, Check]]:
    """List the laws that apply to a method, each with a function that checks it.

    Args:
      method: to be held to them.
      settings: of the method by name, and of other sections by full path, as a variant has them;
        None takes its `law_settings`.
      cost: ``"low"`` leaves out the laws for which more has to be compiled.
      history: of the method under these settings, if it has been recorded.

    Returns:
      Name and check; a check raises an AssertionError whose sentence says what is wrong. The
      method is built and run at the first check, which may raise whatever it raises.
    """
    settings = dict(method.law_settings if settings is None else settings)

    @functools.cache
    def recorded() -> History:
        return history_lib.record(method, settings) if history is None else history

    def check(law: Callable[[History], None]) -> Check:
        return lambda: law(recorded())

    def again(**changes: Any) -> Check:
        return lambda: _compare(recorded(), history_lib.record(method, settings, **changes))

    found = [(name, check(law)) for name, law in laws.LAWS.items()]
    if cost == "low":
        return found
    found.append(("clients that train side by side change nothing", again(chunk_size=3)))
    if len(jax.devices()) > 1:
        mesh = cohort.make_mesh(devices=jax.devices()[:2])
        found.append(("two devices give the result of one", again(mesh=mesh)))
    found.append(("absent clients may be left out", check(left_out)))
    found.append(("rounds that are fed their cohort alone give the same bits", check(fed)))
    if method.nothing_pruned is not None:
        nothing = {**settings, **method.nothing_pruned}
        plain = functools.partial(nothing_pruned_is_fedavg, method, nothing)
        found.append(("where nothing is pruned it is FedAvg, to the bit", plain))
    return found


def left_out(history: History) -> None:
    """A cohort with absent clients is the cohort without them."""
    run, _ = history_lib.player(history.scenario)
    for step in history.steps:
        if all(step.members.participated):
            continue
        ids = tuple(i for i, here in zip(*step.members, strict=True) if here)
        members = Members(ids, (True,) * len(ids))
        after, rows, _ = run(step.index, step.before, step.rows_before, members)
        what = "a cohort with absent clients is not the cohort without them"
        laws.same(step, (after, rows), (step.after, step.rows), what, **laws.ORDER)


def fed(history: History) -> None:
    """A population without the examples of all others gives the same bits, charges included."""
    run, _ = history_lib.player(history.scenario)
    people = jax.device_get(scenario.population())
    store = stores.of_arrays(people.examples, people.order, people.offsets)
    stages = {stage.name: stage for stage in history.scenario.algorithm.stages}
    for step in history.steps:
        ids, present = map(np.asarray, step.members)
        pantry = feeding.stock(
            store, cohort_size=ids.size, reads=stages[step.stage].reads, held=people.held
        )
        own = feeding.population(pantry, ids[present])
        given = step.index, step.before, step.rows_before, step.members
        found = run(*given, jax.tree.map(jnp.asarray, own))
        what = "a round that is fed its cohort alone gives other bits"
        laws.same(step, found, (step.after, step.rows, step.metrics), what)


def _compare(history: History, other: History) -> None:
    """Compare with a history under another protocol that must make no difference."""
    for step, again in zip(history.steps, other.steps, strict=True):
        what = "the result depends on how clients are spread over devices"
        given, found = ((one.after, one.rows) for one in (step, again))
        laws.same(step, jax.device_get(found), given, what, **laws.ORDER)
        one = laws.charged(history, step, step.metrics)
        two = laws.charged(other, again, again.metrics)
        laws.law(one == two, step, "charges depend on how clients are spread over devices")


def nothing_pruned_is_fedavg(method: Method, settings: Mapping[str, Any]) -> None:
    """Where nothing is pruned, training is FedAvg's from the same weights, to the bit."""
    made = scenario.make(method, settings, scenario.PLAIN)
    run, _ = history_lib.player(made)
    state, rows = history_lib.start(made)
    stages = made.algorithm.stages
    before = sum(stage.num_rounds for stage in stages[:-1])
    for index in range(before):
        state, rows, _ = run(index, state, rows, history_lib.half(index))
    own = {name: value for name, value in settings.items() if "." not in name}
    rest = {name: value for name, value in settings.items() if name not in own}
    dense, reference = _fedavg(needs_of(method, method.settings(**own)), rest)
    expected, others = history_lib.start(
        dense._replace(params=state.params, model_state=state.model_state)
    )
    for index in range(before, before + 3):
        members = history_lib.half(index)
        state, rows, _ = run(index, state, rows, members)
        expected = expected._replace(round=jnp.int32(index - before))
        expected, others, _ = reference(index, expected, others, members)
        for name in ("params", "model_state", "masks"):
            found = trees.difference(getattr(state, name), getattr(expected, name))
            assert not found, f"{name} differ from FedAvg's in round {index + 1}: {found}."


_PLAIN: dict[tuple[Needs, str], tuple[scenario.Scenario, history_lib.RunFn]] = {}


def _fedavg(
    needs: Needs, settings: Mapping[str, Any]
) -> tuple[scenario.Scenario, history_lib.RunFn]:
    """Make FedAvg for a method's network and protocol, compiled once for all that have the same."""
    key = needs, repr(sorted(settings.items()))
    if key not in _PLAIN:
        method = Method(
            build=lambda _, task: training(task.protocol, client=task.local_client()),
            settings=Settings,
            needs=needs,
        )
        made = scenario.make(method, settings, scenario.PLAIN)
        _PLAIN[key] = made, history_lib.player(made)[0]
    return _PLAIN[key]
