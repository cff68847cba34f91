"""Both services on loopback with the demo model, as processes of their own, for as long as a ``with`` block lasts."""

import os
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
    """The demo cannot run here; the text is one line for people."""


@dataclass(frozen=True)
class Services:
    """The running services."""

    text_encoder_url: str
    generator_url: str
    processes: tuple[subprocess.Popen[bytes], ...]

    def wait(self) -> None:
        """Return when one of the services has ended."""
        while all(process.poll() is None for process in self.processes):
            time.sleep(0.2)


def port_setting(name: str, default: int) -> int:
    """The port in the environment variable ``name``; it must be free."""
    text = os.environ.get(name, str(default))
    if not text.isdigit() or not 0 < int(text) < 65536:
        raise DemoError(f"{name} is {text!r}: give a port number from 1 to 65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, int(text)))
        except OSError as error:
            told = f"port {text} cannot be used ({error.strerror}): stop what uses it, or set {name} to another"
            raise DemoError(told) from error
    return int(text)


def openmp_environment(defaults: Mapping[str, str]) -> dict[str, str]:
    """OpenMP's variables for a service: those of this process's environment win over ``defaults``.

    ``OMP_WAIT_POLICY`` also wins over ``GOMP_SPINCOUNT``, which would make libgomp ignore it.
    """
    chosen = {**defaults, **{name: value for name, value in os.environ.items() if name.startswith(("OMP_", "GOMP_"))}}
    if "OMP_WAIT_POLICY" in chosen and "GOMP_SPINCOUNT" not in os.environ:
        chosen.pop("GOMP_SPINCOUNT", None)
    return chosen


@contextmanager
def running_services(log_level: str = "warning", openmp: OpenMP = OPENMP) -> Iterator[Services]:
    """Start both services, wait until they are ready, and stop them at the end.

    Args:
        log_level: of both.
        openmp: how their threads wait, and how many there are, where the environment does not say it.

    Raises:
        DemoError: a port is taken, or a service does not start.
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
        # A session of its own: Ctrl-C reaches this process alone, which then stops both in order.
        subprocess.Popen(  # noqa: S603 - ours
            [sys.executable, "-m", module],
            env=environment | openmp_environment(openmp.get(module, {})),
            start_new_session=True,
        )
        for module in MODULES
    )
    services = Services(encoder_url, generator_url, processes)
    try:
        wait_until_ready(services)
        yield services
    finally:
        stop(processes)


def wait_until_ready(services: Services) -> None:
    """Return when the generator, and with it the encoder, says that it is ready."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        for process in services.processes:
            if process.poll() is not None:
                raise DemoError(f"a service ended with status {process.returncode}: its own message is above")
        try:
            if httpx.get(f"{services.generator_url}/health/ready", timeout=2).status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise DemoError(f"the services were not ready after {START_TIMEOUT_S:.0f} s")


def stop(processes: tuple[subprocess.Popen[bytes], ...]) -> None:
    """End the services: politely first."""
    for process in reversed(processes):
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    for process in processes:
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
