"""The metrics of a training round: what was live, who took part, and what travelled."""

from typing import Any

import jax
import jax.numpy as jnp

from fedjaxprune import masks as masks_lib
from fedjaxprune.federated import cohort
from fedjaxprune.rounds import downloads, silence, traffic
from fedjaxprune.rounds.protocol import Given
from fedjaxprune.types import Cohort, RoundMetrics, RoundState, State


def of_round(
    parts: Any,
    states: tuple[RoundState, RoundState],
    given: Given,
    members: Cohort,
    outcome: cohort.Outcome,
    counts: jax.Array,
    memory: State,
) -> RoundMetrics:
    """Count a round.

    Args:
      parts: what the round is made of (`training.Parts`).
      states: before and after it.
      given: what its clients were given.
      members: who was asked.
      outcome: what came of it.
      counts: ``[]`` bool, whether the round counts.
      memory: state of the downlink after the broadcast.
    """
    before, after = states
    present, fields = members.participated, outcome.fields
    received = downloads.count(
        parts.masking, given, members, lambda own: masks_lib.num_kept(own.download)
    )
    rejected = outcome.rejected | (present & (fields[traffic.NUM_MESSAGES] > 0) & ~counts)
    return RoundMetrics(
        train=fields["metrics"],
        num_live=masks_lib.num_kept(after.masks),
        num_changed=masks_lib.num_changed(before.masks, after.masks),
        num_downloaded=jnp.broadcast_to(
            received[..., None, :] if received.ndim > 1 else received[None, None],
            (present.shape[0], 1, received.shape[-1]),
        ),
        num_uploaded=fields[traffic.NUM_UPLOADED],
        participated=present,
        num_participating=jnp.sum(present, dtype=jnp.int32),
        num_rejected=jnp.sum(rejected, dtype=jnp.int32),
        sent=downloads.charge(
            parts.protocol.downlink,
            memory,
            silence.leave_out(
                traffic.sent(
                    before,
                    given,
                    members,
                    fields,
                    specs=parts.fields,
                    prunable=parts.prunable,
                    masking=parts.masking,
                    announcement=parts.hooks.announcement,
                ),
                fields[traffic.SUMMARY],
            ),
            members,
            given.download,
        ),
    )
