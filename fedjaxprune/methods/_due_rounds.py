"""In which rounds methods that exchange weights do so."""

ONE_ROUND = (
    "weights are exchanged in the second round at the earliest, and federation.num_rounds is 1: "
    "the masks stay as they were chosen at the start."
)  # a note where no exchange was asked for by number


def resolve(
    prune_every: int | None,
    last_prune_round: int | None,
    *,
    usual_last: int,
    num_rounds: int,
    usual_period: int = 10,
) -> tuple[int, int]:
    """Resolve the rounds from one exchange to the next, and the last that may have one.

    Args:
      prune_every: as set; None takes `usual_period`, or a third of the last round if less.
      last_prune_round: as set, counted from 1; None takes `usual_last`.
      usual_last: the method's own; at least 1.
      num_rounds: rounds of training.
      usual_period: the method's own.

    Raises:
      ValueError: no exchange would take place.
    """
    until = min(last_prune_round or max(1, usual_last), num_rounds)
    period = prune_every or min(usual_period, max(1, until // 3))
    if period > until:
        raise ValueError(
            f"method.prune_every must be at most {until}, the last round in which weights may be "
            f"exchanged, got {period}."
        )
    return period, until
