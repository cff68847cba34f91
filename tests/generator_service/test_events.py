"""The stream of server-sent events, event by event."""

import asyncio

import httpx
import pytest
import torch

from flux2_shared.wire import dump_torch
from tests.conftest import Serve
from tests.control import Clock, exchange
from tests.generator_service.test_generate import SMALL, STREAM, all_events

pytestmark = pytest.mark.anyio

PING_S = 15.0
"""The documented interval of keep-alive comments, since proxies close idle connections."""


async def test_a_silent_stream_is_kept_alive(serve_generator: Serve, clock: Clock) -> None:
    """While nothing else is sent, a comment every 15 s keeps proxies from closing the connection."""
    may_answer = asyncio.Event()

    async def encoder(_request: httpx.Request) -> httpx.Response:
        await may_answer.wait()
        return httpx.Response(200, content=dump_torch(torch.zeros(1, 32, 384)))

    async with (
        serve_generator(httpx.MockTransport(encoder), text_encoder_timeout_s=1000.0) as http,
        exchange(http, "/generate", SMALL, STREAM) as client,
    ):
        await client.read_until(b"event: encoding")
        for _ in range(3):
            await asyncio.sleep(0.05)  # its timer is restarted
            clock.advance(PING_S + 0.5)
            assert b"\n:" in b"\n" + await client.read_until(b": ping", within_s=PING_S / 2)
        may_answer.set()
        assert b"event: step" in await client.read_until(b"event: completed")


async def test_events_name_their_image(serve_generator: Serve) -> None:
    """With several images each step, preview and result has the image's index, and each image has its own seed."""
    body = SMALL | {"num_images": 3, "previews": 1, "num_inference_steps": 6}
    async with serve_generator() as http:
        stream_events = all_events((await http.post("/generate", json=body, headers=STREAM)).text)
    for index in range(3):
        own = [(name, data) for name, data in stream_events if data.get("index") == index]
        assert [name for name, _ in own if name != "preview"] == ["step"] * 6 + ["completed"]
        assert [data["step"] for name, data in own if name == "step"] == list(range(6))
        assert [data["number"] for name, data in own if name == "preview"] == [0]
        assert own[-1][1]["x-seed"] == str(SMALL["seed"] + index)


async def test_the_image_comes_after_its_steps(serve_generator: Serve) -> None:
    """The events are queued, encoding, steps from 0, completed; nothing follows."""
    async with serve_generator() as http:
        stream_events = all_events((await http.post("/generate", json=SMALL, headers=STREAM)).text)
    assert [name for name, _ in stream_events] == ["queued", "encoding", "step", "step", "step", "step", "completed"]
    assert [data["step"] for name, data in stream_events if name == "step"] == [0, 1, 2, 3]
