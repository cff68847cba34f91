"""Models that must be downloaded: their source, and the space for them."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from flux2_shared.model.subfolders import Service
from flux2_shared.settings import FLUX2_DEV
from generator_service.doctor.check import Check, Status
from generator_service.doctor.download import (
    check_disk,
    check_presence,
    check_token,
    download_hint,
    token_source,
)
from generator_service.doctor.host import Host
from generator_service.doctor.memory import FLUX2_DEV_SIZES
from generator_service.doctor.model import Model
from tests.generator_service.doctor.hosts import GB, described, put

ABSENT = Model(FLUX2_DEV, "main")
OTHER = Model("someone/other", "main")
SECRET = "hf_neverprinted"
BOTH = tuple(Service)


def cached_model(path: Path, *, is_incomplete: bool = False) -> Model:
    """A model in the hub's cache."""
    return Model(FLUX2_DEV, "0123", path, is_incomplete=is_incomplete)


def own_container(tmp_path: Path, **environ: str) -> Host:
    """A container of this project's image."""
    host = described(tmp_path, HF_HOME="/weights", **environ)
    put(host.root, ".dockerenv", "")
    return host


def presence(model: Model, host: Host, problems: dict[str, str] | None = None) -> Check:
    """The check of the model as a whole."""
    [check] = check_presence(model, problems or {}, host)
    return check


def test_a_present_model_is_reported(tmp_path: Path) -> None:
    """The check of a present model names its folder, and fails if its download is incomplete."""
    host = described(tmp_path)
    assert presence(cached_model(tmp_path), host).status is Status.OK
    assert presence(cached_model(tmp_path), host).detail == f"{FLUX2_DEV}@0123 in {tmp_path}, complete"
    assert "with broken parts" in presence(cached_model(tmp_path), host, {"vae": "x"}).detail
    assert presence(cached_model(tmp_path, is_incomplete=True), host).status is Status.FAILED


@pytest.mark.parametrize(
    ("model", "environ", "status", "message"),
    [
        (ABSENT, {}, Status.FAILED, "downloading it needs a token"),
        (ABSENT, {"HF_TOKEN": SECRET}, Status.WARNING, "would download it at startup"),
        (ABSENT, {"HF_TOKEN": SECRET, "HF_HUB_OFFLINE": "1"}, Status.FAILED, "HF_HUB_OFFLINE prevents"),
        (OTHER, {}, Status.WARNING, "would download it at startup"),
        (OTHER, {"HF_HUB_OFFLINE": "true"}, Status.FAILED, "HF_HUB_OFFLINE prevents"),
    ],
)
def test_an_absent_model(tmp_path: Path, model: Model, environ: dict[str, str], status: Status, message: str) -> None:
    """An absent model is a warning if the services can download it, else a failure."""
    check = presence(model, described(tmp_path, **environ))
    assert check.status is status
    assert message in check.detail
    assert "flux2 weights" in check.fix
    assert SECRET not in str(check)


def test_the_fix_depends_on_the_environment(tmp_path: Path) -> None:
    """The fix is ``flux2 weights``, compose's service in our images, or copying a local folder again."""
    assert download_hint(ABSENT, described(tmp_path)) == "run flux2 weights"
    assert "docker compose run --rm weights" in download_hint(ABSENT, own_container(tmp_path))
    assert str(tmp_path) in download_hint(Model("x", "local", tmp_path), described(tmp_path))


def test_the_token_is_read_where_the_library_reads_it(tmp_path: Path) -> None:
    """The token is read from the environment or a file, and never printed."""
    host = described(tmp_path)
    assert token_source(host) is None
    file = tmp_path / "home" / ".cache" / "huggingface" / "token"
    put(tmp_path, "home/.cache/huggingface/token", "\n")
    assert token_source(host) is None
    file.write_text(f"{SECRET}\n")
    assert token_source(host) == str(file)
    assert token_source(described(tmp_path, HF_TOKEN=SECRET)) == "HF_TOKEN"
    assert token_source(described(tmp_path, HF_TOKEN_PATH=str(tmp_path / "absent"))) is None
    assert token_source(described(tmp_path, HF_TOKEN_PATH=str(tmp_path))) is None  # a folder
    put(tmp_path, "hf/token", SECRET)
    assert token_source(described(tmp_path, HF_HOME=str(tmp_path / "hf"))) == str(tmp_path / "hf" / "token")
    [check] = check_token(ABSENT, host)
    assert check.status is Status.OK
    assert SECRET not in str(check)


def test_a_token_is_needed_only_for_a_gated_model(tmp_path: Path) -> None:
    """A missing token is a warning only for a gated model that is not complete."""
    bare = described(tmp_path)
    for model, status in (
        (ABSENT, Status.WARNING),
        (OTHER, Status.SKIPPED),
        (cached_model(tmp_path), Status.SKIPPED),
        (cached_model(tmp_path, is_incomplete=True), Status.WARNING),
    ):
        [check] = check_token(model, bare)
        assert check.status is status
    [check] = check_token(ABSENT, own_container(tmp_path))
    assert check.status is Status.SKIPPED
    assert "only the download" in check.detail


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A disk whose free bytes a test sets."""
    usage = SimpleNamespace(free=200 * GB)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    return usage


def disk_check(model: Model, host: Host, services: tuple[Service, ...] = BOTH) -> Check:
    file_bytes = FLUX2_DEV_SIZES.file_bytes if model.name == FLUX2_DEV else None
    [check] = check_disk(model, file_bytes, services, host)
    return check


def test_the_disk_must_have_room_for_the_download(tmp_path: Path, disk: SimpleNamespace) -> None:
    """The disk must have room for the services' files, less those already downloaded."""
    host = described(tmp_path, HF_HOME=str(tmp_path / "hf"))
    assert disk_check(ABSENT, host).status is Status.OK
    assert "113 GB must be downloaded" in disk_check(ABSENT, host).detail
    disk.free = 100 * GB
    assert disk_check(ABSENT, host).status is Status.FAILED
    assert disk_check(ABSENT, host, (Service.GENERATOR,)).status is Status.OK
    blobs = tmp_path / "hf" / "hub" / "models--black-forest-labs--FLUX.2-dev" / "blobs"
    blobs.mkdir(parents=True)
    with (blobs / "abc").open("wb") as file:
        file.truncate(20 * GB)
    assert "93 GB must be downloaded" in disk_check(ABSENT, host).detail
    assert disk_check(ABSENT, host).status is Status.OK


@pytest.mark.usefixtures("disk")
def test_a_complete_model_needs_no_space(tmp_path: Path) -> None:
    """Space is not checked for a complete model, and a read-only cache is a failure."""
    host = described(tmp_path)
    assert disk_check(cached_model(tmp_path), host).status is Status.SKIPPED
    assert disk_check(OTHER, host).status is Status.OK
    assert "must be downloaded" not in disk_check(OTHER, host).detail
    (tmp_path / "file").touch()
    blocked = described(tmp_path, HF_HOME=str(tmp_path / "file" / "hf"))
    check = disk_check(OTHER, blocked)
    assert check.status is Status.FAILED
    assert "not writable for this user" in check.detail
