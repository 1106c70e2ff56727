"""Users' own data: what can be read trains, and what cannot is refused in one sentence."""

import fractions
import os
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image
from sklearn.datasets import load_breast_cancer, load_diabetes

from fedjaxprune import models, registry, types
from fedjaxprune.data import batching, conversion, datasets, partitions, sources, transforms
from fedjaxprune.errors import ConfigError, DataError
from fedjaxprune.experiment.run import composing, evaluation
from fedjaxprune.models import adapters, heads, lstm

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 3)).astype(np.float32)
Y = np.arange(40) % 4
PLAIN = {"inputs": X, "labels": Y}


def read(name, /, **options):
    part = registry.find("dataset", name).part
    return part.build(part.settings(**options))


def train(dataset, build, *, num_steps=60, learning_rate=0.1, partition="iid", **settings):
    """Train on every client's examples in turn, and test: no method, the pieces alone."""
    part = registry.find("partition", partition).part
    labels = dataset.train["labels"]
    clients = part.build(
        part.settings(**settings),
        np.random.default_rng(1),
        labels,
        num_clients=4,
        keys=dataset.keys,
    )
    people = partitions.population(dataset.train, clients)
    preprocess, test_fn = transforms.for_dataset(dataset, augment=False)
    model = composing.make_model(build, dataset, preprocess=test_fn, what="model 'x'")
    batcher = batching.steps(num_steps=1, batch_size=32, preprocess=preprocess)
    params, state = jax.jit(model.init)(jax.random.key(0))
    optimizer = optax.sgd(learning_rate)

    @jax.jit
    def step(carry, number):
        params, state, moments = carry
        key = jax.random.fold_in(jax.random.key(1), number)
        data = types.client_data(people, number % len(clients))
        batch = batcher.batch(key, data, jnp.int32(0))
        (_, (state, _)), grads = jax.value_and_grad(model.loss, has_aux=True)(
            params, state, batch, key
        )
        updates, moments = optimizer.update(grads, moments)
        return (optax.apply_updates(params, updates), state, moments), None

    start = (params, state, optimizer.init(params))
    (params, state, _), _ = jax.lax.scan(step, start, jnp.arange(num_steps, dtype=jnp.int32))
    test = evaluation.TestSet(
        jnp.asarray(dataset.test["inputs"]), jnp.asarray(dataset.test["labels"])
    )
    look = evaluation.evaluate(model, test_fn, task=dataset.task, batch_size=50)
    found = jax.device_get(jax.jit(look)(params, state, test))
    return evaluation.scores(found, test.labels, task=dataset.task), len(clients), found


def write_csv(path, columns):
    rows = zip(*columns.values(), strict=True)
    lines = [",".join(columns), *(",".join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def cancer():
    bunch: Any = load_breast_cancer()
    columns = {f"f{i}": bunch.data[:, i] for i in range(8)}
    columns["hospital"] = [f"h{i % 7}" for i in range(len(bunch.target))]
    columns["label"] = bunch.target_names[bunch.target]
    return columns


def mlp(**sizes):
    return models.mlp(hidden_sizes=(16,), **sizes)


@pytest.mark.usual("csv-binary-1", "parquet-classification-2")
@pytest.mark.parametrize(("task", "num_outputs"), [("classification", 2), ("binary", 1)])
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_table_with_client_ids_is_learnt(tmp_path, task, num_outputs, suffix):
    path = write_csv(tmp_path / "cancer.csv", cancer())
    if suffix == "parquet":
        import pyarrow.csv
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.csv.read_csv(path), tmp_path / "cancer.parquet")
        path = str(tmp_path / "cancer.parquet")
    dataset = read("table", path=path, keys=("hospital",), task=task)
    assert dataset.class_names == ("benign", "malignant")
    assert (dataset.num_classes, dataset.num_outputs) == (2, num_outputs)
    assert dataset.input_shape == (8,)
    assert len(dataset.train["labels"]) + len(dataset.test["labels"]) == 569
    np.testing.assert_allclose(dataset.train["inputs"].mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(dataset.train["inputs"].std(axis=0), 1, rtol=1e-5)
    scores, num_clients, found = train(dataset, mlp, partition="by_key", key="hospital")
    assert num_clients == 7
    assert scores.accuracy is not None
    assert scores.accuracy > 0.85
    assert scores.error is None
    assert int(found.class_correct.sum()) == int(found.num_correct)


def test_a_regression_is_learnt_and_its_errors_are_the_ones_by_hand(tmp_path):
    bunch: Any = load_diabetes()
    columns = {f"f{i}": bunch.data[:, i] for i in range(10)} | {"label": bunch.target}
    dataset = read("table", path=write_csv(tmp_path / "d.csv", columns), task="regression")
    assert dataset.train["labels"].dtype == np.float32
    assert (dataset.num_classes, dataset.num_outputs) == (0, 1)
    scores, _, found = train(dataset, mlp, learning_rate=0.05)
    assert scores.accuracy is None
    assert scores.loss < 0.75  # 1 is what the mean of the training targets would give
    assert scores.error is not None
    assert 0.3 < scores.error < scores.loss**0.5
    assert found.class_correct.shape == (0,)


def test_a_regression_has_several_targets_and_partitions_without_classes():
    targets = X[:, :2] * 2 - 1
    dataset = conversion.as_dataset({"inputs": X, "labels": targets}, task="regression")
    assert dataset.num_outputs == 2
    scores, _, _ = train(dataset, mlp, num_steps=200)
    assert scores.loss < 0.5
    for name in ("stratified", "shards", "dirichlet"):
        part = registry.find("partition", name).part
        with pytest.raises(ConfigError, match=f"{name} needs one class per example.*iid or by_key"):
            part.build(part.settings(), np.random.default_rng(0), targets, num_clients=2)


def test_heads_are_what_their_formulas_say():
    outputs, labels = jnp.array([[2.0], [-1.0], [0.5]]), jnp.array([1, 1, 0])
    binary = heads.HEADS["binary"]
    assert binary.hits is not None
    wide = jnp.concatenate([jnp.zeros((3, 1)), outputs], axis=1)
    np.testing.assert_allclose(
        binary.loss(outputs, labels), heads.cross_entropy(wide, labels), rtol=1e-6
    )
    assert binary.hits(outputs, labels).tolist() == [True, False, False]
    targets = jnp.array([[1.0, 3.0]])
    errors = heads.HEADS["regression"].loss(jnp.array([[2.0, 1.0]]), targets)
    np.testing.assert_allclose(errors, [(1 + 4) / 2])
    np.testing.assert_allclose(heads.absolute_error(jnp.array([[2.0]]), jnp.array([5.0])), [3.0])


def test_a_model_with_its_own_loss_keeps_it():
    def own(outputs, targets):
        return jnp.abs(outputs[:, 0] - targets)

    def make(**sizes):
        del sizes
        return adapters.from_functions(
            lambda key: {"w": jax.random.normal(key, (3, 1))},
            lambda params, inputs: inputs @ params["w"],
            loss=own,
        )

    dataset = conversion.as_dataset({"inputs": X, "labels": X[:, 0]}, task="regression")
    model = make()
    assert heads.for_task(model, "regression") is model
    scores, _, _ = train(dataset, make, num_steps=100, learning_rate=0.05)
    assert scores.error is not None
    assert scores.error < 0.1


def test_a_folder_of_images_is_read_split_and_learnt(tmp_path):
    for label, name in enumerate(("dark", "light")):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(20):
            pixels = RNG.integers(0, 100, (12, 12)) + 120 * label
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "pets" / name / f"{i}.png")
    path = str(tmp_path / "pets")
    assert sources.source_for_path(path) == ("image_folder", {"path": path})
    dataset = datasets.load(path)
    assert dataset.class_names == ("dark", "light")
    assert dataset.input_shape == (12, 12, 1)
    assert dataset.train["inputs"].dtype == np.uint8
    assert dataset.mean is not None
    assert dataset.std is not None
    np.testing.assert_allclose(dataset.train["inputs"].mean() / 255, dataset.mean, rtol=1e-6)
    np.testing.assert_allclose(dataset.train["inputs"].std() / 255, dataset.std, rtol=1e-6)
    scores, _, _ = train(dataset, models.lenet5, num_steps=20)
    assert scores.accuracy == 1.0
    assert read("image_folder", path=path, resize=6).input_shape == (6, 6, 1)


def test_a_folder_with_train_and_test_keeps_them_apart(tmp_path):
    for split, num in (("train", 3), ("test", 2)):
        for label, name in enumerate("ab"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(num):
                color = Image.new("RGB", (4, 5), (label, i, 7))
                color.save(tmp_path / split / name / f"{i}.png")
    dataset = read("image_folder", path=str(tmp_path))
    assert dataset.input_shape == (5, 4, 3)
    assert dataset.train["labels"].tolist() == [0, 0, 0, 1, 1, 1]
    assert dataset.test["inputs"][:, 0, 0].tolist() == [[0, 0, 7], [0, 1, 7], [1, 0, 7], [1, 1, 7]]


LINES = [
    (name, "\n".join(f"{word} {word} {word} {word}." for word in (word, word[::-1]) * 6))
    for name, word in (("ROMEO", "love"), ("JULIET", "rose"), ("ROMEO", "moon"), ("NURSE", "lark"))
]
PLAY = "\n\n".join(f"{name}:\n{said}" for name, said in LINES)
SPOKEN = [
    "\n".join(said for name, said in LINES if name == one) for one in ("ROMEO", "JULIET", "NURSE")
]


def test_a_text_becomes_sequences_of_speakers_and_is_learnt(tmp_path):
    (tmp_path / "play.txt").write_text(PLAY)
    dataset = read("text", path=str(tmp_path / "play.txt"), length=12, stride=3)
    assert dataset.task == "sequence"
    assert set(dataset.keys["speaker"]) == {"ROMEO", "JULIET", "NURSE"}
    assert dataset.class_names == tuple(sorted(set("".join(SPOKEN))))
    for split in (dataset.train, dataset.test):
        for tokens, label in zip(split["inputs"], split["labels"], strict=True):
            window = "".join(dataset.class_names[token] for token in (*tokens, label))
            assert any(window in said for said in SPOKEN)

    def small(**sizes):
        return lstm.char_lstm(embedding_size=8, hidden_sizes=(24,), **sizes)

    scores, num_clients, _ = train(
        dataset, small, num_steps=150, learning_rate=1.0, partition="by_key"
    )
    assert num_clients == 3
    assert scores.accuracy is not None
    assert scores.accuracy > 0.3  # a guess has one in 16
    plain = "".join(chr(97 + i % 7) for i in range(500))
    (tmp_path / "plain.txt").write_text(plain)
    dataset = datasets.load(str(tmp_path / "plain.txt"))
    assert dataset.input_shape == (80,)
    assert dataset.keys["line"].tolist() == [1, 1, 1, 1]


@pytest.mark.slow
def test_a_sequence_may_have_a_label_at_each_position():
    tokens = RNG.integers(0, 5, (30, 6))
    labels = np.where(np.arange(6) < 4, np.roll(tokens, -1, axis=1), -1)
    dataset = conversion.as_dataset({"inputs": tokens, "labels": labels}, task="sequence")
    assert dataset.num_classes == 5

    def small(**sizes):
        return lstm.char_lstm(hidden_sizes=(4,), labels="every", **sizes)

    scores, _, found = train(dataset, small, num_steps=2)
    counted = dataset.test["labels"] >= 0
    assert scores.accuracy == int(found.num_correct) / counted.sum()
    np.testing.assert_allclose(scores.loss, np.log(5), rtol=0.3)


def test_a_model_says_why_it_cannot_read_the_data(tmp_path):
    digits = datasets.load("digits")
    tokens = conversion.as_dataset(
        {"inputs": RNG.integers(0, 9, (20, 6)), "labels": RNG.integers(0, 9, 20)}, task="sequence"
    )
    cases = [
        (digits, lstm.char_lstm, "takes sequences of tokens of shape \\(length,\\), got .*8, 8, 1"),
        (conversion.as_dataset(PLAIN), lstm.char_lstm, "reads tokens, .* got float32"),
        (tokens, mlp, "mlp reads numbers, not tokens"),
        (tokens, models.lenet5, "lenet5 takes images .* got examples of shape \\(6,\\)"),
        (digits, lambda **sizes: models.mlp(input_shape=(8, 8, 1), num_classes=3), "needed is"),
        (digits, lambda **sizes: len, "must be a Model"),
    ]
    for dataset, build, message in cases:
        _, preprocess = transforms.for_dataset(dataset, augment=False)
        with pytest.raises(ConfigError, match=f"model 'x' does not fit .*{message}"):
            composing.make_model(build, dataset, preprocess=preprocess, what="model 'x'")
    with pytest.raises(ValueError, match=r"augment crops and flips images"):
        transforms.for_dataset(conversion.as_dataset(PLAIN), augment=True)


class Value:
    def __init__(self, dtype):
        self.dtype = dtype


class ClassLabel(Value):
    def __init__(self, names):
        super().__init__("int64")
        self.names, self.num_classes = names, len(names)


class Stub:
    """The surface of a Hugging Face data set that is read."""

    def __init__(self, columns, features):
        self.columns, self.features, self.column_names = columns, features, list(columns)

    def __getitem__(self, name):
        return self.columns[name]


def in_memory(num=30, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, num)
    labels[:3] = range(3)
    images = [Image.fromarray(np.full((8, 8), 80 * label, np.uint8)) for label in labels]
    columns = {
        "image": images,
        "label": labels.tolist(),
        "writer": [f"w{i % 4}" for i in range(num)],
    }
    features = {
        "image": type("Image", (), {})(),
        "label": ClassLabel(["a", "b", "c"]),
        "writer": Value("string"),
    }
    return Stub(columns, features)


def test_a_hugging_face_set_in_memory_is_learnt():
    dataset = conversion.as_dataset({"train": in_memory(), "test": in_memory(12, 1)}, name="mine")
    assert dataset.class_names == ("a", "b", "c")
    assert dataset.input_shape == (8, 8, 1)
    assert len(dataset.test["labels"]) == 12
    scores, num_clients, _ = train(dataset, mlp, partition="by_key", key="writer", num_steps=200)
    assert num_clients == 4
    assert scores.accuracy == 1.0
    alone = conversion.as_dataset(in_memory())
    assert (len(alone.train["labels"]), len(alone.test["labels"])) == (24, 6)
    numbers = Stub(
        {"a": [1.0, 2.0] * 9, "b": [3, 4] * 9, "label": [0, 1] * 9},
        {"a": Value("float32"), "b": Value("int64"), "label": Value("int64")},
    )
    assert conversion.as_dataset(numbers).train["inputs"][0].tolist() in ([1, 3], [2, 4])


def test_the_package_datasets_is_read(tmp_path):
    package = pytest.importorskip("datasets", reason="the package datasets is not installed")
    stub = in_memory()
    features = package.Features(
        {
            "image": package.Image(),
            "label": package.ClassLabel(names=["a", "b", "c"]),
            "writer": package.Value("string"),
        }
    )
    made = package.Dataset.from_dict(stub.columns, features=features)
    dataset = conversion.as_dataset(package.DatasetDict({"train": made, "test": made}))
    np.testing.assert_array_equal(dataset.train["labels"], stub.columns["label"])
    assert dataset.train["inputs"].shape == (30, 8, 8, 1)
    assert set(dataset.keys) == {"writer"}
    made.save_to_disk(str(tmp_path / "mine"))
    again = read("huggingface", source=str(tmp_path / "mine"))
    assert len(again.train["labels"]) == 24


def test_without_the_package_a_named_set_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'fedjaxprune\[huggingface\]'"):
        read("huggingface", source="mnist")


def test_an_archive_is_read_by_usual_and_by_given_names(tmp_path):
    path = tmp_path / "mine.npz"
    images = RNG.integers(0, 255, (20, 6, 6), dtype=np.uint8)
    arrays = {"x_train": images, "y_train": Y[:20], "x_test": images[:4], "y_test": Y[:4]}
    np.savez(path, **arrays, writer=np.arange(20) % 5)
    dataset = datasets.load(str(path))
    assert dataset.input_shape == (6, 6, 1)
    assert dataset.max_value == 255
    assert dataset.keys["writer"].tolist() == (np.arange(20) % 5).tolist()
    names = {"inputs": "x_test", "labels": "y_test", "test_inputs": "x_train"}
    dataset = read("npz", path=str(path), test_labels="y_train", **names)
    assert (len(dataset.train["labels"]), len(dataset.test["labels"])) == (4, 20)
    with pytest.raises(DataError, match=r"labels: .* has no 'y_trian', .* did you mean 'y_train'"):
        read("npz", path=str(path), labels="y_trian")


FORMS = {
    "mapping": PLAIN,
    "pair": (X, Y),
    "lists": (X.tolist(), Y.tolist()),
    "two pairs": ((X, Y), (X[:8], Y[:8])),
    "two mappings": ({"x": X, "y": Y}, {"x": X[:8], "y": Y[:8]}),
    "splits": {"train": (X, Y), "test": (X[:8], Y[:8])},
    "names of files": {"x_train": X, "y_train": Y, "x_test": X[:8], "y_test": Y[:8]},
    "jax": (jnp.asarray(X), jnp.asarray(Y)),
    "text": (X, np.array(list("abcd"))[Y]),
}


@pytest.mark.parametrize("form", sorted(FORMS))
def test_arrays_in_many_forms_are_one_data_set(form):
    dataset = conversion.as_dataset(FORMS[form])
    assert len(dataset.test["labels"]) == 8
    assert dataset.num_classes == 4
    assert dataset.train["inputs"].dtype == np.float32
    assert dataset.train["labels"].dtype == np.int32
    assert np.bincount(dataset.test["labels"]).tolist() == [2, 2, 2, 2]
    assert conversion.as_dataset(dataset) is dataset


def test_client_ids_follow_the_training_examples():
    dataset = conversion.as_dataset({**PLAIN, "client_ids": X[:, 0]})
    np.testing.assert_array_equal(dataset.keys["client_ids"], dataset.train["inputs"][:, 0])


def bad(**changes):
    return {**PLAIN, **changes}


MISTAKES = {
    "nothing": (None, {}, "data must be a mapping of arrays .* got NoneType"),
    "a number": (3, {}, "got int"),
    "a function": (lambda: PLAIN, {}, r"got a function; call it"),
    "a function for inputs": (bad(inputs=np.zeros), {}, r"got a function; call it: zeros\(\)"),
    "no labels": ({"inputs": X}, {}, "must have the arrays inputs and labels .* got inputs"),
    "a typing error": ({"inputs": X, "lables": Y}, {}, "did you mean 'lables'"),
    "an empty mapping": ({}, {}, "got none"),
    "half a test set": (bad(test_inputs=X), {}, "test examples, but no test_labels"),
    "a triple": ((X, Y, X), {}, "got tuple"),
    "a split that is none": (
        {"train": X[0, 0], "test": (X, Y)},
        {},
        r"train must be \(inputs, labels\)",
    ),
    "lengths": (bad(labels=Y[:-1]), {}, "got 40 train inputs, 39 train labels"),
    "test lengths": (((X, Y), (X, Y[:3])), {}, "got 40 test inputs, 3 test labels"),
    "NaN": (bad(inputs=np.where(np.arange(3) == 1, np.nan, X)), {}, "must be finite .* NaN"),
    "infinite": (bad(inputs=X.astype(float) * 1e300), {}, "must be finite float32"),
    "text inputs": (bad(inputs=np.full((40, 2), "a")), {}, "must be numbers .* got text"),
    "ragged": (bad(inputs=[[1.0], [1.0, 2.0]] * 20), {}, "cannot be made an array"),
    "complex": (bad(inputs=X * 1j), {}, "must be real numbers, got complex"),
    "flat inputs": (
        bad(inputs=X[:, 0]),
        {},
        r"got shape \(40,\); one feature .* inputs\[:, None\]",
    ),
    "no examples": ({"inputs": X[:0], "labels": Y[:0]}, {}, "cannot be split|at least one example"),
    "channels first": (bad(inputs=np.zeros((40, 3, 8, 8))), {}, "channels first"),
    "other test shape": (((X, Y), (X[:, :2], Y)), {}, "must be alike"),
    "a column of labels": (bad(labels=Y[:, None]), {}, r"column \(\d+, 1\); give labels\[:, 0\]"),
    "one-hot": (bad(labels=np.eye(4)[Y]), {}, "one-hot: give labels.argmax"),
    "scores": (bad(labels=np.ones((40, 4)) / 4), {}, "several numbers per example"),
    "counted from 1": (bad(labels=Y + 1), {}, "numbered from 0, got 1 to 4; give labels - 1"),
    "with gaps": (bad(labels=Y * 100), {}, "without gaps"),
    "negative": (bad(labels=Y - 1), {}, "must not be negative, got -1"),
    "whole floats": (bad(labels=Y * 1.0), {}, r"got float64; give labels.astype\(int\), or"),
    "floats": (bad(labels=X[:, 0]), {}, "for numbers set the task regression"),
    "one class": (bad(labels=Y * 0), {}, "at least two classes, got one"),
    "no classes": (
        bad(labels=np.arange(40)),
        {},
        "40 distinct|distinct values .* no classes|cannot",
    ),
    "unknown class": (((X, Y % 3), (X, Y)), {}, "class 3, which no training example has"),
    "unknown text": (((X, Y.astype(str)), (X[:1], ["z"])), {}, "the class 'z', which no"),
    "more than declared": (
        PLAIN,
        {"num_classes": 3},
        r"less than the number of classes \(3\), got 3",
    ),
    "binary of four": (PLAIN, {"task": "binary"}, "must be 0 or 1, got 0, 1, 2, 3"),
    "signs": (bad(labels=Y % 2 * 2 - 1), {"task": "binary"}, r"give \(labels > 0\)"),
    "text to regress": (bad(labels=Y.astype(str)), {"task": "regression"}, "must be numbers"),
    "NaN targets": (
        bad(labels=np.full(40, np.nan)),
        {"task": "regression"},
        "labels must be finite",
    ),
    "float tokens": (PLAIN, {"task": "sequence"}, "must be integer tokens, got float32"),
    "negative tokens": (
        bad(inputs=-np.ones((40, 2), int)),
        {"task": "sequence"},
        "at least 0, got -1",
    ),
    "labels of a shorter sequence": (
        bad(inputs=np.ones((40, 5), int), labels=np.ones((40, 4), int)),
        {"task": "sequence"},
        r"shape \(examples,\) or \(\d+, 5\)",
    ),
    "unknown task": (PLAIN, {"task": "ranking"}, "task must be one of .* got 'ranking'"),
    "test fraction": (PLAIN, {"test_fraction": 1.5}, r"must lie in \(0, 1\), got 1.5"),
    "ids of another length": (bad(user=[1, 2]), {}, r"ids 'user' must be one id per .* \(2,\)"),
    "a fraction of a class": (PLAIN, {"num_classes": 4.5}, "num_classes must be a whole .* 4.5"),
    "a flag of classes": (PLAIN, {"num_classes": True}, "num_classes must be a whole .* True"),
    "too few names": (PLAIN, {"class_names": ("a",)}, "must name the 4 classes, got 1 names"),
    "names in one text": (PLAIN, {"class_names": "abcd"}, "a list of names, got the text 'abcd'"),
    "names of a text's classes": (
        bad(labels=Y.astype(str)),
        {"class_names": ("a", "b", "c", "d")},
        "must name the 4 classes of the labels, got a, b, c, d",
    ),
    "number of a text's classes": (
        bad(labels=Y.astype(str)),
        {"num_classes": 5},
        "num_classes is 5, but the labels have 4 classes",
    ),
    "three classes in two": (bad(labels=Y % 2), {"task": "binary", "num_classes": 3}, "have 2 cl"),
    "objects with None": (
        bad(inputs=np.array([[1.0, None]] * 40, object)),
        {},
        r"got missing values \(None\)",
    ),
    "objects": (bad(inputs=X.astype(object)), {}, r"objects; give values.astype\(float\)"),
    "objects of a type": (
        bad(inputs=np.array([[1.0, fractions.Fraction(1, 2)]] * 40, object)),
        {},
        "got objects of type Fraction and float",
    ),
    "bfloat16": (bad(inputs=jnp.ones((40, 2), jnp.bfloat16)), {}, "bfloat16, which is no type of"),
    "bytes as inputs": (bad(inputs=np.full((40, 2), b"a")), {}, "got bytes; decode them"),
    "bytes as labels": (bad(labels=Y.astype("S")), {}, "got bytes; decode them: values.astype"),
    "objects as labels": (bad(labels=np.array([None] * 40)), {}, r"missing values \(None\)"),
    "records": (bad(inputs=np.zeros((40, 2), [("a", "f4")])), {}, "got records of the fields a"),
    "labels of two types": (
        bad(labels=np.array(["a", 1] * 20, object)),
        {},
        "must all be text or all integers, got text and 1",
    ),
    "NaN that became text": (
        bad(labels=np.array(["a", "b", np.nan, "c"] * 10)),
        {},
        "must not be missing, but some are 'nan'",
    ),
    "long integers": (bad(inputs=2**24 + Y[:, None]), {}, "16777217 in example 1, .* scale them"),
    "doubles far from 0": (
        bad(inputs=1e9 + np.arange(80.0).reshape(40, 2)),
        {},
        "lie between 1000000000 and 1000000078 at position 0, which float32 cannot tell apart",
    ),
    "classes of a regression": (
        bad(),
        {"task": "regression", "num_classes": 4},
        "a regression has no classes: leave num_classes and class_names out",
    ),
    "names of a regression": (
        bad(),
        {"task": "regression", "class_names": ("a", "b")},
        "a regression has no classes",
    ),
    "labels alike": (
        bad(labels=np.array(["a", "b ", "b", "c"] * 10)),
        {},
        "labels have 'b' and 'b ', which differ only in spaces: strip them",
    ),
    "ids alike": (
        bad(user=np.array(["u", " u", "v", "w"] * 10)),
        {},
        "client ids 'user' have ' u' and 'u', which differ only in spaces",
    ),
    "large ids": (bad(user=Y + 1e16), {}, "ids 'user' must be text or integers, got float64 num"),
    "missing ids": (bad(user=[None] * 40), {}, "ids 'user' must have no missing"),
    "ids that are NaN": (bad(user=np.full(40, np.nan)), {}, "ids 'user' must have no missing"),
}


@pytest.mark.parametrize("name", sorted(MISTAKES))
def test_a_mistake_gets_one_sentence(name):
    value, options, message = MISTAKES[name]
    with pytest.raises(DataError, match=message) as caught:
        conversion.as_dataset(value, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 400


def test_a_data_set_whose_fields_do_not_fit_is_refused():
    made = conversion.as_dataset(PLAIN)
    for change, message in [
        ({"input_shape": (4,)}, r"input_shape is \(4,\), but train inputs have shape \(3,\)"),
        ({"task": "x"}, "task must be one of"),
        ({"train": {"inputs": X}}, "has no labels"),
        ({"num_classes": 2}, "less than the number of classes"),
        ({"keys": {"a": Y}}, "ids 'a' must be one id per training example"),
    ]:
        with pytest.raises(DataError, match=message):
            conversion.as_dataset(made._replace(**change))


TABLES = {
    "no file": ({}, {"path": "none.csv"}, "there is no file"),
    "near file": ({}, {"path": "tabel.csv"}, "did you mean 'table.csv'"),
    "no such label": (
        {},
        {"label": "lable"},
        r"label \(--label COLUMN\): .* has no 'lable', .* did you mean 'label'",
    ),
    "no such feature": ({}, {"features": ("z",)}, "features: .* has no 'z'"),
    "no such key": ({}, {"keys": ("user",)}, "keys: .* has no 'user'"),
    "the label as a feature": ({}, {"features": ("label",)}, "must not contain the label"),
    "no features": ({}, {"keys": ("a", "b")}, "no feature columns"),
    "missing values": (
        {"a": [1.5, ""] * 20},
        {},
        "20 missing values in column 'a', the first in row 2",
    ),
    "free text": ({"a": [f"text {i}" for i in range(200)]}, {}, "one_hot takes at most 100"),
    "text refused": (
        {"b": ["x", "y"] * 20},
        {"categorical": "refuse"},
        "'b' is text; set categorical",
    ),
    "dates": (
        {"a": ["2020-01-01"] * 40},
        {},
        "must be numbers, true and false, or text, got dates",
    ),
    "numbers as classes": ({"label": X[:, 0]}, {}, "which are no classes; for numbers set task"),
    "text to regress": ({"label": ["a", "b"] * 20}, {"task": "regression"}, "must be numbers"),
    "a split without test": ({"s": ["train"] * 40}, {"split": "s"}, "both train and test"),
    "a split of other words": (
        {"s": ["a"] * 40},
        {"split": "s"},
        "must hold train or test, got 'a'",
    ),
    "one class": ({"label": ["a"] * 40}, {}, "at least two classes"),
    "one value that is no number": (
        {"a": [1.5, 2, 3.25, "?"] + [7] * 36},
        {},
        "'a' that reads as numbers, but '[?]' in row 4 is no number: .* one_hot_all",
    ),
    "decimal commas": ({"a": ['"1,5"', '"2"'] * 20}, {}, "with commas, such as '1,5' in row 1"),
    "per cents": ({"a": [f"{n}%" for n in range(40)]}, {}, "with signs, such as '0%' in row 1"),
    "prices": ({"a": ["$1.50", "€ 2", "3"] * 13}, {}, r"with signs, such as '\$1.50' in row 1"),
    "limits": ({"a": ["<5", "7", "> 80"] * 13}, {}, "with signs, such as '<5' in row 1"),
    "labels alike": (
        {"label": ["yes", "yes ", "no"] * 13},
        {},
        "labels have 'yes' and 'yes ', which differ only in spaces",
    ),
    "thousands": ({"a": ['"1,234.5"', "7"] * 20}, {}, "such as '1,234.5' in row 1"),
    "a label that is missing": (
        {"label": ["a", "NaN", "b", "?"] * 10},
        {},
        r"20 missing values in column 'label', the first in row 2 \('NaN'\)",
    ),
    "a client that is missing": (
        {"user": ["a", "b", "null", "c"] * 10},
        {"keys": ("user",)},
        r"10 missing values in column 'user', the first in row 3 \('null'\)",
    ),
    "a target that is no number": (
        {"label": [1.5, 2.5, "x", 3.5] * 10},
        {"task": "regression"},
        "must be numbers for a regression, got 'x' in row 3",
    ),
    "a huge number": ({"b": [1, 2, 1e300, 3] * 10}, {}, "1e.300 in row 3 of column 'b', which is"),
    "a huge target": ({"label": [1.5, -1e39] * 20}, {"task": "regression"}, "-1e.39 in row 2 of"),
    "an infinity": ({"b": [1.5, "inf"] * 20}, {}, "inf in row 2 of column 'b', which is too large"),
    "long ids": (
        {"a": 2**24 + np.arange(40)},
        {"scaling": "none"},
        "'a' of .* 16777217 in example 1, .* rounded to 16777216: set scaling: standard",
    ),
    "longer ids": (
        {"a": 2**60 + np.arange(40)},
        {},
        "1152921504606846977 in example 1, .* rounded",
    ),
    "targets far from 0": (
        {"label": 1e9 + np.arange(40) / 2},
        {"task": "regression", "scaling": "none"},
        "'label' of .* lie between 1000000000 and 1000000019.5, which float32 cannot tell apart",
    ),
    "tiny numbers": (
        {"a": X[:, 0] * np.float64(1e-60)},
        {"scaling": "none"},
        "'a' of .* cannot tell apart",
    ),
    "large ids of clients": (
        {"user": [f"{2**70}", "1"] * 20},
        {"keys": ("user",)},
        r"beyond 2\*\*53",
    ),
}


@pytest.mark.parametrize("name", sorted(TABLES))
def test_a_mistake_in_a_table_gets_one_sentence(tmp_path, name):
    columns, options, message = TABLES[name]
    whole = {"a": X[:, 0], "b": X[:, 1], "label": Y, **columns}
    num = max(len(values) for values in whole.values())
    whole = {key: np.resize(values, num) for key, values in whole.items()}
    write_csv(tmp_path / "table.csv", whole)
    path = str(tmp_path / options.get("path", "table.csv"))
    with pytest.raises(DataError, match=message) as caught:
        read("table", **{**options, "path": path})
    assert "\n" not in str(caught.value)


def test_a_table_keeps_a_split_and_makes_categories_of_text(tmp_path):
    columns = {
        "color": ["red", "blue", "red", "green"] * 10,
        "size": np.arange(40),
        "on": ["true", "false"] * 20,
        "part": ["train"] * 30 + ["test"] * 10,
        "label": Y + 3,
    }
    path = write_csv(tmp_path / "t.csv", columns)
    dataset = read("table", path=path, split="part")
    assert len(dataset.test["labels"]) == 10
    assert dataset.input_shape == (5,)
    assert dataset.class_names == ("3", "4", "5", "6")
    assert dataset.train["inputs"][:2, :3].tolist() == [[0, 0, 1], [1, 0, 0]]
    assert dataset.train["inputs"][:, 4].tolist() == [1, 0] * 15
    np.testing.assert_allclose(
        dataset.test["inputs"][:, 3], (np.arange(30, 40) - 14.5) / np.arange(30).std(), rtol=1e-5
    )
    raw = read("table", path=path, features=("size",), test_path=path, scaling="none")
    assert raw.train["inputs"][:, 0].tolist() == raw.test["inputs"][:, 0].tolist()


def test_text_that_reads_as_numbers_can_be_categories_and_counted_names_a_header(tmp_path):
    columns = {"0": ["1", "2", "3+", "0"] * 10, "1": [0.1] * 39 + [0.2], "2": Y}
    path = write_csv(tmp_path / "t.csv", columns)
    dataset = read("table", path=path, label="2", categorical="one_hot_all", test_path=path)
    assert dataset.input_shape == (5,)
    # Equal numbers are all 0, whatever rounding says of their deviation.
    path = write_csv(tmp_path / "same.csv", {"a": [0.1] * 40, "b": ["NA", "x"] * 20, "label": Y})
    assert set(read("table", path=path).train["inputs"][:, 0].tolist()) == {0.0}
    test = write_csv(tmp_path / "test.csv", {"a": [0.1, "o"] * 20, "b": [1] * 40, "label": Y})
    with pytest.raises(DataError, match="'a' that reads as numbers, but 'o' in row 2"):
        read("table", path=path, test_path=test)
    with pytest.raises(DataError, match="'b' holds text for training, but int64 in"):
        read("table", path=path, test_path=test, features=("b",))


FILES = {
    "a damaged archive": ("npz", "x.npz", b"nothing", "cannot be read as an .npz archive"),
    "a damaged table": ("table", "x.parquet", b"nothing", "cannot be read as a .parquet table"),
    "rows of other lengths": ("table", "x.csv", b"a,b\n1\n", "cannot be read as a .csv table"),
    "no rows": ("table", "x.csv", b"a,label\n", "has no rows"),
    "another suffix": ("table", "x.xls", b"", "must end in .csv, .tsv or .parquet, got x.xls"),
    "two columns of a name": ("table", "x.csv", b"a,a\n1,2\n", "two columns named 'a'"),
    "an empty table": ("table", "x.csv", b"", "cannot be read as a .csv table: Empty CSV file"),
    "no header": ("table", "x.csv", b"5.1,3.5,0\n4.9,3.0,1\n", r"is numbers \('5.1,3.5,0'\): add"),
    "no header and words": ("table", "x.csv", b"5.1,3.5,a\n4,3,b\n", "no 'label' and seems to be"),
    "semicolons": (
        "table",
        "x.csv",
        b"a;b;label\n1,5;2;0\n",
        "commas, but .* has semicolons",
    ),
    "commas for tabs": ("table", "x.tsv", b"a,b,label\n1,2,0\n", "tabs, but .* has commas"),
    "Latin-1": (
        "table",
        "x.csv",
        "city,label\nBonn,0\nKöln,1\n".encode("latin1"),
        r"is not UTF-8, with b'K.*ln' in row 2 of column 'city': save it as UTF-8, or .* iconv",
    ),
    "a header in Latin-1": ("table", "x.csv", "größe,label\n1,0\n".encode("latin1"), "first line"),
    "UTF-16": ("table", "x.csv", "a,label\n1,0\n".encode("utf-16"), "UTF-16: save it as UTF-8"),
    "three rows": (
        "table",
        "x.csv",
        b"a,label\n1,a\n2,b\n3,c\n",
        "3 examples of 3 classes are",
    ),
    "two rows": ("table", "x.csv", b"a,label\n1,a\n2,a\n", "2 examples are too few to hold out"),
    "no UTF-8": ("text", "x.txt", b"\xff\xfe\xff", "cannot be read as text in UTF-8"),
    "a short text": ("text", "x.txt", b"hello", "5 characters, too few"),
    "a file for a folder": (
        "image_folder",
        "x.png",
        b"",
        "path must be a folder, but .* is a file",
    ),
}


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_file_that_cannot_be_read_gets_one_sentence(tmp_path, name):
    source, file, content, message = FILES[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read(source, path=str(tmp_path / file))
    assert "\n" not in str(caught.value)


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(DataError, match=r"must be a regular file, but .*pipe\.csv is a pipe or a"):
        read("table", path=str(tmp_path / "pipe.csv"))


def test_a_folder_that_is_no_set_of_images_gets_one_sentence(tmp_path):
    with pytest.raises(DataError, match=r"at least two, got none"):
        read("image_folder", path=str(tmp_path))
    for name in "ab":
        (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=r"a has no images"):
        read("image_folder", path=str(tmp_path))
    for name, size in (("a", (4, 4)), ("b", (5, 4))):
        Image.new("L", size).save(tmp_path / name / "1.png")
    with pytest.raises(
        DataError, match=r"must have one size, but .* has 4x4 and .* has 4x5 .* resize"
    ):
        read("image_folder", path=str(tmp_path))
    (tmp_path / "a" / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"cannot be read as an image"):
        read("image_folder", path=str(tmp_path))


def test_keys_name_clients_and_small_ones_are_left_out():
    part = registry.find("partition", "by_key").part
    labels, rng = np.zeros(6, int), np.random.default_rng(0)
    keys = {"user": np.array([1, 1, 1, 2, 2, 3]), "city": np.array(list("aabbcc"))}

    def build(keys, **settings):
        return part.build(part.settings(**settings), rng, labels, num_clients=9, keys=keys)

    assert [p.tolist() for p in build(keys, key="user", min_client_size=2)] == [[0, 1, 2], [3, 4]]
    assert [p.tolist() for p in build(keys, key="user", max_clients=1)] == [[0, 1, 2]]
    assert len(build(keys, key="city", max_clients=2, choice="random")) == 2
    assert len(build({"city": keys["city"]})) == 3
    with pytest.raises(ConfigError, match=r"\(user, city\), got 'usr'; did you mean 'user'"):
        build(keys, key="usr")
    with pytest.raises(ConfigError, match=r"must name a column .* has user, city"):
        build(keys)
    with pytest.raises(ConfigError, match=r"has none"):
        build(None)
    with pytest.raises(
        ValueError, match=r"none of the 3 clients has 4 examples; the largest has 3"
    ):
        build(keys, key="user", min_client_size=4)


def test_paths_choose_their_source(tmp_path):
    for text, source in [
        ("a/b.csv", "table"),
        ("b.PARQUET", "table"),
        ("x.npz", "npz"),
        ("x.txt", "text"),
    ]:
        assert sources.source_for_path(text) == (source, {"path": text})
    for text in ("digits", "cifar10", "my.py:data", "package.module:data", "my_pets/big"):
        assert sources.source_for_path(text) is None


def test_predictions_have_the_loss_of_the_task():
    model = mlp(input_shape=(3,), num_classes=1)
    assert heads.prediction_loss(model) is heads.CLASSES.test_loss
    numbers = heads.for_task(model, "regression")
    assert heads.prediction_loss(numbers) is heads.squared_error
    with pytest.raises(ValueError, match=r"task must be one of classification, .* got 'ranking'"):
        heads.for_task(model, "ranking")
