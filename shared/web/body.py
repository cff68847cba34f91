"""ASGI middleware that limits bodies, and lets a client finish writing one that the service has refused."""

import asyncio
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flux2_shared.errors import Busy, PayloadTooLarge, RequestTimeout

CLOSE = (b"connection", b"close")


@dataclass(frozen=True)
class BodyLimits:
    """Limits of the bodies that are received."""

    max_bytes: int
    """Largest size of one body."""
    max_bytes_of_all: int
    """Largest size of the bodies of all requests that are being served."""
    initial_s: float = 20.0
    """Time for a body to arrive; every ``min_rate`` bytes that have arrived extend it by a second."""
    min_rate: int = 16 * 2**10


@dataclass(frozen=True)
class DrainLimits:
    """How much of an unread body is received and discarded, before the connection is closed anyway."""

    total_s: float = 10.0
    idle_s: float = 2.0
    """The longest pause of the client."""
    num_bytes: int = 128 * 2**20


class BodyLimit:
    """Middleware that limits bodies while they are received, and discards the rest of one that is refused.

    If a server closes a connection with unread data, TCP resets it, and clients that write the whole body before they
    read, as most do, see a broken pipe instead of the response. nginx calls the remedy ``lingering_close``. The
    response is sent at once; only its end is held back, after which the server closes the connection. A connection is
    not used again after an unread body, because the rest of the body would have to be received without bounds.
    """

    def __init__(self, app: ASGIApp, limits: BodyLimits, drain_limits: DrainLimits | None = None) -> None:
        self._app = app
        self._limits = limits
        self._drain_limits = drain_limits or DrainLimits()
        self._all = _AllBodies()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        has_body = "transfer-encoding" in headers or headers.get("content-length", "0").strip("0") != ""
        exchange = _Exchange(receive, send, self._limits, self._drain_limits, self._all, is_read=not has_body)
        try:
            await self._app(scope, exchange.receive, exchange.send)
        finally:
            self._all.num_bytes -= exchange.num_bytes


@dataclass
class _AllBodies:
    """The bodies of all requests that are being served."""

    num_bytes: int = 0


@dataclass
class _Exchange:
    """One request and its response."""

    receive_next: Receive
    send_next: Send
    limits: BodyLimits
    drain_limits: DrainLimits
    all: _AllBodies
    is_read: bool
    num_bytes: int = 0
    began: float | None = None

    async def receive(self) -> Message:
        """Receive the next part of the body, or, after the last one, the client's disconnect.

        Raises:
            RequestTimeout: the body arrives too slowly.
            PayloadTooLarge: the body is too large.
            Busy: the bodies of all requests are too large.
        """
        if self.is_read:
            return await self.receive_next()
        self.began = self.began or asyncio.get_running_loop().time()
        deadline = self.began + self.limits.initial_s + self.num_bytes / self.limits.min_rate
        try:
            async with asyncio.timeout_at(deadline):
                message = await self.receive_next()
        except TimeoutError:
            raise RequestTimeout("the body does not arrive in time") from None
        self.is_read = not message.get("more_body", False)  # also after a disconnect
        num_bytes = len(message.get("body", b""))
        self.num_bytes += num_bytes
        self.all.num_bytes += num_bytes
        if self.num_bytes > self.limits.max_bytes:
            raise PayloadTooLarge(f"the body is larger than the {self.limits.max_bytes} bytes that are accepted")
        if self.all.num_bytes > self.limits.max_bytes_of_all:
            raise Busy("the service is busy: too many large bodies are being received", retry_after_s=1.0)
        return message

    async def send(self, message: Message) -> None:
        """Send a part of the response; hold back its end while the rest of the body is discarded."""
        if message["type"] == "http.response.start" and not self.is_read:
            headers = [pair for pair in message.get("headers", []) if pair[0].lower() != CLOSE[0]]
            message = {**message, "headers": [*headers, CLOSE]}
        if message["type"] == "http.response.body" and not message.get("more_body", False) and not self.is_read:
            await self.send_next({**message, "more_body": True})
            await self._discard()
            message = {"type": "http.response.body", "body": b""}
        await self.send_next(message)

    async def _discard(self) -> None:
        """Receive the rest of the body within the limits."""
        num_bytes, more_body = 0, True
        try:
            async with asyncio.timeout(self.drain_limits.total_s):
                while more_body and num_bytes < self.drain_limits.num_bytes:
                    message = await asyncio.wait_for(self.receive_next(), self.drain_limits.idle_s)
                    num_bytes += len(message.get("body", b""))
                    more_body = message.get("more_body", False)
        except TimeoutError:
            pass
