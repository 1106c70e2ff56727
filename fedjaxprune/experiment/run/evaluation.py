"""Test the deployed parameters on the whole test set, in batches, inside one jit."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from fedjaxprune import metrics
from fedjaxprune.federated import cohort
from fedjaxprune.models import gates as gating
from fedjaxprune.types import Key, Model, Params, State

BATCH_SIZE = 500  # examples at once; decides memory, not the result


class Evaluation(NamedTuple):
    """Sums over the test set, to be divided on the host.

    Attributes:
      total_loss: ``[]`` float32, summed cross-entropy, nats.
      num_correct: ``[]`` int32.
      class_correct: ``[K]`` int32, by the example's class.
      through: by gated layer, what its gates let through (`gating.through`); {} without gates.
    """

    total_loss: jax.Array
    num_correct: jax.Array
    class_correct: jax.Array
    through: dict[str, metrics.Mean] = {}  # noqa: RUF012 never written to


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
    model: Model,
    preprocess: Callable[[Key, Any], Any],
    *,
    batch_size: int = BATCH_SIZE,
    mesh: Mesh | None = None,
) -> Callable[[Params, State, TestSet], Evaluation]:
    """Make ``(params, model_state, test) -> Evaluation`` in inference mode.

    The last batch is filled with repeated examples, which count for nothing. The devices of a mesh
    share the batches; everything else is replicated.
    """
    num_devices = 1 if mesh is None else mesh.size

    def evaluate_fn(params: Params, model_state: State, test: TestSet) -> Evaluation:
        num_examples = test.labels.shape[0]
        size = min(batch_size, num_examples)
        key = jax.random.key(0)  # preprocessing for tests is deterministic and reads no key

        def add(params, model_state, test, total, start):
            places = start + jnp.arange(size, dtype=jnp.int32)
            counts = places < num_examples
            places = jnp.minimum(places, num_examples - 1)
            labels = test.labels[places].astype(jnp.int32)
            logits = model.predict(params, model_state, preprocess(key, test.inputs[places]))
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits.astype(jnp.float32), labels
            )
            correct = counts & (jnp.argmax(logits, axis=-1).astype(jnp.int32) == labels)
            through = gates(params, model_state, test.inputs[places], counts)
            return Evaluation(
                total_loss=total.total_loss + jnp.sum(jnp.where(counts, losses, 0.0)),
                num_correct=total.num_correct + jnp.sum(correct, dtype=jnp.int32),
                class_correct=total.class_correct.at[labels].add(correct.astype(jnp.int32)),
                through=metrics.merge(total.through, through),
            ), None

        def gates(params, model_state, inputs, counts):
            if model.inspect is None:
                return {}
            return gating.through(
                model.inspect(params, model_state, preprocess(key, inputs), counts)
            )

        def share(params, model_state, test, starts):
            layers = jax.eval_shape(
                gates, params, model_state, test.inputs[:size], jnp.ones(size, jnp.bool_)
            )
            one = jax.eval_shape(lambda: preprocess(key, test.inputs[:1]))
            num_classes = jax.eval_shape(model.predict, params, model_state, one).shape[-1]
            zero = Evaluation(
                total_loss=jnp.float32(0.0),
                num_correct=jnp.int32(0),
                class_correct=jnp.zeros((num_classes,), jnp.int32),
                through={name: metrics.zero() for name in layers},
            )
            step = functools.partial(add, params, model_state, test)
            sums, _ = jax.lax.scan(step, zero, starts)
            return sums if mesh is None else jax.lax.psum(sums, cohort.AXIS)

        num_batches = -(-num_examples // size)
        num_batches += -num_batches % num_devices
        starts = size * jnp.arange(num_batches, dtype=jnp.int32)
        if mesh is not None:
            everybodys = PartitionSpec()
            share = jax.shard_map(
                share,
                mesh=mesh,
                in_specs=(everybodys, everybodys, everybodys, PartitionSpec(cohort.AXIS)),
                out_specs=everybodys,
                check_vma=False,
            )
        return share(params, model_state, test, starts)

    return evaluate_fn
