"""Measure how easy pages are to read: words of a sentence, and Flesch reading ease.

    python docs/readability.py [PAGE ...]

Without pages it takes all tutorials and guides. Code, tables, headings and addresses are left out.
Syllables are counted by groups of vowels, which is off by a few per cent.

References:
  Flesch, A new readability yardstick, Journal of Applied Psychology 32, 1948.
"""

import pathlib
import re
import statistics
import sys
from collections.abc import Sequence
from typing import NamedTuple

HERE = pathlib.Path(__file__).parent
FOLDERS = ("tutorials", "how_to")


class Measured(NamedTuple):
    """What was measured of some sentences."""

    num_sentences: int
    median_words: float
    flesch: float


def pages() -> list[pathlib.Path]:
    """List the tutorials and guides."""
    return [page for name in FOLDERS for page in sorted((HERE / name).glob("*.md"))]


def sentences(text: str) -> list[list[str]]:
    """Give the words of each sentence of a page of Markdown."""
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    text = re.sub(r"^(`{3,}|:{3,}).*?^\1`*:*\s*$", "\n", text, flags=re.DOTALL | re.MULTILINE)
    kept = [line for line in text.splitlines() if not re.match(r"\s*(\||#|:{3,}|\()", line)]
    text = "\n".join("\n" + line if re.match(r"\s*([-*]|\d+\.)\s", line) else line for line in kept)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"``?[^`]+``?", "code", text)  # a name counts as one word
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        joined = " ".join(paragraph.split()).lstrip("-*0123456789. ")
        for sentence in re.split(r"(?<=[.!?:])\s+(?=[A-Z\[*\"(c])", joined):
            words = re.findall(r"[A-Za-z][A-Za-z'-]*", sentence)
            if len(words) > 2:
                found.append(words)
    return found


def syllables(word: str) -> int:
    """Count groups of vowels, without a silent e at the end."""
    word = re.sub(r"[^a-z]", "", word.lower())
    groups = len(re.findall(r"[aeiouy]+", word))
    is_silent = word.endswith("e") and not word.endswith("le") and groups > 1
    is_silent |= bool(re.search(r"[^td]ed$", word)) and groups > 1
    return max(groups - is_silent, 1)


def measure(found: Sequence[Sequence[str]]) -> Measured:
    """Measure sentences."""
    words = [word for sentence in found for word in sentence]
    per_sentence = len(words) / len(found)
    per_word = sum(map(syllables, words)) / len(words)
    flesch = 206.835 - 1.015 * per_sentence - 84.6 * per_word
    return Measured(len(found), statistics.median(map(len, found)), flesch)


def main() -> None:
    """Print a line for each page, and one for all."""
    chosen = [pathlib.Path(name) for name in sys.argv[1:]] or pages()
    everything = []
    print("median words  Flesch  sentences  page")
    for page in chosen:
        found = sentences(page.read_text(encoding="utf-8"))
        everything += found
        _show(measure(found), str(page))
    _show(measure(everything), "all")


def _show(one: Measured, name: str) -> None:
    print(f"{one.median_words:12.1f}  {one.flesch:6.1f}  {one.num_sentences:9d}  {name}")


if __name__ == "__main__":
    main()
