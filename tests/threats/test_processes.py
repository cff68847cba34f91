"""The services as processes: stopped, killed, under long load, and fuzzed."""

import base64
import io
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import psutil
import torch
from PIL import Image
from safetensors.torch import save

from demo_model.services import WEIGHTS
from tests.conftest import Times
from tests.e2e.test_services import PATIENCE_S, ROOT, free_port, has_started, wait_for

TINY = {"width": 64, "height": 64, "num_inference_steps": 2, "cache": 1, "seed": 7}
EMBEDS = base64.b64encode(save({"prompt_embeds": torch.zeros(1, 32, 384)})).decode()


@contextmanager
def process(module: str, port: int, **environment: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A service with the demo model, and its address; it is killed at the end."""
    prefix = "TEXT_ENCODER" if module.startswith("text") else "GENERATOR"
    own = {f"{prefix}_PORT": str(port), "FLUX2_MODEL": str(WEIGHTS), "PYTHONPATH": str(ROOT)}
    settings = os.environ | own | {"OMP_WAIT_POLICY": "passive", "LOG_LEVEL": "error"} | environment
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen([sys.executable, "-m", module], env=settings) as started:
        try:
            wait_for(lambda: has_started(url))
            yield started, url
        finally:
            started.kill()


@contextmanager
def both(encoder_port: int) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A generator whose encoder is expected at ``encoder_port``, and its address."""
    expected = f"http://127.0.0.1:{encoder_port}"
    with process("generator_service", free_port(), TEXT_ENCODER_URL=expected) as generator:
        yield generator


def pixels(data: bytes) -> np.ndarray:
    """The image in a complete file; a truncated one is an error."""
    return np.asarray(Image.open(io.BytesIO(data)))


def test_shutdown_never_truncates_an_image(times: Times) -> None:
    """After SIGTERM at a random moment each request gets its complete image or none, and the status is 0."""
    rng = random.Random(0)
    body = {"prompt_embeds": EMBEDS, "num_inference_steps": 20, "cache": "none", "seed": 7}
    whole: list[np.ndarray] = []

    def request_image(url: str) -> None:
        try:
            response = httpx.post(f"{url}/generate", json=body, timeout=PATIENCE_S)
        except httpx.ConnectError:
            return  # the service no longer listened
        assert response.status_code == 200, response.text
        whole.append(pixels(response.content))

    for _ in range(times(1, 100)):
        with process("generator_service", free_port()) as (service, url), ThreadPoolExecutor(3) as clients:
            requests = [clients.submit(request_image, url) for _ in range(3)]
            wait_for(lambda url=url: "\nflux2_queue_depth 0.0\n" not in httpx.get(f"{url}/metrics").text)
            time.sleep(rng.uniform(0, 1.5))
            service.send_signal(signal.SIGTERM)
            assert service.wait(PATIENCE_S) == 0
            for client in requests:
                client.result()
    assert len(whole) >= times(1, 100)  # at least the one that was being generated
    assert all(np.array_equal(image, whole[0]) for image in whole)


def test_the_generator_survives_a_killed_encoder(times: Times) -> None:
    """While the encoder is killed requests get 503 at once; images follow within 10 s of its return, each time."""
    port = free_port()
    prompts = map(str, range(10**9))
    with both(port) as (generator, url), httpx.Client(base_url=url, timeout=PATIENCE_S) as http:

        def request_image(prompt: str) -> int:
            return http.post("/generate", json=TINY | {"prompt": prompt}).status_code

        for _ in range(times(1, 20)):
            with process("text_encoder_service", port):
                back = time.monotonic()
                wait_for(lambda: request_image(next(prompts)) == 200)
                assert time.monotonic() - back < 10
                assert request_image("cached") == 200
            refused = [request_image(next(prompts)) for _ in range(5)]
            took = []
            for _ in range(20):
                began = time.perf_counter()
                refused.append(request_image(next(prompts)))
                took.append(time.perf_counter() - began)
            assert set(refused) == {503}
            assert statistics.median(took) < 0.5  # less than the waits between attempts: no request is sent
            assert request_image("cached") == 200  # its embedding was cached
        assert generator.poll() is None


def test_no_memory_or_file_is_leaked(times: Times) -> None:
    """The resident size and the open files do not grow with the number of images."""
    count = times(120, 10_000)
    with (
        process("generator_service", free_port()) as (service, url),
        httpx.Client(base_url=url, timeout=PATIENCE_S) as http,
    ):
        watched = psutil.Process(service.pid)
        sizes, files = [], []
        for k in range(count):
            response = http.post("/generate", json=TINY | {"prompt_embeds": EMBEDS, "seed": k})
            assert response.status_code == 200
            if k >= count // 3 and k % (count // 30) == 0:  # the caches are full
                sizes.append(watched.memory_info().rss / 2**20)
                files.append(watched.num_fds())
    slope = statistics.linear_regression(range(len(sizes)), sizes).slope / (count // 30) * 1000
    print(f"resident size: {sizes[0]:.0f} to {sizes[-1]:.0f} MiB, {slope:+.2f} MiB per 1000 images")
    assert len(set(files)) <= 2  # the client's connection may be open or not
    assert sizes[-1] - sizes[0] < times(30, 10)
    if count >= 10_000:
        assert slope < 1


def test_no_request_is_an_internal_error(times: Times) -> None:
    """No request that schemathesis derives from the OpenAPI schema is a 5xx, and responses match the schema."""
    port = free_port()
    small = {"GENERATOR_MAX_PIXELS": str(64 * 64), "GENERATOR_MAX_WAITING": "64"}
    checks = "not_a_server_error,content_type_conformance,response_headers_conformance,response_schema_conformance"
    with process("text_encoder_service", port) as (_, encoder):
        expected = {"TEXT_ENCODER_URL": encoder} | small
        with process("generator_service", free_port(), **expected) as (_, generator):
            for url in (encoder, generator):
                tool = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{url}/openapi.json"]
                options = ["--checks", checks, "--max-examples", str(times(5, 400)), "--phases", "examples,fuzzing"]
                options += ["--seed", "1", "--suppress-health-check", "all", "--generation-database", "none"]
                result = subprocess.run([*tool, *options], capture_output=True, text=True, check=False)
                print(result.stdout[-2000:])
                assert result.returncode == 0, result.stdout[-5000:]
