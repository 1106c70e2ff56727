"""Read a TFDS image-classification set that was prepared on this machine.

Nothing is downloaded, no folder is made and the network is not used: a set is read from where it
was prepared, without its builder's code and without TensorFlow.
"""

import difflib
import importlib
import json
import os
import pathlib
import re
import warnings
from typing import Any

import numpy as np

from fedjaxprune.data.datasets import Dataset
from fedjaxprune.errors import DataError, beside, first_line, shown
from fedjaxprune.registry import Part, locate
from fedjaxprune.settings import Settings, setting

# Per channel, over the training images: mean and standard deviation.
_STATISTICS = {
    "mnist": ((0.1307,), (0.3081,)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.507, 0.487, 0.441), (0.267, 0.256, 0.276)),
}

_VERSION = re.compile(r"\d+\.\d+\.\d+")
_NAME = re.compile(r"[^/:\s]+(/[^/:\s]+)?(:[^/:\s]+)?")
_OWN = "tensorflow_datasets."
_CLASSES = frozenset({"pythonClassName", "python_class_name", "type"})  # name code, in JSON
_LARGEST = 2**24  # bytes of the file of features
_CHUNK = 1000  # examples decoded at a time


class TfdsSettings(Settings):
    """Which TFDS set is read, and where from."""

    tfds_name: str = setting(
        ..., "Name of a prepared set: `name` or `name/config`, either may end in `:version`."
    )
    data_dir: str | None = setting(
        None, "Folder of prepared sets.", unset="TFDS_DATA_DIR, else ~/tensorflow_datasets"
    )
    trust_data: bool = setting(
        False, "Whether the set may name code of any package to be imported for its features."
    )


def build(settings: TfdsSettings) -> Dataset:
    """Read the set that the settings name."""
    return read(
        settings.tfds_name, data_dir=settings.data_dir, trust_data=settings.trust_data or None
    )


def read(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    trust_data: bool | None = None,
) -> Dataset:
    """Read the newest or the named version of a set that was prepared in the array_record format.

    Its splits are ``train`` and ``test``, or ``validation`` where there is no ``test``. The files
    of a set name the classes of its features, which TFDS imports: those of TFDS itself, and others
    only with `trust_data`.
    """
    if not _NAME.fullmatch(name):
        raise DataError(
            f"data set {name!r} is no name of one: expected is `name` or `name/config`, and "
            "either may end in `:version`, such as mnist:3.0.1."
        )
    folder = folder_of(data_dir)[0]
    path, _, version = name.partition(":")
    versions = _versions(folder).get(path, {})
    if not versions:
        raise _missing(path, data_dir)
    if version and version not in versions:
        raise DataError(
            f"data set {path!r} is prepared in {folder} as version {', '.join(sorted(versions))}, "
            f"not {version!r}."
        )
    newest = max(versions, key=lambda text: [int(number) for number in text.split(".")])
    chosen = versions[version or newest]
    try:
        if not trust_data:
            _check_features(name, chosen)
        return _read(name, chosen)
    except DataError:
        raise
    except Exception as error:  # whatever its readers raise on missing or damaged files
        raise DataError(
            f"data set {name!r} in {chosen} cannot be read: {first_line(error)}"
        ) from error


def prepared(data_dir: str | os.PathLike[str] | None = None) -> list[str]:
    """List the TFDS sets that are prepared in a folder (see `read`), as ``name[/config]``."""
    return sorted(_versions(folder_of(data_dir)[0]))


def folder_of(data_dir: str | os.PathLike[str] | None = None) -> tuple[pathlib.Path, str]:
    """Find the folder of prepared sets (see `read`), which need not exist, and say who named it."""
    if data_dir:
        return locate(os.fspath(data_dir)), "named by data_dir"
    if environment := os.environ.get("TFDS_DATA_DIR"):
        return pathlib.Path(os.path.expanduser(environment)), "named by TFDS_DATA_DIR"
    return pathlib.Path(os.path.expanduser("~/tensorflow_datasets")), "the default"


def _versions(folder: pathlib.Path) -> dict[str, dict[str, pathlib.Path]]:
    """Map the prepared sets to their versions, and these to their folders."""
    found: dict[str, dict[str, pathlib.Path]] = {}
    for pattern in ("*/*/dataset_info.json", "*/*/*/dataset_info.json"):
        for file in folder.glob(pattern):
            if _VERSION.fullmatch(file.parent.name):
                name = file.parent.parent.relative_to(folder).as_posix()
                found.setdefault(name, {})[file.parent.name] = file.parent
    return found


def _tfds() -> Any:
    """Import TFDS, late, since it takes a while, and quietly, since its warnings are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tensorflow_datasets

        if not hasattr(tensorflow_datasets, "list_builders"):  # it only logs what went wrong
            try:
                importlib.import_module("tensorflow_datasets.public_api")
            except Exception as error:
                why = first_line(error).rstrip(".")
                raise DataError(
                    f"tensorflow-datasets is installed, but cannot be imported: {why}; install "
                    "versions of its packages that fit each other."
                ) from error
    return tensorflow_datasets


def _missing(name: str, data_dir: str | os.PathLike[str] | None) -> DataError:
    """Say why there is no such set, and what to do."""
    folder, named_by = folder_of(data_dir)
    if here := beside(name):
        return DataError(f"data set {name!r} is not prepared in {folder}{here}.")
    known = set(_tfds().list_builders(with_community_datasets=False))
    here = prepared(folder)
    base = name.partition("/")[0]
    kin = [other for other in here if other.partition("/")[0] == base]
    if kin:
        return DataError(
            f"data set {name!r} is not prepared in {folder}; prepared there are {', '.join(kin)}."
        )
    if base in known:
        state = ""
        if not folder.is_dir():
            state = ", which is no folder" if folder.exists() else ", which does not exist"
        return DataError(
            f"data set {name!r} is not prepared in {folder} ({named_by}){state}; {_recipe(name)}"
        )
    near = difflib.get_close_matches(name.lower(), ["digits", *here, *known - set(here)], n=3)
    advice = "any TFDS name can be prepared."
    if near:
        advice = f"did you mean {' or '.join(map(repr, near))}?"
    have = ", ".join(["digits", *here])
    return DataError(f"unknown data set {name!r}: ready to use are {have}; {advice}")


def _recipe(name: str) -> str:
    """Say how to prepare a set."""
    return (
        'prepare it once, where TensorFlow is installed, with `python -c "import '
        f"tensorflow_datasets as tfds; tfds.builder('{name}', file_format='array_record')"
        '.download_and_prepare()"`, and name its folder by --data-dir or TFDS_DATA_DIR if it is '
        "not ~/tensorflow_datasets."
    )


def _read(name: str, folder: pathlib.Path) -> Dataset:
    """Decode both splits of the set prepared in `folder`."""
    tfds = _tfds()
    with warnings.catch_warnings():  # TFDS calls what protobuf 6 calls deprecated
        warnings.simplefilter("ignore", DeprecationWarning)
        builder = tfds.builder_from_directory(folder)
    image, label = _features(tfds, name, builder)
    splits = builder.info.splits
    test_split = "test" if "test" in splits else "validation"
    if "train" not in splits or test_split not in splits:
        raise DataError(
            f"data set {name!r} has the splits {', '.join(splits) or '(none)'}; needed are train, "
            "and test or validation."
        )
    classes = builder.info.features[label]
    train = _decode(name, builder, "train", image, label, classes.num_classes)
    test = _decode(name, builder, test_split, image, label, classes.num_classes)
    if train["inputs"].shape[1:] != test["inputs"].shape[1:]:
        raise _sizes_differ(name, train["inputs"].shape[1:], test["inputs"].shape[1:])
    mean, std = _STATISTICS.get(name.partition(":")[0], (None, None))
    return Dataset(
        name=name,
        train=train,
        test=test,
        num_classes=classes.num_classes,
        task="classification",
        class_names=tuple(classes.names),
        input_shape=train["inputs"].shape[1:],
        max_value=255.0,
        mean=mean,
        std=std,
        may_flip=train["inputs"].shape[-1] > 1,  # grayscale sets are mostly characters
    )


def _check_features(name: str, folder: pathlib.Path) -> None:
    """Refuse a set whose features are of other classes than TFDS's own, before any is imported."""
    for path in sorted(folder.rglob("features.json")):
        if not path.is_file() or path.stat().st_size > _LARGEST:
            raise DataError(f"data set {name!r} cannot be read: {str(path)!r} is damaged.")
        waiting = [json.loads(path.read_text(encoding="utf-8"))]
        while waiting:
            one = waiting.pop()
            waiting.extend(one.values() if isinstance(one, dict) else one)
            waiting = [inner for inner in waiting if isinstance(inner, dict | list)]
            if not isinstance(one, dict):
                continue
            for key in _CLASSES & one.keys():
                kind = one[key]
                if isinstance(kind, str) and "." in kind and not kind.startswith(_OWN):
                    raise DataError(
                        f"data set {name!r} in {folder} asks for the code of {shown(kind)}, which "
                        "is not part of TFDS: if you trust whoever made it, give --trust-data "
                        "(data.dataset.trust_data)."
                    )


def _features(tfds: Any, name: str, builder: Any) -> tuple[str, str]:
    """Find the image and the label: the pair that TFDS trains on, else the only ones there are."""
    features = builder.info.features
    keys = builder.info.supervised_keys or ()
    found = []
    for kind, what in ((tfds.features.Image, "image"), (tfds.features.ClassLabel, "class label")):
        fitting = [key for key in features if isinstance(features[key], kind)]
        supervised = [key for key in fitting if key in keys]
        chosen = supervised if len(supervised) == 1 else fitting
        if len(chosen) != 1:
            raise DataError(
                f"data set {name!r} does not classify images: it has {len(chosen)} features that "
                f"are a{'n' if what[0] in 'aeiou' else ''} {what}, among {', '.join(features)}."
            )
        found.append(chosen[0])
    if np.dtype(features[found[0]].np_dtype) != np.uint8:
        raise DataError(
            f"data set {name!r} has images of {features[found[0]].np_dtype}; only uint8 is read."
        )
    return found[0], found[1]


def _decode(
    name: str, builder: Any, split: str, image: str, label: str, num_classes: int
) -> dict[str, np.ndarray]:
    """Decode one split into arrays."""
    try:
        source = builder.as_data_source(split=split)
    except NotImplementedError as error:
        raise DataError(
            f"data set {name!r} is prepared in a format without random access; {_recipe(name)}"
        ) from error
    if len(source) == 0:
        raise DataError(f"data set {name!r} has no examples in its split {split}.")
    labels = np.empty(len(source), np.int32)
    inputs = np.empty((len(source), *source[0][image].shape), np.uint8)
    for start in range(0, len(source), _CHUNK):
        rows = range(start, min(start + _CHUNK, len(source)))
        for row, example in zip(rows, source.__getitems__(rows), strict=True):
            pixels = example[image]
            if pixels.shape != inputs.shape[1:]:
                raise _sizes_differ(name, inputs.shape[1:], pixels.shape)
            inputs[row] = pixels
            labels[row] = example[label]
    if labels.min() < 0 or labels.max() >= num_classes:
        raise DataError(f"data set {name!r} has examples without a label in its split {split}.")
    return {"inputs": inputs, "labels": labels}


def _sizes_differ(name: str, first: tuple[int, ...], second: tuple[int, ...]) -> DataError:
    """Say that images do not stack."""
    return DataError(
        f"data set {name!r} has images of differing sizes, {first} and {second}; only sets of one "
        "size are read."
    )


PARTS = {
    "tfds": Part(
        build=build, settings=TfdsSettings, summary="an image-classification set of TFDS, prepared"
    )
}
