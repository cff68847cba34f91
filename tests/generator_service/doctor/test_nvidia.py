"""The driver, by an ``nvidia-smi`` that responds, hangs, or prints other output."""

import shutil
from pathlib import Path

import pytest

from generator_service.doctor.check import Check, Status
from generator_service.doctor.host import Host
from generator_service.doctor.libraries import Gpu, Libraries
from generator_service.doctor.nvidia import MIB, Driver, Process, check_driver, read_driver
from tests.generator_service.doctor.hosts import (
    SMI,
    by_name,
    described,
    gpu,
    install,
    install_nvidia_smi,
    libraries,
    put,
)

PROC = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 23 03:02:42 UTC 2025\nGCC version:  12\n"
OPEN_PROC = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (root@x)  Tue\n"


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """A host without a driver."""
    return described(tmp_path)


def checks_of(host: Host, facts: Libraries, *, needs_gpu: bool = True) -> dict[str, Check]:
    """The checks of the driver."""
    return by_name(list(check_driver(read_driver(host), facts, host, needs_gpu=needs_gpu)))


def test_two_gpus_are_read(tmp_path: Path, host: Host) -> None:
    """Two GPUs are read with their memory, compute mode and processes."""
    lines = f"{SMI.format(k=0, used=40_000)}\nGPU-1, 580.95.05, NVIDIA A10, [N/A], [N/A], Exclusive_Process, Disabled\n"
    install_nvidia_smi(tmp_path, lines, "GPU-0, 1234, 39000\nGPU-0, 77, [N/A]\n")
    driver = read_driver(host)
    assert (driver.version, driver.major, driver.problem) == ("580.95.05", 580, "")
    first, second = driver.boards
    assert (first.name, first.total_bytes, first.used_bytes) == ("NVIDIA H100 80GB HBM3", 81_559 * MIB, 40_000 * MIB)
    assert first.processes == (Process("1234", 39_000 * MIB), Process("77", None))
    assert (first.compute_mode, first.is_persistent) == ("Default", True)
    assert (second.total_bytes, second.compute_mode, second.is_persistent) == (None, "Exclusive_Process", False)
    assert driver.board("1") == driver.board("GPU-1") == second  # torch has no prefix
    assert driver.board("") is driver.board("GPU-2") is None


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo nonsense; echo '1, 2'", "unexpected output of nvidia-smi: nonsense 1, 2"),
        ("exit 0", "unexpected output of nvidia-smi"),
        ("head -c 3000 /dev/urandom", "unexpected output of nvidia-smi"),
        ("echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18", "status 18: Failed to initial"),
        ("echo 'no device' >&2; exit 6", "status 6: no device"),
        ("kill -9 $$", "nvidia-smi ended with status -9"),
    ],
)
def test_unusable_output_of_nvidia_smi_is_a_warning(tmp_path: Path, host: Host, script: str, message: str) -> None:
    """Unusable output of nvidia-smi is a warning, and the version comes from ``/proc``."""
    install(tmp_path, "nvidia-smi", script.replace("head", str(shutil.which("head"))))
    put(host.root, "proc/driver/nvidia/version", OPEN_PROC)
    driver = read_driver(host)
    assert message in driver.problem
    assert (driver.version, driver.boards) == ("580.95.05", ())
    checks = checks_of(host, libraries(gpu()))
    assert checks["nvidia-smi"].status is Status.WARNING
    assert checks["nvidia driver"].status is Status.OK


def test_an_nvidia_smi_that_hangs_is_stopped(tmp_path: Path, host: Host) -> None:
    """An nvidia-smi that hangs is killed with its children."""
    install(tmp_path, "nvidia-smi", f"{shutil.which('sleep')} 600 & wait")
    driver = read_driver(Host(host.environ, host.root, program_timeout_s=0.2))
    assert driver.problem == "nvidia-smi did not finish within 0.2 s: the driver hangs"


def test_an_nvidia_smi_that_cannot_be_started_is_reported(tmp_path: Path, host: Host) -> None:
    """An nvidia-smi that cannot be executed is reported."""
    install(tmp_path, "nvidia-smi", "")
    (tmp_path / "bin" / "nvidia-smi").write_bytes(b"\x7fELF, but not really")
    assert read_driver(host).problem == "nvidia-smi cannot be started: Exec format error"


def test_a_host_without_a_driver_is_skipped(host: Host) -> None:
    """A host without a driver is skipped, since the services may run on the CPU."""
    assert read_driver(host) == Driver(problem="nvidia-smi is not on PATH")
    checks = checks_of(host, libraries(cuda=None))
    assert [(check.name, check.status) for check in checks.values()] == [("nvidia driver", Status.SKIPPED)]
    assert "there is no NVIDIA driver" in checks["nvidia driver"].detail
    put(host.root, ".dockerenv", "")
    assert "this container has no access to a GPU" in checks_of(host, libraries())["nvidia driver"].detail


@pytest.mark.parametrize(
    ("proc", "cuda", "gpus", "needs_gpu", "status"),
    [
        (PROC, "13.0", (), True, Status.FAILED),
        (PROC, "13.0", (), False, Status.WARNING),
        (PROC, "13.0", (gpu(),), True, Status.WARNING),  # by CUDA's forward compatibility
        (PROC, "12.6", (gpu(),), True, Status.OK),
        (OPEN_PROC, "13.0", (gpu(),), True, Status.OK),
        (PROC.replace("570", "520"), "12.6", (), True, Status.FAILED),
        (PROC, "14.1", (), True, Status.OK),  # a future version
        (PROC, None, (), False, Status.OK),
    ],
)
def test_the_driver_must_be_new_enough_for_torch(
    host: Host, proc: str, cuda: str | None, gpus: tuple[Gpu, ...], needs_gpu: bool, status: Status
) -> None:
    """CUDA 13 needs driver 580, CUDA 12 driver 525; it fails only if a GPU is needed and torch can use none."""
    put(host.root, "proc/driver/nvidia/version", proc)
    check = checks_of(host, libraries(*gpus, cuda=cuda), needs_gpu=needs_gpu)["nvidia driver"]
    assert check.status is status
    if status is Status.FAILED:
        assert "is too old for torch's CUDA" in check.detail
        assert "TORCH_INDEX_URL" in check.fix


def test_the_drivers_version_is_read_from_sys(host: Host) -> None:
    """The driver's version is read from ``/sys`` if ``/proc`` lacks it."""
    put(host.root, "sys/module/nvidia/version", "535.104.05\n")
    assert read_driver(host).version == "535.104.05"
