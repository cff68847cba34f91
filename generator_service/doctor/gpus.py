"""Checks of the GPUs that torch can use, and of the device that each service would use."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from flux2_shared.model.subfolders import Service
from flux2_shared.settings import ServiceSettings
from generator_service.doctor.check import Check, failed, ok, one_line, skipped, warning
from generator_service.doctor.host import Host
from generator_service.doctor.libraries import Gpu, Libraries
from generator_service.doctor.nvidia import Driver

DEVICE = re.compile(r"cpu|auto|cuda(?::(?P<index>0|[1-9][0-9]*))?")
ARCHITECTURE = re.compile(r"(sm|compute)_(\d+)(\d)([af]?)")
COMPOSE_VARIABLES = {Service.GENERATOR: "GENERATOR_GPU", Service.TEXT_ENCODER: "ENCODER_GPU"}
TRY_THE_DEMO = "or try the demo model, which does not need a GPU: FLUX2_MODEL=demo_model/weights"
LARGE_BYTES = 8 * 10**9
"""The size of weights above which a model needs a GPU in practice."""


@dataclass(frozen=True)
class Placement:
    """The device that a service would use."""

    service: Service
    gpu: Gpu | None
    """None for the CPU."""


def check_gpus(libraries: Libraries, driver: Driver, host: Host) -> Iterator[Check]:
    """Check each GPU that torch sees, or explain why it sees none."""
    if not libraries.has_torch:
        boards = ", ".join(board.name for board in driver.boards) or "none by nvidia-smi"
        yield skipped("gpus", f"torch cannot be imported; seen here: {boards}")
        return
    for gpu in libraries.gpus:
        yield _check_gpu(gpu, libraries.architectures, driver)
    if libraries.gpus:
        return
    seen = ", ".join(board.name for board in driver.boards)
    hidden = libraries.cuda is not None and host.environ.get("CUDA_VISIBLE_DEVICES", "unset").strip() in {"", "-1"}
    if libraries.gpu_error and (seen or host.has_gpu_files):
        yield warning(
            "gpus", f"torch cannot use a GPU: {one_line(libraries.gpu_error)}", "nvidia-smi; see the driver above"
        )
    elif seen and libraries.cuda is None:
        fix = "install a build of torch for CUDA, such as PyPI's for Linux"
        yield warning("gpus", f"torch is built for the CPU only and cannot use {seen}", fix)
    elif seen and hidden:
        yield warning("gpus", f"CUDA_VISIBLE_DEVICES hides {seen}", "unset CUDA_VISIBLE_DEVICES")
    elif seen:
        yield warning("gpus", f"torch cannot use {seen}", "see the driver above")
    else:
        yield skipped("gpus", "none: the CPU is used")


def _check_gpu(gpu: Gpu, architectures: Sequence[str], driver: Driver) -> Check:
    name, board = f"gpu {gpu.index}", driver.board(gpu.uuid)
    detail = f"{gpu.name}, compute capability {gpu.capability_text}, {gpu.total_bytes / 1e9:.1f} GB"
    if gpu.error:
        fix = "see what uses it: nvidia-smi; the compute mode Exclusive_Process allows only one process"
        return warning(name, f"{detail}; CUDA cannot be initialized on it: {one_line(gpu.error)}", fix)
    detail += f" of which {gpu.free_bytes / 1e9:.1f} GB are free"
    if architectures and not has_kernels(gpu.capability, architectures):
        known = ", ".join(architectures)
        fix = "use a build of torch for CUDA 13 if the GPU is newer than these, or an older torch if it is older"
        return warning(name, f"{detail}; this build of torch has no kernels for it, only for {known}", fix)
    if board is not None:
        users = [f"{process.pid} ({_gigabytes(process.used_bytes)})" for process in board.processes]
        detail += f"; used by process {', '.join(users)}" if users else ""
        detail += "" if board.is_persistent else "; persistence mode off: the first use takes seconds longer"
    return ok(name, detail)


def _gigabytes(num_bytes: int | None) -> str:
    return "?" if num_bytes is None else f"{num_bytes / 1e9:.1f} GB"


def has_kernels(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Return whether code for one of ``architectures`` runs on a GPU of this compute capability.

    Binary code (``sm_90``) runs on later minor versions of the same major version, PTX (``compute_90``) on all later
    versions; architectures with the suffix ``a`` are for one version only.
    """
    for match in filter(None, map(ARCHITECTURE.fullmatch, architectures)):
        kind, major, minor, suffix = match[1], int(match[2]), int(match[3]), match[4]
        if suffix == "a":
            is_compatible = capability == (major, minor)
        elif kind == "sm":
            is_compatible = capability[0] == major and capability[1] >= minor
        else:
            is_compatible = capability >= (major, minor)
        if is_compatible:
            return True
    return False


def device_setting(service: Service, settings: ServiceSettings, host: Host) -> str:
    """Return a service's device setting: its own, or on a host that of docker-compose.yml.

    Inside a container the variables of docker-compose.yml do not apply, since it sees only its own GPU.
    """
    if settings.device != "auto" or host.is_container:
        return settings.device
    gpu = host.variable(COMPOSE_VARIABLES[service])
    return f"cuda:{gpu}" if gpu.isdigit() else gpu or "auto"


def gpu_of(setting: str, libraries: Libraries) -> Gpu | None:
    """Find the GPU of a device setting, which may also be a UUID of nvidia-smi; None for the CPU.

    Raises:
        ValueError: the device is not available; the message says why.
    """
    if setting.startswith("GPU-"):
        matching = [gpu for gpu in libraries.gpus if f"GPU-{gpu.uuid.removeprefix('GPU-')}" == setting]
        if not matching:
            raise ValueError("torch sees no GPU with this UUID here")
        return matching[0]
    match = DEVICE.fullmatch(setting)
    if match is None:
        raise ValueError("no such device is supported; set it to auto, cpu, cuda, or cuda:N")
    if setting == "cpu" or (setting == "auto" and not libraries.gpus):
        return None
    if not libraries.gpus:
        raise ValueError("torch cannot use a GPU here")
    index = int(match["index"] or 0)
    if index >= len(libraries.gpus):
        raise ValueError(f"torch sees {len(libraries.gpus)} here, numbered from 0")
    return libraries.gpus[index]


def place(
    settings: Mapping[Service, str], libraries: Libraries, weight_bytes: Mapping[Service, int]
) -> tuple[dict[Service, Placement], list[Check]]:
    """Determine the device of each service, and check whether it can run there."""
    placements: dict[Service, Placement] = {}
    checks: list[Check] = []
    for service, setting in settings.items():
        name = f"{service.replace('-', ' ')} device"
        variable = f"{service.replace('-', '_').upper()}_DEVICE"
        if not libraries.has_torch:
            checks.append(skipped(name, "torch cannot be imported"))
            continue
        try:
            gpu = gpu_of(setting, libraries)
        except ValueError as error:
            fix = f"set {variable} to an available device, or to auto; see the checks of driver and GPUs"
            checks.append(failed(name, f"{variable}={setting}: {error}", fix))
            continue
        placements[service] = Placement(service, gpu)
        checks.append(_check_placement(name, setting, gpu, weight_bytes[service], libraries.architectures))
    return placements, checks


def _check_placement(
    name: str, setting: str, gpu: Gpu | None, weight_bytes: int, architectures: Sequence[str]
) -> Check:
    if gpu is not None:
        if gpu.error:
            return failed(name, f"{setting}: GPU {gpu.index} cannot be used now", f"see gpu {gpu.index} above")
        if architectures and not has_kernels(gpu.capability, architectures):
            return failed(name, f"{setting}: torch has no kernels for GPU {gpu.index}", f"see gpu {gpu.index} above")
        return ok(name, f"{setting}: GPU {gpu.index}, {gpu.name}")
    if weight_bytes <= LARGE_BYTES:
        return ok(name, f"{setting}: the CPU is used")
    detail = f"{setting}: the CPU would be used, but weights of {weight_bytes / 1e9:.0f} GB need a GPU"
    if setting == "cpu":
        return warning(name, f"{detail}: an image takes hours", TRY_THE_DEMO)
    return failed(name, detail, f"an NVIDIA GPU with its driver, {TRY_THE_DEMO}")


def check_compute_mode(placements: Mapping[Service, Placement], driver: Driver) -> Iterator[Check]:
    """Check that the compute mode of each GPU allows all services that share it."""
    name = "compute mode"
    used = [placement.gpu for placement in placements.values() if placement.gpu]
    for gpu in used:
        board = driver.board(gpu.uuid)
        if board is None or board.compute_mode == "Default":
            continue
        fix = f"nvidia-smi -i {gpu.index} -c DEFAULT"
        detail = f"GPU {gpu.index} is in compute mode {board.compute_mode}"
        if board.compute_mode == "Prohibited" or used.count(gpu) > 1:
            yield failed(name, f"{detail}, which does not allow all services that would run on it", fix)
        else:
            yield warning(name, f"{detail}: a second process cannot use it", fix)
