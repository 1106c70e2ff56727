"""Data of the laboratory: functions that return arrays."""

from typing import Annotated

import numpy as np
import pydantic

Number = Annotated[int, pydantic.Field(ge=20, le=100_000, description="Examples in all.")]


def blobs(*, num_examples: Number = 60) -> dict[str, np.ndarray]:
    """Draw two clouds of points with six features, measured at four sites."""
    rng = np.random.default_rng(0)
    labels = np.arange(num_examples) % 2
    inputs = rng.normal(size=(num_examples, 6)) + 2.0 * labels[:, None]
    sites = np.arange(num_examples) // 2 % 4  # a site is a client: partition by_key
    return {"inputs": inputs.astype(np.float32), "labels": labels, "site": sites}
