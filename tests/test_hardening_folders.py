"""Run folders from strangers: looking at one ends with a sentence or a result, and stays in it."""

import csv
import functools
import io
import json
import os
import shutil

import numpy as np
import pytest
from click.testing import CliRunner

from fedjaxprune.cli.main import cli
from fedjaxprune.errors import FedJaxPruneError, RunFolderError, visible
from fedjaxprune.experiment import reading
from fedjaxprune.experiment.analysis import compare, tables
from fedjaxprune.experiment.analysis.report import page
from fedjaxprune.experiment.exporting import restore, safetensors
from fedjaxprune.experiment.folder import failure, layout, load, network, record
from fedjaxprune.experiment.run import launch
from fedjaxprune.experiment.run.listener import Listener
from tests import folders


@pytest.mark.parametrize(
    "source",
    [
        "Infinity",
        "[NaN]",
        "-Infinity",
        "1e999",
        "1e101",
        "9" * 31,
        "-" + "9" * 5_000,
        "[" * 100_000,
        "[" * 40 + "]" * 40,
        '{"a":' * 40 + "1" + "}" * 40,
        '"\\ud800"',
        '{"\\uDC00": 1}',
        "",
    ],
)
def test_json_of_strangers_is_bounded(source):
    with pytest.raises(ValueError, match=r"."):
        reading.from_json(source)


def test_json_of_our_own_is_read():
    tree = {"a": [1, -2.5e-300, 1e100, None, True, 10**29], "b": {"c": "\U0001f600\x1b"}}
    assert reading.from_json(json.dumps(tree)) == tree


def test_a_number_on_record_can_be_squared():
    assert record.finite(1e38) == 1e38
    assert record.finite(np.float64(1e101)) is None
    assert record.finite(float("nan")) is None


def test_a_file_is_made_anew_and_not_written_through_a_link(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("as before")
    (tmp_path / "link").symlink_to(outside)
    reading.write_new(tmp_path / "link", b"new")
    assert (outside.read_text(), (tmp_path / "link").read_text()) == ("as before", "new")


def make(folder, settings=None):
    """Make a run with two rounds on record."""
    lines = [folders.line(1, accuracy=0.5), folders.line(2, accuracy=0.6)]
    return folders.write(folder, lines, settings)


ODD_TEXTS = ("[/bold]", "[link=file:///x]y[/link]", "\x1b]0;title\x07\x1b[31m", "\u202eabc", "=1+1")


def texts(run, text):
    """Put a text where a method, a part's path, a command and an error belong."""
    config = folders.changed(folders.CONFIG, {"method.name": text, "model.name": text, "seed": 0})
    stored = {"schema": layout.SCHEMA, **config, "command": text, "versions": {text: text}}
    stored["parts"] = {"method": {"name": text, "path": text, "sha256": text}}
    (run / layout.CONFIG).write_text(json.dumps(stored))
    (run / layout.SUMMARY).unlink()
    (run / failure.FAILED).write_text(json.dumps({"round": 3, "error": f"{text} said {text}"}))


def put(name, content):
    def change(run):
        (run / name).write_text(content)

    return change


def pipe(name):
    def change(run):
        (run / name).unlink(missing_ok=True)
        os.mkfifo(run / name)

    return change


def link(name, target):
    def change(run):
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(target)

    return change


def field(path, value, row=-1):
    """Put a value into a line of the record."""

    def change(run):
        rows = (run / layout.METRICS).read_text().splitlines()
        line = folders.changed(json.loads(rows[row]), {path: "@"})
        rows[row] = json.dumps(line).replace('"@"', value)
        (run / layout.METRICS).write_text("\n".join(rows) + "\n")

    return change


def cut(name, part):
    def change(run):
        content = (run / name).read_bytes()
        (run / name).write_bytes(content[: int(part * len(content))])

    return change


def double(name):
    def change(run):
        (run / name).write_bytes(2 * (run / name).read_bytes())

    return change


ODD_VALUES = {
    "infinity": "Infinity",
    "large": "9" * 400,
    "larger": "1e308",
    "deep": "[" * 5_000 + "]" * 5_000,
    "text": '"[/bold]"',
    "surrogate": '"\\ud800"',
    "list": "[1, [2], {}]",
    "mapping": '{"a": {"b": []}}',
    "null": "null",
    "negative": "-1e99",
}
FIELDS = [
    "round",
    "stage",
    "stage_round",
    "time_s",
    "train",
    "train.loss",
    "test",
    "test.accuracy",
    "mask",
    "mask.sparsity",
    "mask.sparsity_by_layer",
    "traffic",
    "traffic.up",
    "traffic.up.total_bits",
    "traffic.by_client",
    "compute",
    "compute.training_flops",
    "clients",
    "clients.participating",
    "clients.rejected",
    "clients.accuracy",
    "method",
]
HEADER = ["schema", "stages", "num_prunable", "num_weights", "fedjaxprune"]
OF_FOLDER = (layout.CONFIG, layout.METRICS, layout.SUMMARY, layout.NETWORK, failure.FAILED)
HOSTILE = {
    **{f"field {path} {k}": field(path, v) for path in FIELDS for k, v in ODD_VALUES.items()},
    **{f"header {path} {k}": field(path, v, 0) for path in HEADER for k, v in ODD_VALUES.items()},
    **{f"pipe {name}": pipe(name) for name in OF_FOLDER},
    **{f"device {name}": link(name, "/dev/zero") for name in OF_FOLDER},
    **{f"deep {name}": put(name, "[" * 20_000) for name in OF_FOLDER},
    **{f"empty {name}": put(name, "") for name in OF_FOLDER},
    **{f"zeros {name}": put(name, "\0" * 1000) for name in OF_FOLDER},
    **{
        f"cut {name} {n}": cut(name, n / 7)
        for name in (layout.CONFIG, layout.METRICS)
        for n in range(1, 7)
    },
    **{f"double {name}": double(name) for name in (layout.CONFIG, layout.METRICS)},
    **{
        f"client ids {n}": field(
            "traffic.by_client", f'[{{"client_ids": {one}, "up_bits": 1, "down_bits": 1}}]'
        )
        for n, one in enumerate(("[1]", "{}", '"a"', '"1x99999999"', '"1 "', "null", "7"))
    },
    "alias": put(layout.CONFIG, "a: &a [x]\nb: [*a, *a]\n"),
}


def everything(run, other):
    """Look at a run in every way; each ends with a sentence or a result."""
    for action in (
        lambda: show(*compare.of_folders([run, other])),
        lambda: restore.check(run),
        lambda: network.read(run),
        lambda: layout.stored(run),
        lambda: record.read(run),
    ):
        said = ""
        try:
            action()
        except FedJaxPruneError as error:
            said = str(error)
        assert "\n" not in said


def show(compared, notes):
    """Write a comparison in all forms."""
    from rich.console import Console

    file = io.StringIO()
    console = Console(file=file, width=100)
    for table in tables.terminal(compared, width=100):
        console.print(table)
    found = "".join([file.getvalue(), tables.markdown(compared), tables.comma_separated(compared)])
    assert not {"\x1b", "\x07", "\u202e"} & set(found)
    return compared, notes


QUICK = [
    name
    for name in HOSTILE
    if not name.startswith(("field", "header", "cut", "zeros", "empty"))
    or name.endswith(("stages list", "total_bits infinity", "up negative", "jsonl 4"))
]
ALL = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in HOSTILE]


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Give a sound run to compare with."""
    return make(tmp_path_factory.mktemp("sound") / "other", {"method.name": "fedprox"})


@pytest.mark.parametrize("name", ALL)
def test_a_hostile_folder_ends_with_a_sentence_or_a_result(name, other, tmp_path):
    run = make(tmp_path / "run")
    HOSTILE[name](run)
    everything(run, other)


@pytest.mark.slow
@pytest.mark.parametrize("name", [one for one in HOSTILE if one.startswith("field")])
def test_a_page_of_a_hostile_folder_is_made_or_refused(name, other, tmp_path):
    run = make(tmp_path / "run")
    HOSTILE[name](run)
    done = CliRunner().invoke(cli, ["report", str(run), str(other), "--out", str(tmp_path / "p")])
    assert done.exit_code == 0 or isinstance(done.exception, FedJaxPruneError), done.exception


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_a_text_of_a_stranger_is_shown_as_it_stands(text, tmp_path):
    run, other = make(tmp_path / "run"), make(tmp_path / "other")
    texts(run, text)
    compared, notes = show(*compare.of_folders([run, other]))
    assert visible(text) in compared.groups[0].label
    failed = load.read(run).failure
    assert failed is not None
    assert visible(text) in failed.error
    made = page.make(compared, notes)
    assert not {"\x1b", "\x07", "\u202e"} & set(made)
    done = CliRunner().invoke(cli, ["compare", str(run), str(other)])
    assert done.exit_code == 0, done.output
    assert visible(text)[:5] in done.output


def test_a_formula_is_a_text_in_csv(tmp_path):
    run, other = make(tmp_path / "run"), make(tmp_path / "other")
    texts(run, "=HYPERLINK(1)")
    compared, _ = compare.of_folders([run, other])
    rows = csv.reader(io.StringIO(tables.comma_separated(compared)))
    assert not [cell for row in rows for cell in row if cell[:1] in tuple("=+@\t")]


def test_markup_is_escaped_in_markdown(tmp_path):
    run, other = make(tmp_path / "run"), make(tmp_path / "other")
    texts(run, "<b>|[x](y)`")
    compared, _ = compare.of_folders([run, other])
    assert r"\<b>\|\[x\](y)\`" in tables.markdown(compared)


def test_the_page_holds_no_markup_of_a_stranger(tmp_path):
    run, other = make(tmp_path / "run"), make(tmp_path / "other")
    texts(run, "<script>alert(1)</script>")
    made = page.make(*compare.of_folders([run, other]))
    assert "<script>alert" not in made


class Built(Exception):
    """A run got as far as being built."""


@pytest.fixture
def resume(monkeypatch):
    def build(config, warn, processes):
        raise Built

    monkeypatch.setattr(launch, "_build", build)
    return functools.partial(launch.resume, listener=Listener(warn=lambda text: None))


def planted(kind, run, outside):
    """Put a link that leads out of a folder where a run writes."""
    outside.mkdir()
    (outside / "5").mkdir()
    if kind == "checkpoints":
        (run / layout.CHECKPOINTS).symlink_to(outside)
    elif kind == "step":
        (run / layout.CHECKPOINTS).mkdir()
        (run / layout.CHECKPOINTS / "5").symlink_to(outside / "5")
    elif kind == "skipped":
        (run / layout.SKIPPED).symlink_to(outside)
    elif kind == "pipe":
        (run / layout.CHECKPOINTS / "5" / "about").mkdir(parents=True)
        os.mkfifo(run / layout.CHECKPOINTS / "5" / "about" / "metadata")
    else:
        (run / kind).unlink(missing_ok=True)
        (outside / "file").write_text("as before")
        (run / kind).symlink_to(outside / "file")


@pytest.mark.parametrize(
    "kind", ["checkpoints", "step", "skipped", "pipe", layout.PICTURE, layout.SUMMARY]
)
def test_a_run_with_links_is_not_resumed_and_not_exported(kind, tmp_path, resume):
    run = make(tmp_path / "run", {"model.hidden_size": ...})
    planted(kind, run, tmp_path / "outside")
    before = sorted(map(str, tmp_path.rglob("*")))
    with pytest.raises(RunFolderError, match=r"symbolic link|no regular file"):
        resume(run)
    with pytest.raises(RunFolderError, match=r"symbolic link|no regular file"):
        restore.check(run)
    assert sorted(map(str, tmp_path.rglob("*"))) == before


def test_a_run_without_links_is_resumed(tmp_path, resume):
    with pytest.raises(Built):
        resume(make(tmp_path / "run", {"model.hidden_size": ...}))


def test_a_record_behind_a_link_is_not_written(tmp_path):
    run = make(tmp_path / "run")
    outside = tmp_path / "outside"
    shutil.move(run / layout.METRICS, outside)
    (run / layout.METRICS).symlink_to(outside)
    before = outside.read_bytes()
    with pytest.raises(OSError, match="symbolic"):
        record.append(run, folders.line(3))
    assert outside.read_bytes() == before


def test_a_page_replaces_a_link_and_not_what_it_leads_to(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("as before")
    (tmp_path / "report.html").symlink_to(outside)
    page.write(tmp_path / "report.html", "new")
    assert outside.read_text() == "as before"
    assert not (tmp_path / "report.html").is_symlink()


@pytest.mark.parametrize(
    "shape", ["[1000000000000]", "[-8]", '["a"]', "7", "[8, 1e9]", "[" * 50 + "]" * 50]
)
def test_an_export_cannot_claim_memory(shape):
    tensors = {"a.mask": np.zeros(1, np.uint8), "a.values": np.zeros(0, np.float32)}
    with pytest.raises((ValueError, TypeError)):
        safetensors.decode(tensors, {"shapes": f'{{"a": {shape}}}'})


@pytest.mark.parametrize(
    "changes",
    [
        {"input_shape": [10**9, 10**9]},
        {"input_shape": ["a"]},
        {"input_shape": 3},
        {"input_dtype": "object"},
        {"input_dtype": "x"},
        {"num_outputs": -1},
        {"num_classes": 1e9},
        {"params": {"a": 3}},
        {"params": {"a": ["float32", [-1]]}},
        {"params": []},
        {"prunable": 5, "other": 1},
    ],
)
def test_what_is_said_of_a_network_is_checked(changes, tmp_path):
    known = network.Network(
        "classification", (4,), "float32", 3, 3, (), None, None, None,
        {"a": ["float32", [4, 3]]}, {}, ("a",), 0,
    )  # fmt: skip
    (tmp_path / layout.NETWORK).write_text(network.to_text(known))
    assert network.read(tmp_path) == known
    found = {**json.loads(network.to_text(known)), **changes}
    (tmp_path / layout.NETWORK).write_text(json.dumps(found))
    with pytest.raises(RunFolderError, match="cannot be read"):
        network.read(tmp_path)
