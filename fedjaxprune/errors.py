"""The errors that a user can cause, and what their sentences share; imports nothing heavy."""

import difflib
import os
import pathlib
from collections.abc import Iterable

_LONGEST = 80  # characters of a value that a sentence repeats


class FedJaxPruneError(ValueError):
    """Say in one sentence what was given and what is allowed; the command prints only that."""


class ConfigError(FedJaxPruneError):
    """A setting, an option or the name of a part that cannot be used."""


class RunFolderError(FedJaxPruneError):
    """A run folder that is missing, in use, damaged or of another configuration."""


class DataError(FedJaxPruneError):
    """A data set that is missing or does not have the required form."""


def first_line(error: BaseException) -> str:
    """Give the first line of an error's text, or the name of its type where it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def visible(text: str) -> str:
    """Replace what a terminal would obey, or nobody would see, by escapes such as ``\\x1b``.

    Letters of all languages stay, and so do line breaks.
    """
    return "".join(
        one if one.isprintable() or one in "\n\xa0" else one.encode("unicode_escape").decode()
        for one in text
    )


def shown(value: object) -> str:
    """Repeat what was given in a sentence, cut after 80 characters."""
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


def near_miss(given: object, names: Iterable[object]) -> str:
    """Suggest the closest of `names` as ``"; did you mean 'x'?"``, or end the sentence."""
    lowered = {str(name).lower(): name for name in names}
    text = str(given).lower().replace("-", "_")
    close = difflib.get_close_matches(text, lowered, n=1, cutoff=0.6)
    return f"; did you mean {str(lowered[close[0]])!r}?" if close else "."


def near_file(path: pathlib.Path) -> str:
    """Suggest the nearest name in the folder of a path that does not exist, or end the sentence."""
    is_lost = not os.path.exists(path) and os.path.isdir(path.parent)
    return near_miss(path.name, os.listdir(path.parent) if is_lost else ())


def beside(name: str) -> str:
    """Say that a name is also that of a file or a folder here, which a path would mean."""
    if not os.path.exists(name):
        return ""
    return f"; there is a {'folder' if os.path.isdir(name) else 'file'} here: write ./{name}"
