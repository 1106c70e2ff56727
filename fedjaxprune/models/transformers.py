"""Transformers: a vision transformer and a causal language model on the same blocks."""

from collections.abc import Sequence
from typing import Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjaxprune.kernels import shapes
from fedjaxprune.models import adapters, layers
from fedjaxprune.registry import Part, call
from fedjaxprune.settings import Count, Fraction, Settings, setting
from fedjaxprune.types import Model

Labels = Literal["last", "every"]
Scores = Literal["scaled", "plain"]
Embedding = Literal["dense", "prunable"]

_SMALL = nn.initializers.normal(0.02)


class Attention(nn.Module):
    """Self-attention of several heads, with one kernel for queries, keys and values.

    Attributes:
      num_heads: must divide the width.
      causal: a position sees itself and those before it.
      scaled: scores are divided by the root of a head's width.
      dropout: rate of the attention weights.
    """

    num_heads: int
    causal: bool
    scaled: bool
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map ``[B, T, width]`` to the same shape; softmax is computed in float32."""
        batch, length, width = x.shape
        size = width // self.num_heads
        joint = layers.Dense(3 * width, "normal", name="qkv")(x)
        joint = joint.reshape(batch, length, 3, self.num_heads, size)
        query, key, value = (joint[:, :, i] for i in range(3))
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key).astype(jnp.float32)
        if self.scaled:
            scores = scores / size**0.5
        if self.causal:
            is_past = jnp.tril(jnp.ones((length, length), jnp.bool_))
            scores = jnp.where(is_past[None, None], scores, -jnp.inf)
        weights = nn.softmax(scores, axis=-1).astype(x.dtype)
        weights = nn.Dropout(self.dropout, deterministic=not train)(weights)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape)
        return layers.Dense(width, "normal", name="out")(mixed)


class Block(nn.Module):
    """Attention and two dense layers with an exact GELU, each normalized before and added after."""

    num_heads: int
    hidden_size: int
    causal: bool
    scaled: bool
    dropout: float
    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map ``[B, T, width]`` to the same shape."""
        drop = nn.Dropout(self.dropout, deterministic=not train)
        attention = Attention(
            self.num_heads, self.causal, self.scaled, self.dropout, name="attention"
        )
        x = x + drop(attention(layers.LayerNorm(self.epsilon, name="norm_1")(x), train))
        inner = layers.LayerNorm(self.epsilon, name="norm_2")(x)
        inner = layers.Dense(self.hidden_size, "normal", name="up")(inner)
        inner = nn.gelu(inner, approximate=False)
        return x + drop(layers.Dense(x.shape[-1], "normal", name="down")(inner))


class Vit(nn.Module):
    """Patches, a class token and positions; blocks; normalization; a dense layer on the token."""

    patch_size: int
    width: int
    num_layers: int
    num_heads: int
    num_classes: int
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map ``[B, H, W, C]`` to logits ``[B, num_classes]``."""
        batch, height, width, channels = x.shape
        size = self.patch_size
        patches = x.reshape(batch, height // size, size, width // size, size, channels)
        patches = patches.swapaxes(2, 3).reshape(batch, -1, size * size * channels)
        x = layers.Dense(self.width, name="patches")(patches)
        token = layers.param(self, "token", _SMALL, (self.width,))
        token = jnp.broadcast_to(token.astype(x.dtype)[None, None], (batch, 1, self.width))
        x = jnp.concatenate([token, x], axis=1)
        positions = layers.param(self, "positions", _SMALL, (x.shape[1], self.width))
        x = nn.Dropout(self.dropout, deterministic=not train)(x + positions[None])
        for i in range(1, self.num_layers + 1):
            block = Block(
                self.num_heads,
                4 * self.width,
                causal=False,
                scaled=True,
                dropout=self.dropout,
                epsilon=1e-6,
                name=f"block_{i}",
            )
            x = block(x, train)
        x = layers.LayerNorm(1e-6, name="norm")(x[:, 0])
        return layers.Dense(self.num_classes, "normal", name="dense_1")(x)


def vit(
    *,
    input_shape: Sequence[int],
    num_classes: int,
    patch_size: int = 4,
    width: int = 96,
    num_layers: int = 4,
    num_heads: int = 2,
    dropout: float = 0.0,
) -> Model:
    """Make a small vision transformer: by default 459,562 parameters for 32×32×3 and 10 classes.

    Hidden layers of the blocks have four times the width. Kernels of the patches and the blocks are
    prunable by default; the class token and the positions are not. Kernels start as normals of
    deviation 0.02, that of the patches as in PyTorch.

    Args:
      input_shape: height, width and channels of one example; the sides are multiples of the patch.
      num_classes: width of the output.
      patch_size: side of a patch, a token.
      width: of a token.
      num_layers: blocks.
      num_heads: heads of each attention; must divide the width.
      dropout: rate after the positions, in attention weights and after each half of a block.

    Raises:
      ValueError: if the examples are no such images, or a size is not positive or does not divide.

    References:
      Dosovitskiy et al., `An image is worth 16x16 words <https://arxiv.org/abs/2010.11929>`_, 2021.
    """
    sizes = {"patch_size": (patch_size,), "width": (width,), "num_layers": (num_layers,)}
    shapes.check_sizes(num_classes, input_shape=input_shape, num_heads=(num_heads,), **sizes)
    shapes.check_image("vit", input_shape, smallest=patch_size)
    shapes.check_rate("dropout", dropout)
    if any(side % patch_size for side in input_shape[:2]):
        raise ValueError(
            f"patch_size must divide the sides of the images, {input_shape[0]}x{input_shape[1]}, "
            f"got {patch_size}."
        )
    _check_heads(num_heads, width)
    module = Vit(patch_size, width, num_layers, num_heads, num_classes, dropout)
    return adapters.from_linen(module, input_shape=input_shape)


class Gpt(nn.Module):
    """Token and position embeddings, causal blocks, normalization, and the embedding once more.

    What it makes of a token that is not in ``[0, num_classes)`` is NaN.
    """

    width: int
    num_layers: int
    num_heads: int
    num_positions: int
    num_classes: int
    scaled: bool
    prune_embedding: bool
    dropout: float
    labels: Labels

    @nn.compact
    def __call__(self, tokens: jax.Array, train: bool) -> jax.Array:
        """Map integers ``[B, T]`` to logits ``[B, num_classes]`` or ``[B, T, num_classes]``."""
        if not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"gpt reads tokens, which are integers, got {tokens.dtype}.")
        shape = (self.num_classes, self.width)
        name = "embedding"
        table = (
            _Table(shape, name=name)()
            if self.prune_embedding
            else layers.param(self, name, _SMALL, shape)
        )
        x = table.at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        positions = layers.param(self, "positions", _SMALL, (self.num_positions, self.width))
        x = x + positions[None, : tokens.shape[1]]
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        for i in range(1, self.num_layers + 1):
            block = Block(
                self.num_heads,
                4 * self.width,
                causal=True,
                scaled=self.scaled,
                dropout=self.dropout,
                epsilon=1e-5,
                name=f"block_{i}",
            )
            x = block(x, train)
        if self.labels == "last":
            x = x[:, -1]
        x = layers.LayerNorm(1e-5, name="norm")(x)
        return jax.lax.dot_general(x, table, (((x.ndim - 1,), (1,)), ((), ())))


class _Table(nn.Module):
    """An embedding under the name of a kernel, so that it is prunable by default."""

    shape: tuple[int, int]

    @nn.compact
    def __call__(self) -> jax.Array:
        """Give ``[tokens, width]``."""
        return layers.param(self, "kernel", _SMALL, self.shape)


def gpt(
    *,
    input_shape: Sequence[int],
    num_classes: int,
    width: int = 64,
    num_layers: int = 2,
    num_heads: int | None = None,
    num_positions: int | None = None,
    labels: Labels = "last",
    embedding: Embedding = "dense",
    scores: Scores = "scaled",
    dropout: float = 0.1,
) -> Model:
    """Make a causal language model in the plan of GPT-2, whose output is its embedding transposed.

    By default 120,576 parameters for 256 tokens (bytes) and sequences of 64, of which 98,304 are
    kernels of the blocks. The model that federated pruning papers call GPT-2 with 32 million
    parameters has ``width=256, num_layers=8, num_heads=16, num_positions=2048`` and 50,257 tokens:
    19,708,672 parameters, where the shared matrix is counted once, and ``scores="plain"``. Two
    thirds of them are the embedding: densities of all parameters below that are only possible with
    ``embedding="prunable"``.

    Inputs and labels are those of `char_lstm`: integers ``[B, T]`` and one label, or one for each
    position with ``labels="every"``. All kernels and embeddings start as normals of deviation 0.02,
    biases as zeros.

    Args:
      input_shape: length of one example, ``(T,)``.
      num_classes: number of tokens, in and out.
      width: of a token.
      num_layers: blocks, with hidden layers of four times the width.
      num_heads: heads of each attention; None: a sixteenth of the width, at least 2.
      num_positions: rows of the embedding of positions, at least ``T``; None: ``T``.
      labels: which positions have a label.
      embedding: ``"dense"``, or ``"prunable"`` where the embedding of tokens is among the prunable
        weights.
      scores: of attention: ``"scaled"``, divided by the root of a head's width, or ``"plain"``.
      dropout: rate after the embeddings, in attention weights and after each half of a block.

    Raises:
      ValueError: if the examples are no sequences, or too long, or a size is not positive or does
        not divide, or a word is not known.

    References:
      Radford et al., Language models are unsupervised multitask learners, 2019.
    """
    num_heads = max(width // 16, 2) if num_heads is None else num_heads
    rows = input_shape[0] if num_positions is None and len(input_shape) == 1 else num_positions
    sizes = {"width": (width,), "num_layers": (num_layers,), "num_heads": (num_heads,)}
    shapes.check_sizes(num_classes, input_shape=input_shape, num_positions=(rows or 1,), **sizes)
    shapes.check_rate("dropout", dropout)
    if len(input_shape) != 1:
        raise ValueError(
            "gpt takes sequences of tokens of shape (length,), got examples of shape "
            f"{tuple(input_shape)}."
        )
    rows = rows or input_shape[0]
    if rows < input_shape[0]:
        raise ValueError(
            f"num_positions must be at least {input_shape[0]}, an example's length, got {rows}."
        )
    words = {"labels": (labels, Labels), "embedding": (embedding, Embedding)}
    for name, (word, known) in {**words, "scores": (scores, Scores)}.items():
        if word not in get_args(known):
            raise ValueError(f"{name} must be one of {', '.join(get_args(known))}, got {word!r}.")
    _check_heads(num_heads, width)
    module = Gpt(
        width,
        num_layers,
        num_heads,
        rows,
        num_classes,
        scores == "scaled",
        embedding == "prunable",
        dropout,
        labels,
    )
    return adapters.from_linen(module, input_shape=input_shape, input_dtype=jnp.int32)


def _check_heads(num_heads: int, width: int) -> None:
    if width % num_heads:
        raise ValueError(f"num_heads must divide the width, {width}, got {num_heads}.")


class VitSettings(Settings):
    """Settings of `vit`."""

    patch_size: Count = setting(4, "Side of a patch.", unit="pixels")
    width: Count = setting(96, "Width of a token.", unit="units")
    num_layers: Count = setting(4, "Blocks of attention and two dense layers.", unit="blocks")
    num_heads: Count = setting(2, "Heads of each attention.", unit="heads")
    dropout: Fraction = setting(0.0, "Dropout rate.", unit="fraction")


class GptSettings(Settings):
    """Settings of `gpt`."""

    width: Count = setting(64, "Width of a token.", unit="units")
    num_layers: Count = setting(2, "Blocks of attention and two dense layers.", unit="blocks")
    num_heads: Count | None = setting(
        None, "Heads of each attention.", unit="heads", unset="a sixteenth of the width, at least 2"
    )
    num_positions: Count | None = setting(
        None, "Rows of the embedding of positions.", unit="positions", unset="an example's length"
    )
    labels: Labels = setting("last", "Positions that have a label.")
    embedding: Embedding = setting(
        "dense", "Whether the embedding, which is the output, too, is among the prunable weights."
    )
    scores: Scores = setting(
        "scaled", "Attention scores: divided by the root of a head's width, or not."
    )
    dropout: Fraction = setting(0.1, "Dropout rate.", unit="fraction")


PARTS = {
    "vit": Part(
        call(vit), VitSettings, summary="vision transformer on patches, 0.46 million weights"
    ),
    "gpt": Part(
        call(gpt), GptSettings, summary="causal transformer over tokens, tied output (GPT-2's plan)"
    ),
}
