"""Networks as users write them: by file and name in a command, and as values in Python."""

import math

import equinox as eqx
import flax.linen as nn
import jax
from flax import nnx

NET = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)])  # one that is there already


def linen(num_classes, *, width: int = 4):
    """Build a flax linen network; `width` is a setting."""
    return nn.Sequential([nn.Dense(width), nn.relu, nn.Dense(num_classes)])


class Nnx(nnx.Module):
    def __init__(self, size, num_classes, rngs):
        self.hidden = nnx.Linear(size, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.out = nnx.Linear(4, num_classes, rngs=rngs)

    def __call__(self, images):
        features = images.reshape(images.shape[0], -1)
        return self.out(self.dropout(nnx.relu(self.norm(self.hidden(features)))))


def normalized(input_shape, num_classes):
    """Build a flax nnx network with BatchNorm and Dropout."""
    return lambda rngs: Nnx(math.prod(input_shape), num_classes, rngs)


class Equinox(eqx.Module):
    net: eqx.nn.MLP

    def __call__(self, image):
        return self.net(image.reshape(-1))


def equinox(input_shape, num_classes):
    """Build an Equinox network, which takes one example."""
    size = math.prod(input_shape)
    return lambda key: Equinox(eqx.nn.MLP(size, num_classes, 4, 1, jax.nn.relu, key=key))


class Block(nn.Module):
    num_symbols: int

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(self.num_symbols, 4)(tokens)
        x = x + nn.MultiHeadDotProductAttention(num_heads=1)(nn.LayerNorm()(x))
        return nn.Dense(self.num_symbols)(nn.LayerNorm()(x)[:, -1])


def transformer(num_classes):
    """Build a transformer that predicts the next symbol."""
    return Block(num_classes)
