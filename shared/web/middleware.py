"""ASGI middleware of both services: request ids, logs, metrics, and the errors before and after the routes."""

import logging
import re
import time
import uuid

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flux2_shared.errors import PayloadTooLarge
from flux2_shared.observability import logs
from flux2_shared.observability.metrics import Metrics
from flux2_shared.web.problem import problem_response, unknown_error

logger = logging.getLogger("flux2")

REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
"""Request ids that are accepted from clients."""


class RequestContext:
    """Middleware that sets the request id, logs and counts requests, and handles unexpected exceptions.

    A valid ``x-request-id`` of the client is kept. Unexpected exceptions become a 500 here, because the response of
    starlette's own handler would bypass this middleware. A body that is declared too large is refused before any route.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, max_body_bytes: int) -> None:
        self._app = app
        self._metrics = metrics
        self._max_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given, declared = headers.get("x-request-id", ""), headers.get("content-length", "0")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        logs.request_id.set(request_id)
        scope.setdefault("state", {})["request_id"] = request_id
        began = time.monotonic()
        has_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
                route = getattr(scope.get("route"), "path", "unknown")
                self._metrics.requests.labels(route, message["status"]).inc()
                milliseconds = round(1e3 * (time.monotonic() - began))
                fields = {"method": scope["method"], "route": route, "status": message["status"], "ms": milliseconds}
                logger.info("%s %s %s %s ms", *fields.values(), extra={"fields": fields})
            await send(message)

        try:
            app = self._app
            if declared.isdigit() and int(declared) > self._max_bytes:
                limit = f"larger than the {self._max_bytes} bytes that this service accepts"
                app = problem_response(Request(scope), PayloadTooLarge(f"the body is {limit}"))
            await app(scope, receive, send_with_id)
        except Exception as error:
            if has_started:
                raise  # the response is incomplete: the server closes the connection
            logger.exception("a request failed")
            response = problem_response(Request(scope), unknown_error(error))
            await response(scope, receive, send_with_id)
