"""Read a TFDS set of images with classes, or of text, that was prepared on this machine.

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
from typing import Any, Literal

import numpy as np

from fedjaxprune.data.datasets import Dataset
from fedjaxprune.data.sources import windows
from fedjaxprune.errors import DataError, beside, first_line, near_miss, shown
from fedjaxprune.registry import Part, locate
from fedjaxprune.settings import Settings, setting

# Per channel, over the training images: mean and standard deviation.
_STATISTICS = {
    "mnist": ((0.1307,), (0.3081,)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.507, 0.487, 0.441), (0.267, 0.256, 0.276)),
    "svhn_cropped": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
}
# Colour images of characters, which mirrored are others or none.
_CHARACTERS = ("svhn_cropped",)
_TRANSPOSED = ("emnist",)  # stored with rows for columns
# Labels that occur, where others are declared too: the first one, and the names of all.
_CLASSES_IN_USE = {"emnist/letters": (1, "ABCDEFGHIJKLMNOPQRSTUVWXYZ")}

_VERSION = re.compile(r"\d+\.\d+\.\d+")
_NAME = re.compile(r"[^/:\s]+(/[^/:\s]+)?(:[^/:\s]+)?")
_OWN = "tensorflow_datasets."
_CLASSES = frozenset({"pythonClassName", "python_class_name", "type"})  # name code, in JSON
_LARGEST = 2**24  # bytes of the file of features
_CHUNK = 1000  # examples decoded at a time


class PreparedSettings(Settings):
    """Which TFDS set is read, where from, and how its images are used."""

    tfds_name: str = setting(
        ..., "Name of a prepared set: `name` or `name/config`, either may end in `:version`."
    )
    data_dir: str | None = setting(
        None, "Folder of prepared sets.", unset="TFDS_DATA_DIR, else ~/tensorflow_datasets"
    )
    trust_data: bool = setting(
        False, "Whether the set may name code of any package to be imported for its features."
    )
    label: str | None = setting(
        None,
        "Feature that is the class, such as coarse_label of cifar100.",
        unset="the one that TFDS trains on, or the only one",
    )
    flip: Literal["auto", "always", "never"] = setting(
        "auto",
        "When augmentation mirrors images from left to right; auto: colour images, but not those "
        "of characters.",
    )


class TfdsSettings(windows.WindowSettings, PreparedSettings):
    """Which TFDS set is read, where from, and of a set of text how it is cut into examples."""


def build(settings: TfdsSettings) -> Dataset:
    """Read the set that the settings name."""
    return _find(settings.tfds_name, settings.data_dir, settings)


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

    A set without images whose only feature is a text is cut into sequences as a text file is
    (`sources.text`). Images of EMNIST, which are stored with rows for columns, are turned upright,
    and the labels of ``emnist/letters`` counted from 0 to 25; 37 classes are declared there.
    """
    return _find(name, data_dir, TfdsSettings(tfds_name=name, trust_data=bool(trust_data)))


def _find(name: str, data_dir: str | os.PathLike[str] | None, settings: TfdsSettings) -> Dataset:
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
        if not settings.trust_data:
            _check_features(name, chosen)
        return _read(name, chosen, settings)
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


def _read(name: str, folder: pathlib.Path, settings: TfdsSettings) -> Dataset:
    """Decode both splits of the set prepared in `folder`."""
    tfds = _tfds()
    with warnings.catch_warnings():  # TFDS calls what protobuf 6 calls deprecated
        warnings.simplefilter("ignore", DeprecationWarning)
        builder = tfds.builder_from_directory(folder)
    splits = builder.info.splits
    test_split = "test" if "test" in splits else "validation"
    if "train" not in splits or test_split not in splits:
        raise DataError(
            f"data set {name!r} has the splits {', '.join(splits) or '(none)'}; needed are train, "
            "and test or validation."
        )
    features = builder.info.features
    if len(features) == 1 and isinstance(
        features[text := next(iter(features))], tfds.features.Text
    ):
        both = (_join(name, builder, split, text) for split in ("train", test_split))
        train, test = map(windows.by_speaker, both)
        return windows.cut(train, test, settings, name=name)
    image, label = _features(tfds, name, builder, settings.label)
    classes = features[label]
    own = name.partition(":")[0]
    first, class_names = _CLASSES_IN_USE.get(own, (0, classes.names))
    given = (image, label, range(first, first + len(class_names)))
    train, test = (_decode(name, builder, split, *given) for split in ("train", test_split))
    if train["inputs"].shape[1:] != test["inputs"].shape[1:]:
        raise _sizes_differ(name, train["inputs"].shape[1:], test["inputs"].shape[1:])
    mean, std = _STATISTICS.get(own, (None, None))
    is_colour = train["inputs"].shape[-1] > 1  # grayscale sets are mostly characters
    flip = {"auto": is_colour and own not in _CHARACTERS, "always": True, "never": False}
    return Dataset(
        name=name,
        train=train,
        test=test,
        num_classes=len(class_names),
        task="classification",
        class_names=tuple(class_names),
        input_shape=train["inputs"].shape[1:],
        max_value=255.0,
        mean=mean,
        std=std,
        may_flip=flip[settings.flip],
    )


def _join(name: str, builder: Any, split: str, text: str) -> str:
    """Join the texts of a split, which most sets have one of."""
    values = [example[text] for example in _source(name, builder, split)]
    return "\n".join(one.decode("utf-8") if isinstance(one, bytes) else one for one in values)


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


def _features(tfds: Any, name: str, builder: Any, wanted: str | None) -> tuple[str, str]:
    """Find the image and the label: the pair that TFDS trains on, else the only ones there are.

    `wanted` is the label that is asked for, if one is.
    """
    features = builder.info.features
    kind = tfds.features.ClassLabel
    labels = sorted(key for key in features if isinstance(features[key], kind))
    if wanted is not None and wanted not in labels:
        raise DataError(
            f"label must be a class label of data set {name!r} ({', '.join(labels) or 'none'}), "
            f"got {wanted!r}{near_miss(wanted, labels)}"
        )
    keys = builder.info.supervised_keys or ()
    found = []
    for kind, what in ((tfds.features.Image, "image"), (tfds.features.ClassLabel, "class label")):
        fitting = [key for key in features if isinstance(features[key], kind)]
        if wanted in fitting:
            fitting = [wanted]
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


def _source(name: str, builder: Any, split: str) -> Any:
    """Open one split."""
    try:
        source = builder.as_data_source(split=split)
    except NotImplementedError as error:
        raise DataError(
            f"data set {name!r} is prepared in a format without random access; {_recipe(name)}"
        ) from error
    if len(source) == 0:
        raise DataError(f"data set {name!r} has no examples in its split {split}.")
    return source


def _decode(
    name: str, builder: Any, split: str, image: str, label: str, classes: range
) -> dict[str, np.ndarray]:
    """Decode one split into arrays; the labels are counted from the first of `classes`."""
    source = _source(name, builder, split)
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
    labels -= classes.start
    if labels.min() < 0 or labels.max() >= len(classes):
        raise DataError(f"data set {name!r} has examples without a label in its split {split}.")
    if name.partition(":")[0].partition("/")[0] in _TRANSPOSED:
        inputs = np.ascontiguousarray(inputs.swapaxes(1, 2))
    return {"inputs": inputs, "labels": labels}


def _sizes_differ(name: str, first: tuple[int, ...], second: tuple[int, ...]) -> DataError:
    """Say that images do not stack."""
    return DataError(
        f"data set {name!r} has images of differing sizes, {first} and {second}; only sets of one "
        "size are read."
    )


PARTS = {
    "tfds": Part(
        build=build,
        settings=TfdsSettings,
        summary="a set of TFDS that was prepared: images with classes, or text",
    )
}
