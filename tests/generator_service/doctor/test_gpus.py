"""The GPUs that torch sees, and which of them each service would use."""

from pathlib import Path

import pytest

from flux2_shared.model.subfolders import Service
from generator_service.doctor.check import Status
from generator_service.doctor.gpus import (
    Placement,
    check_compute_mode,
    check_gpus,
    device_setting,
    gpu_of,
    has_kernels,
    place,
)
from generator_service.doctor.host import Host
from generator_service.doctor.libraries import Gpu, Libraries
from generator_service.doctor.nvidia import Board, Driver, Process
from generator_service.settings import GeneratorSettings
from tests.generator_service.doctor.hosts import GB, by_name, described, gpu, libraries, put
from text_encoder_service.settings import TextEncoderSettings

BOTH = (Service.GENERATOR, Service.TEXT_ENCODER)
LARGE, SMALL = 64 * GB, GB // 10
ON_CPU = libraries(cuda=None)


def board(k: int = 0, mode: str = "Default", *processes: Process) -> Board:
    """An H100 as reported by the driver."""
    return Board(f"GPU-{k}", "NVIDIA H100", 85 * GB, GB, mode, is_persistent=False, processes=processes)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """A host without programs or GPUs."""
    return described(tmp_path)


def test_each_gpu_is_one_check(host: Host) -> None:
    """A GPU's check has its name, compute capability, memory and the processes that use it."""
    driver = Driver("580", (board(0, "Default", Process("1234", 40 * GB)), board(1)))
    checks = by_name(list(check_gpus(libraries(gpu(0, free_bytes=44 * GB), gpu(1)), driver, host)))
    assert {name: check.status for name, check in checks.items()} == {"gpu 0": Status.OK, "gpu 1": Status.OK}
    for part in ("NVIDIA H100", "capability 9.0", "85.0 GB of which 44.0 GB are free", "process 1234 (40.0 GB)"):
        assert part in checks["gpu 0"].detail
    assert "persistence mode off" in checks["gpu 1"].detail
    assert "process" not in checks["gpu 1"].detail


@pytest.mark.parametrize(
    ("facts", "seen", "environ", "message"),
    [
        (libraries(gpu_error="RuntimeError: no kernel driver"), (board(),), {}, "torch cannot use a GPU: RuntimeError"),
        (libraries(cuda=None), (board(),), {}, "built for the CPU only and cannot use NVIDIA H100"),
        (libraries(), (board(),), {"CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES hides NVIDIA H100"),
        (libraries(), (board(),), {"CUDA_VISIBLE_DEVICES": "-1"}, "CUDA_VISIBLE_DEVICES hides NVIDIA H100"),
        (libraries(), (board(),), {}, "torch cannot use NVIDIA H100"),
        (
            libraries(gpu(error="OutOfMemoryError: CUDA")),
            (board(),),
            {},
            "CUDA cannot be initialized on it: OutOfMemoryErr",
        ),
        (libraries(gpu(capability=(7, 5))), (board(),), {}, "no kernels for it, only for sm_80"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_a_warning(
    tmp_path: Path, facts: Libraries, seen: tuple[Board, ...], environ: dict[str, str], message: str
) -> None:
    """A GPU that torch cannot use is a warning with the reason."""
    [check] = check_gpus(facts, Driver("580", seen), described(tmp_path, **environ))
    assert check.status is Status.WARNING
    assert message in check.detail
    assert check.fix


def test_a_host_without_gpus_is_skipped(host: Host) -> None:
    """The check is skipped on a host without GPUs, and if torch cannot be imported."""
    [check] = check_gpus(ON_CPU, Driver(), host)
    assert (check.status, check.detail) == (Status.SKIPPED, "none: the CPU is used")
    [check] = check_gpus(libraries(gpu_error="RuntimeError: no driver"), Driver(), host)
    assert check.status is Status.SKIPPED
    [check] = check_gpus(libraries(versions={}), Driver("580", (board(),)), host)
    assert check.status is Status.SKIPPED
    assert "NVIDIA H100" in check.detail


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((9, 0), ["sm_80", "sm_90"], True),
        ((8, 6), ["sm_80", "sm_90"], True),
        ((8, 0), ["sm_86"], False),
        ((10, 0), ["sm_80", "sm_90"], False),
        ((12, 0), ["sm_90", "compute_90"], True),
        ((8, 0), ["compute_90"], False),
        ((9, 0), ["sm_90a"], True),
        ((12, 0), ["compute_90a"], False),
        ((10, 3), ["sm_100f"], True),
        ((9, 0), ["something"], False),
    ],
)
def test_code_runs_on_compatible_gpus(capability: tuple[int, int], architectures: list[str], runs: bool) -> None:
    """``sm_`` code runs on later minor versions of its major version, ``compute_`` code on all later GPUs."""
    assert has_kernels(capability, architectures) == runs


@pytest.mark.parametrize(
    ("setting", "index"),
    [("auto", 0), ("cuda", 0), ("cuda:0", 0), ("cuda:1", 1), ("cpu", None), ("GPU-1", 1)],
)
def test_a_setting_selects_a_device(setting: str, index: int | None) -> None:
    """A device setting, or a GPU's UUID, selects the device that the services would use."""
    first, second = gpu(0), gpu(1)
    expected = None if index is None else (first, second)[index]
    assert gpu_of(setting, libraries(first, second)) == expected


@pytest.mark.parametrize("setting", ["auto", "cpu"])
def test_without_gpus_the_cpu_is_selected(setting: str) -> None:
    """Without GPUs ``auto`` and ``cpu`` select the CPU."""
    assert gpu_of(setting, ON_CPU) is None


@pytest.mark.parametrize(
    ("setting", "num_gpus", "message"),
    [
        ("cuda", 0, "torch cannot use a GPU here"),
        ("cuda:7", 2, "torch sees 2 here"),
        ("cuda:-1", 2, "no such device is supported"),
        ("gpu", 2, "no such device is supported"),
        ("GPU-9", 2, "torch sees no GPU with this UUID"),
    ],
)
def test_an_absent_device_fails(setting: str, num_gpus: int, message: str) -> None:
    """A device that does not exist is a failure with its variable."""
    facts = libraries(*map(gpu, range(num_gpus)))
    placements, [check] = place({Service.TEXT_ENCODER: setting}, facts, {Service.TEXT_ENCODER: SMALL})
    assert placements == {}
    assert (check.name, check.status) == ("text encoder device", Status.FAILED)
    assert f"TEXT_ENCODER_DEVICE={setting}: {message}" in check.detail


@pytest.mark.parametrize(
    ("setting", "weight_bytes", "status"),
    [
        ("auto", SMALL, Status.OK),
        ("cpu", SMALL, Status.OK),
        ("auto", LARGE, Status.FAILED),
        ("cpu", LARGE, Status.WARNING),
    ],
)
def test_a_large_model_needs_a_gpu(setting: str, weight_bytes: int, status: Status) -> None:
    """A setting of ``cpu`` is respected; without a setting the check fails with the requirements."""
    placements, [check] = place({Service.GENERATOR: setting}, ON_CPU, {Service.GENERATOR: weight_bytes})
    assert placements == {Service.GENERATOR: Placement(Service.GENERATOR, None)}
    assert check.status is status
    if status is Status.FAILED:
        assert "an NVIDIA GPU with its driver" in check.fix
        assert "demo_model/weights" in check.fix


@pytest.mark.parametrize("broken", [gpu(error="x"), gpu(capability=(7, 0))])
def test_a_gpu_that_cannot_be_used_fails_where_it_is_needed(broken: Gpu) -> None:
    """A GPU that cannot be used is a failure for the service that is assigned to it."""
    _, [check] = place({Service.GENERATOR: "auto"}, libraries(broken), {Service.GENERATOR: LARGE})
    assert check.status is Status.FAILED


def test_without_torch_devices_are_skipped() -> None:
    """Without torch the devices are skipped, since the failure of torch is already reported."""
    placements, checks = place(dict.fromkeys(BOTH, "auto"), libraries(versions={}), dict.fromkeys(BOTH, LARGE))
    assert placements == {}
    assert [check.status for check in checks] == [Status.SKIPPED, Status.SKIPPED]


def test_composes_variables_select_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose's GPU variables apply unless a device is set or the host is a container."""
    host = described(tmp_path, GENERATOR_GPU="1", ENCODER_GPU="GPU-0")
    assert device_setting(Service.GENERATOR, GeneratorSettings(), host) == "cuda:1"
    assert device_setting(Service.TEXT_ENCODER, TextEncoderSettings(), host) == "GPU-0"
    assert device_setting(Service.GENERATOR, GeneratorSettings(device="cuda:0"), host) == "cuda:0"
    put(host.root, ".dockerenv", "")
    assert device_setting(Service.GENERATOR, GeneratorSettings(), host) == "auto"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    bare = Host({"PATH": ""}, tmp_path / "elsewhere")
    assert device_setting(Service.GENERATOR, GeneratorSettings(), bare) == "auto"
    Path(".env").write_text("GENERATOR_GPU=2\n")
    assert device_setting(Service.GENERATOR, GeneratorSettings(), bare) == "cuda:2"


@pytest.mark.parametrize(
    ("mode", "services", "status"),
    [
        ("Default", BOTH, None),
        ("Exclusive_Process", BOTH, Status.FAILED),
        ("Exclusive_Process", BOTH[:1], Status.WARNING),
        ("Prohibited", BOTH[:1], Status.FAILED),
    ],
)
def test_an_exclusive_gpu_admits_one_service(mode: str, services: tuple[Service, ...], status: Status | None) -> None:
    """An exclusive compute mode fails for two services on one GPU and warns for one."""
    shared = gpu()
    placements = {service: Placement(service, shared) for service in services}
    facts = {check.status for check in check_compute_mode(placements, Driver("580", (board(0, mode),)))}
    assert facts == ({status} if status else set())
