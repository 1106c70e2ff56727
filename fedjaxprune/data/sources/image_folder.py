"""A folder of images with one folder per class."""

import pathlib

import numpy as np

from fedjaxprune.data.conversion import as_dataset
from fedjaxprune.data.datasets import Dataset
from fedjaxprune.data.sources import files
from fedjaxprune.errors import DataError
from fedjaxprune.registry import Part
from fedjaxprune.settings import Count, Probability, Settings, setting

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
_TEST_FOLDERS = ("test", "validation", "valid", "val")


class ImageFolderSettings(Settings):
    """Which folder is read, and how its images are stored."""

    path: str = setting(
        ..., "Folder with one folder of images per class, or with the folders train and test."
    )
    resize: Count | None = setting(
        None,
        "Side of the squares that all images are resized to.",
        unit="pixels",
        unset="images must have one size and keep it",
    )
    test_fraction: Probability = setting(
        0.2,
        "Share of each class held out for tests where there is no folder test.",
        unit="fraction",
        gt=0,
    )
    flip: bool = setting(False, "Augmentation may mirror the images from left to right.")


def build(settings: ImageFolderSettings) -> Dataset:
    """Read the images as uint8; they are grayscale if all of them are, else RGB."""
    root = files.find(settings.path, kind="folder")
    train_root, test_root = root, None
    if (root / "train").is_dir():
        train_root = root / "train"
        test_root = next((root / n for n in _TEST_FOLDERS if (root / n).is_dir()), None)
    names, listed, labels = _list(train_root)
    test_listed, test_labels = [], []
    if test_root is not None:
        test_names, test_listed, test_classes = _list(test_root)
        if unknown := sorted(set(test_names) - set(names)):
            raise DataError(
                f"{test_root} has the class {unknown[0]!r}, which {train_root} has not."
            )
        test_labels = [names.index(test_names[label]) for label in test_classes]
    images = _stack([*listed, *test_listed], settings.resize)
    arrays = {"inputs": images[: len(listed)], "labels": np.array(labels)}
    if test_root is not None:
        arrays |= {"test_inputs": images[len(listed) :], "test_labels": np.array(test_labels)}
    made = as_dataset(
        arrays,
        name=root.resolve().name,
        num_classes=len(names),
        class_names=tuple(names),
        test_fraction=settings.test_fraction,
    )
    mean, std = _statistics(made.train["inputs"])
    return made._replace(mean=mean, std=std, may_flip=settings.flip)


def _list(root: pathlib.Path) -> tuple[list[str], list[pathlib.Path], list[int]]:
    """List the classes, the images and their classes, all in alphabetical order."""
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    names = [name for name in names if not name.startswith((".", "_"))]
    if len(names) < 2:
        raise DataError(
            f"{root} must have a folder of images per class, at least two, got "
            f"{', '.join(names) or 'none'}."
        )
    listed, labels = [], []
    for label, name in enumerate(names):
        images = sorted(p for p in (root / name).rglob("*") if p.suffix.lower() in _SUFFIXES)
        if not images:
            raise DataError(f"{root / name} has no images ({', '.join(_SUFFIXES[:4])}, ...).")
        listed += images
        labels += [label] * len(images)
    return names, listed, labels


def _stack(paths: list[pathlib.Path], resize: int | None) -> np.ndarray:
    """Decode all images to ``[E, H, W, 1 or 3]`` uint8."""
    from PIL import Image

    def decode(path: pathlib.Path) -> np.ndarray:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise DataError(f"{path} must have 8 bits per channel, got mode {image.mode}.")
            image = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
            if resize is not None:
                image = image.resize((resize, resize), Image.Resampling.BILINEAR)
            return np.asarray(image)

    made: list[np.ndarray] = []
    for path in paths:
        made.append(files.read(path, decode, "an image"))
        if made[-1].shape[:2] != made[0].shape[:2]:
            first, this = ("x".join(map(str, x.shape[:2])) for x in (made[0], made[-1]))
            raise DataError(
                f"images must have one size, but {paths[0]} has {first} and {path} has {this} "
                "pixels; set resize."
            )
    is_gray = all(pixels.ndim == 2 for pixels in made)
    if not is_gray:  # gray images among colored ones
        made = [x if x.ndim == 3 else np.repeat(x[..., None], 3, axis=2) for x in made]
    stacked = np.stack(made)
    return stacked[..., None] if is_gray else stacked


def _statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...] | None]:
    """Compute mean and standard deviation of each channel, of values divided by 255."""
    levels = np.arange(256) / 255.0
    means, stds = [], []
    for channel in range(images.shape[-1]):
        shares = np.bincount(images[..., channel].ravel(), minlength=256) / images[..., 0].size
        mean = float(shares @ levels)
        means.append(mean)
        stds.append(float(np.sqrt(shares @ (levels - mean) ** 2)) or 1.0)
    return tuple(means), tuple(stds)


PARTS = {
    "image_folder": Part(
        build=build,
        settings=ImageFolderSettings,
        summary="images in folder/class_name/, or folder/train/class_name/",
    )
}
