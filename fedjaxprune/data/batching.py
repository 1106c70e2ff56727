"""From one client's examples to local steps: shuffled batches, gathered on the device, unpadded.

A client's order in an epoch is a function of key, epoch and position: it is evaluated for the ``B``
positions of a batch alone, so no permutation is stored, sorted or padded to the largest client, and
a client's randomness depends neither on its neighbours nor on the size of the population.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fedjaxprune import permutations
from fedjaxprune.data.transforms import Preprocess
from fedjaxprune.errors import DataError, near_miss
from fedjaxprune.types import Batch, Batcher, ClientData, Key

_INT32_MAX = 2**31 - 1


def epochs(*, num_epochs: int, batch_size: int, preprocess: Preprocess) -> Batcher:
    """Walk through the client's examples `num_epochs` times, each time in a fresh order.

    A client of `size` examples takes ``num_epochs * ceil(size / batch_size)`` steps, an empty one
    none. The last batch of an epoch is kept: the slots that it lacks are filled with examples of
    the same epoch from its beginning, at weight 0.

    Args:
      num_epochs: at least 1.
      batch_size: ``B``, at least 1.
      preprocess: applied to the stored inputs of each batch, with a key of the step's own.

    Returns:
      A `Batcher` of examples ``{"inputs": [E, ...], "labels": [E]}``. A batch of an empty client is
      some other client's example at weight 0.

    Raises:
      ValueError: if a number is out of range; when it is used, if steps would not fit int32.
    """
    _check_positive(num_epochs=num_epochs, batch_size=batch_size)

    def num_steps_fn(data: ClientData) -> jax.Array:
        everybodys = len(data.order)  # at least a client's
        if max(num_epochs * -(-everybodys // batch_size), batch_size + everybodys) > _INT32_MAX:
            raise ValueError(
                f"the steps of {num_epochs} epochs in batches of {batch_size} must fit int32 for "
                f"{everybodys} examples."
            )
        return num_epochs * -(-data.size // batch_size)

    def batch_fn(key: Key, data: ClientData, step: jax.Array) -> Batch:
        order_key, preprocess_key = jax.random.split(key)
        per_epoch = jnp.maximum(-(-data.size // batch_size), 1)
        slots = step % per_epoch * batch_size + jnp.arange(batch_size, dtype=jnp.int32)
        epoch_key = jax.random.fold_in(order_key, step // per_epoch)
        positions = permutations.permute(epoch_key, slots % jnp.maximum(data.size, 1), data.size)
        return _gather(preprocess_key, data, step, positions, slots < data.size, preprocess)

    return Batcher(num_steps=num_steps_fn, batch=batch_fn)


def steps(*, num_steps: int, batch_size: int, preprocess: Preprocess) -> Batcher:
    """Take the same number of full batches at every client, whatever its size.

    Batch `k` takes the slots ``k * B ... (k + 1) * B - 1`` of an endless sequence of epochs, each
    in a fresh order; a batch may span the end of one epoch and the beginning of the next. All of
    its slots count. A client with fewer examples than a batch sees all of them in every batch, as
    equally often as ``B`` allows. An empty client takes no steps.

    Args:
      num_steps: local steps of every client that has examples, at least 1.
      batch_size: ``B``, at least 1.
      preprocess: as for `epochs`.

    Returns:
      A `Batcher`, as `epochs`.

    Raises:
      ValueError: if a number is out of range, or slots would not fit int32.
    """
    _check_positive(num_steps=num_steps, batch_size=batch_size)
    if num_steps * batch_size > _INT32_MAX:
        raise ValueError(
            f"num_steps * batch_size must not exceed {_INT32_MAX}, got {num_steps} * {batch_size}."
        )

    def num_steps_fn(data: ClientData) -> jax.Array:
        return jnp.where(data.size > 0, jnp.int32(num_steps), jnp.int32(0))

    def batch_fn(key: Key, data: ClientData, step: jax.Array) -> Batch:
        order_key, preprocess_key = jax.random.split(key)
        size = jnp.maximum(data.size, 1)
        small = size < batch_size  # every batch begins an epoch: it cannot hold pieces of three
        first = jnp.where(small, 2 * step, step * batch_size // size)
        begin = jnp.where(small, jnp.int32(0), step * batch_size % size)
        slots = begin + jnp.arange(batch_size, dtype=jnp.int32)
        pivots, seeds = jax.vmap(
            lambda epoch: permutations.draw(jax.random.fold_in(order_key, epoch), size)
        )(first + jnp.arange(2, dtype=jnp.int32))
        here = slots < size  # a slot is in one of two epochs: one walk, by the draws of its own
        positions = permutations.walk(
            lambda r: (
                jnp.where(here, pivots[0, r], pivots[1, r]),
                jnp.where(here, seeds[0, r], seeds[1, r]),
            ),
            slots % size,
            size,
        )
        counts = jnp.full(batch_size, data.size > 0)
        return _gather(preprocess_key, data, step, positions, counts, preprocess)

    return Batcher(num_steps=num_steps_fn, batch=batch_fn)


def development(key: Key, *, share: float, batch_size: int, preprocess: Preprocess) -> Batcher:
    """Walk once through a fixed random share of the client's examples, the same ones every time.

    It is for looking, not for training: the keys that it is asked with decide nothing but the
    preprocessing. A client of `size` examples shows ``ceil(share * size)`` of them; a product
    within a part in 10⁶ above an integer counts as it.

    Args:
      key: decides which examples, together with the client's id.
      share: in (0, 1].
      batch_size: ``B``, at least 1.
      preprocess: as for `epochs`; usually the one for tests.

    Raises:
      ValueError: if a number is out of range.
    """
    _check_share(share)
    _check_positive(batch_size=batch_size)

    def num_steps_fn(data: ClientData) -> jax.Array:
        return -(-num_shown(data.size, share) // batch_size)

    def batch_fn(step_key: Key, data: ClientData, step: jax.Array) -> Batch:
        num = num_shown(data.size, share)
        slots = step * batch_size + jnp.arange(batch_size, dtype=jnp.int32)
        own_key = jax.random.fold_in(key, data.client_id)
        positions = permutations.permute(own_key, slots % jnp.maximum(num, 1), data.size)
        return _gather(step_key, data, step, positions, slots < num, preprocess)

    return Batcher(num_steps=num_steps_fn, batch=batch_fn)


def undeveloped(key: Key, *, share: float, batch_size: int, preprocess: Preprocess) -> Batcher:
    """Walk once, in a fresh order, through the examples that `development` does not show.

    Key and share are those given to `development`; a client all of whose examples are shown there
    takes no steps.
    """
    _check_share(share)
    _check_positive(batch_size=batch_size)

    def num_steps_fn(data: ClientData) -> jax.Array:
        return -((num_shown(data.size, share) - data.size) // batch_size)

    def batch_fn(step_key: Key, data: ClientData, step: jax.Array) -> Batch:
        order_key, preprocess_key = jax.random.split(step_key)
        num = num_shown(data.size, share)
        num_left = data.size - num
        slots = step * batch_size + jnp.arange(batch_size, dtype=jnp.int32)
        shuffled = permutations.permute(order_key, slots % jnp.maximum(num_left, 1), num_left)
        hidden = jnp.minimum(num + shuffled, jnp.maximum(data.size - 1, 0))
        positions = permutations.permute(jax.random.fold_in(key, data.client_id), hidden, data.size)
        return _gather(preprocess_key, data, step, positions, slots < num_left, preprocess)

    return Batcher(num_steps=num_steps_fn, batch=batch_fn)


def num_shown(size: jax.Array, share: float) -> jax.Array:
    """Count the examples that `development` shows of a client's `size`: both ``[]`` int32."""
    exact = share * size.astype(jnp.float32)
    return jnp.minimum(jnp.ceil(exact * (1.0 - 1e-6)).astype(jnp.int32), size)


def _gather(
    key: Key,
    data: ClientData,
    step: jax.Array,
    positions: jax.Array,
    counts: jax.Array,
    preprocess: Preprocess,
) -> Batch:
    """Fetch the client's examples at `positions` ``[B]``, and prepare them by the step's own key.

    Those for which `counts` ``[B]`` is False weigh nothing.
    """
    _check_fields(data.examples)
    # An empty last client starts behind the end of the index: clip, so that nothing is made up.
    rows = jnp.zeros_like(positions)
    if data.order.shape[0] > 0:  # else nobody has any
        rows = data.order.at[data.start + positions].get(mode="clip")

    def take(leaf: Any) -> jax.Array:
        return leaf.at[rows].get(mode="clip")

    def target(leaf: jax.Array) -> jax.Array:
        made = take(leaf)  # targets of a regression keep their type
        return made if jnp.issubdtype(made.dtype, jnp.floating) else made.astype(jnp.int32)

    inputs = jax.tree.map(take, data.examples["inputs"])
    labels = jax.tree.map(target, data.examples["labels"])
    return Batch(
        inputs=preprocess(jax.random.fold_in(key, step), inputs),
        labels=labels,
        weights=counts.astype(jnp.float32),
    )


def _check_fields(examples: Any) -> None:
    """Refuse examples that have no inputs or labels of these names."""
    names = examples if isinstance(examples, Mapping) else ()
    if absent := [name for name in ("inputs", "labels") if name not in names]:
        have = ", ".join(map(str, names)) or f"{type(examples).__name__} without names"
        raise DataError(
            "a batch is made of the arrays inputs and labels of the examples, got "
            f"{have}{near_miss(absent[0], names)}"
        )


def _check_share(share: float) -> None:
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share must lie in (0, 1], got {share}.")


def _check_positive(**values: int) -> None:
    """Refuse what is not a whole number of at least 1."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")
