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


def source_for_path(
    text: str, *, data_dir: str | os.PathLike[str] | None = None
) -> tuple[str, dict[str, Any]] | None:
    """Choose the source of a data set that is given by a path or the name of a TFDS set.

    A file is read by its suffix, an existing folder as a folder of images, and the name of a
    prepared TFDS set by ``tfds``. A name of a file ``file.py:NAME`` is no path of data.

    Args:
      text: as the user wrote it.
      data_dir: folder of prepared TFDS sets.

    Returns:
      The name of the source and the settings that name the data; None for any other text.
    """
    suffix = pathlib.Path(text).suffix.lower()
    if suffix in _SUFFIXES:
        return _SUFFIXES[suffix], {"path": text}
    if ("/" in text or os.sep in text) and pathlib.Path(text).expanduser().is_dir():
        return "image_folder", {"path": text}
    from fedjaxprune.data.sources import tfds

    name = text.partition(":")[0]
    if name in tfds.KNOWN or name in tfds.prepared(data_dir):
        return "tfds", {"tfds_name": text} | ({"data_dir": str(data_dir)} if data_dir else {})
    return None
