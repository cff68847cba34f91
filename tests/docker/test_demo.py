"""Real containers: built, started, disturbed under load and stopped, with the demo model on a Docker engine.

``make test-docker`` runs this if an engine can be reached, through ``DOCKER_HOST`` or the default socket.
"""

import gc
import io
import itertools
import os
import re
import shutil
import socket
import statistics
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docker
import httpx
import pytest
from docker.errors import APIError, DockerException
from docker.models.containers import Container
from PIL import Image

ROOT = Path(__file__).parents[2]
WHEELS_OVERRIDE = Path(__file__).parent / "docker-compose.wheels.yml"
PATIENCE_S = 120.0
READY_S = 300
LABEL = "com.docker.compose.project"
REVISION = "0123456789abcdef0123456789abcdef01234567"
pytestmark = pytest.mark.docker


def connect() -> docker.DockerClient | None:
    """The engine of ``DOCKER_HOST`` or the default socket, if it can be reached."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the SDK does not close a socket that failed to connect
        try:
            return docker.from_env()
        except DockerException:
            return None
        finally:
            gc.collect()


@pytest.fixture(scope="session")
def engine() -> Iterator[docker.DockerClient]:
    """A Docker engine with the compose plugin; without them the tests are skipped."""
    client = connect()
    if client is None:
        address = os.environ.get("DOCKER_HOST", "its default socket")
        pytest.skip(f"no Docker engine can be reached at {address}, so the containers were not tested")
    if shutil.which("docker") is None:
        pytest.skip("there is no docker command, so the containers were not tested")
    yield client
    client.close()


@dataclass
class Project:
    """A compose project with its own name and port."""

    engine: docker.DockerClient
    name: str
    port: int

    @property
    def url(self) -> str:
        """The published address of the generator."""
        return f"http://127.0.0.1:{self.port}"

    def compose(self, *arguments: str, **environment: str) -> str:
        """Run ``docker compose`` on this checkout without the caller's settings, and return its output."""
        docker_command = shutil.which("docker")
        assert docker_command is not None
        wheels = os.environ.get("PIP_FIND_LINKS", "")
        override = ["-f", str(WHEELS_OVERRIDE)] if Path(wheels).is_dir() and wheels else []
        command = [docker_command, "compose", "-p", self.name, "--env-file", os.devnull]
        command += ["-f", str(ROOT / "docker-compose.yml"), *override, *arguments]
        variables = {**self.base(), **os.environ, "GENERATOR_PORT": str(self.port), "WHEELS": wheels, **environment}
        # No pseudo-terminal and plain progress, since the output goes to the test's report.
        result = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=1800, check=False)
        assert result.returncode == 0, f"{' '.join(arguments)}\n{result.stdout[-4000:]}\n{result.stderr[-8000:]}"
        return result.stdout

    def base(self) -> dict[str, str]:
        """The Dockerfile's base by its tag if the engine has it, since a digest may need the registry."""
        (pinned,) = re.findall(r"^ARG PYTHON_IMAGE=(\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
        tag = pinned.partition("@")[0]
        return {"PYTHON_IMAGE": tag} if self.engine.images.list(name=tag) else {}

    def container(self, service: str) -> Container:
        """The container of a service, running or stopped."""
        wanted = [f"{LABEL}={self.name}", f"com.docker.compose.service={service}"]
        (container,) = self.engine.containers.list(all=True, filters={"label": wanted})
        return container

    def resources(self) -> dict[str, list[Any]]:
        """All of the engine's resources of this project except images."""
        mine: dict[str, Any] = {"label": f"{LABEL}={self.name}"}
        return {
            "containers": self.engine.containers.list(all=True, filters=mine),
            "networks": self.engine.networks.list(filters=mine),
            "volumes": self.engine.volumes.list(filters=mine),
        }

    def up(self) -> None:
        """Build and start the demo, and wait until it is ready."""
        self.compose("--profile", "demo", "up", "--detach", "--wait", "--wait-timeout", str(READY_S), "demo")

    def down(self) -> None:
        self.compose("--profile", "*", "down", "--volumes", "--timeout", "30")


def free_port() -> int:
    """A port that no process uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def new_project(engine: docker.DockerClient, purpose: str) -> Iterator[Project]:
    """A project that is removed when the block ends."""
    project = Project(engine, f"flux2-{purpose}-{os.getpid()}", free_port())
    try:
        yield project
    finally:
        project.down()


@pytest.fixture(scope="module")
def demo(engine: docker.DockerClient) -> Iterator[Project]:
    """The running demo."""
    with new_project(engine, "demo") as project:
        project.up()
        yield project


def wait_for(condition: Callable[[], object], within_s: float = PATIENCE_S) -> None:
    """Wait until ``condition()`` holds."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_healthy(container: Container) -> bool:
    """Whether the engine reports the container as healthy."""
    container.reload()
    return bool(container.attrs["State"]["Health"]["Status"] == "healthy")


def generate(url: str, prompt: str, **fields: object) -> httpx.Response:
    """Request an image."""
    body = {"prompt": prompt, "seed": 7} | fields
    return httpx.post(f"{url}/generate", json=body, headers={"Accept": "image/png"}, timeout=PATIENCE_S)


def test_an_image_is_generated_through_the_published_port(demo: Project) -> None:
    """From outside the containers the service is ready and documented, and a prompt gives an image."""
    assert httpx.get(f"{demo.url}/health/ready").json() == {"status": "ready"}
    assert httpx.get(f"{demo.url}/docs").status_code == httpx.codes.OK
    response = generate(demo.url, "a small red circle above a large blue square on a white background")
    assert response.status_code == httpx.codes.OK, response.text
    with Image.open(io.BytesIO(response.content)) as image:
        assert (image.format, image.size) == ("PNG", (128, 128))
        assert len(image.convert("RGB").getcolors(128 * 128) or []) > 2


def test_the_containers_match_the_file(demo: Project) -> None:
    """Inside there are no root user, capabilities, ways to gain privileges, or writable folders except /tmp."""
    for service in ("demo", "demo-text-encoder"):
        container = demo.container(service)
        status = output_of(container, "cat", "/proc/self/status").decode()
        facts = dict(re.findall(r"^(\w+):\s+(\S+)", status, re.MULTILINE))
        assert facts.items() >= {"Uid": "1000", "NoNewPrivs": "1"}.items()
        assert {int(value, 16) for name, value in facts.items() if name.startswith("Cap")} == {0}
        assert container.exec_run(["touch", "/anywhere"]).exit_code != 0
        assert container.exec_run(["touch", "/tmp/here"]).exit_code == 0  # noqa: S108 - the container's own
        assert output_of(container, "cat", "/proc/1/comm").strip() in {b"docker-init", b"tini"}


def output_of(container: Container, *command: str) -> bytes:
    """The output of a command in the container."""
    output = container.exec_run(list(command)).output
    assert isinstance(output, bytes)
    return output


def test_the_encoder_is_out_of_reach(demo: Project) -> None:
    """It has no published port and no route to other networks; the generator is published only on loopback."""
    encoder, generator = demo.container("demo-text-encoder"), demo.container("demo")
    assert not any(encoder.attrs["NetworkSettings"]["Ports"].values())
    assert generator.attrs["NetworkSettings"]["Ports"] == {
        "8000/tcp": [{"HostIp": "127.0.0.1", "HostPort": str(demo.port)}]
    }
    connect = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=3)"
    outside = encoder.exec_run(["python", "-c", connect])
    assert outside.exit_code != 0
    assert b"unreachable" in outside.output


@dataclass
class Load:
    """Clients that request images of new prompts, and the responses they get."""

    url: str
    responses: list[tuple[float, float, int]] = field(default_factory=list)
    """The start of each request, its duration in seconds, and the status."""
    _over: threading.Event = field(default_factory=threading.Event)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def _client(self) -> None:
        with httpx.Client(timeout=PATIENCE_S) as http:
            while not self._over.is_set():
                prompt = f"a small red circle, number {next(self._numbers)}"
                began = time.time()
                body = {"prompt": prompt, "num_inference_steps": 1, "cache": "none"}
                status = http.post(f"{self.url}/generate", json=body).status_code
                self.responses.append((began, time.time() - began, status))
                time.sleep(0.05)

    @contextmanager
    def running(self, num_clients: int = 4) -> Iterator[None]:
        """Send requests until the block ends."""
        clients = [threading.Thread(target=self._client) for _ in range(num_clients)]
        for client in clients:
            client.start()
        try:
            yield
        finally:
            self._over.set()
            for client in clients:
                client.join()

    def since(self, moment: float, status: int) -> list[tuple[float, float, int]]:
        """The requests sent after ``moment`` with this response."""
        return [response for response in list(self.responses) if response[0] >= moment and response[2] == status]


WHEN_READY = """
import time, urllib.request
while True:
    try:
        urllib.request.urlopen("http://demo-text-encoder:8006/health/ready", timeout=1)
    except OSError:
        time.sleep(0.05)
    else:
        print(time.time())
        break
"""


def test_the_encoder_is_restarted_under_load(demo: Project, capsys: pytest.CaptureFixture[str]) -> None:
    """Refusals are fast, cached prompts still work, and new ones do within seconds of the encoder's return.

    The limits are 100 ms for a 503 (95th percentile) once the circuit breaker is open, and 10 s. The generator keeps
    running.
    """
    encoder, generator = demo.container("demo-text-encoder"), demo.container("demo")
    cached_prompt = "a large blue square on a white background"
    assert generate(demo.url, cached_prompt).status_code == httpx.codes.OK
    load = Load(demo.url)
    with load.running():
        wait_for(lambda: len(load.since(0, 200)) >= 20)
        encoder.stop()
        stopped = time.time()
        wait_for(
            lambda: len(load.since(stopped, 503)) >= 12
        )  # four clients, three failures each: the circuit breaker is open
        opened = time.time()
        assert generate(demo.url, cached_prompt).status_code == httpx.codes.OK
        wait_for(lambda: len(load.since(opened, 503)) >= 400)
        started = time.time()
        encoder.start()
        returned = float(output_of(generator, "python", "-c", WHEN_READY))
        wait_for(lambda: load.since(started, 200))
        recovered = min(began + seconds for began, seconds, _ in load.since(started, 200))
    refused_s = [seconds for began, seconds, _ in load.since(opened, 503) if began < started]
    p95_s = statistics.quantiles(refused_s, n=20)[-1]
    with capsys.disabled():
        print(
            f"\n  encoder away: {len(refused_s)} refusals, 95th percentile {1000 * p95_s:.0f} ms, "
            f"slowest {1000 * max(refused_s):.0f} ms; back: first new prompt after {recovered - returned:.1f} s later"
        )
    assert p95_s < 0.1
    assert recovered - returned < 10
    assert {status for _, _, status in load.responses} <= {200, 503}
    generator.reload()
    assert (generator.attrs["RestartCount"], generator.status) == (0, "running")
    wait_for(lambda: is_healthy(generator))


def test_a_running_generation_is_finished_when_the_container_stops(demo: Project) -> None:
    """After SIGTERM during a generation the client gets its image, and the container ends with status 0."""
    generator = demo.container("demo")
    stopper = threading.Thread(target=generator.stop, kwargs={"timeout": int(PATIENCE_S)})
    body = {"prompt": "a red square", "num_inference_steps": 100, "cache": "none", "width": 256, "height": 256}
    headers = {"Accept": "text/event-stream"}
    try:
        with httpx.stream("POST", f"{demo.url}/generate", json=body, headers=headers, timeout=PATIENCE_S) as response:
            lines = (line for line in response.iter_lines() if line.startswith("event: "))
            before = list(itertools.islice((line for line in lines if line == "event: step"), 5))
            stopper.start()
            wait_for(lambda: not accepts(demo.port))
            after = list(lines)
        stopper.join()
        assert len(before) == 5
        assert after == ["event: step"] * 95 + ["event: completed"]
        generator.reload()
        assert (generator.attrs["State"]["ExitCode"], generator.attrs["State"]["OOMKilled"]) == (0, False)
    finally:
        generator.start()
        wait_for(lambda: is_healthy(generator))


def accepts(port: int) -> bool:
    """Whether the service behind the published port accepts connections, not only Docker's proxy."""
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health/live", timeout=2).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def test_a_killed_service_is_restarted(demo: Project) -> None:
    """A process that dies is restarted, and the demo is ready again."""
    encoder = demo.container("demo-text-encoder")
    kill = "import os, signal; os.kill(int(open('/proc/1/task/1/children').read().split()[0]), signal.SIGKILL)"
    encoder.exec_run(["python", "-c", kill])
    wait_for(lambda: demo.container("demo-text-encoder").attrs["RestartCount"] == 1)
    wait_for(lambda: is_healthy(encoder))
    wait_for(lambda: httpx.get(f"{demo.url}/health/ready").status_code == httpx.codes.OK)


def test_down_leaves_nothing(engine: docker.DockerClient) -> None:
    """``down --volumes`` leaves no container, network or volume of the project."""
    with new_project(engine, "down") as project:
        project.up()
        assert all(project.resources().values())
        assert generate(project.url, "a red square", num_inference_steps=1).status_code == httpx.codes.OK
        project.down()
        assert project.resources() == {"containers": [], "networks": [], "volumes": []}


def test_gpus_are_requested(engine: docker.DockerClient, tmp_path: Path) -> None:
    """The two services are created with the GPUs of the variables, and not without them; the override shares one."""
    override = ["-f", str(ROOT / "docker-compose.one-gpu.yml")]
    create = ["up", "--no-start"]
    with new_project(engine, "gpus") as project:
        for arguments, expected in (
            (create, {"text-encoder": ["GPU-1"], "generator": ["GPU-2"]}),
            ([*override, *create], {"text-encoder": ["GPU-2"], "generator": ["GPU-2"]}),
        ):
            project.compose(*arguments, ENCODER_GPU="GPU-1", GENERATOR_GPU="GPU-2", SCHEDULES_DIR=str(tmp_path))
            for service, ids in expected.items():
                (request,) = project.container(service).attrs["HostConfig"]["DeviceRequests"]
                assert (request["Driver"], request["DeviceIDs"]) == ("nvidia", ids)
                assert request["Capabilities"] == [["gpu"]]
        with pytest.raises(APIError):  # on any host the driver or the GPU is missing
            project.container("generator").start()


@pytest.mark.parametrize("image", ["flux2-text-encoder", "flux2-generator"])
@pytest.mark.usefixtures("demo")  # has built the images
def test_compiled_code_has_a_volume(engine: docker.DockerClient, image: str) -> None:
    """A new volume at ``/compiled`` belongs to the service's user, and the image has a C compiler."""
    compile_and_run = (
        "echo 'int main() { return 7; }' > /tmp/x.c && gcc -o /compiled/x /tmp/x.c && /compiled/x || echo $?"
    )
    volume = engine.volumes.create()
    try:
        output = engine.containers.run(
            image,
            ["sh", "-c", compile_and_run],
            read_only=True,
            tmpfs={"/tmp": "size=16m"},  # noqa: S108 - the container's own
            volumes={volume.name: {"bind": "/compiled"}},
            remove=True,
        )
    finally:
        volume.remove()
    assert output.strip() == b"7"


def test_weights_are_read_only_and_offline(engine: docker.DockerClient, tmp_path: Path) -> None:
    """Both services load the weights from the volume of the ``weights`` service, without access to the hub.

    The folder has the hub's layout, with the demo model in place of FLUX.2 [dev].
    """
    (tmp_path / "token").write_text("not a token")
    (tmp_path / "token").chmod(0o644)
    model_folder = f"/weights/hub/models--someone--demo/snapshots/{REVISION}"
    copy = f"import shutil; shutil.copytree('/source', '{model_folder}')"
    source = f"{ROOT / 'demo_model' / 'weights'}:/source:ro"
    model_variables = {
        "HF_TOKEN_PATH": str(tmp_path / "token"),
        "FLUX2_MODEL": "someone/demo",
        "FLUX2_REVISION": REVISION,
    }
    with new_project(engine, "weights") as project:
        project.compose(
            "run", "--rm", "--no-TTY", "--volume", source, "weights", "python", "-c", copy, **model_variables
        )
        output = project.compose(
            "run", "--rm", "--no-TTY", "--env", "HF_HUB_OFFLINE=1", "weights", "flux2", "weights", **model_variables
        )
        assert f"someone/demo is available at revision {REVISION}" in " ".join(output.split())
        (volume,) = [volume for volume in project.resources()["volumes"] if volume.name.endswith("weights")]
        generate_command = ["flux2", "generate", "a red square", "--local", "--steps", "2", "-o", "/tmp/image.png"]  # noqa: S108
        log = engine.containers.run(
            "flux2-generator",
            generate_command,
            environment={"HF_HUB_OFFLINE": "1"} | model_variables,
            volumes={volume.name: {"bind": "/weights", "mode": "ro"}},
            network_mode="none",
            read_only=True,
            tmpfs={"/tmp": ""},  # noqa: S108
            remove=True,
            stderr=True,
        )
        assert b"of 2 steps computed" in log, log


def test_the_file_is_valid_for_compose(demo: Project) -> None:
    """``docker compose config`` accepts the file, with every profile and with the override for one GPU."""
    everything = demo.compose("--profile", "*", "config", "--services").split()
    assert {"text-encoder", "generator", "weights", "demo", "demo-text-encoder"} <= set(everything)
    assert demo.compose("-f", str(ROOT / "docker-compose.one-gpu.yml"), "config", "--services").split()
