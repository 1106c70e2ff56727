"""What the factories of networks check before they build."""

from collections.abc import Sequence


def check_sizes(num_classes: int, **shapes: Sequence[int]) -> None:
    """Refuse a width, or a size in one of the named `shapes`, that is not positive.

    Raises:
      ValueError: naming what was given.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}.")
    for name, shape in shapes.items():
        if any(size < 1 for size in shape):
            raise ValueError(f"{name} must be positive throughout, got {tuple(shape)}.")


def check_image(name: str, input_shape: Sequence[int], *, smallest: int) -> None:
    """Refuse examples that are no images, or smaller than network `name` can take.

    Raises:
      ValueError: naming what was given and what is allowed.
    """
    if len(input_shape) != 3:
        raise ValueError(
            f"{name} takes images of shape (height, width, channels), got examples of shape "
            f"{tuple(input_shape)}."
        )
    if min(input_shape[:2]) < smallest:
        raise ValueError(
            f"{name} takes images of at least {smallest}x{smallest} pixels, got "
            f"{input_shape[0]}x{input_shape[1]}."
        )


def check_rate(name: str, rate: float) -> None:
    """Refuse a rate of dropout, called `name`, that is not in [0, 1).

    Raises:
      ValueError: naming what was given.
    """
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"{name} must lie in [0, 1), got {rate}.")
