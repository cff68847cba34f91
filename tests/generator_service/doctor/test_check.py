"""Isolation of checks, and the properties of a host."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from generator_service.doctor.check import MAX_CHARS, Check, Status, attempt, isolated, ok, one_line
from generator_service.doctor.host import Host, Memory, existing_folder
from tests.generator_service.doctor.hosts import described, install, put

MEMINFO = "MemTotal:       65536000 kB\nMemFree: 1 kB\nMemAvailable:   32768000 kB\nHugePages_Total: 0\nodd\n"


def test_an_unexpected_exception_is_a_warning() -> None:
    """An unexpected exception becomes a warning with its type, and earlier checks are kept."""

    def broken() -> Iterator[Check]:
        yield ok("first", "well")
        raise PermissionError(13, "Permission denied", "/x")

    assert isolated("second", broken) == [
        ok("first", "well"),
        Check("second", Status.WARNING, "could not be checked (PermissionError: [Errno 13] Permission denied: '/x')"),
    ]


def test_unknown_values_have_a_default() -> None:
    """A value that cannot be determined has its default, and a warning has the reason."""

    def broken() -> int:
        raise KeyError

    value, [check] = attempt("it", broken, 7)
    assert (value, check.status, check.detail) == (7, Status.WARNING, "could not be determined (KeyError)")
    assert attempt("it", lambda: 8, 7) == (8, [])


def test_other_programs_messages_become_one_line() -> None:
    """Messages of other programs are shortened, without control characters and line breaks."""
    assert one_line(" a\n\tb\x1b[31m \r c\x00 ") == "a b [31m c"
    assert len(one_line("x" * 2000)) == MAX_CHARS


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, Memory(65_536_000 * 1024, 32_768_000 * 1024)),
        ({"sys/fs/cgroup/memory.max": "max\n"}, Memory(65_536_000 * 1024, 32_768_000 * 1024)),
        ({"sys/fs/cgroup/memory.max": "2147483648\n"}, Memory(2**31, 2**31)),
        ({"sys/fs/cgroup/memory/memory.limit_in_bytes": "2147483648\n"}, Memory(2**31, 2**31)),
        (
            {"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712"},
            Memory(65_536_000 * 1024, 32_768_000 * 1024),
        ),
    ],
)
def test_memory_is_limited_by_the_machine_and_the_container(
    tmp_path: Path, limits: dict[str, str], expected: Memory
) -> None:
    """Host memory is the smaller one of the machine's and the container's limit, for cgroups v1 and v2."""
    host = described(tmp_path)
    assert host.memory() is None
    put(host.root, "proc/meminfo", MEMINFO)
    for name, text in limits.items():
        put(host.root, name, text)
    assert host.memory() == expected
    assert f"{expected.total / 1e9:.0f} GB of memory" in host.describe()


def test_containers_are_recognized(tmp_path: Path) -> None:
    """Containers of Docker, Podman and Kubernetes are recognized, and so are those of this project's images."""
    bare, marked = described(tmp_path), tmp_path / "marked"
    put(marked, "run/.containerenv", "")
    docker, kubernetes = Host({}, marked), Host({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, bare.root)
    ours = Host({"HF_HOME": "/weights"}, marked)
    hosts = (bare, docker, kubernetes, ours)
    assert [host.is_container for host in hosts] == [False, True, True, True]
    assert [host.is_our_image for host in hosts] == [False, False, False, True]
    assert ["in a container" in host.describe() for host in hosts] == [False, True, True, True]


def test_programs_are_run_in_the_hosts_environment(tmp_path: Path) -> None:
    """A program's output and exit status are returned, and one that exceeds its timeout is killed."""
    host = described(tmp_path, WORD="hello")
    install(tmp_path, "greet", 'echo "$WORD"; echo "$1" >&2; exit 3')
    assert host.which("absent") is None
    program = host.which("greet")
    assert program is not None
    output = host.run(program, "you")
    assert (output.status, output.stdout, output.stderr) == (3, "hello\n", "you\n")
    assert host.run(sys.executable, "-c", "import time; time.sleep(600)", timeout_s=0.2).status is None
    garbage = host.run(sys.executable, "-c", r"import sys; sys.stdout.buffer.write(b'\xff\xfe')")
    assert garbage.stdout == "\ufffd\ufffd"


def test_the_nearest_existing_folder(tmp_path: Path) -> None:
    """A folder that does not exist yet is represented by its nearest existing parent."""
    assert existing_folder(tmp_path / "a" / "b") == tmp_path
    assert existing_folder(tmp_path) == tmp_path
    assert shutil.disk_usage(existing_folder(Path("x/y"))).free > 0
