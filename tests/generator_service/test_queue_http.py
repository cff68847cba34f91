"""Admission and the order of service over HTTP."""

import asyncio
import base64
import io
import json
import threading
import time
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from flux2_shared.wire import TORCH_MEDIA_TYPE, dump_torch
from generator_service.api.resolve import Resolver
from generator_service.pipelines.flux2 import Flux2Model
from tests.conftest import Serve
from tests.generator_service.test_generate import (
    EMBEDDING_SHAPE,
    LONG,
    SMALL,
    STREAM,
    all_events,
    events,
    metrics,
    pixels,
    steps_run,
)

pytestmark = pytest.mark.anyio


class Device:
    """A model that waits for the test, and records the seeds in the order of service."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.may_run = threading.Event()
        self.seeds: list[int] = []
        real = Flux2Model.generate

        def generate(model: Flux2Model, request: Any, *more: Any) -> Any:
            self.seeds.append(request.seed)
            assert self.may_run.wait(60)
            return real(model, request, *more)

        patch.setattr(Flux2Model, "generate", generate)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


class Encoder(httpx.AsyncBaseTransport):
    """A text encoder that embeds the prompt "slow" only when the test allows it."""

    def __init__(self) -> None:
        self.may_embed = asyncio.Event()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/info":
            return httpx.Response(404)
        if b"slow" in await request.aread():
            await self.may_embed.wait()
        headers = {"content-type": TORCH_MEDIA_TYPE}
        return httpx.Response(200, content=dump_torch(torch.zeros(EMBEDDING_SHAPE)), headers=headers)


def small(seed: int, **more: Any) -> dict[str, Any]:
    """The body of an image that runs alone."""
    return SMALL | {"seed": seed} | more


def queue_of(http: httpx.AsyncClient) -> Any:
    app: Any = http._transport.app  # type: ignore[attr-defined]
    return app.state.generator.engine.queue


async def begin(http: httpx.AsyncClient, body: dict[str, Any]) -> "asyncio.Task[httpx.Response]":
    """Start a stream, and wait until it is admitted."""
    queue = queue_of(http)
    before = queue.num_in_flight
    task = asyncio.create_task(http.post("/generate", json=body, headers=STREAM))
    async with asyncio.timeout(60):
        while queue.num_in_flight == before:  # noqa: ASYNC110 - admission has no event
            await asyncio.sleep(0.001)
    return task


async def until_positions(http: httpx.AsyncClient, expected: list[int]) -> None:
    """Wait until the generations in the queue, in the order of admission, have these positions."""
    queue = queue_of(http)
    async with asyncio.timeout(60):
        while [queue.position(each).position for each in queue.generations] != expected:  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def test_positions_are_the_order_of_service(serve_generator: Serve, device: Device, encoder_url: str) -> None:
    """A slow prompt is overtaken, and every stream reports the order in which the device serves."""
    encoder = Encoder()
    async with serve_generator(encoder) as http:
        tasks = [await begin(http, small(1))]
        await until_positions(http, [0])
        tasks.append(await begin(http, small(2, prompt="slow")))
        tasks.append(await begin(http, small(3)))
        await until_positions(http, [0, 2, 1])
        tasks.append(await begin(http, small(4)))
        await until_positions(http, [0, 3, 1, 2])
        encoder.may_embed.set()
        await until_positions(http, [0, 1, 2, 3])
        device.may_run.set()
        streams = await asyncio.gather(*tasks)
    assert device.seeds == [1, 2, 3, 4]
    all_positions = [
        [data["position"] for name, data in all_events(stream.text) if name == "queued"] for stream in streams
    ]
    assert all_positions[0] == [0]
    assert all_positions[2][-3:] == [2, 1, 0]
    assert all(positions[-1] == 0 for positions in all_positions)


@pytest.mark.parametrize("route", ["/generate", "/jobs", "/v1/images/generations"])
async def test_a_full_queue_refuses_before_the_request_is_resolved(
    serve_generator: Serve, device: Device, monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    """A stream or a job gets 429 before its request is resolved, since the permit is acquired first."""
    resolved: list[bool] = []
    real = Resolver.resolve

    def slow_resolve(resolver: Resolver, *args: Any) -> Any:
        resolved.append(True)
        time.sleep(0.01)
        return real(resolver, *args)

    monkeypatch.setattr(Resolver, "resolve", slow_resolve)
    async with serve_generator(max_waiting=1) as http:
        running = [await begin(http, small(seed)) for seed in (1, 2)]
        resolved.clear()
        body = {"prompt": "a", "stream": True} if route.startswith("/v1") else SMALL
        responses = await asyncio.gather(*(http.post(route, json=body, headers=STREAM) for _ in range(5)))
        assert [response.status_code for response in responses] == [429] * 5
        assert all(int(response.headers["retry-after"]) >= 1 for response in responses)
        assert resolved == []
        device.may_run.set()
        await asyncio.gather(*running)
        assert (await metrics(http))["flux2_queue_depth"] == 0


async def test_a_full_queue_refuses_before_files_are_read(serve_generator: Serve, device: Device) -> None:
    """An edit is refused with 429 before any byte of its files is read."""
    async with serve_generator(max_waiting=1) as http:
        running = [await begin(http, small(seed)) for seed in (1, 2)]
        app: Any = http._transport.app  # type: ignore[attr-defined]
        was_read: list[bool] = []
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            was_read.append(True)
            return {"type": "http.request", "body": b"x" * 1000, "more_body": True}

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"content-type", b"multipart/form-data; boundary=x")]
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/images/edits",
            "query_string": b"",
            "headers": headers,
        }
        await app(scope, receive, send)
        device.may_run.set()
        await asyncio.gather(*running)
    assert sent[0]["status"] == 429
    assert was_read == []


async def test_a_full_queue_refuses_before_references_are_decoded(
    serve_generator: Serve, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An edit in JSON is refused before its images are decoded."""
    decoded: list[bool] = []
    real = Image.open

    def counted(*args: Any, **options: Any) -> Image.Image:
        decoded.append(True)
        return real(*args, **options)

    monkeypatch.setattr(Image, "open", counted)
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "PNG")
    body = small(1, images=[base64.b64encode(buffer.getvalue()).decode()])
    async with serve_generator(max_waiting=1) as http:
        running = [await begin(http, small(seed)) for seed in (1, 2)]
        assert (await http.post("/generate", json=body)).status_code == 429
        assert decoded == []
        device.may_run.set()
        await asyncio.gather(*running)
        assert (await http.post("/generate", json=body)).status_code == 200
        assert decoded


async def test_equal_requests_for_the_last_slot_are_one_job(serve_generator: Serve, device: Device) -> None:
    """Two simultaneous requests with one ``Idempotency-Key``, for the last slot, both get the same job."""
    async with serve_generator(max_waiting=1) as http:
        running = await begin(http, small(1))
        headers = {"Idempotency-Key": "k"}
        responses = await asyncio.gather(*(http.post("/jobs", json=small(2), headers=headers) for _ in range(4)))
        assert [response.status_code for response in responses] == [202] * 4
        assert len({response.json()["id"] for response in responses}) == 1
        device.may_run.set()
        await running


async def test_a_deadline_passes_while_the_prompt_is_embedded(serve_generator: Serve) -> None:
    """A request whose prompt takes too long to embed gets 504 at its deadline, and its slot is freed."""
    encoder = Encoder()
    async with serve_generator(encoder) as http:
        late = await http.post("/generate", json=small(1, prompt="slow", deadline_ms=100))
        assert (late.status_code, late.json()["code"]) == (504, "deadline_exceeded")
        assert (await metrics(http))["flux2_queue_depth"] == 0
        assert await steps_run(http) == 0


@pytest.mark.parametrize("compare", [False, True])
async def test_images_of_one_request_share_a_run(
    serve_generator: Serve, monkeypatch: pytest.MonkeyPatch, *, compare: bool
) -> None:
    """With batching four images share a run, and so do pairs with ``compare``; each equals the one generated alone."""
    batches: list[list[int]] = []
    real = Flux2Model.generate_batch

    def generate_batch(model: Flux2Model, requests: Any, on_step: Any) -> Any:
        batches.append([request.seed for request in requests])
        return real(model, requests, on_step)

    monkeypatch.setattr(Flux2Model, "generate_batch", generate_batch)
    body = small(5, num_images=4, cache=2, compare=compare)
    async with serve_generator(max_batch=4) as http:
        together = (await http.post("/generate", json=body, headers={"Accept": "application/json"})).json()["images"]
        alone = [await http.post("/generate", json=small(5 + k, cache=2)) for k in range(4)]
    assert batches == [[5, 6, 7, 8]] * (2 if compare else 1)
    for image, single in zip(together, alone, strict=True):
        ours = pixels(base64.b64decode(image["image"])).astype(int)
        assert np.abs(ours - pixels(single.content)).max() <= 1
        assert image["x-seed"] == single.headers["x-seed"]


async def test_every_request_gets_a_response_at_shutdown(serve_generator: Serve, device: Device) -> None:
    """At shutdown running and waiting requests end with 503 ``shutting_down``, and streams with that event."""
    async with serve_generator() as http:
        streams = [await begin(http, small(seed)) for seed in (1, 2)]
        await until_positions(http, [0, 1])  # both were resolved: their responses are streams by now
        plain = asyncio.create_task(http.post("/generate", json=small(3)))
        await asyncio.sleep(0)
        while queue_of(http).num_in_flight < 3:  # noqa: ASYNC110 - admission has no event
            await asyncio.sleep(0.001)
        app: Any = http._transport.app  # type: ignore[attr-defined]
        app.state.generator.engine.close()
        device.may_run.set()
        for stream in await asyncio.gather(*streams):
            name, data = events(stream.text)[-1]
            assert (name, data["code"]) == ("error", "shutting_down")
        answer = await plain
        assert (answer.status_code, answer.json()["code"]) == (503, "shutting_down")
        assert answer.headers["content-type"] == "application/problem+json"
        assert (await http.post("/generate", json=LONG)).status_code == 503
    assert json.loads(answer.content)["request_id"]
