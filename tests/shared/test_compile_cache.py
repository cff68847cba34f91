"""Where compiled code is kept, and what happens where it cannot be."""

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
    """A file where a folder would have to be: nobody can write below it, not even root."""
    path = tmp_path / "file"
    path.write_text("")
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of PyTorch's; Triton's is within it."""
    monkeypatch.setenv(INDUCTOR, str(tmp_path / "inductor"))
    monkeypatch.delenv(TRITON, raising=False)
    return tmp_path / "inductor"


def test_a_folder_is_tried(tmp_path: Path) -> None:
    """A folder that is not there is made, a file is really written, and nothing is left."""
    assert is_writable(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_not_writable(tmp_path: Path) -> None:
    """That it is there is not enough."""
    tmp_path.chmod(0o500)
    assert not is_writable(tmp_path)


def test_the_default_is_pytorchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a variable the folder is the one that PyTorch would use."""
    monkeypatch.delenv(INDUCTOR, raising=False)
    assert str(default_folder()) == default_cache_dir()
    monkeypatch.setenv("LOGNAME", "a/b:c")
    assert str(default_folder()) == default_cache_dir()


def test_unwritable_folders_are_named(folder: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each that is set, and no other."""
    assert unwritable_caches() == []
    monkeypatch.setenv(TRITON, str(file / "triton"))
    assert unwritable_caches() == [str(file / "triton")]
    monkeypatch.setenv(INDUCTOR, str(file / "inductor"))
    assert unwritable_caches() == [str(file / "inductor"), str(file / "triton")]
    assert not folder.parent.joinpath("triton").exists()


def test_unwritable_folders_are_replaced(
    folder: Path, file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With a line for each that names it and what follows; a folder that can be written to stays."""
    monkeypatch.setenv(TRITON, str(file / "triton"))
    replace_unwritable_caches()
    assert os.environ[INDUCTOR] == str(folder)
    assert Path(os.environ[TRITON]).is_dir()
    assert unwritable_caches() == []
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.startswith(f"TRITON_CACHE_DIR: {file / 'triton'} cannot be written to: everything is compiled again")


@pytest.mark.parametrize("service", ["generator_service", "text_encoder_service"])
def test_a_service_starts_all_the_same(service: str, file: Path) -> None:
    """Where PyTorch may not make its folder, a service says so and goes on, here until it finds no model."""
    environment = os.environ | {INDUCTOR: str(file / "inductor"), "FLUX2_MODEL": str(file.parent)}
    ended = subprocess.run(
        [sys.executable, "-m", service], env=environment, cwd=file.parent, capture_output=True, text=True, check=False
    )
    lines = ended.stderr.splitlines()
    assert f"{file / 'inductor'} cannot be written to" in lines[0]
    assert lines[-1].startswith("flux2: ")
    assert "Traceback" not in ended.stderr
    assert ended.returncode == 1


def test_the_generator_says_so_where_it_compiles(
    folder: Path, file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Compiled parts that will not be kept are one line; where nothing is compiled there is none."""
    monkeypatch.setenv(TRITON, str(file / "triton"))
    loaded("vae")
    assert "cannot be written to" not in caplog.text
    loaded("compile", "vae", backend="eager")
    assert f"{file / 'triton'} cannot be written to: everything is compiled again at each start" in caplog.text


def test_the_text_encoder_says_so_where_it_compiles(
    folder: Path, file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As the generator."""
    monkeypatch.setenv(TRITON, str(file / "triton"))
    fast_encoder(WEIGHTS, max_batch=1, backend="no such backend")
    assert f"{file / 'triton'} cannot be written to: everything is compiled again at each start" in caplog.text
