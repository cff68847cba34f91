"""ASGI middleware that lets a client finish writing a body that the service has refused without reading it."""

import asyncio
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

CLOSE = (b"connection", b"close")


@dataclass(frozen=True)
class DrainLimits:
    """How much of an unread body is received and discarded, before the connection is closed anyway."""

    total_s: float = 10.0
    idle_s: float = 2.0
    """The longest pause of the client."""
    num_bytes: int = 128 * 2**20


class DrainUnreadBody:
    """Middleware that discards the rest of a body after a response that did not wait for it.

    If a server closes a connection with unread data, TCP resets it, and clients that write the whole body before they
    read, as most do, see a broken pipe instead of the response. nginx calls the remedy ``lingering_close``. The
    response is sent at once; only its end is held back, after which the server closes the connection. A connection is
    not used again after an unread body, because the rest of the body would have to be received without bounds.
    """

    def __init__(self, app: ASGIApp, limits: DrainLimits | None = None) -> None:
        self._app = app
        self._limits = limits or DrainLimits()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not has_body(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        is_read = False

        async def receive_and_note() -> Message:
            nonlocal is_read
            message = await receive()
            is_read = is_read or not message.get("more_body", False)  # also after a disconnect
            return message

        async def send_and_drain(message: Message) -> None:
            if message["type"] == "http.response.start" and not is_read:
                headers = [pair for pair in message.get("headers", []) if pair[0].lower() != CLOSE[0]]
                message = {**message, "headers": [*headers, CLOSE]}
            if message["type"] == "http.response.body" and not message.get("more_body", False) and not is_read:
                await send({**message, "more_body": True})
                await self._discard(receive_and_note)
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        await self._app(scope, receive_and_note, send_and_drain)

    async def _discard(self, receive: Receive) -> None:
        """Receive the rest of the body within the limits."""
        num_bytes, more_body = 0, True
        try:
            async with asyncio.timeout(self._limits.total_s):
                while more_body and num_bytes < self._limits.num_bytes:
                    message = await asyncio.wait_for(receive(), self._limits.idle_s)
                    num_bytes += len(message.get("body", b""))
                    more_body = message.get("more_body", False)
        except TimeoutError:
            pass


def has_body(headers: Headers) -> bool:
    """Return whether the headers announce a request body."""
    return "transfer-encoding" in headers or headers.get("content-length", "0").strip("0") != ""
