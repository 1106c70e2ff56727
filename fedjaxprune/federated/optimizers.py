"""The clients' optimizers as parts: optax transformations; any other one can be named, too."""

import jax
import jax.numpy as jnp
import optax

from fedjaxprune.registry import Part
from fedjaxprune.settings import Fraction, NonNegative, Positive, Settings, setting


class AdamSettings(Settings):
    """Settings of Adam, with optax's decays."""

    learning_rate: Positive = setting(0.1, "Step size in the first round.", unit="factor")
    weight_decay: NonNegative = setting(
        0.0, "Multiple of the weights added to their gradient.", unit="factor"
    )


class SgdSettings(AdamSettings):
    """Settings of stochastic gradient descent."""

    momentum: Fraction = setting(0.0, "Momentum, which starts at zero every round.", unit="factor")


def sgd(settings: SgdSettings) -> optax.GradientTransformation:
    """Follow the gradient, with momentum and weight decay."""
    rule = optax.sgd(settings.learning_rate, momentum=settings.momentum or None)
    return _with_decay(settings, rule)


def adam(settings: AdamSettings) -> optax.GradientTransformation:
    """Follow the gradient divided by its running size, whose memory starts at zero every round."""
    return _with_decay(settings, optax.adam(settings.learning_rate))


def first_step(optimizer: optax.GradientTransformation) -> float:
    """Measure how far a gradient of 1 moves a zero: the learning rate of SGD and of Adam.

    Raises:
      ValueError: the optimizer does not move it against the gradient.
    """
    weight = jnp.zeros([1], jnp.float32)
    with jax.numpy_dtype_promotion("standard"):
        update, _ = optimizer.update(jnp.ones_like(weight), optimizer.init(weight), weight)
    size = -float(jnp.asarray(update)[0])
    if not size > 0.0:
        raise ValueError(
            "the learning rate of the local optimizer cannot be told from its first step, which "
            f"moves a weight by {-size}: take 'sgd' or 'adam'."
        )
    return size


def _with_decay(settings: AdamSettings, rule: optax.GradientTransformation):
    decay = settings.weight_decay
    return optax.chain(optax.add_decayed_weights(decay) if decay else optax.identity(), rule)


PARTS = {
    "sgd": Part(sgd, SgdSettings, summary="stochastic gradient descent"),
    "adam": Part(adam, AdamSettings, summary="Adam"),
}
