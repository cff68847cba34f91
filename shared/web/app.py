"""The common web layer of both services: request ids, limits, API keys, and errors as problem+json."""

import asyncio
import hashlib
import logging
import math
import re
import secrets
import time
import uuid
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from http import HTTPStatus
from typing import Annotated, Any, TypeVar

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flux2_shared.errors import Flux2Error, InvalidRequest, MalformedBody, PayloadTooLarge, Unauthorized
from flux2_shared.observability import logs
from flux2_shared.observability.metrics import Metrics
from flux2_shared.observability.tracing import tracing_of
from flux2_shared.schemas import ErrorDetail, Problem
from flux2_shared.settings import ServiceSettings
from flux2_shared.web.health import Health, add_health_routes

logger = logging.getLogger("flux2")

PROBLEM_MEDIA_TYPE = "application/problem+json"
REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
"""Valid values of a client's ``x-request-id``."""
CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that disconnected; it appears only in logs and metrics."""
DISCONNECT_POLL_S = 0.1
Result = TypeVar("Result")


def make_app(
    title: str,
    version: str,
    settings: ServiceSettings,
    lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]],
) -> FastAPI:
    """Create an app with everything except the service's routes. ``lifespan`` reports to ``app.state.health``."""
    errors: dict[int | str, dict[str, Any]] = {
        "default": {"description": "Any error", "content": {PROBLEM_MEDIA_TYPE: {"schema": problem_schema()}}}
    }
    app = FastAPI(title=title, version=version, lifespan=lifespan, responses=errors)
    app.state.metrics = Metrics()
    app.state.tracing = tracing_of(title)
    app.state.health = Health()
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    app.add_middleware(RequestContext, metrics=app.state.metrics)
    app.add_exception_handler(Flux2Error, _on_flux2_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    add_health_routes(app, app.state.health, app.state.metrics.registry)
    app.state.tracing.trace_app(app)
    return app


def problem_schema() -> dict[str, Any]:
    """Return the JSON schema of errors, without references."""
    schema = Problem.model_json_schema()
    definitions = schema.pop("$defs")
    schema["properties"]["error"] = definitions["ErrorDetail"]
    return schema


class RequestContext:
    """Middleware that sets the request id, logs and counts requests, and handles unexpected exceptions.

    A valid ``x-request-id`` of the client is kept. Unexpected exceptions become a 500 here, because the response of
    starlette's own handler would bypass this middleware.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
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
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            if has_started:
                raise  # the response is incomplete: the server closes the connection
            logger.exception("a request failed")
            response = problem_response(Request(scope), unknown_error(error))
            await response(scope, receive, send_with_id)


class BodyLimit:
    """Middleware that rejects bodies of more than ``max_bytes``, by their declared length or while they are read.

    Unlike starlette's own middleware, it responds with problem+json.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        declared = Headers(scope=scope).get("content-length", "0") if scope["type"] == "http" else "0"
        if declared.isdigit() and int(declared) > self._max_bytes:
            response = problem_response(Request(scope), self._too_large())
            await response(scope, receive, send)
            return
        num_bytes = 0

        async def receive_within_limit() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                raise HTTPException(PayloadTooLarge.status)
            return message

        await self._app(scope, receive_within_limit, send)

    def _too_large(self) -> PayloadTooLarge:
        return PayloadTooLarge(f"the body is larger than the {self._max_bytes} bytes that this service accepts")


def require_token(tokens: Sequence[str]) -> Any:
    """Create a dependency that requires one of the bearer ``tokens``, or nothing if there are none."""

    async def check(
        request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
    ) -> None:
        given = credentials.credentials.encode() if credentials else b""
        # All tokens are compared, in constant time, so that the response time reveals nothing.
        is_known = [secrets.compare_digest(given, token.encode()) for token in tokens]
        if tokens and not any(is_known):
            raise Unauthorized("a valid bearer token is required")
        request.state.owner = hashlib.sha256(given).hexdigest() if tokens else ""

    return Depends(check)


def owner_of(request: Request) -> str:
    """Return the owner of a request: a hash of its token, or an empty string if no tokens are configured."""
    owner: str = request.state.owner
    return owner


_bearer = HTTPBearer(auto_error=False)


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result | None:
    """Await ``work``; if the client disconnects first, cancel it and return None."""
    task = asyncio.create_task(work)
    try:
        while not (await asyncio.wait([task], timeout=DISCONNECT_POLL_S))[0]:
            if await request.is_disconnected():
                return None
        return task.result()
    finally:
        task.cancel()


def problem_of(request: Request, error: Flux2Error, *, status: int | None = None, code: str | None = None) -> Problem:
    """Build the body of an error, in the formats of RFC 9457 and of OpenAI's and Hugging Face's clients."""
    status, code = status or error.status, code or error.code
    kind = "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
    return Problem(
        title=code.replace("_", " "),
        status=status,
        detail=str(error),
        code=code,
        request_id=request.scope.get("state", {}).get("request_id", ""),
        error=ErrorDetail(message=str(error), type=kind, param=error.param, code=code),
    )


def problem_response(
    request: Request, error: Flux2Error, *, status: int | None = None, code: str | None = None
) -> JSONResponse:
    """Build the response to a failed request."""
    problem = problem_of(request, error, status=status, code=code)
    headers = {}
    if error.asks_to_retry or not error.is_worth_retrying:
        headers["x-should-retry"] = str(error.asks_to_retry).lower()
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if problem.status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(problem.model_dump(), problem.status, headers, media_type=PROBLEM_MEDIA_TYPE)


async def _on_flux2_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, Flux2Error)
    if error.__cause__ is not None:
        logger.warning("%s: %s", error.code, error, exc_info=error.__cause__)
    return problem_response(request, error)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return problem_response(request, MalformedBody("the body is not valid JSON"))
    # A union reports an error for each branch, with the branch's name after the field's.
    fields = _fields(first)
    param = fields[0] if fields else None
    detail = "; ".join(dict.fromkeys(f"{'.'.join(_fields(e)) or 'body'}: {e['msg']}" for e in error.errors()))
    return problem_response(request, InvalidRequest(detail[:1000], param=param))


def _fields(error: Any) -> list[str]:
    """Return the path of the error in the body or query. Parts in angle brackets are names of dialects, not fields."""
    return [str(part) for part in error["loc"] if part not in ("body", "query") and not str(part).startswith("<")]


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == PayloadTooLarge.status:
        return problem_response(request, PayloadTooLarge("the body is larger than this service accepts"))
    if error.status_code == MalformedBody.status:  # invalid bytes or too deep nesting
        return problem_response(request, MalformedBody("the body is not valid JSON"))
    phrase = HTTPStatus(error.status_code).phrase
    problem = InvalidRequest(f"{phrase}: {request.method} {request.url.path}")
    response = problem_response(request, problem, status=error.status_code, code=phrase.lower().replace(" ", "_"))
    response.headers.update(error.headers or {})  # such as Allow of a 405
    return response


def unknown_error(_error: Exception) -> Flux2Error:
    """Return the error that clients see instead of an unexpected exception; it reveals no details."""
    return Flux2Error("an internal error; the request id tells the operator more")
