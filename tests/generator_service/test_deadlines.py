"""``deadline_ms``: how long a request may take until its images are finished."""

import asyncio
import json
import threading

import httpx
import pytest
import torch

from flux2_shared.wire import dump_torch
from generator_service.api.resolve import Resolver
from generator_service.api.schemas import GenerateRequest
from generator_service.engine.request import Request
from tests.conftest import Serve
from tests.control import Clock, ModelControl
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


async def test_a_running_generation_is_stopped(
    serve_generator: Serve, clock: Clock, model_control: ModelControl
) -> None:
    """On an idle device, too, a generation ends with 504 at its deadline; the next one runs no later than a step after.

    The deadline is that of all images of a request together.
    """
    num_steps, may_continue = 0, threading.Event()

    def on_step() -> None:
        nonlocal num_steps
        num_steps += 1
        if num_steps == 6:  # in the second image
            clock.advance(DEADLINE_S + 1)
            assert may_continue.wait(60)

    async with serve_generator() as http:
        model_control.on_step = on_step
        job = (await http.post("/jobs", json=HURRIED | {"num_images": 3, "num_inference_steps": 4})).headers["location"]
        while (status := (await http.get(job)).json())["status"] != "failed":  # noqa: ASYNC110 - no event for that
            await asyncio.sleep(0.01)  # so that the event loop looks at its timers after the clock was moved
        may_continue.set()
        assert (status["problem"]["status"], status["problem"]["code"]) == (504, "deadline_exceeded")
        assert events((await http.get(f"{job}/events")).text)[-1][0] == "error"
        assert (await http.post("/generate", json=SMALL | {"num_inference_steps": 1})).status_code == 200
    assert num_steps == 6 + 1  # no step but that of the last request


async def test_the_deadline_counts_from_the_admission(
    serve_generator: Serve, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time for decoding reference images counts, too."""
    resolve = Resolver.resolve

    def slow(resolver: Resolver, body: GenerateRequest, is_followed: bool) -> Request:
        clock.advance(DEADLINE_S + 1)
        return resolve(resolver, body, is_followed)

    async with serve_generator() as http:
        monkeypatch.setattr(Resolver, "resolve", slow)
        late = await http.post("/generate", json=HURRIED)
    assert (late.status_code, late.json()["code"]) == (504, "deadline_exceeded")


async def test_upsampling_counts_towards_the_deadline(serve_generator: Serve, clock: Clock) -> None:
    """A request whose prompt takes too long to rewrite gets 504 at its deadline, not when the chat model answers."""

    async def peer(request: httpx.Request) -> httpx.Response:
        if not request.url.path.endswith("/chat/completions"):
            return httpx.Response(404)
        clock.advance(DEADLINE_S + 1)
        await asyncio.Event().wait()
        raise AssertionError

    upsampler = {"upsampler_url": "http://peer/v1", "upsampler_timeout_s": 1000.0}
    async with serve_generator(httpx.MockTransport(peer), **upsampler) as http:
        late = await http.post("/generate", json=HURRIED | {"upsample_prompt": True})
    assert (late.status_code, late.json()["code"]) == (504, "deadline_exceeded")
