"""A network taken out of a run: its files, what reads them, and what is refused."""

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from fedjaxprune import trees
from fedjaxprune.cli import main
from fedjaxprune.errors import RunFolderError
from fedjaxprune.experiment.exporting import export, model_card
from fedjaxprune.experiment.exporting import safetensors as tensors
from fedjaxprune.experiment.folder.layout import CHECKPOINTS, CONFIG
from fedjaxprune.structure.compaction import compact

for package in export.NEEDED:
    pytest.importorskip(package, reason="exports need the extra `export`")


SPARSE = [
    "run", "--method", "random_masks", "--sparsity", "0.98", "--model", "mlp", "--num-rounds", "2",
    "--num-clients", "4", "--cohort-size", "2", "--devices", "1", "--chunk-size", "1",
    "--steps", "1",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def put_back():
    before = jax.config.values["jax_compilation_cache_dir"]
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Make a run so sparse that channels die."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    main.main([*SPARSE, "--folder", str(folder)])
    return folder


@pytest.fixture(scope="module")
def exported(run):
    """Export it."""
    facts = export.export(run, run / "export")
    return run / "export", facts


def images(count):
    return np.random.default_rng(0).integers(0, 17, (count, 8, 8, 1), dtype=np.uint8)


def test_what_is_exported_says_what_the_run_says(run, exported):
    folder, facts = exported
    small, whole = export.read(folder), export.read(str(run))
    for count in (1, 7):
        expected = np.asarray(whole.predict(images(count)))
        found = np.asarray(small.predict(images(count)))
        assert expected.shape == (count, 10)
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    assert facts.small.changes
    assert facts.num_weights[0] == sum(trees.sizes(whole.params))
    assert facts.num_weights[1] == sum(trees.sizes(small.params)) < facts.num_weights[0]
    for mask, leaf in zip(jax.tree.leaves(small.masks), jax.tree.leaves(small.params), strict=True):
        assert mask.shape == leaf.shape
        assert not leaf[~mask].any()


@pytest.mark.slow
def test_the_program_runs_where_only_jax_is(exported, tmp_path):
    folder, _ = exported
    np.save(tmp_path / "images.npy", images(3))
    code = (
        "import pathlib, sys, numpy\n"
        "from jax import export\n"
        "blob = bytearray(pathlib.Path('model.stablehlo').read_bytes())\n"
        f"logits = export.deserialize(blob).call(numpy.load({str(tmp_path / 'images.npy')!r}))\n"
        f"numpy.save({str(tmp_path / 'logits.npy')!r}, logits)\n"
        "assert not {'fedjaxprune', 'flax', 'safetensors'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(
        np.load(tmp_path / "logits.npy"), export.read(folder).predict(images(3)), rtol=1e-5
    )


def test_the_tensors_are_read_by_safetensors_alone(exported):
    folder, facts = exported
    import safetensors

    with safetensors.safe_open(folder / export.TENSORS, framework="numpy") as file:
        names, metadata = list(file.keys()), file.metadata()
        live = sum(
            file.get_tensor(name).size
            for name in names
            if name.startswith("params/") and not name.endswith(tensors.MASK)
        )
    assert live == facts.num_live  # what is pruned takes a bit
    assert set(json.loads(metadata["shapes"])) == {
        name.removesuffix(tensors.MASK) for name in names if name.endswith(tensors.MASK)
    }
    assert (folder / export.TENSORS).stat().st_size < facts.sizes["dense"] / 3.5


def test_constants_are_named_by_what_they_feed(exported):
    import safetensors

    with safetensors.safe_open(exported[0] / export.TENSORS, framework="numpy") as file:
        found = [name for name in file.keys() if name.startswith("constants/")]  # noqa: SIM118
    layers = {"constants/dense_2", "constants/dense_3"}
    assert found
    assert {name.rpartition("/")[0] for name in found} <= layers


def test_the_card_tells_data_method_costs_accuracy_and_licence(exported):
    folder, facts = exported
    text = (folder / export.CARD).read_text(encoding="utf-8")
    assert facts.summary
    for words in (
        "random_masks",
        "digits",
        "CC BY 4.0",
        f"{100 * facts.summary['test']['accuracy']:.2f} %",
        "sent up, measured",
        "sparsity",
        "dense_1/kernel",
        "fedjaxprune run --method random_masks",
        "from jax import export",
        '["0", "1", "2", ',
    ):
        assert words in text
    assert (folder / CONFIG).read_bytes() == (folder.parent / CONFIG).read_bytes()
    assert "see the page of 'kmnist' at TFDS" in model_card.licence("kmnist:3.0.1")


def call(capsys, *args):
    try:
        main.main([str(arg) for arg in args])
        status = 0
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def snapshot(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_command_tells_what_it_did_and_leaves_the_run_alone(capsys, run, tmp_path):
    before = snapshot(run)
    status, out, err = call(capsys, "export", run, "--out", tmp_path / "net")
    assert (status, err) == (0, "")
    assert "dead channels removed: 34,110 parameters become" in out
    assert str(tmp_path / "net") in out
    assert snapshot(run) == before
    status, _, err = call(capsys, "export", run, "--out", tmp_path / "net")
    assert status == 2
    assert err == f"error: {str(tmp_path / 'net')!r} exists; give a folder that does not.\n"


def test_what_is_no_run_is_refused_in_one_sentence(capsys, run, exported, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    several = tmp_path / "several"
    for name in ("a", "b"):
        (several / name).mkdir(parents=True)
        shutil.copyfile(run / CONFIG, several / name / CONFIG)
    bare = tmp_path / "bare"
    shutil.copytree(run, bare, ignore=shutil.ignore_patterns(CHECKPOINTS, "export"))
    edited = tmp_path / "edited"
    shutil.copytree(run, edited, ignore=shutil.ignore_patterns("export"))
    text = (edited / CONFIG).read_text()
    (edited / CONFIG).write_text(text.replace("- 200\n", "- 201\n"))
    broken = tmp_path / "broken"
    shutil.copytree(run, broken, ignore=shutil.ignore_patterns("export"))
    for path in (broken / CHECKPOINTS).rglob("*"):
        if path.is_file() and "about" not in path.parts:
            path.write_bytes(b"")
    cases = {
        tmp_path / "nowhere": "is no run: there is no such folder.",
        tmp_path / "file": "is no run: it is a file.",
        tmp_path / "empty": "is no run: there is no config.yaml in it, nor in a folder in it.",
        several: f"is no run but holds 2: give one of them ({str(several / 'a')!r}, ",
        exported[0]: "is no run: it is an exported network.",
        bare: "has no checkpoint, so there is no network to take out of it",
        edited: "the network is not that of the run in",
        broken: "no checkpoint of the run in",
    }
    for folder, sentence in cases.items():
        status, out, err = call(capsys, "export", folder, "--out", tmp_path / "net")
        assert (status, out) == (2, "")
        assert sentence in err.splitlines()[-1]
        assert not (tmp_path / "net").exists()
    for name, sentence in (("empty", "there is no config.yaml"), ("several", "but holds 2: give")):
        with pytest.raises(RunFolderError, match=f"is no run and no exported network.*{sentence}"):
            export.read(tmp_path / name)


def test_filters_that_stay_are_listed_once_by_reason():
    left = [
        compact.Remainder("a", 3, (0, 1), "it counts"),
        compact.Remainder("b", 3, (2,), "its channel lives", ("a",)),
        compact.Remainder("c", 3, (4, 5, 6), "it counts"),
    ]
    assert model_card.by_reason(left) == {
        "it counts": {"a": 2, "c": 3},
        "its channel lives": {"b": 1},
    }


def test_nothing_is_left_half_written(run, tmp_path, monkeypatch):
    def fail(facts):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_card, "write", fail)
    with pytest.raises(RunFolderError, match="No space left on device"):
        export.export(run, tmp_path / "net")
    assert list(tmp_path.iterdir()) == []


def test_damaged_files_and_missing_packages_are_named(exported, tmp_path, monkeypatch):
    folder, _ = exported
    for name in (export.TENSORS, export.PROGRAM):
        copy = tmp_path / name.replace(".", "-")
        shutil.copytree(folder, copy)
        (copy / name).write_bytes((copy / name).read_bytes()[:100])
        with pytest.raises(RunFolderError, match=f"{name}' cannot be read: it is damaged"):
            export.read(copy)
    monkeypatch.setattr(export, "NEEDED", ("safetensors", "no_such_package"))
    with pytest.raises(RunFolderError, match=r"need no_such_package: .*fedjaxprune\[export\]"):
        export.read(folder)


@pytest.mark.parametrize("seed", range(4))
def test_tensors_come_back_as_they_were(seed, tmp_path):
    rng = np.random.default_rng(seed)
    shapes = [(7,), (3, 5), (2, 2, 3, 4), (1,), ()]
    params = {
        f"layer_{i}": {"kernel": rng.normal(size=shape).astype(np.float32)}
        for i, shape in enumerate(shapes)
    }
    density = rng.random(len(shapes))
    masks = {
        name: {"kernel": np.asarray(rng.random(leaf["kernel"].shape) < density[i])}
        for i, (name, leaf) in enumerate(params.items())
    }
    masks["layer_1"]["kernel"][:] = True
    masks["layer_0"]["kernel"][:] = False
    params = jax.tree.map(lambda leaf, mask: np.where(mask, leaf, np.float32(0)), params, masks)
    path = pathlib.Path(tmp_path) / "net.safetensors"
    tensors.write(path, params, masks, {"state": {"mean": np.arange(3, dtype=np.int32)}})
    arrays, found = tensors.read(path)
    np.testing.assert_array_equal(arrays.pop("state")["mean"], np.arange(3))
    for tree, expected in ((arrays["params"], params), (found["params"], masks)):
        jax.tree.map(np.testing.assert_array_equal, tree, expected)
