"""Test the deployed parameters on the whole test set, in batches, inside one jit."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjaxprune.base import Key, Model, Params, State

BATCH_SIZE = 500  # examples at once; decides memory, not the result


class Evaluation(NamedTuple):
    """Sums over the test set, to be divided on the host.

    Attributes:
      total_loss: ``[]`` float32, summed cross-entropy, nats.
      num_correct: ``[]`` int32.
    """

    total_loss: jax.Array
    num_correct: jax.Array


class TestSet(NamedTuple):
    """What is held back from all clients.

    Attributes:
      inputs: ``[T, ...]``, as stored.
      labels: ``[T]`` integer classes.
    """

    __test__ = False  # no test case, whatever pytest makes of the name

    inputs: jax.Array
    labels: jax.Array


def evaluate(
    model: Model, preprocess: Callable[[Key, Any], Any], *, batch_size: int = BATCH_SIZE
) -> Callable[[Params, State, TestSet], Evaluation]:
    """Make ``(params, model_state, test) -> Evaluation`` in inference mode.

    The last batch is filled with repeated examples, which count for nothing.
    """

    def evaluate_fn(params: Params, model_state: State, test: TestSet) -> Evaluation:
        num_examples = test.labels.shape[0]
        size = min(batch_size, num_examples)
        key = jax.random.key(0)  # preprocessing for tests is deterministic and reads no key

        def add(total, start):
            places = start + jnp.arange(size, dtype=jnp.int32)
            counts = places < num_examples
            places = jnp.minimum(places, num_examples - 1)
            labels = test.labels[places].astype(jnp.int32)
            logits = model.predict(params, model_state, preprocess(key, test.inputs[places]))
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits.astype(jnp.float32), labels
            )
            correct = counts & (jnp.argmax(logits, axis=-1).astype(jnp.int32) == labels)
            return Evaluation(
                total_loss=total.total_loss + jnp.sum(jnp.where(counts, losses, 0.0)),
                num_correct=total.num_correct + jnp.sum(correct, dtype=jnp.int32),
            ), None

        zero = Evaluation(total_loss=jnp.float32(0.0), num_correct=jnp.int32(0))
        starts = jnp.arange(0, num_examples, size, dtype=jnp.int32)
        return jax.lax.scan(add, zero, starts)[0]

    return evaluate_fn
