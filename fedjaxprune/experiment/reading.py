"""Read files that may come from strangers: regular ones, up to a size, as text and as JSON.

A pipe would be waited for without end, a device read without end, and a link may lead anywhere.
"""

import json
import math
import os
import pathlib
import stat
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

LARGEST_TEXT = 256 * 2**20  # bytes of a file that is read
_LARGEST_WHOLE = 64 * 2**20  # of a file in a checkpoint that describes arrays
_ARRAYS = "d"  # folder in which TensorStore keeps arrays
_DEEPEST = 32  # lists and mappings in each other
_DIGITS = 30  # of a whole number
_SEAL = "own_checksum"
LARGEST_NUMBER = 1e100  # whose square is finite

_NO_WAITING = getattr(os, "O_NONBLOCK", 0)  # else opening a pipe waits for its writer
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)


def text(
    path: pathlib.Path,
    *,
    may_link: bool,
    largest: int = LARGEST_TEXT,
    errors: str = "strict",
) -> str:
    """Read a regular file of UTF-8 text, of at most `largest` bytes.

    Raises:
      OSError: it cannot be opened, is no regular file, is too large, or is a symbolic link where
        it must not be one; its `strerror` says which.
      UnicodeDecodeError: it is not UTF-8, unless `errors` says what is done then.
    """
    if not may_link and os.path.islink(path):
        raise OSError(None, "it is a symbolic link", str(path))
    flags = os.O_RDONLY | _NO_WAITING | (0 if may_link else _NO_LINK)
    with open(path, "rb", opener=lambda name, _: os.open(name, flags)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(None, "it is no regular file", str(path))
        content = file.read(largest + 1)
    if len(content) > largest:
        raise OSError(None, f"it is larger than {largest:,} bytes", str(path))
    return content.decode("utf-8", errors)


def sealed(**facts: Any) -> dict[str, Any]:
    """Add a checksum to facts that JSON can tell."""
    return {**facts, _SEAL: _sum(facts)}


def unsealed(facts: Any) -> dict[str, Any]:
    """Give facts that `sealed` made; a ValueError if they are others."""
    if not isinstance(facts, dict) or facts.get(_SEAL) != _sum(facts):
        raise ValueError("its checksum does not fit its contents")
    return facts


def _sum(facts: Mapping[str, Any]) -> int:
    rest = {name: value for name, value in facts.items() if name != _SEAL}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def open_no_link(name: str, flags: int) -> int:
    """Open a file, as the `opener` of `open`, unless it is a symbolic link."""
    return os.open(name, flags | _NO_LINK, 0o666)


def write_new(path: pathlib.Path, content: bytes) -> None:
    """Write a file that is made anew, so that no link that lies there is followed."""
    path.unlink(missing_ok=True)
    with path.open("xb") as file:
        file.write(content)


def check_own(folder: pathlib.Path, names: Iterable[str], *, checkpoints: str = "") -> None:
    """Check that files and folders of these names, and all in them, are no links, pipes or devices.

    In the folder of that name, only files that hold arrays may have more than 64 MiB, as the others
    are read whole.

    Raises:
      OSError: one of them is, or is too large.
    """
    waiting = [folder / name for name in names]
    while waiting:
        path = waiting.pop()
        try:
            about = path.lstat()
            mode = about.st_mode
            if stat.S_ISDIR(mode):
                waiting.extend(path.iterdir())
                continue
        except FileNotFoundError:  # a run that is going on takes its drafts away
            continue
        if not stat.S_ISREG(mode):
            kind = "a symbolic link" if stat.S_ISLNK(mode) else "no regular file"
            raise OSError(None, f"it is {kind}", str(path))
        is_whole = path.parent.name != _ARRAYS and folder / checkpoints in path.parents
        if checkpoints and is_whole and about.st_size > _LARGEST_WHOLE:
            raise OSError(None, f"it is larger than {_LARGEST_WHOLE:,} bytes", str(path))


def from_json(source: str) -> Any:
    """Read JSON as this package writes it.

    Raises:
      ValueError: it is no JSON, or has a number that is not finite or beyond 1e100, a whole number
        of more than 30 digits, more than 32 levels, or half of a surrogate pair.
    """
    try:
        found = json.loads(
            source, parse_int=_whole, parse_float=_number, parse_constant=_refuse_constant
        )
    except RecursionError:
        raise ValueError("lists and mappings lie too deep in each other") from None
    _check_depth(found)
    if "\\ud" in source.lower():
        json.dumps(found, ensure_ascii=False).encode()
    return found


def _whole(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"a whole number has more than {_DIGITS} digits")
    return int(digits)


def _number(digits: str) -> float:
    number = float(digits)
    if not math.fabs(number) <= LARGEST_NUMBER:
        raise ValueError(f"a number is beyond {LARGEST_NUMBER:g}")
    return number


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _check_depth(found: Any) -> None:
    level = [found]
    for _ in range(_DEEPEST + 1):
        inner = [one for one in level if isinstance(one, dict | list)]
        level = [
            one for each in inner for one in (each.values() if isinstance(each, dict) else each)
        ]
        if not inner:
            return
    raise ValueError("lists and mappings lie too deep in each other")
