"""The stream of events as it arrives, message by message."""

import asyncio

import httpx
import pytest
import torch

from shared.wire import dump_torch
from tests.conftest import Serve
from tests.control import Clock, exchange
from tests.generator_service.test_generate import SMALL

pytestmark = pytest.mark.anyio

PING_S = 15.0
"""The longest silence, as documented: proxies close connections that are silent for longer."""


async def test_a_silent_stream_is_kept_alive(serve_generator: Serve, clock: Clock) -> None:
    """While nothing happens a comment is sent every 15 s, so that no proxy closes the connection."""
    may_answer = asyncio.Event()

    async def encoder(_request: httpx.Request) -> httpx.Response:
        await may_answer.wait()
        return httpx.Response(200, content=dump_torch(torch.zeros(1, 32, 384)))

    async with (
        serve_generator(httpx.MockTransport(encoder), text_encoder_timeout_s=1000.0) as http,
        exchange(http, "/generate", SMALL, "text/event-stream") as client,
    ):
        await client.read_until(b"event: encoding")
        for _ in range(3):
            await asyncio.sleep(0.05)  # its timer is started again
            clock.advance(PING_S + 0.5)
            assert b"\n:" in b"\n" + await client.read_until(b": ping", within_s=PING_S / 2)
        may_answer.set()
        assert b"event: step" in await client.read_until(b"event: completed")
