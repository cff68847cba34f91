"""Whole simulated hosts: the report about each, and that nothing ends the examination."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from demo_model.services import WEIGHTS
from flux2_shared.model.subfolders import Service
from generator_service.doctor import examination
from generator_service.doctor.check import Check, Status
from generator_service.doctor.examination import examine
from generator_service.doctor.host import Host
from generator_service.doctor.libraries import Gpu
from tests.generator_service.doctor.hosts import (
    GB,
    SMI,
    STUBS,
    by_name,
    described,
    gpu,
    install,
    install_nvidia_smi,
    install_packages,
    put,
    torch_with,
)
from tests.test_docs import rows, text_of

MEMINFO = "MemTotal: 250000000 kB\nMemAvailable: 240000000 kB\n"
CLOSED_PORT = "http://127.0.0.1:9"
SERVICES = {"GENERATOR_PORT": "0", "TEXT_ENCODER_PORT": "0", "TEXT_ENCODER_URL": CLOSED_PORT}
"""Ports that are always free, and a text encoder that does not run."""
CUDA = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
Set = Callable[..., None]


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Set:
    """Set the services' variables."""

    def set_variables(**variables: str) -> None:
        for name, value in {**SERVICES, **variables}.items():
            monkeypatch.setenv(name, value)

    return set_variables


def gpu_host(tmp_path: Path, *gpus: Gpu, **environ: str) -> Host:
    """A machine with these GPUs, enough of all other resources, and everything but Triton itself for compiling."""
    packages = install_packages(tmp_path / "packages", torch=torch_with(*gpus), **STUBS)
    cache_folders = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "c"), "TRITON_CACHE_DIR": str(tmp_path / "c")}
    host = described(tmp_path, PYTHONPATH=packages, **CUDA, **cache_folders, **environ)
    put(host.root, "proc/meminfo", MEMINFO)
    install(tmp_path, "gcc", "")
    install_nvidia_smi(tmp_path, "\n".join(SMI.format(k=checks.index, used=4) for checks in gpus))
    return host


def checks_of(host: Host, only: Service | None = None) -> dict[str, Check]:
    """Every check by its name."""
    return by_name(examine(host, only))


def failures(checks: dict[str, Check]) -> set[str]:
    """The names of the checks that failed."""
    return {name for name, check in checks.items() if check.status is Status.FAILED}


def test_two_h100_hold_flux2_dev(tmp_path: Path, settings: Set, flux2_dev: Path) -> None:
    """With a service on each of two H100s nothing fails, and the report has the chosen configuration."""
    settings(FLUX2_MODEL=str(flux2_dev), TEXT_ENCODER_DEVICE="cuda:0", GENERATOR_DEVICE="cuda:1")
    checks = checks_of(gpu_host(tmp_path, gpu(0), gpu(1)))
    assert failures(checks) == set()
    assert "580.95.05; torch's CUDA 13.0 needs 580 or newer" in checks["nvidia driver"].detail
    assert "profile fast: attention, compile, fused_qkv, vae" in checks["generator profile"].detail
    assert "fast on compute capability 9.0" in checks["text encoder profile"].detail
    assert "text-encoder 37.8 GB (34.7 GB of bfloat16 weights)" in checks["memory of gpu 0"].detail
    assert "generator 70.6 GB (64.6 GB of bfloat16 weights)" in checks["memory of gpu 1"].detail
    assert checks["transformer"].detail.startswith("7 files, 64.45 GB")
    for name in ("host memory", "compile cache", "allocator", "compiler", "gpu 0", "gpu 1"):
        assert checks[name].status is Status.OK, checks[name]


def test_one_h100_does_not_hold_both_services(tmp_path: Path, settings: Set, flux2_dev: Path) -> None:
    """One H100 holds either service but not both; an H200 holds both."""
    settings(FLUX2_MODEL=str(flux2_dev))
    host = gpu_host(tmp_path, gpu(0))
    assert failures(checks_of(host)) == {"memory of gpu 0"}
    for service in Service:
        assert failures(checks_of(host, service)) == set()
    shutil.rmtree(tmp_path / "packages")
    large = gpu(0, name="NVIDIA H200", total_bytes=150 * GB, free_bytes=149 * GB)
    assert failures(checks_of(gpu_host(tmp_path, large))) == set()


def test_composes_variables_assign_the_gpus(
    tmp_path: Path, settings: Set, monkeypatch: pytest.MonkeyPatch, flux2_dev: Path
) -> None:
    """``ENCODER_GPU`` and ``GENERATOR_GPU`` in ``.env`` assign the services to GPUs."""
    settings(FLUX2_MODEL=str(flux2_dev))
    Path(".env").write_text("ENCODER_GPU=1\nGENERATOR_GPU=0\n")
    checks = checks_of(gpu_host(tmp_path, gpu(0), gpu(1)))
    assert failures(checks) == set()
    assert "generator" in checks["memory of gpu 0"].detail
    assert "text-encoder" in checks["memory of gpu 1"].detail


def test_a_small_gpu_gets_offload(tmp_path: Path, settings: Set, flux2_dev: Path) -> None:
    """A GPU of 48 GB gets the profile ``offload``, which needs host memory."""
    settings(FLUX2_MODEL=str(flux2_dev))
    small = gpu(0, name="NVIDIA L40S", capability=(8, 9), total_bytes=48 * GB, free_bytes=47 * GB)
    host = gpu_host(tmp_path, small)
    checks = checks_of(host, Service.GENERATOR)
    assert failures(checks) == set()
    assert "profile offload" in checks["generator profile"].detail
    put(host.root, "proc/meminfo", "MemTotal: 64000000 kB\nMemAvailable: 60000000 kB\n")
    assert failures(checks_of(host, Service.GENERATOR)) == {"host memory"}


def test_flux2_dev_without_a_gpu_fails(tmp_path: Path, settings: Set, flux2_dev: Path) -> None:
    """FLUX.2 [dev] on a host without a GPU fails with the requirements, downloaded or not."""
    settings(FLUX2_MODEL=str(flux2_dev))
    packages = install_packages(tmp_path / "packages", torch=torch_with().replace('"13.0"', "None"), **STUBS)
    host = described(tmp_path, PYTHONPATH=packages)
    for name in (str(flux2_dev), "black-forest-labs/FLUX.2-dev"):
        settings(FLUX2_MODEL=name)
        checks = checks_of(host)
        assert {"generator device", "text encoder device"} <= failures(checks)
        assert "an NVIDIA GPU with its driver" in checks["generator device"].fix


def test_an_old_driver_is_the_reason(tmp_path: Path, settings: Set, flux2_dev: Path) -> None:
    """A driver that is too old fails together with the device that needs it."""
    settings(FLUX2_MODEL=str(flux2_dev), GENERATOR_DEVICE="cuda")
    host = gpu_host(tmp_path)
    install_nvidia_smi(tmp_path, SMI.format(k=0, used=4).replace("580.95.05", "550.54.15"))
    checks = checks_of(host, Service.GENERATOR)
    assert failures(checks) == {"nvidia driver", "generator device"}
    assert "550.54.15 is too old for torch's CUDA 13.0" in checks["nvidia driver"].detail


def test_a_broken_model_is_reported_and_not_counted(tmp_path: Path, settings: Set, folder: Path) -> None:
    """A model with a broken component fails, and its memory is not counted."""
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    settings(FLUX2_MODEL=str(folder))
    checks = checks_of(gpu_host(tmp_path, gpu(0)))
    assert failures(checks) == {"vae"}
    assert checks["memory"].status is Status.SKIPPED


def test_a_remote_encoder_is_not_checked(tmp_path: Path, settings: Set) -> None:
    """If ``TEXT_ENCODER_URL`` is another host, only the generator is checked, unless the option overrides it."""
    settings(FLUX2_MODEL=str(WEIGHTS), TEXT_ENCODER_URL="http://text-encoder.invalid:8006")
    host = gpu_host(tmp_path, gpu(0))
    checks = checks_of(host)
    assert "the text encoder is at http://text-encoder.invalid:8006" in checks["services"].detail
    assert "text encoder port" not in checks
    assert "tokenizer" not in checks
    assert checks["text encoder"].status is Status.WARNING
    checks = checks_of(host, Service.TEXT_ENCODER)
    assert checks["services"].detail == "text encoder"
    assert "text encoder port" in checks
    assert "generator port" not in checks
    assert "vae" not in checks


def test_without_torch_the_rest_is_checked(tmp_path: Path, settings: Set) -> None:
    """If torch is broken, checks that need it are skipped and all others run."""
    settings(FLUX2_MODEL=str(WEIGHTS))
    packages = install_packages(tmp_path / "packages", torch="raise OSError('libcublas.so.13')", **STUBS)
    checks = checks_of(described(tmp_path, PYTHONPATH=packages))
    assert failures(checks) == {"torch"}
    assert checks["tokenizer"].status is Status.OK
    assert checks["generator port"].status is Status.OK
    for name in ("gpus", "generator device", "profiles", "memory"):
        assert checks[name].status is Status.SKIPPED


def test_a_bad_setting_of_both_services_is_reported_once(tmp_path: Path, settings: Set) -> None:
    """A setting that both services read is reported once."""
    settings(FLUX2_MODEL=str(WEIGHTS), LOG_LEVEL="loud", TEXT_ENCODER_MAX_BATCH="0", GENERATOR_MAX_BATCH="0")
    checks = examine(gpu_host(tmp_path, gpu(0)))
    wrong = [check.name for check in checks if check.status is Status.FAILED]
    assert sorted(wrong) == ["GENERATOR_MAX_BATCH", "LOG_LEVEL", "TEXT_ENCODER_MAX_BATCH"]


@pytest.mark.parametrize(
    "broken",
    [
        "configuration.check_env_file",
        "models.inspect",
        "memory.sizes_of",
        "download.check_presence",
        "libraries.read_libraries",
        "nvidia.read_driver",
        "nvidia.check_driver",
        "gpus.place",
        "network.check_port",
        "profiles.choose_generator_profile",
        "profiles.check_compiler",
        "memory.check_gpu_memory",
        "configuration.check_keys",
        "network.check_encoder",
    ],
)
def test_a_defect_in_one_check_does_not_affect_the_others(
    tmp_path: Path, settings: Set, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """A defect in one check is a single warning, and all other checks run."""

    def fail(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("of a test")

    settings(FLUX2_MODEL=str(WEIGHTS))
    module, function = broken.split(".")
    monkeypatch.setattr(getattr(examination, module), function, fail)
    checks = examine(gpu_host(tmp_path, gpu(0)))
    assert [check.status for check in checks if "ZeroDivisionError: of a test" in check.detail] == [Status.WARNING]
    assert "text encoder" in {check.name for check in checks}
    assert len(checks) > 20


def test_every_check_is_documented(tmp_path: Path, settings: Set, flux2_dev: Path) -> None:
    """``docs/first-start.md`` names exactly the checks; those of variables have the variables' names."""
    section = text_of("docs/first-start.md").split("## What the doctor checks")[1]
    documented = {name for row in rows(section) for name in re.findall(r"`([^`]+)`", row[0])} - {"name", *Status}
    sources = [file.read_text(encoding="utf-8") for file in Path(examination.__file__).parent.glob("*.py")]
    settings(FLUX2_MODEL=str(flux2_dev))
    named = {re.sub(r"\d+$", "N", check.name) for check in examine(gpu_host(tmp_path, gpu(0)))}
    assert named <= documented
    rare = documented - named - {"GENERATOR_PORT"}
    assert [name for name in rare if not any(f'"{name.removesuffix(" N")}' in source for source in sources)] == []
