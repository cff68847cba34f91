"""HTTP client of the generator for the command line."""

import base64
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

CONNECT_TIMEOUT_S = 5.0
RESPONSE_TIMEOUT_S = 600.0
REQUIRED_HEADERS = ("x-steps-computed", "x-steps-total", "x-schedule", "x-denoise-ms")


class GeneratorError(RuntimeError):
    """The generator rejected the request or could not be reached."""


@dataclass(frozen=True)
class GeneratedFile:
    """An image file and the headers that came with it."""

    data: bytes
    headers: dict[str, str]


def post_generate(
    url: str, body: dict[str, Any], token: str | None = None, transport: httpx.BaseTransport | None = None
) -> GeneratedFile:
    """Send ``POST /generate``.

    Raises:
        GeneratorError: no connection, or a status other than 200; the message is that of the service.
    """
    with _connection(url, token, transport) as http:
        response = http.post("/generate", json=body)
    if response.status_code != httpx.codes.OK:
        raise GeneratorError(_detail(response))
    return GeneratedFile(response.content, dict(response.headers))


def stream_generate(
    url: str,
    body: dict[str, Any],
    on_step: Callable[[int, bool], None],
    token: str | None = None,
    transport: httpx.BaseTransport | None = None,
) -> GeneratedFile:
    """Like ``post_generate``, but follow the stream of events and call ``on_step`` for each step."""
    headers = {"Accept": "text/event-stream"}
    with (
        _connection(url, token, transport) as http,
        http.stream("POST", "/generate", json=body, headers=headers) as response,
    ):
        if response.status_code != httpx.codes.OK:
            response.read()
            raise GeneratorError(_detail(response))
        try:
            for name, data in _events(response):
                if name == "step":
                    on_step(data["step"], data["computed"])
                elif name == "error":
                    raise GeneratorError(data["detail"])
                elif name == "completed":
                    return GeneratedFile(base64.b64decode(data.pop("image")), _with_headers(data))
        except (ValueError, KeyError, TypeError) as error:
            raise GeneratorError(f"the response of {url} is not that of a generator") from error
    raise GeneratorError("the generator's response is incomplete")


def _with_headers(data: dict[str, str]) -> dict[str, str]:
    """Return the headers of an image; raise ``KeyError`` if one that is always there is missing."""
    for name in REQUIRED_HEADERS:
        data[name]
    return data


@contextmanager
def _connection(url: str, token: str | None, transport: httpx.BaseTransport | None) -> Iterator[httpx.Client]:
    if token and not (token.isascii() and token.strip().isprintable()):
        raise GeneratorError("the token contains characters that a header cannot have")
    headers = {"Authorization": f"Bearer {token.strip()}"} if token else {}
    timeout = httpx.Timeout(RESPONSE_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    try:
        # For one request, so without cookies. Proxies of the environment are used, as by other commands of a user, who
        # may reach the generator only through one.
        with httpx.Client(base_url=url, headers=headers, timeout=timeout, transport=transport) as http:
            yield http
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise GeneratorError(f"no response from {url}: is the generator running? ({type(error).__name__})") from error


def _events(response: httpx.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and data of each server-sent event."""
    name = ""
    for line in response.iter_lines():
        field, _, value = line.partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            yield name, json.loads(value)


def _detail(response: httpx.Response) -> str:
    try:
        return str(response.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return f"the generator responded with status {response.status_code}"
