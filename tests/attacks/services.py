"""The services as processes of their own, and what is measured of them from outside."""

import asyncio
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from demo_model.services import WEIGHTS
from tests import ROOT
from tests.e2e.test_services import free_port

START_S = 90.0
SAMPLE_S = 0.02
PATIENCE_S = 60.0
MIB = 2**20
TINY: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 1, "cache": "none", "seed": 7}


@dataclass
class Service:
    """A running service."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    port: int
    keys: dict[str, str] = field(default_factory=dict)
    """Headers that carry the key, if one is needed."""

    @property
    def rss(self) -> int:
        """The resident size of the process and its children, in bytes."""
        watched = psutil.Process(self.process.pid)
        return sum(each.memory_info().rss for each in (watched, *watched.children(recursive=True)))

    def num_connections(self) -> int:
        """The number of connections that the process holds on its port."""
        connections = psutil.Process(self.process.pid).net_connections("tcp")
        return sum(c.laddr.port == self.port and c.status != psutil.CONN_LISTEN for c in connections)


@asynccontextmanager
async def service(
    module: str, wrapper: tuple[str, ...] = (), files: int = 0, **settings: str
) -> AsyncIterator[Service]:
    """Start a service with the demo model and wait until it has loaded it; it is killed at the end.

    Args:
        module: ``text_encoder_service`` or ``generator_service``.
        wrapper: a command that starts the service, such as ``unshare``.
        files: the limit of its descriptors; 0 is that of this process.
        settings: environment variables.
    """
    prefix, port = module.removesuffix("_service").upper(), free_port()
    own = {f"{prefix}_PORT": str(port), "FLUX2_MODEL": str(WEIGHTS), "PYTHONPATH": os.environ["PYTHONPATH"]}
    environment = os.environ | own | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | settings
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        with log.open("wb") as output:
            limited = ("sh", "-c", f'ulimit -n {files} && exec "$@"', "sh") if files else ()
            command = [*limited, *wrapper, sys.executable, "-m", module]
            process = subprocess.Popen(command, env=environment, cwd=folder, stdout=output, stderr=output)
        try:
            started = Service(process, f"http://127.0.0.1:{port}", log, port)
            await asyncio.to_thread(wait_until_started, started)
            yield started
        finally:
            process.kill()
            process.wait()


def wait_until_started(started: Service) -> None:
    """Wait until the service has loaded its model."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if started.process.poll() is not None:
            raise RuntimeError(f"the service ended: {started.log.read_text(errors='replace')[-300:]}")
        try:
            if httpx.get(f"{started.url}/health/ready", timeout=5).json()["status"] != "starting":
                return
        except (httpx.HTTPError, ValueError):
            pass
        time.sleep(0.1)
    raise RuntimeError("the service did not start in time")


def generator(**options: Any) -> AbstractAsyncContextManager[Service]:
    """A generator; see ``service``."""
    return service("generator_service", **options)


@asynccontextmanager
async def both(**options: Any) -> AsyncIterator[Service]:
    """A generator with its text encoder; ``options`` are the generator's."""
    async with (
        service("text_encoder_service") as encoder,
        generator(TEXT_ENCODER_URL=encoder.url, **options) as started,
    ):
        yield started


@dataclass
class Watch:
    """What was measured while an attack ran."""

    growth: float = 0.0
    """The largest growth of the resident size, in MiB."""
    latencies: list[float] = field(default_factory=list)
    """The durations of all requests for ``/health/live``, in seconds; those without an answer count as ten."""

    def live(self, quantile: float) -> float:
        """A quantile of the latencies, in seconds."""
        return sorted(self.latencies)[int(quantile * (len(self.latencies) - 1))] if self.latencies else float("inf")


@asynccontextmanager
async def watching(watched: Service) -> AsyncIterator[Watch]:
    """Measure the memory, and the liveness from another process, until the block ends."""
    watch, ends, before = Watch(), threading.Event(), watched.rss

    def sample() -> None:
        while not ends.wait(SAMPLE_S):
            try:
                watch.growth = max(watch.growth, (watched.rss - before) / MIB)
            except psutil.NoSuchProcess:
                return

    sampler = threading.Thread(target=sample, daemon=True)
    prober = await asyncio.create_subprocess_exec(
        *(sys.executable, "-S", str(ROOT / "tests/attacks/prober.py"), str(watched.port)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    await asyncio.sleep(0.3)
    sampler.start()
    try:
        yield watch
    finally:
        ends.set()
        sampler.join()
        output, _ = await prober.communicate(b"")
        watch.latencies.extend(map(float, output.split()))


def metric(watched: Service, name: str, label: str = "") -> float:
    """The sum of a metric over its labels, or over those with ``label``."""
    lines = httpx.get(f"{watched.url}/metrics", timeout=PATIENCE_S).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name) and label in line)


async def generate(http: httpx.AsyncClient, prompt: str, **fields: Any) -> tuple[int, float]:
    """The status of a request for a small image, 0 without an answer, and its seconds."""
    began, status = time.monotonic(), 0
    with suppress(httpx.HTTPError):
        status = (await http.post("/generate", json=TINY | {"prompt": prompt} | fields)).status_code
    return status, time.monotonic() - began


def client(of: Service, address: str = "", timeout_s: float = PATIENCE_S) -> httpx.AsyncClient:
    """A client of a service, from an address of the loopback network, with as many connections as it likes."""
    transport = httpx.AsyncHTTPTransport(local_address=address or None, limits=httpx.Limits(max_connections=None))
    return httpx.AsyncClient(transport=transport, base_url=of.url, headers=of.keys, timeout=timeout_s)
