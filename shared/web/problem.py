"""Errors as problem details (RFC 9457)."""

import logging
import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from flux2_shared.errors import Flux2Error, InvalidRequest, MalformedBody
from flux2_shared.schemas import ErrorDetail, Problem

logger = logging.getLogger("flux2")

PROBLEM_MEDIA_TYPE = "application/problem+json"
MAX_DETAIL_CHARS = 1000
MAX_PARAM_CHARS = 100
NESTING_FIELD = "parameters"
"""The field of Hugging Face's API that contains most of its fields."""


def problem_schema() -> dict[str, Any]:
    """Return the JSON schema of errors, without references."""
    schema = Problem.model_json_schema()
    definitions = schema.pop("$defs")
    schema["properties"]["error"] = definitions["ErrorDetail"]
    return schema


def add_error_handlers(app: FastAPI) -> None:
    """Answer every error with problem details."""
    app.add_exception_handler(Flux2Error, _on_flux2_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)


def name_fields(request: Request, names: Mapping[str, str]) -> None:
    """Report errors of native fields under the names that the client's API has for them."""
    request.state.field_names = names


def in_terms_of_client(request: Request, error: Flux2Error) -> tuple[str, str | None]:
    """Return an error's message and field with the names of the client's API; see ``name_fields``."""
    message, param = str(error), error.param
    if param is not None:
        names = request.scope.get("state", {}).get("field_names", {})
        field, bracket, index = param.partition("[")
        param = names.get(param) or names.get(field, field) + bracket + index
        if message.startswith(f"{error.param}: "):
            message = f"{param}: {message.removeprefix(f'{error.param}: ')}"
    return printable(message, MAX_DETAIL_CHARS), None if param is None else printable(param, MAX_PARAM_CHARS)


def printable(text: str, max_chars: int) -> str:
    """Shorten ``text``, and replace lone surrogates, which cannot be encoded as UTF-8."""
    return text[:max_chars].encode("utf-8", "replace").decode()


def problem_of(request: Request, error: Flux2Error, *, status: int | None = None, code: str | None = None) -> Problem:
    """Build the body of an error, in the formats of RFC 9457 and of OpenAI's and Hugging Face's clients."""
    status, code = status or error.status, code or error.code
    message, param = in_terms_of_client(request, error)
    kind = "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
    return Problem(
        title=code.replace("_", " "),
        status=status,
        detail=message,
        code=code,
        request_id=request.scope.get("state", {}).get("request_id", ""),
        error=ErrorDetail(message=message, type=kind, param=param, code=code),
    )


def note_outcome(request: Request, code: str) -> None:
    """Note the code of the error that ends a request, for the metrics and the log."""
    request.scope.setdefault("state", {})["outcome"] = code


def problem_response(
    request: Request, error: Flux2Error, *, status: int | None = None, code: str | None = None
) -> JSONResponse:
    """Build the response to a failed request."""
    problem = problem_of(request, error, status=status, code=code)
    note_outcome(request, problem.code)
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
    param = next((field for field in fields if field != NESTING_FIELD), None)
    detail = "; ".join(dict.fromkeys(f"{'.'.join(_fields(e)) or 'body'}: {e['msg']}" for e in error.errors()))
    return problem_response(request, InvalidRequest(detail, param=param))


def _fields(error: Any) -> list[str]:
    """Return the path of the error in the body or query. Parts in angle brackets are names of dialects, not fields."""
    return [str(part) for part in error["loc"] if part not in ("body", "query") and not str(part).startswith("<")]


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == MalformedBody.status:  # invalid bytes or too deep nesting
        return problem_response(request, MalformedBody("the body is not valid JSON"))
    phrase = HTTPStatus(error.status_code).phrase
    problem = InvalidRequest(f"{phrase}: {request.method} {request.url.path}")
    response = problem_response(request, problem, status=error.status_code, code=phrase.lower().replace(" ", "_"))
    response.headers.update(error.headers or {})
    allowed = response.headers.get("allow", "").split(", ")
    if "GET" in allowed:  # and then HEAD, by ``LenientRouting``
        response.headers["allow"] = ", ".join(sorted({*allowed, "HEAD"}))
    return response


def unknown_error(_error: Exception) -> Flux2Error:
    """Return the error that clients see instead of an unexpected exception; it reveals no details."""
    return Flux2Error("an internal error; the request id tells the operator more")
