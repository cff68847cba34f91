"""Attacks from the chat model that rewrites prompts."""

import asyncio
import json

from tests.attacks.attack import Figures, attack
from tests.attacks.relay import relaying, respond
from tests.attacks.services import both, client, generate

TIMEOUT_S = 3


async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer with one byte each half second, for ever."""
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n")
    try:
        while True:
            writer.write(b" ")
            await writer.drain()
            await asyncio.sleep(0.5)
    except (OSError, asyncio.CancelledError):
        writer.close()


@attack(36, "upsampler drips")
async def drips(figures: Figures) -> None:
    """An answer that never ends fails at the deadline of the upsampler and gives its place back."""
    server = await asyncio.start_server(drip, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    url = f"http://127.0.0.1:{port}/v1"
    async with both(GENERATOR_UPSAMPLER_URL=url, GENERATOR_UPSAMPLER_TIMEOUT_S=str(TIMEOUT_S)) as target:
        async with client(target, timeout_s=20) as http:
            task = asyncio.create_task(generate(http, "a red circle", upsample_prompt=True))
            done, _ = await asyncio.wait([task], timeout=20)
            status, seconds = task.result() if done and not task.exception() else (0, 20.0)
    server.close()
    figures.one_of("status", status, (502, 503, 504))
    figures.at_most("after", seconds, TIMEOUT_S + 1, " s")


@attack(36, "upsampler nests and mutilates")
async def nests(figures: Figures) -> None:
    """Nested lists and lone surrogates in its answer are 502, and the service goes on."""
    bodies = {
        "nested": b"[" * 200_000,
        "surrogate": rb'{"choices":[{"message":{"content":"a \ud800 circle"}}]}',
        "numbers": b'{"choices":[{"message":{"content":' + b"9" * 200_000 + b"}}]}",
        "good": json.dumps({"choices": [{"message": {"content": "a red circle"}}]}).encode(),
    }
    current = b""

    async def answer(request_head: bytes, body: bytes) -> bytes:
        return respond(current, "application/json")

    async with relaying(answer=answer) as relay, both(GENERATOR_UPSAMPLER_URL=f"{relay.url}/v1") as target:
        async with client(target) as http:
            for name, payload in bodies.items():
                current = payload
                status, _ = await generate(http, f"prompt {name}", upsample_prompt=True)
                figures.one_of(name, status, (200,) if name == "good" else (502,))
