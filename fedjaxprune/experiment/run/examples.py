"""A run's data: read, the server's share set aside, the rest dealt out to clients."""

import zlib
from typing import Any, NamedTuple

import numpy as np

from fedjaxprune.data import (
    conversion,
    mapped,
    partitions,
    population_checks,
    splits,
    transforms,
)
from fedjaxprune.data.datasets import Dataset
from fedjaxprune.errors import ConfigError, DataError, first_line
from fedjaxprune.experiment.config.sections import RunConfig
from fedjaxprune.method import needs_of
from fedjaxprune.types import Population

_SAMPLE = 1000  # examples that a checksum of the data looks at


class Examples(NamedTuple):
    """Who holds which examples, and how they become inputs."""

    dataset: Dataset  # as its source gave it
    held: np.ndarray  # ``[S]`` int32, rows that the server holds
    population: Population  # on the host
    sizes: np.ndarray  # ``[N]``, the clients' numbers of examples
    train: transforms.Preprocess  # ``(key, inputs) -> inputs`` in training
    test: transforms.Preprocess  # the same in tests


def read(config: RunConfig) -> Examples:
    """Read the data, set the server's examples aside, and deal the rest out to clients."""
    section = config.data
    try:
        value = config.parts.dataset.part.build(section.dataset)
        dataset = conversion.as_dataset(value, name=section.dataset.name)
    except DataError as error:
        raise DataError(f"data.dataset {section.dataset.name!r}: {error}") from None
    if dataset.clients is not None:
        return _of_store(config, dataset)
    labels = np.asarray(dataset.train["labels"])
    held, rest = _hold_out(config, labels)
    rng = np.random.default_rng(config.seed)
    try:
        parts = config.parts.partition.part.build(
            section.partition,
            rng,
            labels[rest],
            num_clients=section.num_clients,
            keys={name: ids[rest] for name, ids in dataset.keys.items()},
        )
        order, offsets = population_checks.rows(parts, len(rest))
    except ValueError as error:
        over = "" if section.num_clients is None else f" over {section.num_clients} clients"
        raise ConfigError(
            f"data.partition {section.partition.name!r} of {section.dataset.name!r}{over} is "
            f"impossible: {first_line(error)}"
        ) from None
    num_clients = len(offsets) - 1
    if section.num_clients not in (None, num_clients):
        raise ConfigError(
            f"data.num_clients must be {num_clients}, as the partition {section.partition.name!r} "
            f"makes so many clients, or be left out; got {section.num_clients}."
        )
    parts = partitions.Partition(rest[order], offsets)
    dataset, train, test = _prepared(config, dataset)
    return Examples(
        dataset=dataset,
        held=held,
        population=partitions.population_on_host(
            dict(dataset.train),
            parts,
            num_classes=None if dataset.task == "regression" else dataset.num_classes,
            held=held,
        ),
        sizes=np.diff(offsets).astype(np.int64),
        train=train,
        test=test,
    )


def _prepared(
    config: RunConfig, dataset: Dataset
) -> tuple[Dataset, transforms.Preprocess, transforms.Preprocess]:
    """Say how examples become inputs, in training and in tests."""
    if not config.data.normalize:
        dataset = dataset._replace(mean=None, std=None)
    try:
        return dataset, *transforms.for_dataset(dataset, augment=config.data.augment)
    except ValueError as error:
        raise ConfigError(f"data.augment: {first_line(error)}") from None


def _of_store(config: RunConfig, dataset: Dataset) -> Examples:
    """Take the clients that a client store has; there is nothing to deal out."""
    sizes = dataset.clients.sizes
    if config.data.num_clients not in (None, len(sizes)):
        raise ConfigError(
            f"data.num_clients must be {len(sizes)}, the clients that {dataset.name!r} has, or be "
            f"left out; got {config.data.num_clients}."
        )
    needs = needs_of(config.parts.method.part, config.method)
    if config.server.data_fraction or needs.server_examples:
        raise ConfigError(
            f"the server needs examples of its own, and {dataset.name!r} has those of clients "
            "alone: leave server.data_fraction out, and take a method that needs none."
        )
    if config.execution.examples == "device":
        raise ConfigError(
            f"execution.examples must be host or auto for {dataset.name!r}, whose examples are "
            "fetched, got device."
        )
    dataset, train, test = _prepared(config, dataset)
    people: Any = Population(
        examples=dict(dataset.train),
        order=np.zeros(0, np.int32),  # pyright: ignore[reportArgumentType]
        offsets=np.concatenate([[0], np.cumsum(sizes)]),  # pyright: ignore[reportArgumentType]
    )
    return Examples(dataset, np.zeros(0, np.int32), people, sizes, train, test)


def _hold_out(config: RunConfig, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Set the server's examples aside, where there are to be any: ``(held, rest)``."""
    share = config.server.data_fraction
    needs = needs_of(config.parts.method.part, config.method)
    if share is None and not needs.server_examples:
        return np.zeros(0, np.int32), np.arange(len(labels), dtype=np.int32)
    rng = np.random.default_rng([config.seed, 1])  # leaves the partition's draws as they were
    try:
        return splits.hold_out(rng, splits.classes_or_one(labels), share=share)
    except ValueError as error:
        raise ConfigError(f"server.data_fraction: {error}") from None


def checksum(dataset: Dataset) -> int:
    """Sum up shapes and some examples of a data set, evenly spaced; see also `checksum_of_all`."""
    total = 0
    for split in (dataset.train, dataset.test):
        for name in ("inputs", "labels"):
            array = np.asarray(split[name])
            rows = array[:: max(1, len(array) // _SAMPLE)]
            total = zlib.crc32(f"{array.shape} {array.dtype}".encode(), total)
            total = zlib.crc32(np.ascontiguousarray(rows).tobytes(), total)
    return total


def checksum_of_all(examples: Examples) -> int:
    """Sum up all examples, in training and in tests, and who holds which.

    Of a client store it is the sizes, the tests, and what the store says of its contents.
    """
    dataset = examples.dataset
    arrays = [np.asarray(split[n]) for split in (dataset.train, dataset.test) for n in split]
    arrays += [examples.held, examples.population.order, examples.population.offsets]
    total = mapped.checksum(arrays)
    if dataset.clients is not None and dataset.clients.checksum is not None:
        total = zlib.crc32(str(int(dataset.clients.checksum())).encode(), total)
    return total
