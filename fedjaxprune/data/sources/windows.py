"""Texts as sequences of tokens: symbols, windows, and who speaks."""

import re
from collections.abc import Mapping
from typing import Literal

import numpy as np

from fedjaxprune.data.conversion import as_dataset
from fedjaxprune.data.datasets import Dataset
from fedjaxprune.errors import DataError
from fedjaxprune.settings import Count, Settings, setting

Predict = Literal["last", "every"]
Symbols = Literal["own", "leaf", "bytes"]

# The characters of LEAF's Shakespeare, in its order.
LEAF = "\n !\"&'(),-.0123456789:;>?ABCDEFGHIJKLMNOPQRSTUVWXYZ[]abcdefghijklmnopqrstuvwxyz}"
_MAX_SYMBOLS = 1000
_SPEAKER = re.compile(r"(?m)^([A-Z][A-Za-z .'-]{0,40}):[ \t]*$\n?")


class WindowSettings(Settings):
    """How a text is cut into examples."""

    length: Count = setting(80, "Characters that the network reads.", unit="characters")
    stride: Count | None = setting(
        None, "Distance between the starts of two examples.", unit="characters", unset="length"
    )
    predict: Predict = setting(
        "last", "Positions that have a label, the character that follows: the last, or every one."
    )
    symbols: Symbols = setting(
        "own",
        "What a token is: a character of the text, one of LEAF's 80 characters (others are left "
        "out), or a byte of its UTF-8 form.",
    )


def by_speaker(text: str) -> dict[str, str]:
    """Join what each speaker says, by lines such as ``ROMEO:``, in the order of the speakers.

    What comes before the first speaker is left out. A text without two speakers is given whole,
    with an empty name.
    """
    _, *pieces = _SPEAKER.split(text)
    found: dict[str, list[str]] = {}
    for name, said in zip(pieces[::2], pieces[1::2], strict=True):
        found.setdefault(name, []).append(said.strip())
    if len(found) < 2:
        return {"": text}
    return {name: "\n".join(filter(None, said)) for name, said in found.items()}


def cut(
    train: Mapping[str, str], test: Mapping[str, str], settings: WindowSettings, *, name: str
) -> Dataset:
    """Cut texts into examples of `length` tokens, labeled with what follows.

    Args:
      train: by speaker, what is for training; with an empty name if nobody is named.
      test: the same for tests. No example crosses from one text to the next.
      settings: sizes, positions with a label, and symbols.
      name: for records and errors.

    Returns:
      A data set of the task ``sequence`` whose column of client ids is ``speaker``, or else
      ``line``: the number of the line in which an example starts.

    Raises:
      DataError: there are too many symbols, or too few of them for one example of each kind.
    """
    texts = [*train.values(), *test.values()]
    symbols = _symbols(texts, settings.symbols, name)
    code = {symbol: number for number, symbol in enumerate(symbols)}
    size, stride = settings.length + 1, settings.stride or settings.length
    windows: tuple[list[np.ndarray], list[np.ndarray]] = [], []
    owners: list[str | int] = []
    for split, blocks in enumerate((train, test)):
        for speaker, block in blocks.items():
            tokens = _tokens(block, code, settings.symbols)
            starts = np.arange(0, len(tokens) - size + 1, stride)
            if starts.size:
                views = np.lib.stride_tricks.sliding_window_view(tokens, size)
                windows[split].append(views[starts])
            if split == 0:
                breaks = np.flatnonzero(tokens == code.get("\n", -1))
                lines = np.searchsorted(breaks, starts) + 1
                owners += [speaker] * len(starts) if speaker else lines.tolist()
    if not windows[0] or not windows[1]:
        raise DataError(
            f"{name} has {sum(map(len, texts))} characters, too few for training and test examples "
            f"of {settings.length} + 1 characters; set a smaller length."
        )
    splits = []
    for rows in map(np.concatenate, windows):
        labels = rows[:, -1] if settings.predict == "last" else rows[:, 1:]
        splits.append((rows[:, :-1], labels))
    return as_dataset(
        tuple(splits),
        name=name,
        task="sequence",
        num_classes=len(symbols),
        class_names=tuple(symbols),
        keys={"line" if "" in train else "speaker": np.array(owners)},
    )


def _symbols(texts: list[str], kind: Symbols, name: str) -> list[str]:
    """List what tokens stand for."""
    if kind == "leaf":
        return list(LEAF)
    if kind == "bytes":
        return [chr(byte) for byte in range(256)]
    symbols = sorted(set().union(*texts))
    if len(symbols) > _MAX_SYMBOLS:
        raise DataError(
            f"{name} has {len(symbols)} distinct characters; at most {_MAX_SYMBOLS} are read: set "
            "symbols to bytes."
        )
    return symbols


def _tokens(text: str, code: Mapping[str, int], kind: Symbols) -> np.ndarray:
    if kind == "bytes":
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)
    return np.array([code[symbol] for symbol in text if symbol in code], np.int32)
