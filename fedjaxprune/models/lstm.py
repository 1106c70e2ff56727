"""Recurrent networks over tokens: batches of integers in, a label each or one a position out."""

from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjaxprune.kernels import shapes
from fedjaxprune.models import adapters, layers
from fedjaxprune.registry import Part, call
from fedjaxprune.settings import Count, Counts, Settings, setting
from fedjaxprune.types import Model

Labels = Literal["last", "every"]


class _Affine(nn.Module):
    """The parameters of an affine map, which start uniform in ``[-bound, bound]``."""

    fan_in: int
    features: int
    bound: float

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        """Give kernel ``[fan_in, features]`` and bias ``[features]``."""

        def start(key, shape):
            return jax.random.uniform(key, shape, jnp.float32, -self.bound, self.bound)

        kernel = layers.param(self, "kernel", start, (self.fan_in, self.features))
        return kernel, layers.param(self, "bias", start, (self.features,))


class Lstm(nn.Module):
    """A long short-term memory over a sequence, starting from zeros.

    Gates lie side by side in the order input, forget, cell, output, and there are two biases, one
    of which would do: both as in PyTorch, whose parameters fit.
    """

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map ``[B, T, F]`` to the hidden states ``[B, T, features]``."""
        width, bound = 4 * self.features, self.features**-0.5
        kernel, bias = _Affine(x.shape[-1], width, bound, name="input")()
        recurrent, recurrent_bias = _Affine(self.features, width, bound, name="recurrent")()
        # All that does not depend on the past is one product, outside the loop.
        inputs = x @ kernel + (bias + recurrent_bias)[None, None]

        def step(carry, now):
            hidden, memory = carry
            gates = now + hidden @ recurrent
            enter, forget, cell, leave = jnp.split(gates, 4, axis=-1)
            memory = nn.sigmoid(forget) * memory + nn.sigmoid(enter) * jnp.tanh(cell)
            hidden = nn.sigmoid(leave) * jnp.tanh(memory)
            return (hidden, memory), hidden

        zeros = jnp.zeros((x.shape[0], self.features), x.dtype)
        _, outputs = jax.lax.scan(step, (zeros, zeros), jnp.swapaxes(inputs, 0, 1))
        return jnp.swapaxes(outputs, 0, 1)


class CharLstm(nn.Module):
    """An embedding, stacked LSTMs and a dense layer; `num_classes` counts tokens, in and out.

    What it makes of a token that is not in ``[0, num_classes)`` is NaN.
    """

    embedding_size: int
    hidden_sizes: Sequence[int]
    num_classes: int
    labels: Labels

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Map integers ``[B, T]`` to logits ``[B, num_classes]`` or ``[B, T, num_classes]``."""
        if not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"char_lstm reads tokens, which are integers, got {tokens.dtype}.")
        shape = (self.num_classes, self.embedding_size)
        table = layers.param(self, "embedding", nn.initializers.normal(1.0), shape)
        x = table.at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        for i, size in enumerate(self.hidden_sizes, start=1):
            x = Lstm(size, name=f"lstm_{i}")(x)
        if self.labels == "last":
            x = x[:, -1]
        return layers.Dense(self.num_classes, name="dense_1")(x)


def char_lstm(
    *,
    input_shape: Sequence[int],
    num_classes: int,
    embedding_size: int = 8,
    hidden_sizes: Sequence[int] = (256, 256),
    labels: Labels = "last",
) -> Model:
    """Make the character LSTM that AutoFLIP trains on LEAF's Shakespeare.

    An embedding of 8, two layers of 256 and a dense layer: 819,920 parameters for 80 symbols.
    Kernels of inputs and of recurrence are prunable by default, the embedding is not. PyTorch's
    initialization.

    Inputs are integers ``[B, T]``. With ``labels="last"`` an example has one label, the symbol that
    follows; with ``"every"`` it has ``[T]``, each counts alike in the loss, and negative ones do
    not count (see `Batch`).

    Args:
      input_shape: length of one example, ``(T,)``.
      num_classes: number of symbols, in and out.
      embedding_size: width of the embedding.
      hidden_sizes: widths of the LSTMs.
      labels: which positions have a label.

    Raises:
      ValueError: if the examples are no sequences, a size is not positive, or `labels` is neither.

    References:
      Internò et al., `AutoFLIP <https://arxiv.org/abs/2405.10271>`_, 2024, and its public code;
      Caldas et al., `LEAF <https://arxiv.org/abs/1812.01097>`_, 2018.
    """
    shapes.check_sizes(
        num_classes,
        input_shape=input_shape,
        embedding_size=(embedding_size,),
        hidden_sizes=hidden_sizes,
    )
    if len(input_shape) != 1:
        raise ValueError(
            "char_lstm takes sequences of tokens of shape (length,), got examples of shape "
            f"{tuple(input_shape)}."
        )
    if labels not in ("last", "every"):
        raise ValueError(f'labels must be "last" or "every", got {labels!r}.')
    module = CharLstm(embedding_size, tuple(hidden_sizes), num_classes, labels)
    return adapters.from_linen(module, input_shape=input_shape, input_dtype=jnp.int32)


class CharLstmSettings(Settings):
    """Settings of `char_lstm`."""

    embedding_size: Count = setting(8, "Width of the embedding.", unit="units")
    hidden_sizes: Counts = setting((256, 256), "Widths of the LSTMs.", unit="units")
    labels: Labels = setting("last", "Positions that have a label.")


PARTS = {
    "char_lstm": Part(
        call(char_lstm),
        CharLstmSettings,
        summary="two LSTM layers of 256 over characters; sequences of tokens",
    )
}
