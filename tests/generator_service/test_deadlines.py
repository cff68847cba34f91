"""``deadline_ms``: how long a request may take until its generation begins."""

import asyncio
import json

import httpx
import pytest
import torch

from flux2_shared.wire import dump_torch
from tests.conftest import Serve
from tests.control import Clock, ModelControl, until_queued
from tests.generator_service.test_generate import SMALL, events

pytestmark = pytest.mark.anyio

EMBEDDING = dump_torch(torch.zeros(1, 32, 384))
DEADLINE_S = 60.0
HURRIED = SMALL | {"deadline_ms": round(1000 * DEADLINE_S)}


async def test_embedding_counts_towards_the_deadline(
    serve_generator: Serve, clock: Clock, model_control: ModelControl
) -> None:
    """A request whose prompt takes longer to embed than its deadline is refused with 504, and not generated."""

    def encoder(request: httpx.Request) -> httpx.Response:
        if json.loads(request.content)["prompt"] == "slow":
            clock.advance(DEADLINE_S + 1)
        return httpx.Response(200, content=EMBEDDING)

    async with serve_generator(httpx.MockTransport(encoder), text_encoder_timeout_s=1000.0) as http:
        with model_control.holding():
            running = asyncio.create_task(http.post("/generate", json=SMALL))
            await model_control.is_held()
            late = asyncio.create_task(http.post("/generate", json=HURRIED | {"prompt": "slow"}))
            for _ in range(1000):  # not by the clock, which is moved below
                if late.done():
                    break
                await asyncio.sleep(0.01)
        assert (await running).status_code == 200
        response = await late
    assert (response.status_code, response.json()["code"]) == (504, "deadline_exceeded")


async def test_a_running_request_is_finished(serve_generator: Serve, clock: Clock, model_control: ModelControl) -> None:
    """Once the first image of a request is generated, the others are not subject to its deadline.

    Another request is queued between them, so that they have to wait.
    """
    async with serve_generator() as http:
        with model_control.holding():
            job = (await http.post("/jobs", json=HURRIED | {"num_images": 3})).headers["location"]
            await model_control.is_held()
            other = asyncio.create_task(http.post("/generate", json=SMALL))
            await until_queued(http, 2)
            clock.advance(DEADLINE_S + 1)
        job_events = events((await http.get(f"{job}/events")).text)
        assert (await other).status_code == 200
    assert [name for name, _ in job_events if name != "step"] == ["completed"] * 3
