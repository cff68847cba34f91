"""Control over what a test would otherwise wait for: the clock, the model, and a client's connection."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from types import MappingProxyType
from typing import Any

import httpx
import pytest
import torch
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from fastapi import FastAPI

PATIENCE_S = 60.0
"""How long a test waits for an expected event before it fails, in seconds."""
NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class Clock:
    """The monotonic clocks of this process, which can be moved forward, together with timers of event loops.

    They are never moved back: a service of another test, whose loop has set its timers meanwhile, would wait for them.
    """

    def __init__(self) -> None:
        self._ahead_s = 0.0
        time.monotonic = self._ahead_of(time.monotonic)
        time.perf_counter = self._ahead_of(time.perf_counter)

    def _ahead_of(self, real: Callable[[], float]) -> Callable[[], float]:
        return lambda: real() + self._ahead_s

    def advance(self, seconds: float) -> None:
        """Let ``seconds`` pass at once. Any thread may call this."""
        self._ahead_s += seconds


class ModelControl:
    """Hooks into the loaded model, which run on the device thread.

    Every forward pass of the transformer calls ``on_step`` first and returns ``change(velocity)``; the decoder calls
    ``on_decode`` first. ``holding`` makes the transformer wait.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.on_step: Callable[[], None] = lambda: None
        self.change: Callable[[torch.Tensor], torch.Tensor] = lambda velocity: velocity
        self.on_decode: Callable[[], None] = lambda: None
        self._may_run = threading.Event()
        self._may_run.set()
        self._is_reached = threading.Event()
        forward, decode = Flux2Transformer2DModel.forward, AutoencoderKLFlux2.decode

        def controlled_forward(model: Any, *args: Any, **kwargs: Any) -> Any:
            self._is_reached.set()
            assert self._may_run.wait(PATIENCE_S)
            self.on_step()
            output, *rest = forward(model, *args, **kwargs)
            return (self.change(output), *rest)

        def controlled_decode(vae: Any, *args: Any, **kwargs: Any) -> Any:
            self.on_decode()
            return decode(vae, *args, **kwargs)

        patch.setattr(Flux2Transformer2DModel, "forward", controlled_forward)
        patch.setattr(AutoencoderKLFlux2, "decode", controlled_decode)

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Within the block the next forward pass of the transformer waits for the block's end."""
        self._is_reached.clear()
        self._may_run.clear()
        try:
            yield
        finally:
            self._may_run.set()

    async def is_held(self) -> None:
        """Return once the transformer waits."""
        assert await asyncio.to_thread(self._is_reached.wait, PATIENCE_S)


class Exchange:
    """A request whose response is read as it arrives, and whose client may disconnect."""

    def __init__(self, body: bytes | None) -> None:
        self._request = [] if body is None else [{"type": "http.request", "body": body, "more_body": False}]
        self._is_disconnected = asyncio.Event()
        self._messages: asyncio.Queue[Mapping[str, Any]] = asyncio.Queue()

    async def receive(self) -> dict[str, Any]:
        """The ASGI callable: the body, then a disconnect once the client has disconnected."""
        if self._request:
            return self._request.pop()
        await self._is_disconnected.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Mapping[str, Any]) -> None:
        self._messages.put_nowait(message)

    def disconnect(self) -> None:
        """Close the connection."""
        self._is_disconnected.set()

    async def read_until(self, content: bytes, within_s: float = PATIENCE_S) -> bytes:
        """The response's body from the end of the last call to the message that contains ``content``."""
        read = b""
        async with asyncio.timeout(within_s):
            while content not in read:
                read += (await self._messages.get()).get("body", b"")
        return read


@asynccontextmanager
async def exchange(
    http: httpx.AsyncClient, path: str, body: Mapping[str, Any] | None, headers: Mapping[str, str] = NO_HEADERS
) -> AsyncIterator[Exchange]:
    """``POST`` to the app behind ``http``, whose own transport would wait for the whole response.

    Args:
        http: a client of an app in this process.
        path: the route.
        body: is sent as JSON; None sends none, as a client does that is slow.
        headers: beside the content type.
    """
    fields = {"content-type": "application/json", **headers}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(name.lower().encode(), value.encode()) for name, value in fields.items()],
        "server": ("test", 80),
        "client": ("test", 1),
    }
    client = Exchange(None if body is None else json.dumps(body).encode())
    app: FastAPI = http._transport.app  # type: ignore[attr-defined]  # httpx keeps it private
    serving = asyncio.create_task(app(scope, client.receive, client.send))
    try:
        yield client
    finally:
        client.disconnect()
        await serving


async def until(condition: Callable[[], bool]) -> None:
    """Return once ``condition`` holds, for conditions without an event."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.01)


async def until_queued(http: httpx.AsyncClient, depth: int) -> None:
    """Return once the service counts this number of requests, running ones included."""
    async with asyncio.timeout(PATIENCE_S):
        while f"\nflux2_queue_depth {float(depth)}\n" not in (await http.get("/metrics")).text:  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.01)
