"""Reading data sets: digits, TFDS folders made here on the spot, and (where present) real ones."""

import importlib
import io
import json
import subprocess
import sys
import time
import types
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedjaxprune.data import datasets
from fedjaxprune.data.sources import tfds
from fedjaxprune.errors import ConfigError, DataError

FEATURES = "tensorflow_datasets.core.features"
LABEL = {
    "pythonClassName": f"{FEATURES}.class_label_feature.ClassLabel",
    "classLabel": {"numClasses": "3"},
}


TEXT = {"pythonClassName": f"{FEATURES}.text_feature.Text", "text": {}}


def image_feature(dtype="uint8", channels=1):
    return {
        "pythonClassName": f"{FEATURES}.image_feature.Image",
        "image": {"dtype": dtype, "shape": {"dimensions": ["-1", "-1", str(channels)]}},
    }


def label_feature(num_classes):
    """A class label without names."""
    return {**LABEL, "classLabel": {"numClasses": str(num_classes)}}


def pictures(num, *, size=(5, 4), seed=0):
    rng = np.random.default_rng(seed)
    return [(rng.integers(0, 256, size, dtype=np.uint8), int(rng.integers(3))) for _ in range(num)]


def prepare(
    root,
    name,
    splits,
    *,
    features=None,
    version="1.0.0",
    file_format="array_record",
    supervised=(),
):
    """Lay the files of a prepared TFDS set.

    `splits` maps names to lists of (image, label), of (image, labels by feature), or of
    (text, None).
    """
    tfds._tfds()  # imports it without its warnings
    # Generated code, opaque to the type checker.
    array_record: Any = importlib.import_module("array_record.python.array_record_module")
    proto: Any = importlib.import_module("tensorflow_datasets.proto")

    folder = root / name / version
    folder.mkdir(parents=True)
    features = features or {"picture": image_feature(), "kind": LABEL}
    images = [key for key, value in features.items() if "image" in value]
    labels = [key for key, value in features.items() if "classLabel" in value]
    (folder / "features.json").write_text(
        json.dumps(
            {
                "pythonClassName": f"{FEATURES}.features_dict.FeaturesDict",
                "featuresDict": {"features": features},
            }
        )
    )
    texts = [key for key, value in features.items() if "text" in value]
    for key in labels:
        if features[key] == LABEL:
            (folder / f"{key}.labels.txt").write_text("cat\ndog\nowl\n")
    info: dict[str, Any] = {
        "name": name.split("/")[0],
        "version": version,
        "fileFormat": file_format,
        "splits": [],
    }
    if supervised:
        keys = [{"featureKey": key} for key in supervised]
        info["supervisedKeys"] = {"tuple": {"items": keys}}
    for split, examples in splits.items():
        info["splits"].append(
            {
                "name": split,
                "numBytes": "1",
                "shardLengths": [str(len(examples))],
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
        )
        file = folder / f"{info['name']}-{split}.{file_format}-00000-of-00001"
        writer = array_record.ArrayRecordWriter(str(file), "group_size:1")
        for pixels, label in examples:
            content = pixels.encode() if texts else as_png(pixels)
            values = {
                key: proto.tf_feature_pb2.Feature(
                    bytes_list=proto.tf_feature_pb2.BytesList(value=[content])
                )
                for key in (*images, *texts)
            }
            for key in labels:
                own = label[key] if isinstance(label, dict) else label
                values[key] = proto.tf_feature_pb2.Feature(
                    int64_list=proto.tf_feature_pb2.Int64List(value=[own])
                )
            example = proto.tf_example_pb2.Example(
                features=proto.tf_feature_pb2.Features(feature=values)
            )
            writer.write(example.SerializeToString())
        writer.close()
    (folder / "dataset_info.json").write_text(json.dumps(info))


def as_png(pixels):
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG")
    return png.getvalue()


def read(name, folder, **settings):
    return tfds.build(tfds.TfdsSettings(tfds_name=name, data_dir=str(folder), **settings))


def assert_holds(split, examples):
    np.testing.assert_array_equal(split["inputs"], np.stack([x[..., None] for x, _ in examples]))
    np.testing.assert_array_equal(split["labels"], [label for _, label in examples])
    assert split["inputs"].dtype == np.uint8
    assert split["labels"].dtype == np.int32


def test_digits_need_nothing_and_are_split_evenly():
    digits = datasets.load("digits", data_dir="/does/not/matter")
    assert digits.train["inputs"].shape == (1442, 8, 8, 1)
    assert digits.test["inputs"].shape == (355, 8, 8, 1)
    assert digits.train["inputs"].max() == digits.max_value == 16
    counts = [np.bincount(split["labels"]) for split in (digits.train, digits.test)]
    np.testing.assert_array_equal(counts[1], (counts[0] + counts[1]) // 5)
    for split in (digits.train, digits.test):
        assert split["inputs"].dtype == np.uint8
        assert split["labels"].dtype == np.int32


def test_a_tfds_that_cannot_be_imported_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", types.ModuleType("empty"))
    monkeypatch.setitem(sys.modules, "tensorflow_datasets.public_api", None)
    with pytest.raises(DataError, match=r"^tensorflow-datasets is installed, but cannot be imp"):
        datasets.load("mnist", data_dir=tmp_path)


def test_importing_does_not_import_tfds():
    program = (
        "import sys, fedjaxprune.data.datasets; assert 'tensorflow_datasets' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("test_split", ["test", "validation"])
def test_a_prepared_set_is_read_as_stored(tmp_path, test_split):
    train, test = pictures(1003), pictures(7, seed=1)
    prepare(tmp_path, "my_pets", {"train": train, test_split: test})
    dataset = datasets.load("my_pets", data_dir=tmp_path)
    assert_holds(dataset.train, train)
    assert_holds(dataset.test, test)
    assert dataset.class_names == ("cat", "dog", "owl")
    assert (dataset.num_classes, dataset.input_shape) == (3, (5, 4, 1))
    assert (dataset.max_value, dataset.mean, dataset.std) == (255, None, None)


def test_the_environment_names_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    prepare(tmp_path, "my_pets", {"train": pictures(3), "test": pictures(2)})
    assert tfds.prepared() == ["my_pets"]
    assert len(datasets.load("my_pets").train["labels"]) == 3


def test_the_newest_version_is_read_unless_one_is_named(tmp_path):
    for version, num in (("1.0.0", 2), ("1.10.0", 3), ("1.9.0", 4)):
        prepare(tmp_path, "my_pets", {"train": pictures(num), "test": pictures(1)}, version=version)
    assert len(datasets.load("my_pets", data_dir=tmp_path).train["labels"]) == 3
    assert len(datasets.load("my_pets:1.9.0", data_dir=tmp_path).train["labels"]) == 4
    with pytest.raises(DataError, match=r"1.10.0.*not '3.0.0'"):
        datasets.load("my_pets:3.0.0", data_dir=tmp_path)


def test_configurations_are_read_by_name(tmp_path):
    for config in ("big", "small"):
        prepare(tmp_path, f"my_pets/{config}", {"train": pictures(2), "test": pictures(1)})
    assert tfds.prepared(tmp_path) == ["my_pets/big", "my_pets/small"]
    assert datasets.load("my_pets/big", data_dir=tmp_path).name == "my_pets/big"
    for name in ("my_pets", "my_pets/tiny"):
        with pytest.raises(DataError, match=r"prepared there are my_pets/big, my_pets/sm"):
            datasets.load(name, data_dir=tmp_path)


def test_digits_in_colour_are_normalized_and_never_mirrored(tmp_path):
    features = {"image": image_feature(channels=3), "label": LABEL}
    splits = {"train": pictures(3, size=(4, 4, 3)), "test": pictures(2, size=(4, 4, 3))}
    for name, may_flip in (("svhn_cropped", False), ("my_pets", True)):
        prepare(tmp_path, name, splits, features=features)
        dataset = datasets.load(name, data_dir=tmp_path)
        assert dataset.may_flip == may_flip
        assert read(name, tmp_path, flip="always").may_flip
        assert not read(name, tmp_path, flip="never").may_flip
    dataset = datasets.load("svhn_cropped:1.0.0", data_dir=tmp_path)
    assert not dataset.may_flip
    assert dataset.mean == (0.4377, 0.4438, 0.4728)
    assert dataset.std == (0.1980, 0.2010, 0.1970)


def test_of_two_class_labels_the_one_that_is_trained_on_or_asked_for(tmp_path):
    features = {"coarse_label": LABEL, "image": image_feature(), "label": label_feature(5)}
    splits = {
        split: [(pixels, {"coarse_label": kind, "label": kind + 2}) for pixels, kind in pictures(9)]
        for split in ("train", "test")
    }
    prepare(tmp_path, "cifar100", splits, features=features, supervised=("image", "label"))
    fine = datasets.load("cifar100", data_dir=tmp_path)
    coarse = read("cifar100", tmp_path, label="coarse_label")
    assert (fine.num_classes, coarse.num_classes) == (5, 3)
    np.testing.assert_array_equal(fine.train["labels"], coarse.train["labels"] + 2)
    assert coarse.class_names == ("cat", "dog", "owl")
    with pytest.raises(
        DataError, match=r"\(coarse_label, label\), got 'lable'; did you mean 'label'"
    ):
        read("cifar100", tmp_path, label="lable")
    prepare(tmp_path, "my_pets", splits, features=features)
    with pytest.raises(DataError, match="2 features that are a class label"):
        datasets.load("my_pets", data_dir=tmp_path)
    assert read("my_pets", tmp_path, label="label").num_classes == 5


def test_letters_are_upright_and_counted_from_zero(tmp_path):
    features = {"image": image_feature(), "label": label_feature(37)}
    train = [(pixels, 1 + i) for i, (pixels, _) in enumerate(pictures(26))]
    prepare(tmp_path, "emnist/letters", {"train": train, "test": train[:3]}, features=features)
    dataset = datasets.load("emnist/letters", data_dir=tmp_path)
    assert_holds(dataset.train, [(pixels.T, label - 1) for pixels, label in train])
    assert (dataset.num_classes, dataset.num_outputs) == (26, 26)
    assert dataset.class_names[2] == "C"
    assert dataset.input_shape == (4, 5, 1)
    assert not dataset.may_flip
    wrong = [(train[0][0], 27)]
    prepare(
        tmp_path,
        "emnist/letters",
        {"train": train, "test": wrong},
        features=features,
        version="1.0.1",
    )
    with pytest.raises(DataError, match="without a label in its split test"):
        datasets.load("emnist/letters", data_dir=tmp_path)
    balanced = [(pixels, 46) for pixels, _ in pictures(2)]
    features = {"image": image_feature(), "label": label_feature(47)}
    prepare(tmp_path, "emnist/balanced", {"train": balanced, "test": balanced}, features=features)
    dataset = datasets.load("emnist/balanced", data_dir=tmp_path)
    assert (dataset.num_classes, dataset.train["labels"].tolist()) == (47, [46, 46])
    np.testing.assert_array_equal(dataset.test["inputs"][0, ..., 0], balanced[0][0].T)


SPOKEN = ("O, she doth teach the torches!", "His name is Romeo, é.")
PLAY = "ROMEO:\n{}\n\nNURSE:\n{}\n\n".format(*SPOKEN)


@pytest.mark.parametrize("name", ["tiny_shakespeare", "tiny_shakespeare:1.0.0"])
def test_a_text_is_cut_into_sequences(tmp_path, name):
    splits = {"train": [(PLAY, None)], "validation": [("no", None)], "test": [(SPOKEN[0], None)]}
    prepare(tmp_path, "tiny_shakespeare", splits, features={"text": TEXT})
    dataset = read(name, tmp_path, length=6, stride=2)
    assert (dataset.task, dataset.input_shape) == ("sequence", (6,))
    assert dataset.class_names == tuple(sorted(set("".join(SPOKEN))))
    assert set(dataset.keys["speaker"]) == {"ROMEO", "NURSE"}
    said = "".join(dataset.class_names[token] for token in dataset.train["inputs"][0])
    assert said == "O, she"
    assert dataset.class_names[dataset.train["labels"][0]] == " "
    every = read(name, tmp_path, length=6, predict="every")
    np.testing.assert_array_equal(every.train["inputs"][:, 1:], every.train["labels"][:, :-1])
    assert every.train["labels"].shape == every.train["inputs"].shape
    leaf = read(name, tmp_path, length=6, stride=1, symbols="leaf")
    assert leaf.num_classes == len(set(leaf.class_names)) == 80
    assert len(leaf.train["inputs"]) == sum(len(text) - 6 for text in SPOKEN) - 1  # lacks the e
    octets = read(name, tmp_path, length=6, stride=1, symbols="bytes")
    assert octets.num_classes == 256
    assert len(octets.train["inputs"]) == sum(len(text) - 6 for text in SPOKEN) + 1
    with pytest.raises(DataError, match="too few for training and test examples of 80"):
        datasets.load(name, data_dir=tmp_path)


def test_a_path_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="there is no file or folder '/absent/mnist'"):
        datasets.load("/absent/mnist")


@pytest.mark.parametrize(
    ("features", "splits", "message"),
    [
        (None, {"train": 2}, "has the splits train; needed are"),
        (None, {"test": 2}, "has the splits test; needed are"),
        ({"picture": image_feature()}, {"train": 2, "test": 2}, "0 features that are a class"),
        ({"kind": LABEL}, {"train": 2, "test": 2}, "0 features that are an image"),
        (
            {"left": image_feature(), "right": image_feature(), "kind": LABEL},
            {"train": 2, "test": 2},
            "2 features that are an image",
        ),
        (
            {"picture": image_feature("uint16"), "kind": LABEL},
            {"train": 2, "test": 2},
            "images of uint16",
        ),
    ],
)
def test_a_set_that_does_not_classify_images_is_refused(tmp_path, features, splits, message):
    splits = {split: pictures(num) for split, num in splits.items()}
    prepare(tmp_path, "my_pets", splits, features=features)
    with pytest.raises(DataError, match=message):
        datasets.load("my_pets", data_dir=tmp_path)


@pytest.mark.parametrize("where", ["train", "test"])
def test_images_of_differing_sizes_are_refused(tmp_path, where):
    splits = {"train": pictures(3), "test": pictures(3)}
    splits[where] = splits[where] + pictures(1, size=(6, 4))
    if where == "test":
        splits[where] = pictures(3, size=(6, 4))
    prepare(tmp_path, "my_pets", splits)
    with pytest.raises(DataError, match="images of differing sizes"):
        datasets.load("my_pets", data_dir=tmp_path)


def test_examples_without_a_label_are_refused(tmp_path):
    test = [(pixels, -1) for pixels, _ in pictures(3)]
    prepare(tmp_path, "my_pets", {"train": pictures(3), "test": test})
    with pytest.raises(DataError, match="without a label in its split test"):
        datasets.load("my_pets", data_dir=tmp_path)


@pytest.mark.parametrize("damage", ["missing", "torn info", "torn records", "tfrecord"])
def test_damaged_or_foreign_files_are_one_clear_error(tmp_path, damage):
    file_format = "tfrecord" if damage == "tfrecord" else "array_record"
    splits = {"train": pictures(3), "test": pictures(2)}
    prepare(tmp_path, "my_pets", splits, file_format=file_format)
    folder = tmp_path / "my_pets" / "1.0.0"
    if damage == "missing":
        (folder / "my_pets-train.array_record-00000-of-00001").unlink()
    if damage == "torn info":
        (folder / "dataset_info.json").write_text("{")
    if damage == "torn records":
        file = folder / "my_pets-train.array_record-00000-of-00001"
        file.write_bytes(file.read_bytes()[:100])
    message = "without random access; prepare it" if damage == "tfrecord" else "cannot be read"
    with pytest.raises(DataError, match=message):
        datasets.load("my_pets", data_dir=tmp_path)


def test_a_set_that_is_not_prepared_says_how(tmp_path):
    with pytest.raises(DataError, match=r"builder\('mnist', file_format='array_record'"):
        datasets.load("mnist", data_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []
    absent = r"absent \(named by data_dir\), which does not exist; prepare it once"
    with pytest.raises(DataError, match=absent):
        datasets.load("mnist", data_dir=tmp_path / "absent")
    assert tfds.prepared(tmp_path / "absent") == []


def test_who_named_the_folder_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"named by TFDS_DATA_DIR\), which is no folder"):
        datasets.load("mnist")


@pytest.mark.parametrize("name", ["mnist:", "mnist/", "a/b/c", "mnist:1:2", "m nist"])
def test_a_name_that_is_none_is_refused(tmp_path, name):
    with pytest.raises(DataError, match="expected is `name` or `name/config`"):
        datasets.load(name, data_dir=tmp_path)


@pytest.mark.parametrize(
    ("name", "near"),
    [("digit", "digits"), ("CIFAR10", "cifar10"), ("cifra10", "cifar10"), ("my_pet", "my_pets")],
)
def test_an_unknown_name_gets_a_near_miss(tmp_path, name, near):
    prepare(tmp_path, "my_pets", {"train": pictures(1), "test": pictures(1)})
    with pytest.raises(DataError, match=f"unknown .*{name}.* did you mean .*'{near}'"):
        datasets.load(name, data_dir=tmp_path)


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "num_train", "shape", "labels"),
    [
        ("fashion_mnist", 60_000, (28, 28, 1), [2, 1, 8, 4, 1, 9, 2, 2, 0, 2]),
        ("cifar10", 50_000, (32, 32, 3), [7, 8, 4, 4, 6, 5, 2, 9, 6, 6]),
    ],
)
def test_real_sets_are_the_ones_that_everybody_knows(
    tfds_data_dir, record_property, name, num_train, shape, labels
):
    if name not in tfds.prepared(tfds_data_dir):
        pytest.skip(f"no prepared {name} in {tfds_data_dir}")
    start = time.perf_counter()
    dataset = datasets.load(name, data_dir=tfds_data_dir)
    record_property("load_s", time.perf_counter() - start)
    assert dataset.train["inputs"].shape == (num_train, *shape)
    assert dataset.test["inputs"].shape == (10_000, *shape)
    assert dataset.train["labels"][:10].tolist() == labels
    assert (np.bincount(dataset.train["labels"]) == num_train // 10).all()
    assert dataset.mean is not None
    assert dataset.std is not None
    pixels = dataset.train["inputs"].reshape(-1, shape[2])
    np.testing.assert_allclose(pixels.mean(axis=0) / 255, dataset.mean, atol=1e-4)
    np.testing.assert_allclose(pixels.std(axis=0) / 255, dataset.std, atol=1e-4)
