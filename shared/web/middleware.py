"""ASGI middleware of both services: request ids, logs, metrics, and the errors before and after the routes."""

import logging
import re
import time
import uuid
from http import HTTPStatus

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flux2_shared.errors import PayloadTooLarge
from flux2_shared.observability import logs
from flux2_shared.observability.metrics import Metrics
from flux2_shared.web.connection import CLIENT_CLOSED_REQUEST
from flux2_shared.web.problem import note_outcome, problem_response, unknown_error

logger = logging.getLogger("flux2")

REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
"""Request ids that are accepted from clients."""
MAX_METHOD_CHARS = 20
PROBED_ROUTES = {"/health", "/health/live", "/health/ready", "/metrics"}
"""Routes that machines request every few seconds; their successful requests are only logged at the level debug."""


class RequestContext:
    """Middleware that sets the request id, logs and counts requests, and handles unexpected exceptions.

    Requests are counted and logged when their response ends, with the code of their error, because a stream has the
    status 200 however it ends. A valid ``x-request-id`` of the client is kept. Unexpected exceptions become a 500 here,
    because the response of starlette's own handler would bypass this middleware. A body that is declared too large is
    refused before any route.
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
        status, is_complete = 0, False

        async def send_with_id(message: Message) -> None:
            nonlocal status, is_complete
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            is_complete = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        try:
            app = self._app
            if declared.isascii() and declared.isdigit() and int(declared) > self._max_bytes:
                limit = f"larger than the {self._max_bytes} bytes that this service accepts"
                app = problem_response(Request(scope), PayloadTooLarge(f"the body is {limit}"))
            await app(scope, receive, send_with_id)
        except Exception as error:
            request = Request(scope)
            if status:
                note_outcome(request, unknown_error(error).code)
                raise  # the response is incomplete: the server closes the connection
            logger.exception("a request failed")
            response = problem_response(request, unknown_error(error))
            await response(scope, receive, send_with_id)
        finally:
            self._record(scope, status, time.monotonic() - began, is_complete=is_complete)

    def _record(self, scope: Scope, status: int, seconds: float, *, is_complete: bool) -> None:
        """Count and log a request that has ended."""
        has_left = not is_complete or status == CLIENT_CLOSED_REQUEST
        code = scope["state"].get("outcome") or ("disconnected" if has_left else "ok")
        route = getattr(scope.get("route"), "path", "unknown")
        self._metrics.requests.labels(route, status, code).inc()
        self._metrics.request_seconds.labels(route).observe(seconds)
        fields = {"method": scope["method"][:MAX_METHOD_CHARS], "route": route, "status": status, "code": code}
        fields["ms"] = round(1000 * seconds)
        is_probe = route in PROBED_ROUTES and status == HTTPStatus.OK
        level = logging.DEBUG if is_probe else logging.INFO
        logger.log(level, "%s %s %s %s %s ms", *fields.values(), extra={"fields": fields})
