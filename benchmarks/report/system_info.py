"""Describes the system of a measurement, and measures the GPU's power during one."""

import platform
import statistics
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import torch
from rich.console import Console
from rich.table import Table

PACKAGES = ("diffusers", "transformers", "torchao", "cache-dit")
SAMPLE_EVERY_S = 0.05
ROOT = Path(__file__).parents[2]


def system_info() -> dict[str, Any]:
    """Return machine, versions, commit and date (UTC) for JSON. Unknown values are omitted or ``unknown``."""
    return {
        "machine": gpu() if torch.cuda.is_available() else cpu(),
        "versions": package_versions(),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def gpu() -> dict[str, Any]:
    """Describe the GPU that torch uses."""
    properties = torch.cuda.get_device_properties(0)
    info: dict[str, Any] = {"gpu": properties.name, "memory_gb": round(properties.total_memory / 1e9, 1)}
    pynvml = nvml()
    if pynvml is not None:
        with suppress(pynvml.NVMLError):  # some machines provide no sensors
            driver = pynvml.nvmlSystemGetDriverVersion()
            info["driver"] = driver.decode() if isinstance(driver, bytes) else driver
            info["power_limit_w"] = pynvml.nvmlDeviceGetEnforcedPowerLimit(device_handle(pynvml)) / 1000
    return info


def cpu() -> dict[str, Any]:
    """Describe the CPU, with the number of threads that torch uses."""
    model = platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        model = next(iter(names), model)
    return {"cpu": model, "threads": torch.get_num_threads()}


def package_versions() -> dict[str, str]:
    """Return the versions of Python, torch, CUDA and the installed packages of ``PACKAGES``."""
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    if torch.version.cuda is not None:
        versions["cuda"] = torch.version.cuda
        versions["cudnn"] = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def commit() -> dict[str, Any]:
    """Return the git commit and whether the tree is dirty; ``unknown`` without git or outside of a repository."""
    try:
        head, changes = (
            subprocess.run(  # noqa: S603 - fixed arguments
                ["git", "-C", str(ROOT), *arguments],  # noqa: S607 - the git of the PATH
                capture_output=True,
                text=True,
                check=True,
            ).stdout.strip()
            for arguments in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return {"commit": "unknown"}
    return {"commit": head, "is_dirty": bool(changes)}


def nvml() -> Any:
    """Import and initialize ``pynvml``; return None if it is not installed or finds no driver."""
    try:
        pynvml = import_module("pynvml")
        pynvml.nvmlInit()
    except Exception:  # noqa: BLE001 - its exception classes are unknown before the import
        return None
    return pynvml


def device_handle(pynvml: Any) -> Any:
    """Return NVML's handle of the GPU that torch uses, which may not be NVML's first."""
    uuid = str(torch.cuda.get_device_properties(0).uuid)
    return pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")


def show(info: dict[str, Any]) -> None:
    """Print the system information as a table."""
    table = Table("key", "value", show_header=False)
    for key, value in info.items():
        text = ", ".join(f"{name} {entry}" for name, entry in value.items()) if isinstance(value, dict) else str(value)
        table.add_row(key, text)
    Console(width=110, file=sys.stdout).print(table)


@dataclass(frozen=True)
class PowerUsage:
    """Energy, mean power and mean clock of a GPU during a measurement."""

    energy_j: float
    mean_w: float
    mean_sm_mhz: float


class PowerMeter:
    """Samples the GPU's power and clock on another thread within a ``with`` block.

    ``usage`` is set after the block; it is None without NVML, or if the block was too short.
    """

    def __init__(self) -> None:
        self.usage: PowerUsage | None = None
        self._nvml = nvml() if torch.cuda.is_available() else None
        self._samples: list[tuple[float, float, float]] = []
        """Seconds, watts, MHz."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="power", daemon=True)

    def __enter__(self) -> Self:
        if self._nvml is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._nvml is not None:
            self._stop.set()
            self._thread.join()
            self.usage = power_usage(self._samples)

    def _sample(self) -> None:
        pynvml: Any = self._nvml
        with suppress(pynvml.NVMLError):
            handle = device_handle(pynvml)
            while True:
                watts = pynvml.nvmlDeviceGetPowerUsage(handle) / 1000
                clock = pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)
                self._samples.append((time.perf_counter(), watts, clock))
                if self._stop.wait(SAMPLE_EVERY_S):
                    return


def power_usage(samples: list[tuple[float, float, float]]) -> PowerUsage | None:
    """Integrate samples (seconds, watts, MHz) by the trapezoidal rule; return None for fewer than two samples."""
    if len(samples) < 2:
        return None
    energy = sum((later[0] - earlier[0]) * (later[1] + earlier[1]) / 2 for earlier, later in pairwise(samples))
    mean_w = energy / (samples[-1][0] - samples[0][0])
    return PowerUsage(energy, mean_w, statistics.fmean(clock for *_, clock in samples))
