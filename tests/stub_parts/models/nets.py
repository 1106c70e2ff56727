"""Networks that compute nothing."""

from typing import Literal

from fedjaxprune.registry import Part
from fedjaxprune.settings import Settings, setting


class Normed(Settings):
    """A network with normalization."""

    norm: Literal["batch", "group"] = setting("batch", "Normalization layers.")


class Wide(Settings):
    """A network of any width."""

    hidden_sizes: tuple[int, ...] = setting((200, 100), "Units of each layer.", unit="units")


class Gated(Normed):
    """A network with gates."""

    gate: Literal["learned", "random"] = setting("learned", "How channels are chosen.")


PARTS = {
    "mlp": Part(
        build=lambda settings, **context: settings, settings=Wide, summary="two hidden layers"
    ),
    "lenet5": Part(build=lambda settings, **context: settings, summary="two convolutions"),
    "resnet8": Part(
        build=lambda settings, **context: settings, settings=Normed, summary="CIFAR form"
    ),
    "gated_resnet8": Part(
        build=lambda settings, **context: settings, settings=Gated, summary="with gates"
    ),
}
