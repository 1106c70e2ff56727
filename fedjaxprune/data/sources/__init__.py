"""Where data sets come from: one module per source, each with its settings."""

import os
from typing import Any

from fedjaxprune.errors import ConfigError, near_file
from fedjaxprune.registry import locate

_SUFFIXES = {".csv": "table", ".tsv": "table", ".parquet": "table", ".npz": "npz", ".txt": "text"}


def is_path(text: str) -> bool:
    """Tell whether the name of a data set can be the path of a file or a folder."""
    return "/" in text or os.sep in text or text.lower().endswith(tuple(_SUFFIXES))


def source_for_path(text: str) -> tuple[str, dict[str, Any]] | None:
    """Choose the source of a data set that is given by the path of a file or a folder.

    A file is read by its suffix; an existing folder, with a slash in its path, is one of images.

    Args:
      text: as the user wrote it.

    Returns:
      The name of the source and its setting that names the data; None for any other text.

    Raises:
      ConfigError: it can only be a path, but there is nothing, or no file that is read.
    """
    path = locate(text)
    suffix = path.suffix.lower()
    if suffix in _SUFFIXES:
        return _SUFFIXES[suffix], {"path": text}
    if ("/" in text or os.sep in text) and path.is_dir():
        return "image_folder", {"path": text}
    if text.startswith(("./", "../", "/", "~")) and ".py" not in text:
        if path.is_file():
            raise ConfigError(
                f"data.dataset: files that are read end in {', '.join(_SUFFIXES)}, got {text!r}."
            )
        raise ConfigError(f"data.dataset: there is no file or folder {text!r}{near_file(path)}")
    return None
