"""The energy meter on made-up counters and a made-up RAPL tree."""

import time

import pytest
from memtrain_common.energy import EnergyMeter, nvml_counters, rapl_counters


class Clock:
    """A counter at a constant power."""

    def __init__(self, watts):
        self.watts, self.began = watts, time.monotonic()

    def __call__(self):
        return 1000 + self.watts * (time.monotonic() - self.began)


def test_joules_are_watts_times_seconds_over_all_counters(tmp_path):
    csv = tmp_path / "energy.csv"
    with EnergyMeter(csv, counters={"a": Clock(30.0), "b": Clock(12.0)}, interval=0.02) as meter:
        began = time.monotonic()
        time.sleep(0.2)
        spent = time.monotonic() - began
        joules = meter.joules
    assert meter.source == "a + b"
    assert joules == pytest.approx(42.0 * spent, rel=0.05)
    header, *lines = csv.read_text().splitlines()
    assert header == "seconds,watts,joules"
    values = [tuple(map(float, line.split(","))) for line in lines]
    assert len(values) >= 4
    assert values == sorted(values, key=lambda v: v[0])
    assert all(v[2] == pytest.approx(42 * v[0], rel=0.02, abs=0.02) for v in values)


def test_a_resumed_run_goes_on_from_the_last_whole_row(tmp_path):
    csv = tmp_path / "energy.csv"
    csv.write_text("seconds,watts,joules\n1.0,40.0,40.0\n2.0,50.0,90.0\n3.0,6")
    with EnergyMeter(csv, counters={"a": Clock(10.0)}) as meter:
        time.sleep(0.05)
    last = [float(v) for v in csv.read_text().splitlines()[-1].split(",")]
    assert csv.read_text().count("\n") == 4  # the row that was cut short is gone
    assert last[0] == pytest.approx(2.05, abs=0.04)
    assert last[2] == pytest.approx(90.5, abs=0.4)
    assert meter.joules > 90


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
