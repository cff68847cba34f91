"""Limits of Serve's HTTP proxies, which read what clients send before the API sees it.

A proxy receives a body as fast as the client sends it, into a queue without a bound, and obeys headers with which any
client can disable Serve's timeout and its detection of clients that left. The environment of Ray's processes must name
this module: ``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=flux2_ray.proxy:middleware``.
"""

import uuid
from collections.abc import Sequence

from fastapi import Request
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flux2_shared.errors import Flux2Error, PayloadTooLarge, Unauthorized
from flux2_shared.web.auth import authenticate
from flux2_shared.web.body import BodyLimit, BodyLimits
from flux2_shared.web.problem import problem_response
from generator_service.settings import GeneratorSettings

OF_SERVE = {"serve_multiplexed_model_id", "x_request_disconnect_disabled", "x_request_timeout_seconds", "x_session_id"}
"""Headers that Serve obeys, in its spelling: with underscores."""


def middleware() -> list[Middleware]:
    """Return what Serve puts around its proxy, from the innermost to the outermost; Serve calls it once per proxy."""
    settings = GeneratorSettings()
    limits = BodyLimits(settings.max_body_bytes, max(settings.max_body_bytes, settings.max_bodies_bytes))
    proxy_limits = Middleware(ProxyLimits, max_body_bytes=settings.max_body_bytes, tokens=settings.tokens())
    return [proxy_limits, Middleware(BodyLimit, limits=limits)]


class ProxyLimits:
    """Middleware that refuses bodies without a key before they are received, and answers for ``BodyLimit``.

    Args:
        app: Serve's proxy.
        max_body_bytes: the largest body.
        tokens: one of them is needed for a request with a body; empty: none is.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, tokens: Sequence[str]) -> None:
        self._app = app
        self._max_bytes = max_body_bytes
        self._tokens = tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        of_client = [(name, value) for name, value in scope["headers"] if spelled(name) not in OF_SERVE]
        refusal = self._refuse(headers)
        has_response = False

        async def receive_within_limits() -> Message:
            nonlocal refusal
            try:
                return await receive()
            except Flux2Error as error:  # of BodyLimit
                refusal = error
                return {"type": "http.disconnect"}

        async def send_response(message: Message) -> None:
            nonlocal has_response
            has_response = True
            await send(message)

        if refusal is None:
            await self._app({**scope, "headers": of_client}, receive_within_limits, send_response)
        if refusal is not None and not has_response:
            await respond(refusal, scope, receive, send)

    def _refuse(self, headers: Headers) -> Flux2Error | None:
        """Return why a request is refused by its headers alone, or None."""
        declared = headers.get("content-length", "0")
        if "transfer-encoding" not in headers and not declared.strip("0"):
            return None  # no body: the API decides
        try:
            authenticate(headers, self._tokens)
        except Unauthorized as error:
            return error
        if declared.isascii() and declared.isdigit() and int(declared) > self._max_bytes:
            return PayloadTooLarge(f"the body is larger than the {self._max_bytes} bytes that this service accepts")
        return None


def spelled(name: bytes) -> str:
    """Return a header's name as Serve compares it."""
    return name.decode("latin-1").lower().replace("-", "_")


async def respond(error: Flux2Error, scope: Scope, receive: Receive, send: Send) -> None:
    """Send the response to a refused request, which no other part of the service has seen."""
    request_id = uuid.uuid4().hex
    request = Request({**scope, "state": {"request_id": request_id}})
    response = problem_response(request, error)
    response.headers["x-request-id"] = request_id
    await response(scope, receive, send)
