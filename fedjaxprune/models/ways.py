"""Say how a model convolves several clients at once, off the CPU."""

from typing import Any

from fedjaxprune.kernels import side_by_side
from fedjaxprune.types import Model


def convolve(model: Model, way: side_by_side.Way) -> Model:
    """Let a model's convolutions take a way where clients with kernels of their own train together.

    It changes nothing on a CPU, nor for one client at a time, nor in convolutions that are not this
    package's (`kernels.convolution`).

    Raises:
      ValueError: there is no such way.
    """
    if way not in side_by_side.WAYS:
        raise ValueError(f"way must be one of {', '.join(side_by_side.WAYS)}, got {way!r}.")

    def loss_fn(*args: Any) -> Any:
        with side_by_side.convolved(way):
            return model.loss(*args)

    def predict_fn(*args: Any) -> Any:
        with side_by_side.convolved(way):
            return model.predict(*args)

    return model._replace(loss=loss_fn, predict=predict_fn)
