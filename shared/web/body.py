"""ASGI middleware that limits bodies, and lets a client finish writing one that the service has refused."""

import asyncio
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flux2_shared.errors import PayloadTooLarge

CLOSE = (b"connection", b"close")


@dataclass(frozen=True)
class DrainLimits:
    """How much of an unread body is received and discarded, before the connection is closed anyway."""

    total_s: float = 10.0
    idle_s: float = 2.0
    """The longest pause of the client."""
    num_bytes: int = 128 * 2**20


class BodyLimit:
    """Middleware that limits bodies while they are read, and discards the rest of one that a response did not wait for.

    If a server closes a connection with unread data, TCP resets it, and clients that write the whole body before they
    read, as most do, see a broken pipe instead of the response. nginx calls the remedy ``lingering_close``. The
    response is sent at once; only its end is held back, after which the server closes the connection. A connection is
    not used again after an unread body, because the rest of the body would have to be received without bounds.

    Unlike starlette's own limit, a body that exceeds this one is answered with problem+json.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, drain_limits: DrainLimits | None = None) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._drain_limits = drain_limits or DrainLimits()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        has_body = "transfer-encoding" in headers or headers.get("content-length", "0").strip("0") != ""
        is_read = not has_body
        num_bytes = 0

        async def receive_within_limit() -> Message:
            nonlocal is_read, num_bytes
            message = await receive()
            is_read = is_read or not message.get("more_body", False)  # also after a disconnect
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                raise HTTPException(PayloadTooLarge.status)
            return message

        async def send_and_drain(message: Message) -> None:
            if message["type"] == "http.response.start" and not is_read:
                headers = [pair for pair in message.get("headers", []) if pair[0].lower() != CLOSE[0]]
                message = {**message, "headers": [*headers, CLOSE]}
            if message["type"] == "http.response.body" and not message.get("more_body", False) and not is_read:
                await send({**message, "more_body": True})
                await self._discard(receive)
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        await self._app(scope, receive_within_limit, send_and_drain)

    async def _discard(self, receive: Receive) -> None:
        """Receive the rest of the body within the limits."""
        num_bytes, more_body = 0, True
        try:
            async with asyncio.timeout(self._drain_limits.total_s):
                while more_body and num_bytes < self._drain_limits.num_bytes:
                    message = await asyncio.wait_for(receive(), self._drain_limits.idle_s)
                    num_bytes += len(message.get("body", b""))
                    more_body = message.get("more_body", False)
        except TimeoutError:
            pass
