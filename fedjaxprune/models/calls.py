"""What a call of a network is for, and the names of arguments that say so."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

# Arguments that say whether this is training, as the libraries and their users name them.
TRAINING = ("train", "training", "is_training", "is_train", "train_mode", "enable_dropout")
TRAINING += ("update_stats",)
INFERENCE = ("deterministic", "use_running_average", "inference", "is_inference", "eval", "is_eval")
INFERENCE += ("eval_mode", "evaluation", "test", "is_test", "testing", "is_testing")
KEYS = ("key", "rng", "prng_key", "rng_key", "dropout_key", "dropout_rng")

Kwargs = Mapping[str, Any]


class Mode(NamedTuple):
    """What a call of a network is for.

    Attributes:
      train: whether it is a step of training; a Python boolean.
      mask: ``[B]`` bool, False for padding; None in predictions.
      key: of this call alone; None in predictions, which draw nothing.
    """

    train: bool
    mask: jax.Array | None = None
    key: jax.Array | None = None


CallFn = Callable[[Any, Any, Mode], Any]  # (network, inputs, mode) -> logits
