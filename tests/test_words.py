"""The documents and doc-strings are written in plain technical English that is easy to read."""

import ast
import pathlib
import re
import runpy

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
# Phrases that only this project used, and what to write: the field's own word.
BANNED = {
    r"to be had": "available",
    r"told of": "reported",
    r"go(es)? on": "continues",
    r"broken off": "interrupted",
    r"joins": "combines, concatenates or is added to",
    r"mended": "fixed",
    r"by lot": "at random",
    r"never heard of": "does not depend on",
    r"plays? (a )?rounds?( yourself)?": "run rounds",
    r"dear": "costly",
    r"wings?": "packages",
    r"has the last word": "decides",
    r"comes? to its end": "ends",
    r"what starts well": "the best start",
    r"bits go first": "a bit per channel is sent first",
}
PATTERN = re.compile(rf"\b(?:{'|'.join(BANNED)})\b", re.IGNORECASE)


def texts_of(source):
    """List the texts in Python source: doc-strings, messages and help."""
    tree = ast.parse(source)
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_a_page_has_no_banned_words(page):
    found = [match[0] for match in PATTERN.finditer(page.read_text(encoding="utf-8"))]
    assert found == []


def test_doc_strings_and_messages_have_no_banned_words():
    found = []
    for folder in ("fedjaxprune", "examples"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for text in texts_of(file.read_text(encoding="utf-8")):
                matches = PATTERN.finditer(" ".join(text.split()))
                found += [(str(file.relative_to(ROOT)), match[0]) for match in matches]
    assert found == []


def test_tutorials_and_guides_are_easy_to_read():
    tool = runpy.run_path(str(ROOT / "docs/readability.py"))
    everything = []
    for page in tool["pages"]():
        found = tool["sentences"](page.read_text(encoding="utf-8"))
        everything += found
        assert tool["measure"](found).median_words <= 20, page
    measured = tool["measure"](everything)
    assert measured.num_sentences > 300
    assert measured.flesch >= 45


def test_readability_is_measured_right():
    tool = runpy.run_path(str(ROOT / "docs/readability.py"))
    text = "# A heading that counts for nothing\n\nThe cat sat. A `name` here runs.\n\n| a | b |\n"
    found = tool["sentences"](text)
    assert found == [["The", "cat", "sat"], ["A", "code", "here", "runs"]]
    # Seven words in two sentences; one syllable each, as a silent e does not count.
    assert tool["measure"](found).flesch == pytest.approx(206.835 - 1.015 * 3.5 - 84.6)
