"""Test the deployed parameters on the whole test set, in batches, inside one jit."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from fedjaxprune import metrics, trees
from fedjaxprune.federated import cohort
from fedjaxprune.models import gates as gating
from fedjaxprune.models import heads
from fedjaxprune.types import Key, Model, Params, State

BATCH_SIZE = 500  # examples at once; decides memory, not the result


class Evaluation(NamedTuple):
    """Sums over the test set, to be divided on the host."""

    # ``[]`` float32, summed over labels: cross-entropy in nats, or squared error
    total_loss: jax.Array
    num_correct: jax.Array  # ``[]`` int32; 0 for a regression
    class_correct: jax.Array  # ``[K]`` int32, by the label's class; empty for a regression
    total_error: jax.Array  # ``[]`` float32, summed absolute error of a regression, else 0
    # by gated layer, what its gates let through (`gates.through`); {} without gates
    through: dict[str, metrics.Mean] = {}  # noqa: RUF012 never written to


class TestSet(NamedTuple):
    """What is held back from all clients."""

    __test__ = False  # no test case, whatever pytest makes of the name

    inputs: Any  # ``[T, ...]``, or a tree of these, as stored
    labels: jax.Array  # ``[T]`` or more, as `Dataset.test` has them


class Scores(NamedTuple):
    """What one test found, as numbers of the host."""

    loss: float  # mean over the labels: cross-entropy in nats, or the squared error of a regression
    accuracy: float | None  # fraction of the labels that are predicted right; None for a regression
    # mean absolute error of a regression, in the unit of its targets; None for classes
    error: float | None


def scores(evaluation: Evaluation, labels: Any, *, task: str = "classification") -> Scores:
    """Divide the sums of a test, read to the host, by the number of its labels."""
    labels = np.asarray(labels)
    is_regression = heads.HEADS[task].hits is None
    several = labels.ndim > 1 and not is_regression
    num_labels = int((labels >= 0).sum()) if several else len(labels)
    if not num_labels:
        raise ValueError("a test must have at least one label, and all of these are negative.")
    return Scores(
        loss=float(evaluation.total_loss / num_labels),
        accuracy=None if is_regression else int(evaluation.num_correct) / num_labels,
        error=float(evaluation.total_error) / num_labels if is_regression else None,
    )


def evaluate(
    model: Model,
    preprocess: Callable[[Key, Any], Any],
    *,
    task: str = "classification",
    batch_size: int = BATCH_SIZE,
    mesh: Mesh | None = None,
) -> Callable[[Params, State, TestSet], Evaluation]:
    """Make ``(params, model_state, test) -> Evaluation`` in inference mode.

    The last batch is filled with repeated examples, which have weight 0. The devices of a mesh
    share the batches; everything else is replicated.

    Raises:
      ValueError: while tracing, if inputs and labels differ in number, there are none, or the
        labels do not fit the outputs.
    """
    head = heads.HEADS[task]

    def as_classes(labels: jax.Array) -> jax.Array:
        return labels if head.hits is None else labels.astype(jnp.int32)

    num_devices = 1 if mesh is None else mesh.shape[cohort.AXIS]

    def evaluate_fn(params: Params, model_state: State, test: TestSet) -> Evaluation:
        num_examples = _count(test, are_classes=head.hits is not None)
        size = min(batch_size, num_examples)
        key = jax.random.key(0)  # preprocessing for tests is deterministic and reads no key

        def add(params, model_state, test, total, start):
            places = start + jnp.arange(size, dtype=jnp.int32)
            counts = places < num_examples
            places = jnp.minimum(places, num_examples - 1)
            labels = test.labels[places]
            inputs = trees.take_rows(test.inputs, places)
            logits = model.predict(params, model_state, preprocess(key, inputs))
            through = metrics.merge(total.through, gates(params, model_state, inputs, counts))
            if head.hits is None:
                errors = jnp.where(counts, heads.absolute_error(logits, labels), 0.0)
                total = total._replace(total_error=total.total_error + jnp.sum(errors))
            else:
                labels = as_classes(labels)
                if labels.ndim > 1:  # one label per position; negative: none
                    counts = counts[:, None] & (labels >= 0)
                    labels = jnp.maximum(labels, 0)
                correct = counts & head.hits(logits, labels)
                total = total._replace(
                    num_correct=total.num_correct + jnp.sum(correct, dtype=jnp.int32),
                    class_correct=total.class_correct.at[labels].add(correct.astype(jnp.int32)),
                )
            losses = jnp.where(counts, head.test_loss(logits, labels), 0.0)
            total_loss = total.total_loss + jnp.sum(losses)
            return total._replace(total_loss=total_loss, through=through), None

        def gates(params, model_state, inputs, counts):
            if model.inspect is None:
                return {}
            return gating.through(
                model.inspect(params, model_state, preprocess(key, inputs), counts)
            )

        def share(params, model_state, test, starts):
            some = trees.take_rows(test.inputs, slice(size))
            layers = jax.eval_shape(gates, params, model_state, some, jnp.ones(size, jnp.bool_))
            one = jax.eval_shape(lambda: preprocess(key, trees.take_rows(test.inputs, slice(1))))
            outputs = jax.eval_shape(model.predict, params, model_state, one)
            label = jax.eval_shape(lambda: as_classes(test.labels[:1]))
            jax.eval_shape(head.test_loss, outputs, label)  # says what does not fit
            num_classes = outputs.shape[-1]
            num_classes = {"binary": 2, "regression": 0}.get(task, num_classes)
            zero = Evaluation(
                total_loss=jnp.float32(0.0),
                num_correct=jnp.int32(0),
                class_correct=jnp.zeros((num_classes,), jnp.int32),
                total_error=jnp.float32(0.0),
                through={name: metrics.zero() for name in layers},
            )
            step = functools.partial(add, params, model_state, test)
            sums, _ = jax.lax.scan(step, zero, starts)
            return sums if mesh is None else _added(sums, mesh)

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
                axis_names={cohort.AXIS},  # devices that share a model share its work
                check_vma=False,
            )
        return share(params, model_state, test, starts)

    return evaluate_fn


def _added(sums: Evaluation, mesh: Mesh) -> Evaluation:
    """Add up what the devices found, in their order, whatever processes they belong to."""
    if not mesh.is_multi_process:
        return jax.lax.psum(sums, cohort.AXIS)  # adds in this order
    gathered = jax.lax.all_gather(sums, cohort.AXIS)
    each = [trees.take_rows(gathered, jnp.int32(device)) for device in range(mesh.size)]
    return functools.reduce(functools.partial(jax.tree.map, jnp.add), each)


def _count(test: TestSet, *, are_classes: bool) -> int:
    """Count the examples of a test set, whose labels must be as many, and of the right type."""
    labels = jnp.asarray(test.labels)
    sizes = {jnp.shape(leaf)[:1] for leaf in (*jax.tree.leaves(test.inputs), labels)}
    if len(sizes) > 1 or () in sizes or (0,) in sizes:
        shapes = ", ".join(str(jnp.shape(leaf)) for leaf in jax.tree.leaves(test.inputs))
        raise ValueError(
            "a test set must have a label for each of its examples, at least one, got inputs of "
            f"shape {shapes} and labels of shape {labels.shape}."
        )
    is_class = jnp.issubdtype(labels.dtype, jnp.integer) or labels.dtype == jnp.bool_
    if are_classes and not is_class:
        raise ValueError(f"labels of a test are classes, which are integers, got {labels.dtype}.")
    return labels.shape[0]
