"""Two services on one GPU warm up one after the other."""

import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flux2_shared.device import lock as gpu_lock
from flux2_shared.device.lock import alone_on_gpu, lock_file
from tests.e2e.test_services import PATIENCE_S, ROOT

GPU = torch.device("cuda", 0)
HOLDER = """
import sys, threading
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    threading.Event().wait()
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The lock file of a simulated GPU."""
    file = tmp_path / "flux2-gpu-1.lock"
    monkeypatch.setattr(gpu_lock, "lock_file", lambda _device: file)
    return file


def test_a_service_waits_for_another_that_warms_up(file: Path) -> None:
    """The second service logs that it waits, and goes on when the first one's process has ended, even by SIGKILL."""
    stages: list[str] = []
    waits, entered = threading.Event(), threading.Event()

    def report(stage: str) -> None:
        stages.append(stage)
        waits.set()

    def warm_up() -> None:
        with alone_on_gpu(GPU, report):
            entered.set()

    command = [sys.executable, "-c", HOLDER, str(file)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        service = threading.Thread(target=warm_up)
        service.start()
        assert waits.wait(PATIENCE_S)
        assert not entered.is_set()
        other.kill()
        assert entered.wait(PATIENCE_S)
        service.join()
    assert stages == ["waiting for another service that warms up on this GPU"]


def test_the_lock_is_released(file: Path) -> None:
    """The block can be entered again, also after an error in it."""
    with pytest.raises(ValueError, match="warm-up"), alone_on_gpu(GPU):
        raise ValueError("warm-up")
    heard: list[str] = []
    with alone_on_gpu(GPU, heard.append):
        pass
    assert heard == []


def test_an_unwritable_folder_does_not_prevent_the_warm_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The block runs, and the log has the possible consequences."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(gpu_lock, "lock_file", lambda _device: tmp_path / "file" / "flux2.lock")
    with alone_on_gpu(GPU):
        pass
    assert "may disturb each other" in caplog.text


def test_a_cpu_needs_no_lock(file: Path) -> None:
    """On a CPU nothing is chosen by measurement, and no file is created."""
    with alone_on_gpu(torch.device("cpu")):
        assert not file.exists()


def test_the_file_names_the_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Containers number GPUs differently; the UUID is the same. The folder is that of compiled code."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: SimpleNamespace(uuid="1234-abcd"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    assert lock_file(GPU) == tmp_path / "inductor" / "flux2-gpu-1234-abcd.lock"
