"""Clients' ids as short text: the first id, then how far each id is from the one before.

``3 1x4 10`` stands for the ids 3, 4, 5, 6, 7 and 17: ``1x4`` is the distance 1 four times. The ids
of 10,000 of a million clients take about 30 kB, less than half of what they take as numbers.
"""

import re
from collections.abc import Iterable

import numpy as np

_GAP = "[0-9]{1,10}(?:x[0-9]{1,8})?"
_TEXT = re.compile(f"(?:{_GAP}(?: {_GAP})*)?")
_MOST = 2**24  # ids of one text


def to_text(ids: Iterable[int]) -> str:
    """Write ids, which ascend and may repeat."""
    values = np.fromiter(ids, np.int64)
    if not values.size:
        return ""
    gaps = np.diff(values, prepend=0)
    begins = np.flatnonzero(np.r_[True, gaps[1:] != gaps[:-1]])
    times = np.diff(begins, append=len(gaps)).tolist()
    pairs = zip(gaps[begins].tolist(), times, strict=True)
    return " ".join(f"{gap}x{number}" if number > 1 else str(gap) for gap, number in pairs)


def is_text(text: object) -> bool:
    """Tell whether something is text that `of_text` reads, of not more than 2²⁴ ids."""
    if not isinstance(text, str) or not _TEXT.fullmatch(text):
        return False
    return text.count(" ") + sum(map(int, re.findall("x([0-9]+)", text))) <= _MOST


def of_text(text: str) -> list[int]:
    """Read ids."""
    pairs = re.findall("([0-9]+)(?:x([0-9]+))?", text)
    gaps = np.array([int(gap) for gap, _ in pairs], np.int64)
    times = np.array([int(number or 1) for _, number in pairs], np.int64)
    return np.cumsum(np.repeat(gaps, times)).tolist()
