"""Bodies that are refused before they are read, over real sockets."""

import http.client
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from urllib.parse import urlsplit

import httpx
import pytest
import requests
from fastapi import FastAPI, Request

from flux2_shared.observability.metrics import Metrics
from flux2_shared.settings import ServiceSettings
from flux2_shared.web.app import make_app
from flux2_shared.web.body import BodyLimit, BodyLimits, DrainLimits
from tests.conftest import listening
from tests.control import PATIENCE_S
from tests.shared.test_problem import nothing

LARGE, LIMIT, TOO_LARGE = 5 * 2**20, 6 * 2**20, 7 * 2**20
"""More than the buffers of a connection."""
JSON_HEADERS = {"Content-Type": "application/json"}
SHORT = DrainLimits(total_s=1.0, idle_s=0.3, num_bytes=2**20)
MARGIN_S = 10.0
"""For a machine that is busy with other tests."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The address of an app with the middleware of both services, whose limit is ``LIMIT``."""
    app = make_app("test", "0", ServiceSettings(port=0, max_body_bytes=LIMIT, max_waiting=1), nothing, Metrics())

    @app.post("/read")
    async def read(request: Request) -> int:
        return len(await request.body())

    @app.post("/ignore")
    async def ignore() -> str:
        return "not read"

    with listening(app) as address:
        yield address


@pytest.fixture(scope="module")
def impatient_url() -> Iterator[str]:
    """The address of an app that reads no bodies, with short limits for draining them."""
    app = FastAPI()
    app.add_middleware(BodyLimit, limits=BodyLimits(LIMIT, LIMIT), drain_limits=SHORT)
    with listening(app) as address:
        yield address


def chunks(num_bytes: int) -> Iterator[bytes]:
    """A body without a declared length."""
    for _ in range(num_bytes // 2**16):
        yield b"x" * 2**16


def by_urllib(url: str, body: bytes, headers: dict[str, str]) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers)) as response:  # noqa: S310 - of this test
            return int(response.status)
    except urllib.error.HTTPError as error:
        with error:
            json.loads(error.read())
        return error.code


def by_http_client(url: str, body: bytes, headers: dict[str, str]) -> int:
    with closing(http.client.HTTPConnection(urlsplit(url).netloc)) as connection:
        connection.request("POST", urlsplit(url).path, body, headers)
        response = connection.getresponse()
        json.loads(response.read())
        return response.status


def by_http_client_in_chunks(url: str, body: bytes, headers: dict[str, str]) -> int:
    with closing(http.client.HTTPConnection(urlsplit(url).netloc)) as connection:
        connection.request("POST", urlsplit(url).path, chunks(len(body)), headers, encode_chunked=True)
        response = connection.getresponse()
        json.loads(response.read())
        return response.status


def by_requests(url: str, body: bytes, headers: dict[str, str]) -> int:
    response = requests.post(url, body, headers=headers, timeout=PATIENCE_S)
    response.json()
    return response.status_code


def by_requests_in_chunks(url: str, body: bytes, headers: dict[str, str]) -> int:
    response = requests.post(url, chunks(len(body)), headers=headers, timeout=PATIENCE_S)
    response.json()
    return response.status_code


def by_httpx(url: str, body: bytes, headers: dict[str, str]) -> int:
    response = httpx.post(url, content=body, headers=headers)
    response.json()
    return response.status_code


CLIENTS: list[Callable[[str, bytes, dict[str, str]], int]] = [
    by_urllib,
    by_http_client,
    by_http_client_in_chunks,
    by_requests,
    by_requests_in_chunks,
    by_httpx,
]
CONNECTIONS = [{}, {"Connection": "close"}, {"Expect": "100-continue"}]


@pytest.mark.parametrize("headers", CONNECTIONS, ids=["keep", "close", "expect"])
@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.__name__)
@pytest.mark.parametrize(
    ("path", "size", "status"), [("/read", TOO_LARGE, 413), ("/nowhere", LARGE, 404), ("/health", LARGE, 405)]
)
def test_a_refusal_reaches_a_client_that_still_writes(
    url: str,
    client: Callable[[str, bytes, dict[str, str]], int],
    path: str,
    size: int,
    status: int,
    headers: dict[str, str],
) -> None:
    """A client that writes its whole body first reads the refusal, not a broken pipe, however it sends the body."""
    assert client(f"{url}{path}", b"x" * size, headers | JSON_HEADERS) == status


def test_a_service_refuses_a_huge_prompt(encoder_url: str, generator_url: str) -> None:
    """A prompt of 5 MB is 413 for the text encoder, and 422 for the generator, whose limit is larger."""
    body = json.dumps({"prompt": "x" * LARGE}).encode()
    assert by_urllib(f"{encoder_url}/predict", body, JSON_HEADERS) == 413
    assert by_urllib(f"{generator_url}/generate", body, JSON_HEADERS) == 422
    assert by_urllib(f"{generator_url}/generate", body * 11, JSON_HEADERS) == 413


def test_the_response_is_sent_before_the_body_is_read(url: str) -> None:
    """A client that reads while it writes, or waits for ``100 Continue``, gets the refusal at once, and no 100."""
    for extra in ("", "Expect: 100-continue\r\n"):
        with connected(url) as connection:
            began = time.monotonic()
            connection.sendall(head("/read", f"Content-Length: {10**12}\r\n{extra}"))
            response = read_response(connection)
            assert time.monotonic() - began < DrainLimits().idle_s / 2
        assert response.startswith(b"HTTP/1.1 413 ")
        assert b"\r\nconnection: close\r\n" in response


def test_connections_are_kept_where_the_body_was_read(url: str) -> None:
    """Requests without a body, and those whose body was read, keep their connection; others announce its end."""
    with httpx.Client(base_url=url) as client:
        kept = [client.get("/health/live"), client.post("/ignore"), client.post("/read", content=b"x" * 1000)]
        closed = client.post("/ignore", content=b"x" * 1000)
        after = client.get("/health/live")
    assert [response.headers.get("connection") for response in kept] == [None] * 3
    assert (closed.status_code, closed.headers["connection"]) == (200, "close")
    assert after.status_code == 200


@pytest.mark.parametrize("pause_s", [0.05, 0.0])
@pytest.mark.parametrize("framing", [f"Content-Length: {10**12}", "Transfer-Encoding: chunked"])
def test_a_client_cannot_hold_a_connection(impatient_url: str, pause_s: float, framing: str) -> None:
    """A body that arrives slowly, or without end, is received for a bounded time; then the connection is closed."""
    piece = b"x" * 16 if pause_s else b"x" * 2**16
    if "chunked" in framing:
        piece = f"{len(piece):x}\r\n".encode() + piece + b"\r\n"
    with connected(impatient_url) as connection:
        connection.sendall(head("/nowhere", f"{framing}\r\n"))
        assert read_response(connection).startswith(b"HTTP/1.1 404 ")
        assert write_until_closed(connection, piece, pause_s) < SHORT.total_s + MARGIN_S


def test_a_client_that_pauses_is_disconnected(impatient_url: str) -> None:
    """A client that neither writes nor closes is disconnected after the idle limit, with an orderly end."""
    with connected(impatient_url) as connection:
        connection.sendall(head("/nowhere", "Content-Length: 1000\r\n"))
        assert read_response(connection).startswith(b"HTTP/1.1 404 ")
        began = time.monotonic()
        assert connection.recv(1) == b""
        assert time.monotonic() - began < SHORT.idle_s + MARGIN_S


def test_other_requests_are_served_meanwhile(url: str) -> None:
    """Draining does not block the event loop."""
    stop = threading.Event()

    def write() -> None:
        with connected(url) as connection:
            connection.sendall(head("/read", f"Content-Length: {10**12}\r\n"))
            while not stop.is_set():
                connection.sendall(b"x" * 1024)
                stop.wait(0.01)

    writers = [threading.Thread(target=write) for _ in range(4)]
    for writer in writers:
        writer.start()
    try:
        assert httpx.get(f"{url}/health/live").status_code == 200
    finally:
        stop.set()
        for writer in writers:
            writer.join()


def write_until_closed(connection: socket.socket, piece: bytes, pause_s: float) -> float:
    """Write until the connection is reset; return the seconds that it took."""
    began = time.monotonic()
    with suppress(ConnectionError):
        while time.monotonic() - began < PATIENCE_S:
            connection.sendall(piece)
            time.sleep(pause_s)
    return time.monotonic() - began


def connected(url: str) -> socket.socket:
    """A connection, whose operations fail rather than wait for ever."""
    address = urlsplit(url)
    assert address.hostname is not None
    return socket.create_connection((address.hostname, address.port or 80), timeout=PATIENCE_S)


def head(path: str, headers: str) -> bytes:
    """The head of a request."""
    return f"POST {path} HTTP/1.1\r\nHost: test\r\n{headers}\r\n".encode()


def read_response(connection: socket.socket) -> bytes:
    """The head and body of a response with a declared length."""
    response = b""
    while b"\r\n\r\n" not in response:
        response += connection.recv(2**16)
    headers, _, body = response.partition(b"\r\n\r\n")
    length = next(
        int(line.split(b":")[1]) for line in headers.split(b"\r\n") if line.lower().startswith(b"content-length")
    )
    while len(body) < length:
        body += connection.recv(2**16)
    return headers + b"\r\n\r\n" + body
