"""Runs both services with the demo model on the loopback interface, as subprocesses, within a ``with`` block."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

WEIGHTS = Path(__file__).parent / "weights"
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 10.0
LOOPBACK = "127.0.0.1"
MODULES = ("text_encoder_service", "generator_service")

OpenMP = Mapping[str, Mapping[str, str]]
"""OpenMP's environment variables for each module."""
OPENMP: OpenMP = {
    "text_encoder_service": {"OMP_NUM_THREADS": "1"},
    "generator_service": {"GOMP_SPINCOUNT": "10000"},
}
"""So that two services can share few cores with each other, and with other programs; see ``docs/configure.md``."""


class DemoError(RuntimeError):
    """The demo cannot run here; the message is one line for the user."""


@dataclass(frozen=True)
class Services:
    """The running services."""

    text_encoder_url: str
    generator_url: str
    processes: tuple[subprocess.Popen[bytes], ...]

    def wait(self) -> None:
        """Wait until one of the services exits."""
        while all(process.poll() is None for process in self.processes):
            time.sleep(0.2)


def port_setting(name: str, default: int) -> int:
    """Read a port from the environment variable ``name``, and check that it is free.

    Raises:
        DemoError: the port is invalid or in use.
    """
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdigit()) or not 0 < int(text) < 65536:
        raise DemoError(f"{name} is {text!r}: give a port number from 1 to 65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, int(text)))
        except OSError as error:
            raise DemoError(
                f"port {text} cannot be used ({error.strerror}): stop what uses it, or set {name} to another"
            ) from error
    return int(text)


def openmp_environment(defaults: Mapping[str, str]) -> dict[str, str]:
    """Return OpenMP's variables for a service; this process's environment overrides ``defaults``.

    ``OMP_WAIT_POLICY`` also overrides a default ``GOMP_SPINCOUNT``, with which libgomp would ignore it.
    """
    chosen = {**defaults, **{name: value for name, value in os.environ.items() if name.startswith(("OMP_", "GOMP_"))}}
    if "OMP_WAIT_POLICY" in chosen and "GOMP_SPINCOUNT" not in os.environ:
        chosen.pop("GOMP_SPINCOUNT", None)
    return chosen


@contextmanager
def running_services(log_level: str = "warning", openmp: OpenMP = OPENMP) -> Iterator[Services]:
    """Start both services, wait until they are ready, and stop them at the end of the block.

    Args:
        log_level: log level of both services.
        openmp: defaults of OpenMP's variables for each service.

    Raises:
        DemoError: a port is in use, or a service does not start.
    """
    encoder_port = port_setting("TEXT_ENCODER_PORT", 8006)
    generator_port = port_setting("GENERATOR_PORT", 8000)
    encoder_url, generator_url = (f"http://{LOOPBACK}:{port}" for port in (encoder_port, generator_port))
    environment = {
        **os.environ,
        "FLUX2_MODEL": str(WEIGHTS),
        "LOG_LEVEL": log_level,
        "TEXT_ENCODER_PORT": str(encoder_port),
        "GENERATOR_PORT": str(generator_port),
        "TEXT_ENCODER_URL": encoder_url,
        "GENERATOR_TOKEN": "",
        "TEXT_ENCODER_TOKEN": "",
        "HF_HUB_OFFLINE": "1",
    }
    processes = tuple(
        start([sys.executable, "-m", module], environment | openmp_environment(openmp.get(module, {})))
        for module in MODULES
    )
    services = Services(encoder_url, generator_url, processes)
    try:
        wait_until_ready(services)
        yield services
    finally:
        stop(processes)


def start(command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a program that gets SIGTERM when this process ends, also if this process is killed.

    In its own session, Ctrl-C reaches only this process, which then stops the services in order.
    """
    setpriv = shutil.which("setpriv")  # part of util-linux; without it, the program survives a killed parent
    if setpriv is not None:
        command = [setpriv, "--pdeathsig", "TERM", *command]
    return subprocess.Popen(command, env=environment, start_new_session=True)  # noqa: S603 - this project's programs


def wait_until_ready(services: Services) -> None:
    """Wait until the generator is ready, which includes the text encoder.

    Raises:
        DemoError: a service exits, or they are not ready in time.
    """
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        for process in services.processes:
            if process.poll() is not None:
                raise DemoError(f"a service exited with status {process.returncode}: see its message above")
        try:
            if (
                httpx.get(f"{services.generator_url}/health/ready", timeout=2, trust_env=False).status_code
                == httpx.codes.OK
            ):
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise DemoError(f"the services were not ready after {START_TIMEOUT_S:.0f} s")


def stop(processes: tuple[subprocess.Popen[bytes], ...]) -> None:
    """Terminate the services, and kill them if they do not exit in time."""
    for process in reversed(processes):
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    for process in processes:
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
