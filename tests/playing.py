"""Helpers that play rounds of the client with a known answer under any protocol."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjaxprune import trees
from fedjaxprune.costs import ledger
from fedjaxprune.federated import server_optimizers, uplinks
from fedjaxprune.methods import fedavg, feddip
from fedjaxprune.rounds import protocol
from tests import quadratic

KEY = jax.random.key(3)
PEOPLE = quadratic.population()
ROUNDS = 6
STATE = {"steps": jnp.float32(0.0), **quadratic.NORMALIZED_STATE, **quadratic.GATED_STATE}
SERVER = server_optimizers.fedavgm(learning_rate=0.5, momentum=0.9)
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


def player(algorithm):
    """Play any round of any stage: which one it is, the state knows."""
    ends = np.cumsum([stage.num_rounds for stage in algorithm.stages])
    rounds = [jax.jit(stage.round) for stage in algorithm.stages]

    def run(key, state, members, people):
        stage = np.searchsorted(ends, int(state.round), side="right")
        return rounds[min(stage, len(rounds) - 1)](key, state, members, people)

    return run


def play(algorithm, run, cohorts, rounds, start=None, model_state=STATE):
    """Play rounds from a `start`, state and everybody's rows; give both and metrics after each."""
    everyone = quadratic.cohort(algorithm, range(6)).states
    state, everyone = start or (algorithm.init(quadratic.PARAMS, model_state), everyone)
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


def some(index):
    """One of four is absent in every third round."""
    ids = [(index + j) % 6 for j in range(4)]
    return ids, [True, index % 3 != 1, True, True]


def charged(algorithm, metrics, state):
    """Say what each client is charged, by its id: bits up and down."""
    return {
        client: (entry.uplink_bits, entry.downlink_bits)
        for entry in ledger.account(metrics, state, algorithm).clients
        for client in entry.client_ids
    }
