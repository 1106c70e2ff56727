"""A convolution whose gate chooses, for every example, which of its channels are kept."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjaxprune import metrics
from fedjaxprune.kernels import pooling
from fedjaxprune.metrics import Mean
from fedjaxprune.models import gates, layers, resnet

Choice = Literal["salient", "random"]


class GatedConv(nn.Module):
    """A convolution, normalization and a gate: ``norm(conv(x)) * saliency`` on the kept channels.

    Exactly `gates.num_kept` channels are kept for every example; of equal saliencies the lower
    channel goes first, and a `choice` of ``"random"`` draws as many, scaled all the same. The
    choice has no gradient, the saliencies of kept channels have. How many examples kept each
    channel is sown as ``kept``, and what share of the layer's products they need as ``through``
    (see `gates`). The gate sees its input as it is or, by `squash`, a sigmoid of it. Its kernel
    starts as `gate_scale` times He's normal by fan-in, its bias at 1, so that a small kernel begins
    close to the network without gates.
    """

    features: int
    norm: resnet.Norm
    stride: int = 1
    squash: Literal["none", "sigmoid"] = "none"
    choice: Choice = "salient"
    gate_scale: float = 1.0

    @nn.compact
    def __call__(
        self, x: jax.Array, density: jax.Array, train: bool, mask: jax.Array | None
    ) -> jax.Array:
        """Map ``[B, H, W, C]`` to ``[B, H', W', features]``; `density` is ``[]``."""
        shape = (x.shape[-1], self.features)
        start = nn.initializers.variance_scaling(2.0 * self.gate_scale**2, "fan_in", "normal")
        kernel = self.param("gate_kernel", start, shape)
        bias = self.param("gate_bias", nn.initializers.ones, shape[1:])
        channels = pooling.global_average_pool(x)
        summary = nn.sigmoid(channels) if self.squash == "sigmoid" else channels
        saliency = nn.relu(summary @ kernel + bias[None])
        scores = jax.lax.stop_gradient(saliency)
        if self.choice == "random":
            key = self.make_rng("dropout") if train else jax.random.key(0)
            scores = _draw(key, jax.lax.stop_gradient(summary), self.features)
        kept = _rank(scores) < gates.num_kept(density, self.features)
        counts = jnp.ones(x.shape[:1], jnp.bool_) if mask is None else mask
        seen = Mean(
            total=jnp.sum(kept & counts[:, None], axis=0).astype(jnp.float32),
            weight=jnp.sum(counts).astype(jnp.float32),
        )
        factor = jnp.where(kept, saliency, jnp.zeros_like(saliency))
        passed = metrics.mean(_share_through(channels, factor), counts.astype(jnp.float32))
        for name, value in ((gates.KEPT, seen), (gates.THROUGH, passed)):
            self.sow("metrics", name, value, init_fn=metrics.zero, reduce_fn=metrics.merge)
        x = layers.Conv(self.features, 3, self.stride, name="conv")(x)
        return resnet.NormLayer(self.norm, name="norm")(x, train, mask) * factor[:, None, None]


def _share_through(channels: jax.Array, factor: jax.Array) -> jax.Array:
    """Measure the share of a layer's products that an example needs: ``[B]`` float32.

    Behind a ReLU the mean of a channel (`channels`, ``[B, C]``) is zero where all of it is.
    """
    share_in, share_out = (
        jnp.mean((x != 0).astype(jnp.float32), axis=1)
        for x in jax.lax.stop_gradient((channels, factor))
    )
    return share_in * share_out


def _rank(scores: jax.Array) -> jax.Array:
    """Count, for each entry of ``[B, C]``, the entries of its row that go before it: int32.

    The greater goes first, of equals the former. Rows are short: all pairs cost less than a sort.
    """
    first, second = scores[:, :, None], scores[:, None, :]
    place = jnp.arange(scores.shape[-1], dtype=jnp.int32)
    former = place[None, None, :] < place[None, :, None]
    return jnp.sum((second > first) | ((second == first) & former), axis=-1, dtype=jnp.int32)


def _draw(key: jax.Array, summary: jax.Array, features: int) -> jax.Array:
    """Draw scores ``[B, features]`` for each example from its own content.

    So that a prediction, which has no key of its own, depends neither on the example's place in the
    batch nor on its neighbours.
    """
    content = jax.lax.bitcast_convert_type(summary.astype(jnp.float32), jnp.uint32)
    places = jnp.arange(1, summary.shape[-1] + 1, dtype=jnp.uint32) * jnp.uint32(0x9E3779B1)
    seeds = jnp.sum(content * places[None], axis=-1, dtype=jnp.uint32)  # modulo 2^32

    def draw(seed):
        return jax.random.uniform(jax.random.fold_in(key, seed), (features,))

    return jax.vmap(draw)(seeds)
