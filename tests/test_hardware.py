"""Modeled time: devices of the clients, the seconds of a round, and where they are shown."""

import json

import numpy as np
import pytest

import fedjaxprune as fjp
from fedjaxprune.costs import hardware
from fedjaxprune.errors import ConfigError
from fedjaxprune.experiment.analysis import compare, tables
from fedjaxprune.experiment.config import resolve
from fedjaxprune.experiment.folder import record, summary
from fedjaxprune.traffic import ClientBits
from tests import stub

THREE = hardware.of_devices(
    [
        hardware.Device(1.0, 1.0, 2.0),
        hardware.Device(4.0, 2.0, 4.0),
        hardware.Device(0.5, 8.0, 8.0),
    ]
)


def test_a_round_takes_as_long_as_its_slowest_client():
    clients = (
        ClientBits(4_000_000, 8_000_000, (0, 1)),  # bits up, bits down
        ClientBits(0, 8_000_000, (2,)),  # dropped out after the broadcast
    )
    # 6 GFLOP of 3 examples: 2 of client 0, 4 of client 1. 0: 8/2 + 2/1 + 4/1; 1: 8/4 + 4/4 + 4/2
    found = hardware.time_of_round(THREE, clients, flops=6e9, work=np.array([5, 10, 99]))
    assert found == hardware.Time(10.0, 4.0, 0)


def test_what_is_computed_is_divided_by_examples_and_nobody_takes_no_time():
    clients = (ClientBits(8, 8, (2, 1)),)
    found = hardware.time_of_round(THREE, clients, flops=4e9, work=np.array([0, 3, 1]))
    assert found.slowest_client == 2
    np.testing.assert_allclose(found.seconds, 1e9 / 0.5e9 + 16 / 8e6)
    assert hardware.time_of_round(THREE, (), flops=1.0, work=np.ones(3)) == (0.0, 0.0, None)
    idle = hardware.time_of_round(THREE, clients, flops=0.0, work=np.zeros(3))
    np.testing.assert_allclose(idle.seconds, 8 / 2e6 + 8 / 4e6)


def test_of_equal_clients_the_first_is_named():
    four = hardware.same(hardware.DEVICES["phone"], 4)
    clients = (ClientBits(8, 8, (3, 1)), ClientBits(8, 8, (2,)))
    assert hardware.time_of_round(four, clients, flops=1.0, work=np.ones(4)).slowest_client == 1


def test_draws_follow_the_seed_and_a_client_keeps_its_device_in_a_larger_population():
    def draw(seed, number):
        rng = np.random.default_rng(seed)
        return hardware.spread(hardware.DEVICES["phone"], number, rng=rng, spread=0.5)

    small, large = draw(0, 5), draw(0, 5000)
    for few, many in zip(small, large, strict=True):
        np.testing.assert_array_equal(few, many[:5])
    assert not np.array_equal(draw(1, 5).flops_per_second, small.flops_per_second)
    logs = np.log(large.up_bits_per_second / 10e6)
    assert abs(logs.mean()) < 4 * 0.5 / np.sqrt(5000)
    np.testing.assert_allclose(logs.std(), 0.5, rtol=0.06)
    mixed = hardware.mixed(["phone", "laptop"], 1000, rng=np.random.default_rng(0))
    values, counts = np.unique(mixed.flops_per_second, return_counts=True)
    np.testing.assert_array_equal(values, [20e9, 200e9])
    assert counts.min() > 420


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ((1.0, 2.0), "must be a Hardware, got a tuple"),
        (THREE._replace(up_bits_per_second=np.ones(2)), r"shape \[3\], .* got \[2\]"),
        (THREE._replace(flops_per_second=np.array([1.0, 0.0, 1.0])), "got 0.0 for client 1"),
        (THREE._replace(flops_per_second=np.array([1.0, 1.0, np.nan])), "got nan for client 2"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(table, sentence):
    with pytest.raises(ValueError, match=sentence):
        hardware.check(table, 3)


def test_an_unknown_class_of_devices_is_refused():
    with pytest.raises(ConfigError, match="got 'toaster'"):
        resolve.resolve({"client": {"hardware": {"name": "mixed", "classes": ["toaster"]}}})


def own(num_clients: int):
    """Give the clients devices of one's own."""
    return hardware.same(hardware.Device(1e-3, 1e-3, 1e-3), num_clients)


def test_a_run_models_its_time_and_what_compares_runs_shows_it(tmp_path):
    settings = stub.settings() | {"federation.num_rounds": 2, "client.hardware": own}
    settings["client.steps"] = settings.pop("client.epochs")  # as many for every client
    result = fjp.run(settings, folder=tmp_path / "run")
    lines = [*map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())][1:]
    times = [line["compute"]["client_time"] for line in lines]
    for line, time in zip(lines, times, strict=True):
        longest = max(one["up_bits"] + one["down_bits"] for one in line["traffic"]["by_client"])
        flops = line["compute"]["training_flops"]
        total = sum(flops[name] for name in ("forward", "input_gradient", "weight_gradient"))
        cohort = line["clients"]["participating"]
        np.testing.assert_allclose(time["seconds"], longest / 1e3 + total / cohort / 1e6)
        assert 0 < time["overlapped_seconds"] < time["seconds"]
    assert record.read(tmp_path / "run").lines == lines
    seconds = sum(time["seconds"] for time in times)
    np.testing.assert_allclose(result.summary["compute"]["client_time"]["seconds"], seconds)
    compared, _ = compare.of_folders([tmp_path / "run"])
    titles = [column.title for several in tables.columns(compared).values() for column in several]
    assert "modeled time, s" in titles
    np.testing.assert_allclose(compared.measures[0][0].seconds, seconds)


def test_without_hardware_nothing_is_modeled():
    lines = [{"round": 1, "stage": "train", "test": {}, "compute": {"training_flops": None}}]
    assert "client_time" not in summary._compute(lines)


def test_a_round_of_the_server_alone_takes_no_time_and_names_no_client(tmp_path):
    settings = stub.settings() | {"federation.num_rounds": 1, "client.hardware": own}
    fjp.run(settings | {"method": "random_masks"}, folder=tmp_path / "run")
    first, second = record.read(tmp_path / "run").lines
    assert first["compute"]["client_time"] == {"seconds": 0.0, "overlapped_seconds": 0.0}
    assert second["compute"]["client_time"]["slowest_client"] in range(4)
