"""The services as processes: ended, killed, left alone for long, and asked for whatever a machine can think of."""

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
    """A generator, and its address, whose encoder is expected at ``encoder_port``."""
    expected = f"http://127.0.0.1:{encoder_port}"
    with process("generator_service", free_port(), TEXT_ENCODER_URL=expected) as generator:
        yield generator


def pixels(data: bytes) -> np.ndarray:
    """The whole picture in a file; a truncated one is an error."""
    return np.asarray(Image.open(io.BytesIO(data)))


def test_no_end_truncates_a_picture(times: Times) -> None:
    """SIGTERM at a random moment: each request gets its whole picture or none at all, and the status is 0."""
    rng = random.Random(0)
    body = {"prompt_embeds": EMBEDS, "num_inference_steps": 20, "cache": "none", "seed": 7}
    whole: list[np.ndarray] = []

    def ask(url: str) -> None:
        try:
            answer = httpx.post(f"{url}/generate", json=body, timeout=PATIENCE_S)
        except httpx.ConnectError:
            return  # it listened no more
        assert answer.status_code == 200, answer.text
        whole.append(pixels(answer.content))

    for _ in range(times(1, 100)):
        with process("generator_service", free_port()) as (service, url), ThreadPoolExecutor(3) as clients:
            asked = [clients.submit(ask, url) for _ in range(3)]
            wait_for(lambda url=url: "\nflux2_queue_depth 0.0\n" not in httpx.get(f"{url}/metrics").text)
            time.sleep(rng.uniform(0, 1.5))
            service.send_signal(signal.SIGTERM)
            assert service.wait(PATIENCE_S) == 0
            for client in asked:
                client.result()
    assert len(whole) >= times(1, 100)  # at least the one that was being generated
    assert all(np.array_equal(picture, whole[0]) for picture in whole)


def test_the_generator_survives_its_encoder(times: Times) -> None:
    """The encoder is killed, again and again: 503 while it is away, at once; pictures within 10 s of its return."""
    port = free_port()
    prompts = map(str, range(10**9))
    with both(port) as (generator, url), httpx.Client(base_url=url, timeout=PATIENCE_S) as http:

        def ask(prompt: str) -> int:
            return http.post("/generate", json=TINY | {"prompt": prompt}).status_code

        for _ in range(times(1, 20)):
            with process("text_encoder_service", port):
                back = time.monotonic()
                wait_for(lambda: ask(next(prompts)) == 200)
                assert time.monotonic() - back < 10
                assert ask("known") == 200
            refused = [ask(next(prompts)) for _ in range(5)]
            took = []
            for _ in range(20):
                began = time.perf_counter()
                refused.append(ask(next(prompts)))
                took.append(time.perf_counter() - began)
            assert set(refused) == {503}
            assert statistics.median(took) < 0.5  # less than the waits between attempts: it is not asked
            assert ask("known") == 200  # its embedding was kept
        assert generator.poll() is None


def test_nothing_is_leaked(times: Times) -> None:
    """Pictures leave no memory and no file behind: the resident size does not rise with their number."""
    count = times(120, 10_000)
    with (
        process("generator_service", free_port()) as (service, url),
        httpx.Client(base_url=url, timeout=PATIENCE_S) as http,
    ):
        watched = psutil.Process(service.pid)
        sizes, files = [], []
        for k in range(count):
            answer = http.post("/generate", json=TINY | {"prompt_embeds": EMBEDS, "seed": k})
            assert answer.status_code == 200
            if k >= count // 3 and k % (count // 30) == 0:  # after the caches are full
                sizes.append(watched.memory_info().rss / 2**20)
                files.append(watched.num_fds())
    slope = statistics.linear_regression(range(len(sizes)), sizes).slope / (count // 30) * 1000
    print(f"resident size: {sizes[0]:.0f} to {sizes[-1]:.0f} MiB, {slope:+.2f} MiB per 1000 pictures")
    assert len(set(files)) <= 2  # our one connection may be open or not
    assert sizes[-1] - sizes[0] < times(30, 10)
    if count >= 10_000:
        assert slope < 1


def test_no_request_is_an_internal_error(times: Times) -> None:
    """Whatever schemathesis makes of the API's own description: no 5xx, and the answers are as they are described."""
    port = free_port()
    small = {"GENERATOR_MAX_PIXELS": str(64 * 64), "GENERATOR_MAX_WAITING": "64"}
    checks = "not_a_server_error,content_type_conformance,response_headers_conformance,response_schema_conformance"
    with process("text_encoder_service", port) as (_, encoder):
        expected = {"TEXT_ENCODER_URL": encoder} | small
        with process("generator_service", free_port(), **expected) as (_, generator):
            for url in (encoder, generator):
                tool = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{url}/openapi.json"]
                options = ["--checks", checks, "--max-examples", str(times(5, 200)), "--phases", "examples,fuzzing"]
                options += ["--seed", "1", "--suppress-health-check", "all", "--generation-database", "none"]
                told = subprocess.run([*tool, *options], capture_output=True, text=True, check=False)
                print(told.stdout[-2000:])
                assert told.returncode == 0, told.stdout[-5000:]
