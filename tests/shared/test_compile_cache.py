"""The folders of compiled code, and what happens if they cannot be written to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from demo_model.services import WEIGHTS
from flux2_shared.model.compile_cache import (
    INDUCTOR,
    TRITON,
    default_folder,
    is_writable,
    replace_unwritable_caches,
    unwritable_caches,
)
from tests.generator_service.test_optimizations import loaded
from tests.text_encoder_service.test_fast_layers import fast_encoder


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file in the place of a folder: no process can write below it, not even as root."""
    path = tmp_path / "file"
    path.write_text("")
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """PyTorch's cache folder, which contains Triton's."""
    monkeypatch.setenv(INDUCTOR, str(tmp_path / "inductor"))
    monkeypatch.delenv(TRITON, raising=False)
    return tmp_path / "inductor"


def test_folders_are_tested_by_writing(tmp_path: Path) -> None:
    """A missing folder is created, a file is written for the test, and nothing is left."""
    assert is_writable(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_not_writable(tmp_path: Path) -> None:
    """Existence alone is not enough."""
    tmp_path.chmod(0o500)
    assert not is_writable(tmp_path)


def test_the_default_is_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a variable the folder is the one that PyTorch would use."""
    monkeypatch.delenv(INDUCTOR, raising=False)
    assert str(default_folder()) == default_cache_dir()
    monkeypatch.setenv("LOGNAME", "a/b:c")
    assert str(default_folder()) == default_cache_dir()


def test_unwritable_folders_are_reported(folder: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only variables that are set to an unwritable folder are reported."""
    assert unwritable_caches() == []
    monkeypatch.setenv(TRITON, str(file / "triton"))
    assert unwritable_caches() == [str(file / "triton")]
    monkeypatch.setenv(INDUCTOR, str(file / "inductor"))
    assert unwritable_caches() == [str(file / "inductor"), str(file / "triton")]
    assert not folder.parent.joinpath("triton").exists()


def test_unwritable_folders_are_replaced(
    folder: Path, file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each is reported in one line with the consequence; a writable folder stays."""
    monkeypatch.setenv(TRITON, str(file / "triton"))
    replace_unwritable_caches()
    assert os.environ[INDUCTOR] == str(folder)
    assert Path(os.environ[TRITON]).is_dir()
    assert unwritable_caches() == []
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.startswith(f"TRITON_CACHE_DIR: {file / 'triton'} cannot be written to: everything is compiled again")


@pytest.mark.parametrize("service", ["generator_service", "text_encoder_service"])
def test_a_service_starts_without_a_cache(service: str, file: Path) -> None:
    """If PyTorch cannot create its folder, a service logs it and goes on, here until it finds no model."""
    environment = os.environ | {INDUCTOR: str(file / "inductor"), "FLUX2_MODEL": str(file.parent)}
    ended = subprocess.run(
        [sys.executable, "-m", service], env=environment, cwd=file.parent, capture_output=True, text=True, check=False
    )
    lines = ended.stderr.splitlines()
    assert f"{file / 'inductor'} cannot be written to" in lines[0]
    assert lines[-1].startswith("flux2: ")
    assert "Traceback" not in ended.stderr
    assert ended.returncode == 1


def test_the_generator_logs_it_if_it_compiles(
    folder: Path, file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning is logged if compiled code will not be stored, and only if something is compiled."""
    monkeypatch.setenv(TRITON, str(file / "triton"))
    loaded("vae")
    assert "cannot be written to" not in caplog.text
    loaded("compile", "vae", backend="eager")
    assert f"{file / 'triton'} cannot be written to: everything is compiled again at each start" in caplog.text


def test_the_text_encoder_logs_it_if_it_compiles(
    folder: Path, file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(TRITON, str(file / "triton"))
    fast_encoder(WEIGHTS, max_batch=1, backend="no such backend")
    assert f"{file / 'triton'} cannot be written to: everything is compiled again at each start" in caplog.text
