"""One compiled round: the training round, reporting rounds, work at the server, simulation."""

from fedjaxprune import namespace

__all__, __getattr__, __dir__ = namespace.offer(
    __name__,
    modules="facts hostility protocol reporting server_work simulation stages task training",
    names={"protocol": "FieldSpec Hooks Masking Protocol", "stages": "in_order", "task": "Task"},
)
