"""What the documents tell users to type is what the command takes, and their code runs."""

import os
import pathlib
import re
import shlex
import subprocess
import sys

import jax
import pytest

import fedjaxprune as fjp
from fedjaxprune import registry
from fedjaxprune.cli import main as command
from fedjaxprune.data import conversion
from fedjaxprune.experiment.config import errors, files, resolve
from fedjaxprune.experiment.execution import joining
from fedjaxprune.experiment.execution.processes import ALONE
from fedjaxprune.experiment.run import launch
from fedjaxprune.models import outside

ROOT = pathlib.Path(__file__).parents[1]
GENERATED = ("reference/api", "reference/parts")  # by docs/make_reference.py, for the site
PAGES = [
    ROOT / "README.md",
    *(
        page
        for page in sorted((ROOT / "docs").rglob("*.md"))
        if page.parent.name not in ("notes", "parts", "api")
    ),
]


def commands(page, kind="bash"):
    """List the words behind every ``fedjaxprune`` in a page's blocks of shell commands."""
    blocks = re.findall(rf"^```{kind}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    for line in "".join(blocks).replace("\\\n", " ").splitlines():
        words = shlex.split(line.partition("&&")[0], comments=True)
        if words[:1] == ["fedjaxprune"] and not any("..." in word for word in words):
            yield words[1:]


CASES = [
    (page.name, words)
    for page in PAGES
    for words in commands(page)
    if words[0] in ("run", "list", "describe")
]


@pytest.mark.parametrize(
    ("page", "words"), CASES, ids=[f"{page}-{i}" for i, (page, _) in enumerate(CASES)]
)
def test_a_documented_command_is_valid(page, words, monkeypatch, tmp_path):
    del page  # for the name of the case
    monkeypatch.chdir(tmp_path)
    begun = []
    monkeypatch.setattr(launch, "start", lambda config, **rest: begun.append(config))
    monkeypatch.setattr(launch, "resume", lambda folder, *_, **rest: begun.append(folder))
    monkeypatch.setattr(joining, "join", lambda membership: ALONE)
    if "--resume" in words:
        folder = pathlib.Path(words[words.index("--resume") + 1])
        folder.mkdir(parents=True)
        stored = files.to_yaml(resolve.resolve({}), versions={})
        (folder / "config.yaml").write_text(stored)
    while "--track" in words:  # its package need not be installed
        at = words.index("--track")
        words = words[:at] + words[at + 2 :]
    command.main(words)  # a refusal is a SystemExit
    assert len(begun) == (words[0] == "run")


def test_every_command_is_documented():
    text = "".join(page.read_text() for page in PAGES)
    assert [name for name in command.cli.commands if f"fedjaxprune {name}" not in text] == []


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            place = os.path.normpath(page.parent / target)
            if not any(f"/docs/{folder}/" in place for folder in GENERATED):
                assert os.path.exists(place), (page.name, target)


def test_the_page_of_methods_is_what_the_methods_say():
    done = subprocess.run(
        [sys.executable, "docs/make_methods.py", "--check"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_page_of_migration_has_every_renamed_setting():
    text = (ROOT / "docs/reference/migration.md").read_text()
    settings = text.partition("\n## Settings\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| `([\w. `]+)` \|$", settings, re.MULTILINE)
    assert {old: new.replace("`", "") for old, new in rows} == dict(errors.RENAMED)


@pytest.fixture(scope="module")
def own_parts(tmp_path_factory):
    """Write the files of docs/how_to/own_parts.md, which begin with their name."""
    folder = tmp_path_factory.mktemp("own_parts")
    text = (ROOT / "docs/how_to/own_parts.md").read_text()
    for name, code in re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```", text, re.M | re.S):
        (folder / name).write_text(code)
    return folder


OWN = [
    words
    for words in commands(ROOT / "docs/how_to/own_parts.md", "console")
    if any(".py:" in word for word in words) and words[0] in ("run", "describe")
]


@pytest.mark.parametrize("words", OWN, ids=range(len(OWN)))
def test_a_command_of_the_page_is_valid(own_parts, words, monkeypatch):
    test_a_documented_command_is_valid("own_parts.md", words, monkeypatch, own_parts)


@pytest.mark.parametrize("name", ["short.py:momentum_sgd", "long.py:OPTIMIZER"])
def test_an_optimizer_of_the_page_is_a_part(own_parts, name):
    part = registry.find("optimizer", f"{own_parts}/{name}").part
    optimizer = part.build(part.settings(learning_rate=0.5))
    assert jax.tree.leaves(optimizer.init({"kernel": jax.numpy.zeros(3)}))


@pytest.mark.parametrize("name", ["linen", "batch_norm", "equinox", "functions", "said"])
def test_a_network_of_the_page_is_a_model(own_parts, name):
    part = registry.find("model", f"{own_parts}/networks.py:{name}").part
    made = part.build(part.settings(), input_shape=(8, 8, 1), num_classes=10)
    model = outside.as_model(made, input_shape=(8, 8, 1))
    params, state = jax.eval_shape(model.init, jax.random.key(0))
    inputs = jax.ShapeDtypeStruct((3, 8, 8, 1), jax.numpy.float32)
    assert jax.eval_shape(model.predict, params, state, inputs).shape == (3, 10)


def test_the_data_set_of_the_page_has_client_ids(own_parts):
    part = registry.find("dataset", f"{own_parts}/own_data.py:sine").part
    data = conversion.as_dataset(part.build(part.settings(num_users=4)))
    assert data.num_classes == 2
    assert set(data.keys["user"]) == set(range(4))


def test_the_method_of_the_page_runs(own_parts, tmp_path):
    run = fjp.run(
        method=f"{own_parts}/rigl.py:METHOD",
        model={"name": "mlp", "hidden_sizes": (8,)},
        sparsity=0.8,
        prune_every=1,
        num_rounds=2,
        num_clients=4,
        devices=1,
        chunk_size=1,
        folder=tmp_path / "run",
    )
    assert run.state == "finished"
    assert run.record["mask.sparsity"] == pytest.approx([0.8, 0.8], abs=5e-3)  # by layer
    assert run.record["mask.num_changed"][1] > 0
    [whose] = [one for one in ("rigl.py",) if one in (run.folder / "config.yaml").read_text()]
    assert whose
