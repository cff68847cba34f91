"""A name server that never answers: name resolution occupies every thread of the event loop's default executor."""

import asyncio
import base64
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch
from safetensors.torch import save

from flux2_shared.thread_pool import ThreadPool
from tests.conftest import Serve
from tests.control import PATIENCE_S
from tests.generator_service.test_generate import SMALL

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def occupied_executor() -> AsyncIterator[None]:
    """Within the block the default executor has no free thread."""
    loop, done = asyncio.get_running_loop(), threading.Event()
    loop.set_default_executor(ThreadPoolExecutor(2))
    lookups = [loop.run_in_executor(None, done.wait, PATIENCE_S) for _ in range(10)]
    try:
        async with asyncio.timeout(PATIENCE_S / 2):
            yield
    finally:
        done.set()
        await asyncio.gather(*lookups)


async def test_the_generator_needs_no_default_executor(serve_generator: Serve) -> None:
    """An embedding that is given, a cached one, reference images, a large body, files and jobs are served."""
    embeds = base64.b64encode(save({"prompt_embeds": torch.zeros(1, 32, 384)})).decode()
    given: dict[str, Any] = {name: value for name, value in SMALL.items() if name != "prompt"}
    async with serve_generator() as http:
        assert (await http.post("/generate", json=SMALL)).status_code == 200
        async with occupied_executor():
            image = (await http.post("/generate", json=SMALL | {"compare": True, "cache": 2})).content
            bodies = [given | {"prompt_embeds": embeds}, SMALL | {"images": [base64.b64encode(image).decode()]}]
            for body in bodies:
                assert (await http.post("/generate", json=body)).status_code == 200
            assert (await http.post("/jobs", json=SMALL)).status_code == 202
            edit = await http.post(
                "/v1/images/edits", data={"prompt": SMALL["prompt"]}, files={"image": ("a.png", image, "image/png")}
            )
            assert edit.status_code == 200, edit.text


@pytest.mark.parametrize("accept", ["application/octet-stream", "application/vnd.safetensors"])
async def test_the_encoder_needs_no_default_executor(serve_encoder: Serve, accept: str) -> None:
    """New and cached prompts are encoded and serialized."""
    async with serve_encoder() as http, occupied_executor():
        for _ in range(2):
            response = await http.post("/predict", json={"prompt": ["a", "b"]}, headers={"Accept": accept})
            assert response.status_code == 200


async def test_a_pool_ends_without_the_default_executor() -> None:
    """Leaving a pool waits for its work, not for a thread of the default executor."""
    finished: list[int] = []
    async with occupied_executor(), ThreadPool("test") as threads:
        work = asyncio.ensure_future(threads.run(finished.append, 1))
        await asyncio.sleep(0)
    assert finished == [1]
    await work
