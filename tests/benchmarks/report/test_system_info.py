"""The system info of a measurement, and its energy."""

import json
import threading
import time
from pathlib import Path

import pytest
import torch

from benchmarks.report import system_info as module
from benchmarks.report.system_info import PowerMeter, power_usage, show, system_info


def test_the_info_has_machine_versions_commit_and_date(capsys: pytest.CaptureFixture[str]) -> None:
    """The info is JSON and can be printed."""
    info = system_info()
    assert json.loads(json.dumps(info)) == info
    assert {"machine", "versions", "commit", "date"} == info.keys()
    assert {"python", "torch", "diffusers"} <= info["versions"].keys()
    assert info["date"].endswith("+00:00")
    show(info)
    assert info["versions"]["torch"] in capsys.readouterr().out


def test_without_git_the_commit_is_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert module.commit() == {"commit": "unknown"}


@pytest.mark.parametrize("has_gpu", [False, True])
def test_without_a_sensor_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, *, has_gpu: bool) -> None:
    """Without a GPU, or without NVML to read it, the result is None."""
    sensor = FakeNvml(num_samples=1000)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(module, "nvml", lambda: None if has_gpu else sensor)
    with PowerMeter() as meter:
        pass
    assert meter.usage is None
    assert sensor.num_left == 1000


def test_energy_is_the_integral_of_power() -> None:
    """100 W, then a rise to 300 W: the energy is a sum of trapezoids, the mean power is energy over time."""
    energy = power_usage([(0.0, 100.0, 1000.0), (1.0, 100.0, 1000.0), (3.0, 300.0, 1600.0)])
    assert energy is not None
    assert energy.energy_j == 100 + 400
    assert energy.mean_w == pytest.approx(500 / 3)
    assert energy.mean_sm_mhz == 1200
    assert power_usage([(0.0, 100.0, 1000.0)]) is None


class FakeNvml:
    """A GPU with a power of 200 W at 1500 MHz; its clock cannot be read after some samples."""

    NVML_CLOCK_SM = 1

    class NVMLError(Exception):
        """As pynvml's."""

    def __init__(self, num_samples: int) -> None:
        self.num_left = num_samples
        self.is_sampled = threading.Event()
        """Set by the third sample, or when there are no more samples."""
        self._num_samples = num_samples

    def nvmlDeviceGetPowerUsage(self, _handle: object) -> int:  # noqa: N802 - pynvml's name
        return 200_000

    def nvmlDeviceGetClockInfo(self, _handle: object, _kind: int) -> int:  # noqa: N802 - pynvml's name
        self.num_left -= 1
        if self.num_left < 0:
            self.is_sampled.set()
            raise self.NVMLError
        if self._num_samples - self.num_left >= 3:
            self.is_sampled.set()
        return 1500


@pytest.mark.parametrize(("num_samples", "is_measured"), [(1000, True), (0, False)])
def test_the_meter_samples_during_the_block(
    monkeypatch: pytest.MonkeyPatch, num_samples: int, *, is_measured: bool
) -> None:
    """Energy is power times the block's duration; a failing sensor ends only the sampling."""
    sensor = FakeNvml(num_samples)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module, "nvml", lambda: sensor)
    monkeypatch.setattr(module, "device_handle", lambda _pynvml: None)
    began = time.perf_counter()
    with PowerMeter() as meter:
        assert sensor.is_sampled.wait(60)
    seconds = time.perf_counter() - began
    assert (meter.usage is not None) == is_measured
    if meter.usage is not None:
        assert meter.usage.mean_w == pytest.approx(200)
        assert 0 < meter.usage.energy_j <= 200 * seconds
        assert meter.usage.mean_sm_mhz == 1500
