"""The system info of a measurement, and its energy."""

import json
import threading
import time
from pathlib import Path

import pytest
import torch

from benchmarks import system_info as info
from benchmarks.system_info import PowerMeter, power_usage, show, system_info


def test_a_card_says_where_and_with_what(capsys: pytest.CaptureFixture[str]) -> None:
    """A card has machine, versions, commit and date, goes into JSON, and can be shown."""
    made = system_info()
    assert json.loads(json.dumps(made)) == made
    assert {"machine", "versions", "commit", "date"} == made.keys()
    assert {"python", "torch", "diffusers"} <= made["versions"].keys()
    assert made["date"].endswith("+00:00")
    show(made)
    assert made["versions"]["torch"] in capsys.readouterr().out


def test_outside_a_git_tree_the_commit_is_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A bare copy of the tree has no commit, and the card says so."""
    monkeypatch.setattr(info, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert info.commit() == {"commit": "unknown"}


@pytest.mark.parametrize("has_gpu", [False, True])
def test_without_a_sensor_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, *, has_gpu: bool) -> None:
    """Without a GPU, or without NVML to read it, the result is None."""
    sensor = FakeNvml(num_samples=1000)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(info, "nvml", lambda: None if has_gpu else sensor)
    with PowerMeter() as meter:
        pass
    assert meter.usage is None
    assert sensor.left == 1000


def test_energy_is_the_area_under_the_power() -> None:
    """100 W, then a rise to 300 W: energy by trapezoids, the mean power is energy over time."""
    found = power_usage([(0.0, 100.0, 1000.0), (1.0, 100.0, 1000.0), (3.0, 300.0, 1600.0)])
    assert found is not None
    assert found.energy_j == 100 + 400
    assert found.mean_w == pytest.approx(500 / 3)
    assert found.mean_sm_mhz == 1200
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
    monkeypatch.setattr(info, "nvml", lambda: sensor)
    monkeypatch.setattr(info, "device_handle", lambda _pynvml: None)
    began = time.perf_counter()
    with PowerMeter() as meter:
        assert sensor.is_sampled.wait(60)
    seconds = time.perf_counter() - began
    assert (meter.usage is not None) == is_told
    if meter.usage is not None:
        assert meter.usage.mean_w == pytest.approx(200)
        assert 0 < meter.usage.energy_j <= 200 * seconds
        assert meter.usage.mean_sm_mhz == 1500
