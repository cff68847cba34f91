"""The checked machine: its environment variables, files and programs.

All access to the operating system goes through ``Host``, so that tests can simulate another machine with other
variables, another file tree for ``/proc`` and ``/sys``, and other programs on ``PATH``.
"""

import os
import platform
import shutil
import signal
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile

from dotenv import dotenv_values

CGROUP_LIMITS = ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes")
CONTAINER_MARKS = (".dockerenv", "run/.containerenv")


@dataclass(frozen=True)
class Memory:
    """Host memory, in bytes."""

    total: int
    """The machine's memory, or the container's limit if it is lower."""
    available: int


@dataclass(frozen=True)
class Output:
    """The output and exit status of a program."""

    status: int | None
    """None if it exceeded its timeout and was killed."""
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Host:
    """A machine to check.

    Args:
        environ: environment variables.
        root: the folder that contains ``proc`` and ``sys``.
        program_timeout_s: timeout of a program such as nvidia-smi.
        import_timeout_s: timeout of a Python process that imports torch and diffusers, possibly from a slow disk.
    """

    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    root: Path = Path("/")
    program_timeout_s: float = 15.0
    import_timeout_s: float = 180.0

    def which(self, program: str) -> str | None:
        """Return the program's path, or None if it is not on ``PATH``."""
        return shutil.which(program, path=self.environ.get("PATH", os.defpath))

    def run(self, *command: str, timeout_s: float | None = None) -> Output:
        """Run a program and kill it after the timeout. A process that hangs in the driver is left behind.

        Raises:
            OSError: the program cannot be started.
        """
        # subprocess.run would wait indefinitely for the killed process. With files, partial output is kept.
        with TemporaryFile() as stdout, TemporaryFile() as stderr:
            process = subprocess.Popen(  # noqa: S603 - fixed programs, no shell
                command,
                env=dict(self.environ),
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
            try:
                status: int | None = process.wait(timeout_s or self.program_timeout_s)
            except subprocess.TimeoutExpired:
                status = None
                os.killpg(process.pid, signal.SIGKILL)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(5)
            for file in (stdout, stderr):
                file.seek(0)
            return Output(status, *(file.read().decode(errors="replace") for file in (stdout, stderr)))

    def read(self, path: str) -> str:
        """Read a file below ``root``; return an empty string if it cannot be read."""
        try:
            return (self.root / path).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def variable(self, name: str) -> str:
        """Return a variable of the environment or, like docker compose, of ``.env``; an empty string if unset."""
        if name in self.environ:
            return self.environ[name]
        try:
            return dotenv_values(".env").get(name) or ""
        except (OSError, UnicodeDecodeError):
            return ""

    def home(self) -> Path:
        return Path(self.environ.get("HOME") or Path.home())

    @property
    def is_container(self) -> bool:
        """Whether this is known to be a container."""
        return "KUBERNETES_SERVICE_HOST" in self.environ or any((self.root / mark).exists() for mark in CONTAINER_MARKS)

    @property
    def is_our_image(self) -> bool:
        """Whether this is a container of an image that was built by this project's Dockerfile."""
        return self.is_container and self.environ.get("HF_HOME") == "/weights"

    @property
    def has_gpu_files(self) -> bool:
        """Whether the operating system has files of an NVIDIA driver."""
        return (self.root / "dev/nvidiactl").exists() or (self.root / "proc/driver/nvidia/version").exists()

    def memory(self) -> Memory | None:
        """Return the host memory, or None if ``/proc/meminfo`` cannot be read."""
        lines = (line.split() for line in self.read("proc/meminfo").splitlines())
        kilobytes = {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}
        if "MemTotal" not in kilobytes:
            return None
        total, available = (kilobytes.get(name, 0) * 1024 for name in ("MemTotal", "MemAvailable"))
        limits = [int(text) for text in map(self.read, CGROUP_LIMITS) if text.strip().isdigit()]
        total = min([total, *limits])
        return Memory(total, min(total, available))

    def describe(self) -> str:
        memory = self.memory()
        parts = [f"{platform.system()} {platform.machine()}", f"{os.cpu_count()} processors"]
        parts += [f"{memory.total / 1e9:.0f} GB of memory"] if memory else []
        parts += ["in a container"] if self.is_container else []
        return ", ".join(parts)


def existing_folder(path: Path) -> Path:
    """Return ``path`` or its nearest parent that exists."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())
