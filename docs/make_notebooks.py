"""Write the tutorials as notebooks, which open in Jupyter and Colab.

    python docs/make_notebooks.py

The first cell installs the package. Links between pages become names of pages, since a notebook is
opened alone.
"""

import hashlib
import json
import pathlib
import re
from typing import Any

HERE = pathlib.Path(__file__).parent
FOLDER = HERE / "notebooks"
INSTALL = """\
# Where the package is: a clone two folders up. On Colab, upload a wheel and write its name.
SOURCE = "../.."
%pip install --quiet "{SOURCE}[export,report]"
"""


def notebook(text: str) -> dict[str, Any]:
    """Make a notebook of a tutorial's text."""
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    made = [cell("code", INSTALL.strip(), 0)]
    pieces = re.split(r"^```\{code-cell\} python\n(.*?)^```\n", text, flags=re.M | re.S)
    for at, piece in enumerate(pieces):
        is_code = at % 2 == 1
        content = re.sub(r"\A:tags: .*\n\n", "", piece) if is_code else markdown(piece)
        if content.strip():
            made.append(cell("code" if is_code else "markdown", content.strip(), at + 1))
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": made, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def cell(kind: str, source: str, at: int) -> dict[str, Any]:
    """Make a cell; its id follows from its place and content."""
    name = hashlib.sha256(f"{at} {source}".encode()).hexdigest()[:8]
    made = {"cell_type": kind, "id": name, "metadata": {}, "source": source}
    return {**made, "execution_count": None, "outputs": []} if kind == "code" else made


def markdown(text: str) -> str:
    """Turn MyST into the Markdown of notebooks."""
    image = r"^```\{image\} (\S+)\n:alt: (.*?)\n.*?^```\n"
    text = re.sub(image, r"![\2](../tutorials/\1)\n", text, flags=re.M | re.S)
    return re.sub(r"(?<!!)\[([^\]]*)\]\((?!https?:)[^)]*\)", r"*\1*", text)


def main() -> None:
    """Write all notebooks."""
    FOLDER.mkdir(exist_ok=True)
    for page in sorted((HERE / "tutorials").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        if "{code-cell}" in text:
            made = json.dumps(notebook(text), indent=1, ensure_ascii=False)
            (FOLDER / f"{page.stem}.ipynb").write_text(made + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
