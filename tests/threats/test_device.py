"""Failures of the device, and clients that disconnect."""

import asyncio
import io
import json
import random
from collections.abc import Callable
from itertools import cycle
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLFlux2
from PIL import Image

from generator_service.pipelines.flux2 import Flux2Model
from tests.conftest import Serve, Times
from tests.control import ModelControl, until, until_queued
from tests.generator_service.test_generate import events, metrics, steps_run
from tests.memory_errors import KINDS

pytestmark = pytest.mark.anyio

SMALL: dict[str, Any] = {"prompt": "a red circle", "width": 64, "height": 64, "num_inference_steps": 10, "seed": 7}
LONG = SMALL | {"width": 128, "height": 128, "num_inference_steps": 100, "cache": "none"}


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


real = Flux2Model.generate


def without_memory_at_step_7(error: Callable[[], Exception]) -> Callable[..., Any]:
    """``Flux2Model.generate`` on a device with too little memory."""

    def generate(model: Flux2Model, request: Any, on_step: Any, previews: Any) -> Any:
        def fail(step: int, is_computed: bool) -> None:
            on_step(step, is_computed)
            if step == 7:
                raise error()

        return real(model, request, fail, previews)

    return generate


async def test_out_of_memory_affects_only_its_own_request(
    serve_generator: Serve, monkeypatch: pytest.MonkeyPatch, times: Times
) -> None:
    """Out of memory at step 7, of any type, is 503 ``oom``, and the next image is right, each time."""
    async with serve_generator() as http:
        expected = pixels((await http.post("/generate", json=SMALL)).content)
        for seed, error in zip(range(times(len(KINDS), 100)), cycle(KINDS.values()), strict=False):
            with monkeypatch.context() as broken:
                broken.setattr(Flux2Model, "generate", without_memory_at_step_7(error))
                refused = await http.post("/generate", json=SMALL | {"seed": seed, "width": 96})
            assert (refused.status_code, refused.json()["code"]) == (503, "oom")
            assert refused.headers["x-should-retry"] == "false"
            assert "0x7f" not in refused.text
            assert np.array_equal(pixels((await http.post("/generate", json=SMALL)).content), expected)


async def test_latents_that_are_not_finite_are_not_decoded(serve_generator: Serve, model_control: ModelControl) -> None:
    """Latents that are not finite, even with every step computed, are refused before they are decoded."""
    decodes: list[int] = []
    async with serve_generator() as http:
        model_control.on_decode = lambda: decodes.append(1)
        model_control.change = lambda velocity: torch.full_like(velocity, float("nan"))
        refused = await http.post("/generate", json=SMALL)
    assert (refused.status_code, refused.json()["code"]) == (500, "nonfinite_output")
    assert decodes == []


async def test_an_image_that_is_not_finite_is_refused(serve_generator: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoded image must be finite, too: NaN would become a black image."""
    decode = AutoencoderKLFlux2.decode

    def not_a_number(vae: Any, *args: Any, **kwargs: Any) -> Any:
        return (torch.full_like(decode(vae, *args, **kwargs)[0], float("nan")),)

    async with serve_generator() as http:
        monkeypatch.setattr(AutoencoderKLFlux2, "decode", not_a_number)
        refused = await http.post("/generate", json=SMALL)
    assert (refused.status_code, refused.json()["code"]) == (500, "nonfinite_output")


async def test_images_of_an_intact_model_are_finite(
    serve_generator: Serve, times: Times, caplog: pytest.LogCaptureFixture
) -> None:
    """No image of an intact model is classified as not finite."""
    async with serve_generator() as http:
        for seed in range(times(20, 1000)):
            body = SMALL | {"num_inference_steps": 2, "seed": seed, "cache": 1 + seed % 2}
            response = await http.post("/generate", json=body)
            assert (response.status_code, response.headers["x-steps-computed"]) == (200, str(1 + seed % 2))
    assert "finite" not in caplog.text


async def test_requests_past_their_deadline_do_not_start(serve_generator: Serve, model_control: ModelControl) -> None:
    """Of 20 requests with a short deadline behind a long one none starts, and each gets 504."""
    async with serve_generator(max_waiting=20) as http:
        await http.post("/generate", json=SMALL)
        with model_control.holding():
            long = asyncio.create_task(http.post("/generate", json=SMALL))
            await model_control.is_held()
            late = await asyncio.gather(*(http.post("/generate", json=SMALL | {"deadline_ms": 100}) for _ in range(20)))
            assert not long.done()
        assert (await long).status_code == 200
        generated = (await metrics(http))['flux2_stage_seconds_count{stage="denoise"}']
    assert [(response.status_code, response.json()["code"]) for response in late] == [(504, "deadline_exceeded")] * 20
    assert generated == 2


async def test_a_flood_is_refused(serve_generator: Serve, model_control: ModelControl) -> None:
    """Of 200 requests at once 9 are generated, one after the other; 191 are refused before the first of them ends."""
    async with serve_generator(max_waiting=8) as http:
        with model_control.holding():
            calls = [asyncio.create_task(http.post("/generate", json=SMALL | {"seed": seed})) for seed in range(200)]
            await until(lambda: sum(call.done() for call in calls) == 191)
        responses = await asyncio.gather(*calls)
    assert sorted(response.status_code for response in responses) == [200] * 9 + [429] * 191
    assert all(int(response.headers["retry-after"]) >= 1 for response in responses if response.status_code == 429)


async def test_disconnects_free_their_slots(generator_url: str, times: Times) -> None:
    """Clients that disconnect at random moments leave no slot occupied, and the next image is right."""
    address, rng = urlsplit(generator_url), random.Random(0)
    assert address.hostname is not None
    async with httpx.AsyncClient(base_url=generator_url, timeout=60) as http:
        expected = pixels((await http.post("/generate", json=SMALL)).content)

        async def disconnect(seed: int) -> None:
            body = json.dumps(LONG | {"seed": seed, "prompt": f"prompt {seed % 50}"}).encode()
            accept = rng.choice(["*/*", "text/event-stream"])
            head = f"POST /generate HTTP/1.1\r\nhost: x\r\naccept: {accept}\r\ncontent-type: application/json\r\n"
            reader, writer = await asyncio.open_connection(address.hostname, address.port)
            writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body[: rng.choice([len(body), 20])])
            await writer.drain()
            await asyncio.sleep(rng.uniform(0, 0.2))
            writer.transport.abort()
            del reader

        for first in range(0, times(20, 500), 4):
            await asyncio.gather(*(disconnect(first + k) for k in range(4)))

        await until_queued(http, 0)
        steps_before = await steps_run(http)
        assert np.array_equal(pixels((await http.post("/generate", json=SMALL)).content), expected)
        assert await steps_run(http) - steps_before <= SMALL["num_inference_steps"] + 2


async def test_a_failed_stream_ends_with_its_error(serve_generator: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failure in all three attempts the stream ends with the error, never with an image."""
    async with serve_generator() as http:
        monkeypatch.setattr(Flux2Model, "generate", without_memory_at_step_7(KINDS["torch"]))
        stream_events = events((await http.post("/generate", json=SMALL, headers={"Accept": "text/event-stream"})).text)
    assert [name for name, _ in stream_events] == ["step"] * 8 * 3 + ["error"]
    assert stream_events[-1][1]["code"] == "oom"


@pytest.mark.parametrize(
    ("route", "body", "headers"),
    [
        ("/generate", LONG, [(b"accept", b"text/event-stream")]),
        ("/v1/images/generations", {"prompt": "a", "stream": True, "num_inference_steps": 100, "cache": "none"}, []),
    ],
)
async def test_a_disconnect_before_the_first_byte_frees_the_slot(
    serve_generator: Serve, route: str, body: dict[str, Any], headers: list[tuple[bytes, bytes]]
) -> None:
    """A stream whose first byte cannot be sent frees its slot at once, and its generation stops."""
    messages = [{"type": "http.request", "body": json.dumps(body).encode()}]
    scope = {
        "type": "http",
        "method": "POST",
        "path": route,
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), *headers],
    }

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await asyncio.Event().wait()
        raise AssertionError

    async def send(_message: Any) -> None:
        raise OSError("the client has left")

    async with serve_generator(max_waiting=1) as http:
        app: Any = http._transport.app  # type: ignore[attr-defined]
        before = await steps_run(http)
        with pytest.raises(OSError, match="has left"):
            await app(scope, receive, send)

        await until_queued(http, 0)
        assert await steps_run(http) - before < 50  # of 100
        assert (await http.post("/generate", json=SMALL)).status_code == 200
