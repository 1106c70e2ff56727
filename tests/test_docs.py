"""What the documents tell users to type is what the command takes."""

import pathlib
import re
import shlex

import pytest

from fedjaxprune import registry
from fedjaxprune.cli import run

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page):
    """List the words behind every ``fedjaxprune run`` in a page's blocks of shell commands."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    for line in "".join(blocks).replace("\\\n", " ").splitlines():
        words = shlex.split(line.partition("&&")[0], comments=True)
        if words[:2] == ["fedjaxprune", "run"]:
            yield words[2:]


CASES = [(page.name, words) for page in PAGES for words in commands(page)]


def test_every_method_is_described():
    text = (ROOT / "docs/methods.md").read_text()
    assert [n for n in registry.names("method") if f"`{n}`" not in text] == []


@pytest.mark.parametrize(
    ("page", "words"), CASES, ids=[f"{page}-{i}" for i, (page, _) in enumerate(CASES)]
)
def test_a_documented_command_is_valid(page, words):
    del page  # for the name of the case
    context = run.run.make_context("run", list(words))
    assert context.params is not None
