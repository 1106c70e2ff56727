"""Plain convolutional networks under one name."""

from fedjaxprune.models.convolutional import (
    AlexNet,
    PooledCnn,
    TwoCnn,
    alexnet,
    femnist_cnn,
    pooled_cnn,
    two_cnn,
)

__all__ = ["AlexNet", "PooledCnn", "TwoCnn", "alexnet", "femnist_cnn", "pooled_cnn", "two_cnn"]
