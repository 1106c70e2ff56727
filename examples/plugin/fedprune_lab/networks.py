"""Networks of the laboratory: functions that return a network of flax, Equinox or one's own."""

from typing import Annotated

import flax.linen as nn
import pydantic

Width = Annotated[int, pydantic.Field(ge=1, le=1000, description="Units of the hidden layer.")]


def small_perceptron(num_classes: int, *, width: Width = 2) -> nn.Module:
    """Build a perceptron with one hidden layer."""
    return nn.Sequential([nn.Dense(width), nn.relu, nn.Dense(num_classes)])
