"""Stub of a method with settings that depend on one another.

A second paragraph for `describe`.
"""

from typing import Any, Literal

import pydantic

from fedjaxprune.method import Method, Needs, Paper
from fedjaxprune.settings import NonNegative, Rounds, Settings, Sparsity, setting


class FedDIP(Settings):
    """Settings of the stub."""

    sparsity: Sparsity = setting(0.9, "Pruned fraction at the end.", unit="fraction")
    initial_sparsity: Sparsity | None = setting(
        None, "Sparsity of the first masks.", unit="fraction", unset="0.5, or the sparsity if less"
    )
    prune_every: Rounds = setting(5, "Rounds from one revision to the next.", unit="rounds")
    max_penalty: NonNegative = setting(1e-3, "Last step of the penalty.", unit="loss per norm")
    mode: Literal["masked", "regrow", "dense"] = setting("masked", "What is ranked.")

    @pydantic.model_validator(mode="after")
    def _check(self) -> "FedDIP":
        if self.initial_sparsity is not None and self.initial_sparsity > self.sparsity:
            raise ValueError(
                f"initial_sparsity must be at most sparsity ({self.sparsity}), "
                f"got {self.initial_sparsity}."
            )
        return self


def build(settings: Any, task: Any) -> Any:
    """Build nothing."""
    return settings, task


METHOD = Method(
    build=build,
    settings=FedDIP,
    paper=Paper("Long et al.", 2023, "FedDIP", arxiv="2309.06805"),
    needs=Needs(batch_norm=True),
    variants={
        "without_penalty": {"max_penalty": 0.0},
        "corrected": {"client.correction": "scaffold", "sparsity": 0.5},
        "gated": {"model.gate": "random"},
    },
)
