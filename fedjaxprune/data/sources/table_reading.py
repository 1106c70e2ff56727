"""Columns of a .csv, .tsv or .parquet file, and why they cannot be used, in one sentence each."""

import csv
import pathlib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from fedjaxprune.data import rounding
from fedjaxprune.data.sources import files
from fedjaxprune.errors import DataError, shown

_SUFFIXES = (".csv", ".tsv", ".parquet")
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_HEADER = 1 << 20  # bytes of a file in which its first line ends
_SAVE = "save it as UTF-8, or convert it, for instance by iconv -f latin1 -t utf8"
_PLAIN = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_WITH_COMMA = re.compile(
    r"[+-]?(\d*,\d+([eE][+-]?\d+)?|\d{1,3}(,\d{3})+(\.\d*)?|\d{1,3}([. ']\d{3})+(,\d*)?)"
)
_SIGN = r"[<>≤≥~]?\s*[$€£¥]?\s*"  # before a number
_WITH_SIGN = re.compile(rf"{_SIGN}({_PLAIN.pattern}|{_WITH_COMMA.pattern})\s*[%‰$€£¥°]?")


def read(path: pathlib.Path, label: str) -> dict[str, np.ndarray]:
    """Read all columns ``[rows]`` as arrays; text and missing values are objects.

    Args:
      path: of the file.
      label: name of a column that is to be there.
    """
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise DataError(f"path must end in .csv, .tsv or .parquet, got {path.name}.")
    separator = _separator(path)

    def reader(path: pathlib.Path) -> Any:
        if suffix == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(path)
        return _read_text(path)

    if suffix != ".parquet":
        _check_header(path, label, separator)
    table = files.read(path, reader, f"a {suffix} table")
    if len(set(table.column_names)) < len(table.column_names):
        twice = next(n for n in table.column_names if table.column_names.count(n) > 1)
        raise DataError(f"{path} has two columns named {twice!r}.")
    if table.num_rows == 0:
        raise DataError(f"{path} has no rows.")
    columns = {name: table[name].to_numpy() for name in table.column_names}
    if suffix != ".parquet":
        for name, values in columns.items():
            _check_encoding(values, name, path)
    return columns


def _read_text(path: pathlib.Path, **conversion: Any) -> Any:
    """Read a file of text, with options of `pyarrow.csv.ConvertOptions`."""
    import pyarrow.csv

    return pyarrow.csv.read_csv(
        path,
        parse_options=pyarrow.csv.ParseOptions(delimiter=_separator(path)),
        convert_options=pyarrow.csv.ConvertOptions(**conversion),
    )


def _separator(path: pathlib.Path) -> str:
    return "\t" if path.suffix.lower() == ".tsv" else ","


def check_ids(table: Mapping[str, np.ndarray], names: Sequence[str], path: pathlib.Path) -> None:
    """Refuse client ids that differ in a file of text, and are read as the same value."""
    import pyarrow

    names = [name for name in names if table[name].dtype.kind != "O"]
    if path.suffix.lower() == ".parquet" or not names:
        return
    as_text = dict.fromkeys(names, pyarrow.string())
    written = files.read(
        path,
        lambda path: _read_text(path, include_columns=names, column_types=as_text),
        "a table",
    )
    for name in names:
        texts, first = np.unique(written[name].to_numpy().astype(str), return_index=True)
        values, which = np.unique(table[name][first], return_inverse=True)
        alike = [texts[which == place] for place in np.flatnonzero(np.bincount(which) > 1)]
        if alike:
            one, other = (str(text) for text in alike[0][:2])
            raise DataError(
                f"column {name!r} of {path} has the client ids {one!r} and {other!r}, which are "
                f"read as the same, {values[which[texts == one][0]]}: write each client one way, "
                "or put a letter before each id."
            )


def _check_header(path: pathlib.Path, label: str, separator: str) -> None:
    """Refuse a first line that is not UTF-8, is split by another mark, or has no names."""
    first = files.read(path, _first_line, f"a {path.suffix.lower()} table")
    if first.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path} is text in UTF-16: save it as UTF-8.")
    try:
        line = first.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError:
        raise DataError(f"the first line of {path} is not UTF-8: {_SAVE}.") from None
    names = _split(line, separator)
    if not names:
        return  # the reader skips empty lines, and refuses an empty file
    for other, what in _SEPARATORS.items():
        others = _split(line, other)
        if len(others) > 1 and (len(names) == 1 or (label in others and label not in names)):
            raise DataError(
                f"{path} must have columns separated by {_SEPARATORS[separator]}, but its first "
                f"line has {what}: save it with {_SEPARATORS[separator]}, and numbers with decimal "
                "points."
            )
    is_counted = [*map(str, range(len(names)))] == names or (
        [*map(str, range(1, len(names) + 1))] == names
    )
    num_numbers = sum(_reads(name) for name in names)
    if num_numbers == len(names) and not (is_counted and label in names):
        raise DataError(
            f"the first line of {path} must name the columns, but it is numbers ({shown(line)}): "
            "add a line with names."
        )
    if label not in names and 2 * num_numbers >= len(names):
        raise DataError(
            f"the first line of {path} has no {label!r} and seems to be a row of the data "
            f"({shown(line)}): add a line with the columns' names, or name the label by label."
        )


def _first_line(path: pathlib.Path) -> bytes:
    with path.open("rb") as file:
        return file.readline(_HEADER)


def _split(line: str, separator: str) -> list[str]:
    """Read the names in a line."""
    try:
        return next(csv.reader([line], delimiter=separator), [])
    except csv.Error:
        return [line]


def _check_encoding(values: np.ndarray, name: str, path: pathlib.Path) -> None:
    """Refuse a column of bytes: what Arrow makes of text that is not UTF-8."""
    if not isinstance(next((value for value in values if value is not None), None), bytes):
        return
    for row, value in enumerate(values, 1):
        try:
            str(value or b"", "utf-8")
        except UnicodeDecodeError:
            raise DataError(
                f"{path} is not UTF-8, with {shown(value)} in row {row} of column {name!r}: "
                f"{_SAVE}."
            ) from None


def complete(
    values: np.ndarray, name: str, path: pathlib.Path, *, words: Collection[str] = ("",)
) -> np.ndarray:
    """Refuse missing values ``[rows]``, and numbers that float32 cannot hold.

    Args:
      values: of a column.
      name: of the column.
      path: of its file.
      words: texts in lower case that stand for a missing value. ``NA`` can be a category of a
        feature, but it is no class and no client: their words are `checks.MISSING`.
    """
    if values.dtype.kind == "f":
        bad = np.isnan(values)
    elif values.dtype.kind == "O":
        bad = np.array([_is_missing(value, words) for value in values])
    else:
        return values
    if bad.any():
        number, first = int(bad.sum()), int(np.flatnonzero(bad)[0])
        written = values[first] if isinstance(values[first], str) else ""
        written = f" ({written!r})" if written else ""
        raise DataError(
            f"{path} has {number} missing value{'s' * (number > 1)} in column {name!r}, the first "
            f"in row {first + 1}{written}; fill them, or leave the column or the rows out."
        )
    if values.dtype.kind == "f" and (large := np.abs(values) > rounding.FLOAT32_MAX).any():
        row = int(np.flatnonzero(large)[0])
        raise DataError(
            f"{path} has {values[row]} in row {row + 1} of column {name!r}, which is too large: "
            f"numbers must lie within {rounding.FLOAT32_MAX:.3g} of 0."
        )
    return values


def _is_missing(value: Any, words: Collection[str]) -> bool:
    if isinstance(value, str):
        return value.strip().lower() in words
    return value is None or value != value


def check_numbers(values: np.ndarray, name: str, path: pathlib.Path) -> None:
    """Refuse text ``[rows]`` of which at least half reads as numbers.

    One wrong value, decimal commas, or signs such as ``%`` make a column of numbers text, and each
    number a category.
    """
    texts, first, counts = np.unique(values.astype(str), return_index=True, return_counts=True)
    plain = np.array([bool(_PLAIN.fullmatch(text.strip())) for text in texts])
    comma = np.array([bool(_WITH_COMMA.fullmatch(text.strip())) for text in texts]) & ~plain
    signed = np.array([bool(_WITH_SIGN.fullmatch(text.strip())) for text in texts])
    signed &= ~plain & ~comma
    if 2 * counts[plain | comma | signed].sum() < counts.sum():
        return
    if (~plain & ~comma & ~signed).any():
        row = int(first[~plain & ~comma & ~signed].min())
        why = f"but {values[row]!r} in row {row + 1} is no number: correct it, leave its row out"
    elif signed.any():
        row = int(first[signed].min())
        why = f"but with signs, such as {values[row]!r} in row {row + 1}: write numbers alone"
    elif comma.any():
        row = int(first[comma].min())
        why = f"but with commas, such as {values[row]!r} in row {row + 1}: write decimal points"
    else:
        why = "but is stored as text: store numbers"
    raise DataError(
        f"{path} has a column {name!r} that reads as numbers, {why}, or, if the values are "
        "categories, set categorical: one_hot_all."
    )


def first_text(values: np.ndarray) -> str:
    """Name the first of texts ``[rows]`` that is no number, with its row."""
    rows = (row for row, value in enumerate(values) if not _PLAIN.fullmatch(str(value).strip()))
    row = next(rows, 0)
    return f"{shown(values[row])} in row {row + 1}"


def _reads(text: str) -> bool:
    """Tell whether a text reads as a number."""
    text = text.strip()
    return bool(_PLAIN.fullmatch(text) or _WITH_COMMA.fullmatch(text))
