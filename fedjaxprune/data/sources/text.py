"""A text file as sequences of characters, each with the character that follows it."""

import re

import numpy as np

from fedjaxprune.data.conversion import as_dataset
from fedjaxprune.data.datasets import Dataset
from fedjaxprune.data.sources import files
from fedjaxprune.errors import DataError
from fedjaxprune.registry import Part
from fedjaxprune.settings import Count, Probability, Settings, setting

_MAX_SYMBOLS = 1000
_SPEAKER = re.compile(r"(?m)^([A-Z][A-Za-z .'-]{0,40}):[ \t]*$\n?")


class TextSettings(Settings):
    """How a text is cut into examples."""

    path: str = setting(..., "File of text in UTF-8.")
    length: Count = setting(80, "Characters that the network reads.", unit="characters")
    stride: Count | None = setting(
        None, "Distance between the starts of two examples.", unit="characters", unset="length"
    )
    test_fraction: Probability = setting(
        0.2, "Share at the end of each speaker's text that is for tests.", unit="fraction", gt=0
    )


def build(settings: TextSettings) -> Dataset:
    """Cut the text into examples of `length` characters, labeled with the next character.

    Lines such as ``ROMEO:`` name who speaks the lines that follow. A speaker's lines are joined,
    no example has two speakers, and ``speaker`` is the key of natural clients. Without such lines
    the key is ``line``, the number of the line in which an example starts. No character of a test
    example is in a training example. The symbols are the characters of the file, in the order of
    their code points.

    References:
      Caldas et al., `LEAF <https://arxiv.org/abs/1812.01097>`_, 2018, which cuts the plays of
      Shakespeare in this way.
    """
    path = files.find(settings.path)
    text = files.read(path, lambda path: path.read_text(encoding="utf-8"), "text in UTF-8")
    spoken = _by_speaker(text)
    blocks = spoken if len(spoken) > 1 else {"": text}
    symbols = sorted(set("".join(blocks.values())))
    if len(symbols) > _MAX_SYMBOLS:
        raise DataError(
            f"{path} has {len(symbols)} distinct characters; at most {_MAX_SYMBOLS} are read."
        )
    code = {symbol: number for number, symbol in enumerate(symbols)}
    windows: tuple[list, list] = [], []
    owners: list[str | int] = []
    size, stride = settings.length + 1, settings.stride or settings.length
    for speaker, block in blocks.items():
        tokens = np.array([code[symbol] for symbol in block], np.int32)
        cut = len(tokens) - round(settings.test_fraction * len(tokens))
        breaks = np.flatnonzero(tokens == code.get("\n", -1))
        for split, begin, end in ((0, 0, cut), (1, cut, len(tokens))):
            starts = np.arange(begin, end - size + 1, stride)
            windows[split].extend(tokens[start : start + size] for start in starts)
            if split == 0:
                lines = np.searchsorted(breaks, starts) + 1
                owners += [speaker] * len(starts) if speaker else lines.tolist()
    if not windows[0] or not windows[1]:
        raise DataError(
            f"{path} has {len(text)} characters, too few for training and test examples of "
            f"{settings.length} + 1 characters; set a smaller length."
        )
    train, test = np.stack(windows[0]), np.stack(windows[1])
    columns = {"speaker" if len(spoken) > 1 else "line": np.array(owners)}
    return as_dataset(
        ((train[:, :-1], train[:, -1]), (test[:, :-1], test[:, -1])),
        name=path.stem,
        task="sequence",
        num_classes=len(symbols),
        class_names=tuple(symbols),
        keys=columns,
    )


def _by_speaker(text: str) -> dict[str, str]:
    """Join what each speaker says; what comes before the first speaker is left out."""
    _, *pieces = _SPEAKER.split(text)
    found: dict[str, list[str]] = {}
    for name, said in zip(pieces[::2], pieces[1::2], strict=True):
        found.setdefault(name, []).append(said.strip())
    return {name: "\n".join(filter(None, said)) for name, said in found.items()}


PARTS = {
    "text": Part(
        build=build, settings=TextSettings, summary="a text file, to predict the next character"
    )
}
