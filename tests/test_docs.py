"""What the documents tell users to type is what the command takes."""

import pathlib
import re
import shlex

import pytest

from fedjaxprune.experiment.config.flat import files, validation

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page):
    """List the words behind every ``fedjaxprune run`` in a page's blocks of shell commands."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    for line in "".join(blocks).replace("\\\n", " ").splitlines():
        words = shlex.split(line.partition("&&")[0], comments=True)
        if words[:2] == ["fedjaxprune", "run"]:
            yield words[2:]


def settings(words):
    """Read options, and what may stand before them."""
    values, source = {}, None
    words = list(words)
    if words and not words[0].startswith("--"):
        source = words.pop(0)
    while words:
        name = words.pop(0).removeprefix("--").replace("-", "_")
        if name in ("track", "resume"):
            words.pop(0)
        elif validation.is_flag(name.removeprefix("no_")):
            values[name.removeprefix("no_")] = not name.startswith("no_")
        else:
            values[name] = words.pop(0)
    return {**({} if source is None else files.read_source(source)), **values}


CASES = [(page.name, words) for page in PAGES for words in commands(page)]


def test_every_method_is_described():
    text = (ROOT / "docs/methods.md").read_text()
    assert [n for n in validation.alternatives("algorithm") if f"`{n}`" not in text] == []


@pytest.mark.parametrize(
    ("page", "words"), CASES, ids=[f"{page}-{i}" for i, (page, _) in enumerate(CASES)]
)
def test_a_documented_command_is_valid(page, words):
    del page  # for the name of the case
    validation.validate(settings(words))
