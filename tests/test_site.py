"""The site: its code runs, every public name has an entry, and notebooks match their pages.

``pytest -m docs`` runs the blocks of the tutorials and guides, which takes minutes, and needs
``pip install -e '.[docs]'``.
"""

import ast
import importlib.util
import json
import os
import pathlib
import re
import runpy
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
TUTORIALS = sorted(
    page for page in (DOCS / "tutorials").glob("*.md") if "{code-cell}" in page.read_text()
)
GUIDES = sorted(  # but for the one that tests/test_docs.py runs
    page
    for page in (DOCS / "how_to").glob("*.md")
    if "```python\n" in page.read_text() and page.stem != "own_parts"
)


def cells(page):
    """Give the code of a tutorial, cell by cell."""
    blocks = re.findall(r"^```\{code-cell\} python\n(.*?)^```", page.read_text(), re.M | re.S)
    return [re.sub(r"\A:tags: .*\n\n", "", block) for block in blocks]


def snippets(page):
    """Give the code of a guide, and the files that it shows by their names."""
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)
    named = [(re.match(r"# ([\w.]+\.py)\n", block), block) for block in blocks]
    files = {match[1]: block for match, block in named if match}
    return [block for match, block in named if not match], files


def execute(code, folder):
    """Run code as users do: in a fresh process, in a folder of its own."""
    (folder / "page.py").write_text("\n\n".join(code))
    done = subprocess.run(
        [sys.executable, "page.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.docs
@pytest.mark.parametrize("page", TUTORIALS, ids=[page.stem for page in TUTORIALS])
def test_a_tutorial_runs_from_top_to_bottom(page, tmp_path):
    execute(cells(page), tmp_path)


@pytest.mark.docs
@pytest.mark.parametrize("page", GUIDES, ids=[page.stem for page in GUIDES])
def test_the_snippets_of_a_guide_run(page, tmp_path):
    code, files = snippets(page)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        code.append(f"import {name.removesuffix('.py')}")
    execute(code, tmp_path)


def test_every_block_of_python_is_valid():
    for page in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]:
        for block in re.findall(r"^```py(?:thon)?\n(.*?)^```", page.read_text(), re.M | re.S):
            ast.parse(block, str(page))
        for block in cells(page):
            ast.parse(block, str(page))


def test_ci_runs_the_two_commands_of_the_readme():
    readme = (ROOT / "README.md").read_text()
    setup = readme.partition("## Set up")[2].partition("\n## ")[0]
    commands = [block.strip() for block in re.findall(r"```bash\n(.*?)```", setup, re.S)]
    assert len(commands) == 2
    assert all("\n" not in command and "pip install -e" in command for command in commands)
    run = [line.strip() for line in (ROOT / ".ci/run").read_text().splitlines()]
    assert [line for line in run if line in commands] == commands


def test_ci_builds_the_site_as_the_readme_says():
    readme = (ROOT / "README.md").read_text()
    [command] = re.findall(r"^pip install .*sphinx.*$", readme, re.M)
    assert f"  {command}" in (ROOT / ".ci/docs").read_text().splitlines()
    assert command in (ROOT / "CONTRIBUTING.md").read_text()


@pytest.mark.docs
def test_every_public_name_has_an_entry():
    pytest.importorskip("sphinx", reason="pip install -e '.[docs]'")
    spec = importlib.util.spec_from_file_location("make_reference", DOCS / "make_reference.py")
    assert spec is not None
    assert spec.loader is not None
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    described = set()
    for module, text in maker.module_pages(maker.entries()).items():
        named = re.findall(r"^\.\. py:(?:function|class|exception|data):: (\w+)", text, re.M)
        described |= {module, *(f"{module}.{name}" for name in named)}
    lines = (ROOT / "tests/api.txt").read_text().splitlines()
    assert {line.partition("(")[0] for line in lines} - described == set()


def test_notebooks_are_the_tutorials():
    tool = runpy.run_path(str(DOCS / "make_notebooks.py"))
    for page in TUTORIALS:
        notebook = DOCS / "notebooks" / f"{page.stem}.ipynb"
        made = tool["notebook"](page.read_text(encoding="utf-8"))
        assert json.loads(notebook.read_text(encoding="utf-8")) == made, (
            "run `python docs/make_notebooks.py`"
        )


def test_a_function_that_raises_says_so():
    """A public function with a `raise` of its own has a section Raises."""
    silent = []
    for line in (ROOT / "tests/api.txt").read_text().splitlines():
        path = line.partition("(")[0]
        module, _, name = path.rpartition(".")
        file = ROOT / f"{module.replace('.', '/')}.py"
        if not file.exists() or "(" not in line:
            continue
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name == name and raises(node):
                said = ast.get_docstring(node) or ""
                silent += [] if "Raises:" in said or "errors" in said.lower() else [path]
    assert silent == []


def raises(function):
    """Tell whether a function raises itself, not in a function inside."""
    waiting = list(function.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Raise):
            return True
        if not isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            waiting += ast.iter_child_nodes(node)
    return False
