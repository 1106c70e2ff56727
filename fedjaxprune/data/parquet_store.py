"""A client store of a Parquet file, of which only the row groups that a cohort needs are read."""

import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from fedjaxprune.data import mapped, rounding
from fedjaxprune.data.sources import files
from fedjaxprune.data.stores import ClientStore
from fedjaxprune.errors import DataError
from fedjaxprune.settings import INT_MAX

_GROUPS_KEPT = 4  # row groups that were read last


def of_parquet(
    path: str | os.PathLike[str],
    *,
    inputs: Sequence[str],
    label: str,
    client: str,
    test: tuple[Any, Any],
) -> ClientStore:
    """Make a store of a table with one example per row; clients count in the order of their ids.

    The column with client ids is read whole at the start. A file whose rows are sorted by client is
    read least, as a client's examples are then in one row group, or two. A run reads the file once
    more to sum it up, so that it is not continued with another one.

    Args:
      path: of the file.
      inputs: columns of numbers, which become float32 inputs ``[E, columns]``.
      label: column of integer classes.
      client: column with a client id for each row, without missing values.
      test: inputs and labels of the test examples.

    Raises:
      DataError: the file cannot be read, or a column is not there, has missing values, or holds no
        numbers, labels that are no integers, or numbers that float32 or int32 does not hold.
    """
    import pyarrow.parquet as pq  # an optional package

    place = files.find(os.fspath(path)).absolute()
    file = files.read(place, pq.ParquetFile, "a Parquet table")
    names = file.schema_arrow.names
    columns = [*inputs, label]
    if absent := [name for name in (*columns, client) if name not in names]:
        raise DataError(f"{path} has no column {absent[0]!r}; it has {', '.join(names)}.")
    owners = file.read([client]).column(client)
    ids = owners.to_numpy()
    if owners.null_count or (ids.dtype.kind == "f" and np.isnan(ids).any()):
        raise DataError(f"{path} must have a client id in each row of {client!r}.")
    _, owner = np.unique(ids, return_inverse=True)
    sizes = np.bincount(owner)
    order = np.argsort(owner, kind="stable")
    begins = np.cumsum(sizes) - sizes
    num_rows = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    ends = np.cumsum(num_rows)

    @functools.lru_cache(maxsize=_GROUPS_KEPT)
    def group(number: int) -> tuple[np.ndarray, np.ndarray]:
        table = files.read(place, lambda _: file.read_row_group(number, columns), "a Parquet table")
        found = [_numbers(table.column(name), f"{path}: column {name!r}") for name in inputs]
        return np.stack(found, axis=1), _classes(table.column(label), f"{path}: column {label!r}")

    def fetch_fn(ids: np.ndarray) -> dict[str, np.ndarray]:
        rows = np.concatenate([order[begins[i] : begins[i] + sizes[i]] for i in ids])
        of_group = np.searchsorted(ends, rows, side="right")
        features = np.empty((rows.size, len(inputs)), np.float32)
        labels = np.empty(rows.size, np.int32)
        for number in np.unique(of_group).tolist():
            at = np.flatnonzero(of_group == number)
            read, classes = group(number)
            within = rows[at] - (ends[number] - num_rows[number])
            features[at], labels[at] = read[within], classes[within]
        return {"inputs": features, "labels": labels}

    like = {
        "inputs": jax.ShapeDtypeStruct((len(inputs),), np.float32),
        "labels": jax.ShapeDtypeStruct((), np.int32),
    }
    return ClientStore(
        sizes.astype(np.int64), fetch_fn, like, test, lambda: mapped.checksum_of_file(place)
    )


def _numbers(column: Any, what: str) -> np.ndarray:
    """Read a column of numbers as float32."""
    found = _values(column, what, kinds="buif", words="numbers")
    rounding.check_integers(found, what, digits=24, advice="scale them before")
    with np.errstate(over="ignore"):
        floats = found.astype(np.float32)
    is_too_large = np.isinf(floats) & np.isfinite(found)
    if is_too_large.any():
        raise DataError(f"{what} has {found[is_too_large][0]}, which float32 does not hold.")
    return floats


def _classes(column: Any, what: str) -> np.ndarray:
    """Read a column of labels as int32."""
    found = _values(column, what, kinds="bui", words="integers, as labels are")
    low, high = int(found.min(initial=0)), int(found.max(initial=0))
    if max(high, -low) > INT_MAX:
        raise DataError(f"{what} must be classes, got {low} to {high}.")
    return found.astype(np.int32)


def _values(column: Any, what: str, *, kinds: str, words: str) -> np.ndarray:
    """Read a column without missing values, of some kinds of types."""
    if column.null_count:
        raise DataError(f"{what} must have no missing values.")
    found = column.to_numpy()
    if found.dtype.kind not in kinds:
        raise DataError(f"{what} must be {words}, got {found.dtype}.")
    return found
