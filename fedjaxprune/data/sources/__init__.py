"""Where data sets come from: one module per source, each with its settings."""

import os
import pathlib
from typing import Any

_SUFFIXES = {
    ".csv": "table",
    ".tsv": "table",
    ".parquet": "table",
    ".npz": "npz",
    ".txt": "text",
}


def source_for_path(text: str) -> tuple[str, dict[str, Any]] | None:
    """Choose the source of a data set that is given by the path of a file or a folder.

    A file is read by its suffix; an existing folder, with a slash in its path, is one of images.

    Args:
      text: as the user wrote it.

    Returns:
      The name of the source and its setting that names the data; None for any other text.
    """
    suffix = pathlib.Path(text).suffix.lower()
    if suffix in _SUFFIXES:
        return _SUFFIXES[suffix], {"path": text}
    if ("/" in text or os.sep in text) and pathlib.Path(text).expanduser().is_dir():
        return "image_folder", {"path": text}
    return None
