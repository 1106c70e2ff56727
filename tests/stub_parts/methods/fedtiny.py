"""Stub of a method that shares a name with another."""

from typing import Any

from fedjaxprune.method import Method
from fedjaxprune.settings import Settings, Sparsity, setting


class FedTiny(Settings):
    """Settings of the stub."""

    sparsity: Sparsity = setting(0.99, "Pruned fraction.", unit="fraction")
    pool_size: int | None = setting(None, "Candidates.", unit="candidates", unset="ten", ge=1)


def build(settings: Any, task: Any) -> Any:
    """Build nothing."""
    return settings, task


METHOD = Method(build=build, settings=FedTiny, variants={"vanilla": {"pool_size": 1}})
