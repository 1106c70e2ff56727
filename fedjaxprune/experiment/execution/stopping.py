"""All processes of a run end after the same round, whichever of them is asked to stop.

A process that is asked says so to process 0, which asks all where they are. Who answers that it has
completed round r does not pass round r + 1 before it knows the last one, and the last one is the
round after the largest of the answers. The answers come from the threads that receive messages, so
no process waits for another one that waits in a round.
"""

import threading
from collections.abc import Callable

from fedjaxprune.experiment.execution.channel import Channel

_LOOK_S = 1.0  # until a process that waits looks whether another one is gone


def together(channel: Channel, stop: Callable[[], bool]) -> Callable[[], bool]:
    """Make a function to be asked once a round by all: whether the run ends after it.

    Args:
      channel: to the other processes.
      stop: whether this process is asked to stop.

    Returns:
      What says the same on all processes in the same round, if all ask in every round.
    """
    changed = threading.Condition()
    completed = 0  # rounds for which this process has asked
    limit = last = None  # rounds before which it waits, and after which it ends
    answers: dict[int, int] = {}
    is_asked = False

    def ask() -> None:
        """Ask all where they are; process 0 does it, once."""
        nonlocal is_asked
        with changed:
            if is_asked:
                return
            is_asked = True
        channel.tell("where")
        answer(channel.process, where())

    def where() -> int:
        nonlocal limit
        with changed:
            limit = completed + 1
            return completed

    def answer(process: int, number: int) -> None:
        with changed:
            answers[process] = number
            if len(answers) < channel.number:
                return
        number = max(answers.values()) + 1
        channel.tell("last", round=number)
        end_after(number)

    def end_after(number: int) -> None:
        nonlocal last
        with changed:
            last = number
            changed.notify_all()

    def stop_fn() -> bool:
        nonlocal completed
        with changed:
            completed += 1
            may_ask = last is None and not is_asked
        if may_ask and stop():
            if channel.process == 0:
                ask()
            else:
                channel.tell("stop")
        with changed:
            while last is None and limit is not None and completed >= limit:
                if channel.lost.is_set():
                    break
                changed.wait(_LOOK_S)
            return last is not None and completed >= last

    channel.handlers["stop"] = lambda process, facts: ask()
    channel.handlers["where"] = lambda process, facts: channel.tell("at", round=where())
    channel.handlers["at"] = lambda process, facts: answer(process, facts["round"])
    channel.handlers["last"] = lambda process, facts: end_after(facts["round"])
    return stop_fn
