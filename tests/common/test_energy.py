"""The energy meter on made-up counters and a made-up RAPL tree."""

import time

import pytest
import torch
from memtrain_common.measuring import energy
from memtrain_common.measuring.energy import EnergyMeter, nvml_counters, rapl_counters


class Clock:
    """Time that stands still until it is moved; everything that the meter reads hangs on it."""

    def __init__(self, monkeypatch):
        self.now = 500.0
        monkeypatch.setattr(energy.time, "monotonic", lambda: self.now)

    def counter(self, watts):
        return lambda: 1000 + watts * (self.now - 500.0)


NEVER = 1e6  # seconds between samples: the tests take them by hand


def rows(csv):
    header, *lines = csv.read_text().splitlines()
    assert header == "seconds,watts,joules"
    return [tuple(map(float, line.split(","))) for line in lines]


def test_joules_are_watts_times_seconds_over_all_counters(tmp_path, monkeypatch):
    clock, csv = Clock(monkeypatch), tmp_path / "energy.csv"
    counters = {"a": clock.counter(30.0), "b": clock.counter(12.0)}
    with EnergyMeter(csv, counters=counters, interval=NEVER) as meter:
        for moment in (1.5, 2.0):
            clock.now = 500 + moment
            meter.sample()
        clock.now = 504
        assert meter.joules == 42 * 4
    assert meter.source == "a + b"
    assert rows(csv) == [(1.5, 42.0, 63.0), (2.0, 42.0, 84.0), (4.0, 42.0, 168.0)]


def test_a_resumed_run_goes_on_from_the_last_whole_row(tmp_path, monkeypatch):
    clock, csv = Clock(monkeypatch), tmp_path / "energy.csv"
    csv.write_text("seconds,watts,joules\n1.0,40.0,40.0\n2.0,50.0,90.0\n3.0,6")
    with EnergyMeter(csv, counters={"a": clock.counter(10.0)}, interval=NEVER) as meter:
        clock.now += 3
    assert rows(csv) == [(1.0, 40.0, 40.0), (2.0, 50.0, 90.0), (5.0, 10.0, 120.0)]
    assert meter.joules == 120


def test_a_thread_samples_while_the_run_goes_on(tmp_path):
    csv = tmp_path / "energy.csv"
    with EnergyMeter(csv, counters={"a": lambda: 5.0}, interval=0.001):
        while len(csv.read_text().splitlines()) < 4:  # ends when the thread has written three rows
            time.sleep(0.001)
    assert all(joules == 0 for _, _, joules in rows(csv))


def test_no_counter_is_unavailable_and_not_zero(tmp_path):
    with EnergyMeter(tmp_path / "energy.csv", counters={}) as meter:
        pass
    assert meter.joules is None
    assert meter.source == "unavailable"
    assert not (tmp_path / "energy.csv").exists()


def zone(root, name, energy, limit=1000, label="package-0"):
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "energy_uj").write_text(f"{energy}\n")
    (folder / "max_energy_range_uj").write_text(f"{limit}\n")
    (folder / "name").write_text(f"{label}\n")
    return folder


def test_rapl_counts_packages_once_and_survives_the_wrap(tmp_path):
    package = zone(tmp_path, "intel-rapl:0", 900)
    zone(tmp_path, "intel-rapl:0:0", 100, label="core")  # a part of the package
    counters = rapl_counters(tmp_path)
    assert list(counters) == ["RAPL package-0"]
    read = counters["RAPL package-0"]
    assert read() == 0
    (package / "energy_uj").write_text("950\n")
    assert read() == pytest.approx(50e-6)
    (package / "energy_uj").write_text("20\n")  # beyond 1000, the register began again at 0
    assert read() == pytest.approx((50 + 71) * 1e-6)


def test_a_rapl_that_cannot_be_read_is_left_out(tmp_path):
    folder = zone(tmp_path, "intel-rapl:0", 5)
    (folder / "energy_uj").unlink()
    (folder / "energy_uj").mkdir()  # unreadable for root as well
    assert rapl_counters(tmp_path) == {}
    assert rapl_counters(tmp_path / "nowhere") == {}


def test_without_gpus_nvml_is_not_asked():
    assert nvml_counters([]) == {}


def test_mean_watts_are_of_the_time_that_joules_were_counted(tmp_path, monkeypatch):
    """A source of 100 W: an evaluation that takes most of the time takes most of the joules."""
    from memtrain_common.commands.result import write_result
    from memtrain_common.training.loop import FitConfig, Task, fit

    clock = [0.0]
    monkeypatch.setattr(energy.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(energy, "rapl_counters", lambda: {"steady": lambda: 100 * clock[0]})

    def evaluate(_):
        clock[0] += 50
        return {"loss": 1.0}

    def loss(model, x):
        clock[0] += 1
        return model(x).square().mean()

    model = torch.nn.Linear(3, 2)
    task = Task(model, lambda i: torch.ones(2, 3), loss, torch.optim.SGD(model.parameters()), evaluate=evaluate)
    result = fit(task, FitConfig(6, eval_interval=3))
    assert result.joules == pytest.approx(100 * (6 + 3 * 50))
    write_result(tmp_path, {}, result)
    header, row = (tmp_path / "cost.csv").read_text().splitlines()
    assert dict(zip(header.split(","), row.split(","), strict=True))["mean_watts"] == "100.0"


@pytest.mark.parametrize(("device", "size", "expected"), [("cpu", 1, []), ("cuda:1", 1, [1]), ("cuda:0", 2, [0, 1])])
def test_the_gpus_that_are_metered_are_the_runs_own(device, size, expected, monkeypatch):
    from memtrain_common.training import distributed

    monkeypatch.setattr(distributed, "world", lambda: distributed.World(0, size, 0, size))
    assert distributed.gpus_of(torch.device(device)) == expected
