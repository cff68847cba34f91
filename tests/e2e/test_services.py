"""The services and the demo as the processes that users start."""

import base64
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from demo_model.services import WEIGHTS

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60


def free_port() -> int:
    """A port that no process uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def environment() -> dict[str, str]:
    """Free ports, and this checkout's code in whatever folder a program runs."""
    ports = {"TEXT_ENCODER_PORT": str(free_port()), "GENERATOR_PORT": str(free_port())}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    return {**inherited, **ports, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"}


def run(module: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a program of this project until it ends."""
    command = [sys.executable, "-m", module]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def error_line(text: str) -> str:
    """The only line of a program's output beside its log."""
    lines = [line for line in text.strip().splitlines() if not line.startswith("INFO ")]
    assert len(lines) == 1, text
    assert lines[0].startswith("flux2: ")
    return lines[0]


def test_the_demo_generates_one_prompt_in_five_modes(environment: dict[str, str], tmp_path: Path) -> None:
    """Five images, a contact sheet and a table: none computes 50 steps, ultra 10, and the images are similar."""
    result = run("demo_model.demo", environment)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "demo-output"
    images = {
        mode: np.asarray(Image.open(folder / f"{mode}.png")) for mode in ("none", "slow", "medium", "fast", "ultra")
    }
    assert all(image.shape == (128, 128, 3) for image in images.values())
    assert not np.array_equal(images["none"], images["ultra"])
    assert np.abs(images["none"].astype(float) - images["ultra"]).mean() < 8
    with Image.open(folder / "contact-sheet.png") as sheet:
        assert sheet.width == 5 * 128
    for message in ("50/50", "26/50", "20/50", "15/50", "10/50", "PSNR", "contact-sheet.png"):
        assert message in result.stdout


@pytest.mark.parametrize("module", ["demo_model.demo", "demo_model.serve"])
@pytest.mark.parametrize("name", ["TEXT_ENCODER_PORT", "GENERATOR_PORT"])
def test_a_port_in_use_is_one_line(environment: dict[str, str], module: str, name: str) -> None:
    """The line names the port and the variable that changes it."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = run(module, environment | {name: str(port)})
    assert result.returncode == 1
    assert str(port) in error_line(result.stderr)
    assert name in result.stderr


def test_an_invalid_port_is_one_line(environment: dict[str, str]) -> None:
    """The line has the valid values."""
    result = run("demo_model.serve", environment | {"GENERATOR_PORT": "eight"})
    assert result.returncode == 1
    assert "GENERATOR_PORT is 'eight'" in error_line(result.stderr)


def test_an_unwritable_output_folder_is_one_line(environment: dict[str, str], tmp_path: Path) -> None:
    """The line has the folder and the reason."""
    (tmp_path / "demo-output").write_text("in the way")
    result = run("demo_model.demo", environment)
    assert result.returncode == 1
    assert "demo-output" in error_line(result.stderr)


@pytest.mark.parametrize(
    ("module", "settings", "message"),
    [
        ("text_encoder_service", {"FLUX2_MODEL": str(ROOT / "tests")}, "not a diffusers pipeline"),
        ("generator_service", {"FLUX2_MODEL": "nonexistent/model", "HF_HUB_OFFLINE": "1"}, "'nonexistent/model'"),
        ("text_encoder_service", {"FLUX2_MODEL": str(WEIGHTS), "LOG_LEVEL": "loud"}, "LOG_LEVEL"),
        ("generator_service", {"FLUX2_MODEL": str(WEIGHTS), "LOG_LEVEL": "loud"}, "LOG_LEVEL"),
    ],
)
def test_a_failed_start_is_reported_in_one_line(
    environment: dict[str, str], module: str, settings: dict[str, str], message: str
) -> None:
    """A model that cannot be loaded, or an invalid setting, is one line and a nonzero status."""
    result = run(module, environment | settings)
    assert result.returncode == 1
    assert message in error_line(result.stderr)


@pytest.fixture
def starting(environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """``make serve``, just started."""
    process = subprocess.Popen([sys.executable, "-m", "demo_model.serve"], env=environment, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def serving(
    starting: subprocess.Popen[bytes], environment: dict[str, str]
) -> tuple[subprocess.Popen[bytes], list[str]]:
    """``make serve``, ready, and the addresses of the two services."""
    urls = [f"http://127.0.0.1:{environment[name]}" for name in ("TEXT_ENCODER_PORT", "GENERATOR_PORT")]
    wait_for(lambda: is_ok(f"{urls[1]}/health/ready"))
    return starting, urls


def test_a_running_generation_is_finished(environment: dict[str, str]) -> None:
    """After SIGTERM the stream of a running generation goes on to its image, then the service ends."""
    url = f"http://127.0.0.1:{environment['GENERATOR_PORT']}"
    command = [sys.executable, "-m", "generator_service"]
    embeds = base64.b64encode(save({"prompt_embeds": torch.zeros(1, 32, 384)})).decode()
    body = {"prompt_embeds": embeds, "num_inference_steps": 60, "cache": "none"}
    service = subprocess.Popen(command, env=environment | {"FLUX2_MODEL": str(WEIGHTS)}, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: has_started(url))
        headers = {"Accept": "text/event-stream"}
        with httpx.stream("POST", f"{url}/generate", json=body, headers=headers, timeout=PATIENCE_S) as response:
            lines = response.iter_lines()
            assert "event: step" in lines  # reads up to that event
            service.send_signal(signal.SIGTERM)
            names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
        assert names == ["step"] * 59 + ["completed"]
        assert service.wait(PATIENCE_S) == 0
    finally:
        service.kill()
        service.wait()


def test_the_drain_is_bounded(environment: dict[str, str]) -> None:
    """A generation that takes longer than ``GENERATOR_DRAIN_S`` after SIGTERM is aborted, and the service ends."""
    url = f"http://127.0.0.1:{environment['GENERATOR_PORT']}"
    embeds = base64.b64encode(save({"prompt_embeds": torch.zeros(1, 32, 384)})).decode()
    body = {"prompt_embeds": embeds, "num_inference_steps": 100, "cache": "none", "width": 768, "height": 768}
    settings = {"FLUX2_MODEL": str(WEIGHTS), "GENERATOR_DRAIN_S": "1"}
    command = [sys.executable, "-m", "generator_service"]
    service = subprocess.Popen(command, env=environment | settings, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: has_started(url))
        headers = {"Accept": "text/event-stream"}
        with httpx.stream("POST", f"{url}/generate", json=body, headers=headers, timeout=PATIENCE_S) as response:
            lines = response.iter_lines()
            assert "event: step" in lines
            service.send_signal(signal.SIGTERM)
            assert service.wait(PATIENCE_S) == 0
            rest: list[str] = []
            with suppress(httpx.TransportError):
                rest.extend(lines)
        assert "event: completed" not in rest
    finally:
        service.kill()
        service.wait()


def is_ok(url: str) -> bool:
    """Whether the response is 200."""
    try:
        return httpx.get(url).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def has_started(url: str) -> bool:
    """Whether the service has loaded its model, even if the other service is not ready."""
    try:
        return bool(httpx.get(f"{url}/health/ready", timeout=PATIENCE_S).json()["status"] != "starting")
    except httpx.TransportError:
        return False


def wait_for(condition: object) -> None:
    """Wait until ``condition()`` holds."""
    assert callable(condition)
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_both_services(serving: tuple[subprocess.Popen[bytes], list[str]], sent: signal.Signals) -> None:
    """``make serve`` runs until Ctrl-C, and leaves no process behind."""
    if signal.getsignal(sent) == signal.SIG_IGN:
        pytest.skip("a shell's background commands, and what they start, are not to hear Ctrl-C")
    process, urls = serving
    response = httpx.post(f"{urls[1]}/generate", json={"prompt": "a red square", "num_inference_steps": 4}, timeout=60)
    assert response.headers["content-type"] == "image/png"
    process.send_signal(sent)
    assert process.wait(PATIENCE_S) == 0
    assert not any(is_ok(f"{url}/health/live") for url in urls)


def test_openmp_settings_reach_the_services(starting: subprocess.Popen[bytes]) -> None:
    """The encoder has one thread, and the generator waits as the environment of ``make serve`` says."""
    children = Path(f"/proc/{starting.pid}/task/{starting.pid}/children")
    if not children.exists():
        pytest.skip("only Linux tells a process's children")
    wait_for(lambda: len(children.read_text().split()) == 2)
    files = [Path(f"/proc/{pid}/environ") for pid in children.read_text().split()]
    wait_for(lambda: all("FLUX2_MODEL=" in file.read_text() for file in files))  # both have their own environment
    encoder, generator = (file.read_text(encoding="utf-8").split("\0") for file in files)
    assert "OMP_NUM_THREADS=1" in encoder
    assert "OMP_WAIT_POLICY=passive" in generator
    assert not any(variable.startswith("GOMP_SPINCOUNT=") for variable in generator)


def test_one_service_does_not_outlive_the_other(serving: tuple[subprocess.Popen[bytes], list[str]]) -> None:
    """If a service ends, the other is stopped and the status reports an error."""
    process, urls = serving
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        pytest.skip("only Linux tells a process's children")
    os.kill(int(children.read_text().split()[0]), signal.SIGKILL)
    assert process.wait(PATIENCE_S) == 1
    assert not any(is_ok(f"{url}/health/live") for url in urls)
