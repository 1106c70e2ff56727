"""Plain convolutional networks under one name."""

from fedjaxprune.models.alexnet import AlexNet, alexnet
from fedjaxprune.models.cnn import PooledCnn, TwoCnn, femnist_cnn, pooled_cnn, two_cnn

__all__ = ["AlexNet", "PooledCnn", "TwoCnn", "alexnet", "femnist_cnn", "pooled_cnn", "two_cnn"]
