"""The card of a measurement: on what it ran, with what, when; and what the GPU drew meanwhile."""

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
ROOT = Path(__file__).parents[1]


def machine_card() -> dict[str, Any]:
    """Machine, versions, commit and date (UTC), as JSON has them; what cannot be known is left out or ``unknown``."""
    return {
        "machine": gpu() if torch.cuda.is_available() else cpu(),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def gpu() -> dict[str, Any]:
    """The GPU that torch uses."""
    properties = torch.cuda.get_device_properties(0)
    found: dict[str, Any] = {"gpu": properties.name, "memory_gb": round(properties.total_memory / 1e9, 1)}
    pynvml = nvml()
    if pynvml is not None:
        with suppress(pynvml.NVMLError):  # some machines have a GPU without its sensors
            driver = pynvml.nvmlSystemGetDriverVersion()
            found["driver"] = driver.decode() if isinstance(driver, bytes) else driver
            found["power_limit_w"] = pynvml.nvmlDeviceGetEnforcedPowerLimit(device_handle(pynvml)) / 1000
    return found


def cpu() -> dict[str, Any]:
    """The processor and how many of its threads torch uses."""
    model = platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        model = next(iter(names), model)
    return {"cpu": model, "threads": torch.get_num_threads()}


def versions() -> dict[str, str]:
    """Python's, torch's, CUDA's, and those of the packages that are there."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
        found["cudnn"] = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]  # of torch
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def commit() -> dict[str, Any]:
    """The git commit of the tree and whether it was changed since; ``unknown`` where there is no git or no tree."""
    try:
        head, changes = (
            subprocess.run(  # noqa: S603 - fixed arguments
                ["git", "-C", str(ROOT), *arguments],  # noqa: S607 - whichever git there is
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
    """``pynvml``, initialised, or None where there is none or it finds no driver."""
    try:
        pynvml = import_module("pynvml")
        pynvml.nvmlInit()
    except Exception:  # noqa: BLE001 - its errors are only known once it is there
        return None
    return pynvml


def device_handle(pynvml: Any) -> Any:
    """NVML's handle of the GPU that torch uses, which need not be its first."""
    uuid = str(torch.cuda.get_device_properties(0).uuid)
    return pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")


def show(card: dict[str, Any]) -> None:
    """Print it."""
    table = Table("card", "", show_header=False)
    for key, value in card.items():
        text = ", ".join(f"{name} {entry}" for name, entry in value.items()) if isinstance(value, dict) else str(value)
        table.add_row(key, text)
    Console(width=110, file=sys.stdout).print(table)


@dataclass(frozen=True)
class Draw:
    """What the GPU drew over a while."""

    energy_j: float
    mean_w: float
    mean_sm_mhz: float


class PowerMeter:
    """Samples the GPU's power and clock on a thread of its own while a ``with`` block lasts.

    ``drawn`` is the block's result once it has ended; None where NVML cannot tell, or the block was too short for it.
    """

    def __init__(self) -> None:
        self.drawn: Draw | None = None
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
            self.drawn = drawn(self._samples)

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


def drawn(samples: list[tuple[float, float, float]]) -> Draw | None:
    """Energy by the trapezoidal rule and means of samples of (seconds, watts, MHz); None of fewer than two."""
    if len(samples) < 2:
        return None
    energy = sum((later[0] - earlier[0]) * (later[1] + earlier[1]) / 2 for earlier, later in pairwise(samples))
    mean_w = energy / (samples[-1][0] - samples[0][0])
    return Draw(energy, mean_w, statistics.fmean(clock for *_, clock in samples))
