"""Compute new masks from masks; does not depend on `federated`."""

from fedjaxprune import namespace

__all__, __getattr__, __dir__ = namespace.offer(
    __name__,
    modules=(
        "allocation candidates cost_benefit drop_and_grow movement posteriors pruners schedules "
        "scores selection structured views"
    ),
)
