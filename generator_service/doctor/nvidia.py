"""The NVIDIA driver and its GPUs, as reported by ``nvidia-smi`` and ``/proc``; does not need torch."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from generator_service.doctor.check import Check, failed, ok, one_line, skipped, warning
from generator_service.doctor.host import Host, Output
from generator_service.doctor.libraries import Libraries

MIB = 2**20
FIELDS = ("uuid", "driver_version", "name", "memory.total", "memory.used", "compute_mode", "persistence_mode")
PROCESS_FIELDS = ("gpu_uuid", "pid", "used_memory")
OLDEST_DRIVERS = {13: 580, 12: 525, 11: 450}
"""The oldest driver on Linux for each major version of CUDA."""
CUDA_FOR_OLD_DRIVERS = "build with PyTorch's index for CUDA 12.6 (TORCH_INDEX_URL, docs/run.md, The driver)"


@dataclass(frozen=True)
class Process:
    """A process that uses a GPU's memory."""

    pid: str
    used_bytes: int | None


@dataclass(frozen=True)
class Board:
    """A GPU as reported by the driver."""

    uuid: str
    name: str
    total_bytes: int | None
    used_bytes: int | None
    compute_mode: str
    is_persistent: bool
    processes: tuple[Process, ...] = ()


@dataclass(frozen=True)
class Driver:
    """The driver's version and GPUs, as far as known."""

    version: str = ""
    boards: tuple[Board, ...] = ()
    problem: str = ""
    """Why nvidia-smi does not work."""

    @property
    def major(self) -> int | None:
        first = self.version.split(".")[0]
        return int(first) if first.isdigit() else None

    def board(self, uuid: str) -> Board | None:
        """Return the GPU with this UUID, with or without the prefix ``GPU-``, which torch omits."""
        wanted = uuid.removeprefix("GPU-")
        return next((board for board in self.boards if wanted and board.uuid.removeprefix("GPU-") == wanted), None)


def read_driver(host: Host) -> Driver:
    """Run ``nvidia-smi``; if it does not work, read the version from ``/proc``."""
    version = _kernel_module_version(host)
    program = host.which("nvidia-smi")
    if program is None:
        return Driver(version, problem="nvidia-smi is not on PATH")
    try:
        output = host.run(program, f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits")
    except OSError as error:
        return Driver(version, problem=f"nvidia-smi cannot be started: {error.strerror}")
    problem = _problem(output, host)
    rows = _rows(output.stdout, len(FIELDS))
    if problem or not rows:
        return Driver(version, problem=problem or f"unexpected output of nvidia-smi: {one_line(output.stdout)[:200]}")
    processes = _processes(host, program)
    boards = tuple(
        Board(uuid, name, _bytes(total), _bytes(used), mode, persistence == "Enabled", tuple(processes.get(uuid, [])))
        for uuid, _, name, total, used, mode, persistence in rows
    )
    return Driver(rows[0][1], boards)


def _problem(output: Output, host: Host) -> str:
    if output.status is None:
        return f"nvidia-smi did not finish within {host.program_timeout_s:g} s: the driver hangs"
    if output.status != 0:
        message = one_line(output.stdout or output.stderr)
        return f"nvidia-smi ended with status {output.status}: {message}"
    return ""


def _processes(host: Host, program: str) -> dict[str, list[Process]]:
    """List processes by the UUID of their GPU. Inside a container none are visible."""
    output = host.run(program, f"--query-compute-apps={','.join(PROCESS_FIELDS)}", "--format=csv,noheader,nounits")
    processes: dict[str, list[Process]] = {}
    for uuid, pid, used in _rows(output.stdout, len(PROCESS_FIELDS)):
        processes.setdefault(uuid, []).append(Process(pid, _bytes(used)))
    return processes


def _rows(printed: str, num_fields: int) -> list[list[str]]:
    """Parse the lines with ``num_fields`` fields of which the first is a GPU's UUID."""
    rows = [[cell.strip() for cell in line.split(",")] for line in printed.splitlines()]
    return [row for row in rows if len(row) == num_fields and row[0].startswith(("GPU-", "MIG-"))]


def _bytes(mebibytes: str) -> int | None:
    return int(mebibytes) * MIB if mebibytes.isdigit() else None


def _kernel_module_version(host: Host) -> str:
    """Return the version of the loaded kernel module, or an empty string."""
    match = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", host.read("proc/driver/nvidia/version"))
    return match[1] if match else host.read("sys/module/nvidia/version").strip()


def check_driver(driver: Driver, libraries: Libraries, host: Host, *, needs_gpu: bool) -> Iterator[Check]:
    """Check whether the driver is loaded, works, and is new enough for torch."""
    name = "nvidia driver"
    if driver.problem and (driver.version or host.has_gpu_files):
        fix = "if nvidia-smi also fails by hand, reload the driver or reboot; restart a container"
        yield warning("nvidia-smi", driver.problem, fix)
    if not driver.version:
        reason = "this container has no access to a GPU" if host.is_container else "there is no NVIDIA driver"
        yield skipped(name, f"{reason}: {driver.problem}")
        return
    needed = OLDEST_DRIVERS.get(int(libraries.cuda.split(".")[0])) if libraries.cuda else None
    if needed is None or driver.major is None:
        why = f"torch's CUDA {libraries.cuda}" if libraries.cuda else "a torch without CUDA"
        yield ok(name, f"{driver.version}; the version that {why} needs is not known")
    elif driver.major >= needed:
        yield ok(name, f"{driver.version}; torch's CUDA {libraries.cuda} needs {needed} or newer")
    elif libraries.gpus:
        yield warning(name, f"{driver.version}, older than {needed}, yet torch finds a GPU (forward compatibility)")
    else:
        detail = f"{driver.version} is too old for torch's CUDA {libraries.cuda}, which needs {needed} or newer"
        fix = f"install driver {needed} or newer, or {CUDA_FOR_OLD_DRIVERS}"
        yield failed(name, detail, fix) if needs_gpu else warning(name, detail, fix)
