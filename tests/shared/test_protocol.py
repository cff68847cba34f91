"""Connections of slow clients, and of many clients, over real sockets."""

import asyncio
import resource
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import pytest
import uvicorn
from fastapi import FastAPI, Request, Response

from flux2_shared.web import protocol, server
from flux2_shared.web.protocol import ConnectionLimit, LimitedProtocol, peer_of
from flux2_shared.web.server import LoopErrors, num_connections
from tests.control import PATIENCE_S

pytestmark = pytest.mark.anyio

MAX_CONNECTIONS, MAX_OF_PEER = 8, 6
SHORT_S = 0.5
GET = b"GET /live HTTP/1.1\r\nHost: test\r\n\r\n"
WAIT = b"GET /wait HTTP/1.1\r\nHost: test\r\n\r\n"
UNFINISHED = b"POST /read HTTP/1.1\r\nHost: test\r\nContent-Length: 100\r\n\r\nabc"


@dataclass
class Served:
    """A served app, and the limit of its connections."""

    port: int
    limit: ConnectionLimit
    goes_on: threading.Event
    """Ends the requests to ``/wait``."""
    loop: asyncio.AbstractEventLoop
    num_waiting: list[int] = field(default_factory=list)

    def connect(self, peer: str = "127.0.0.1") -> socket.socket:
        """Open a connection from one of the addresses of the loopback interface."""
        return socket.create_connection(("127.0.0.1", self.port), PATIENCE_S, (peer, 0))


@contextmanager
def serving() -> Iterator[Served]:
    """An app behind ``LimitedProtocol``."""
    app, goes_on, waiting, loops = FastAPI(), threading.Event(), list[int](), list[asyncio.AbstractEventLoop]()

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        loops.append(asyncio.get_running_loop())
        yield

    app.router.lifespan_context = lifespan

    @app.get("/live")
    async def live() -> str:
        return "alive"

    @app.get("/wait")
    async def wait() -> str:
        waiting.append(1)
        await asyncio.to_thread(goes_on.wait, PATIENCE_S)
        return "done"

    @app.post("/read")
    async def read(request: Request) -> int:
        return len(await request.body())

    @app.get("/large")
    async def large() -> Response:
        return Response(bytes(64 * 2**20))

    limit = ConnectionLimit(MAX_CONNECTIONS)
    http = cast("Any", partial(LimitedProtocol, limit=limit))
    uvicorn_server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, http=http, ws="none"))
    thread = threading.Thread(target=uvicorn_server.run)
    thread.start()
    while not uvicorn_server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield Served(uvicorn_server.servers[0].sockets[0].getsockname()[1], limit, goes_on, loops[0], waiting)
    finally:
        goes_on.set()
        uvicorn_server.should_exit = True
        thread.join()


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for something that must happen soon."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_closed(connection: socket.socket) -> bool:
    """Wait for the end of a connection on which nothing arrives."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def is_answered(connection: socket.socket) -> bool:
    """Request ``/live`` on a connection."""
    received = b""
    try:
        connection.sendall(GET)
        while not received.endswith(b'"alive"'):
            received += (part := connection.recv(2**16))
            if not part:
                return False
    except OSError:
        return False
    return received.startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize(
    ("sent", "is_first"),
    [(b"", True), (b"GET", True), (b"GET", False), (b"GET / HTTP/1.1\r\nHo", True), (b"GET / HTTP/1.1\r\nHo", False)],
)
def test_slow_heads_are_closed(monkeypatch: pytest.MonkeyPatch, sent: bytes, is_first: bool) -> None:
    """A connection is closed if the head of its first or a later request does not arrive in time."""
    monkeypatch.setattr(protocol, "HEAD_S", SHORT_S)
    with serving() as served, served.connect() as connection:
        if not is_first:
            assert is_answered(connection)
        connection.sendall(sent)
        assert is_closed(connection)


def test_a_head_that_arrives_byte_by_byte_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time for a head is not extended by parts of it."""
    monkeypatch.setattr(protocol, "HEAD_S", SHORT_S)

    def drip(connection: socket.socket) -> None:
        for _ in range(int(PATIENCE_S / 0.02)):
            connection.sendall(b"G")
            time.sleep(0.02)

    with serving() as served, served.connect() as connection, pytest.raises(OSError, match=r"reset|[Bb]roken"):
        drip(connection)


def test_a_request_that_takes_long_is_not_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time for heads does not limit the time for responses."""
    monkeypatch.setattr(protocol, "HEAD_S", SHORT_S)
    with serving() as served, served.connect() as connection:
        connection.sendall(WAIT)
        time.sleep(2 * SHORT_S)
        served.goes_on.set()
        assert connection.recv(2**16).startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize("sent", [b"", b"GET /li", UNFINISHED, GET])
def test_waiting_connections_are_replaced(sent: bytes) -> None:
    """At the limit, those that wait for their client make room, the longest waiting first, and health is answered."""
    with serving() as served, ExitStack() as stack:
        waiting = [stack.enter_context(served.connect()) for _ in range(3 * MAX_CONNECTIONS)]
        for connection in waiting:
            try:
                connection.sendall(sent)
            except OSError:
                assert connection in waiting[: -MAX_OF_PEER + 1]
        assert is_answered(stack.enter_context(served.connect()))
        assert served.limit.num_open <= MAX_OF_PEER
        assert is_closed(waiting[0]) or sent == GET


def test_the_connection_that_was_used_last_is_kept() -> None:
    """A client whose connection is older, but was used since, keeps it."""
    with serving() as served, ExitStack() as stack:
        used = stack.enter_context(served.connect())
        assert is_answered(used)
        idle = [stack.enter_context(served.connect()) for _ in range(MAX_OF_PEER - 1)]
        wait_until(lambda: served.limit.num_open == MAX_OF_PEER)
        assert is_answered(used)
        stack.enter_context(served.connect())
        assert is_closed(idle[0])
        assert is_answered(used)


def test_served_connections_are_not_replaced() -> None:
    """If all connections of a client serve requests, a new one is closed; other clients get theirs."""
    with serving() as served, ExitStack() as stack:
        busy = [stack.enter_context(served.connect()) for _ in range(MAX_OF_PEER)]
        for connection in busy:
            connection.sendall(WAIT)
        wait_until(lambda: len(served.num_waiting) == MAX_OF_PEER)
        assert is_closed(stack.enter_context(served.connect()))
        assert is_answered(stack.enter_context(served.connect("127.0.0.2")))
        served.goes_on.set()
        assert all(connection.recv(2**16).startswith(b"HTTP/1.1 200 OK") for connection in busy)


def test_the_client_with_the_most_connections_loses_one() -> None:
    """At the limit of all connections, one of the client with the most is closed."""
    with serving() as served, ExitStack() as stack:
        few = [stack.enter_context(served.connect("127.0.0.2")) for _ in range(2)]
        wait_until(lambda: served.limit.num_open == 2)
        many = [stack.enter_context(served.connect()) for _ in range(MAX_OF_PEER)]
        wait_until(lambda: served.limit.num_open == MAX_CONNECTIONS)
        assert is_answered(stack.enter_context(served.connect("127.0.0.3")))
        assert is_closed(many[0])
        assert all(map(is_answered, few))


def test_waiting_connections_are_closed_without_descriptors() -> None:
    """If a connection cannot be accepted, waiting ones are closed and the limit is lowered; busy ones are kept."""
    with serving() as served, ExitStack() as stack:
        busy = stack.enter_context(served.connect())
        busy.sendall(WAIT)
        waiting = [stack.enter_context(served.connect()) for _ in range(MAX_OF_PEER - 1)]
        wait_until(lambda: served.limit.num_open == MAX_OF_PEER and bool(served.num_waiting))
        served.loop.call_soon_threadsafe(served.limit.reduce, 3)
        assert [is_closed(connection) for connection in waiting[:3]] == [True] * 3
        wait_until(lambda: served.limit.num_open == MAX_OF_PEER - 3)
        assert is_answered(stack.enter_context(served.connect()))
        served.goes_on.set()
        assert busy.recv(2**16).startswith(b"HTTP/1.1 200 OK")


def test_a_client_that_does_not_read_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A response that its client leaves unread is given up."""
    monkeypatch.setattr(protocol, "SEND_S", SHORT_S)
    with serving() as served, served.connect() as connection:
        connection.sendall(b"GET /large HTTP/1.1\r\nHost: test\r\n\r\n")
        assert connection.recv(1) == b"H"
        wait_until(lambda: served.limit.num_open == 0)


class SlowTransport:
    """A transport whose client takes a fixed number of bytes between two looks at the buffer."""

    def __init__(self, size: int, taken: int) -> None:
        self.size, self.taken, self.is_aborted = size, taken, False
        self.has_been_asked = asyncio.Event()

    def get_write_buffer_size(self) -> int:
        self.size -= self.taken
        if self.size <= 10 * self.taken:
            self.has_been_asked.set()
        return self.size

    def abort(self) -> None:
        self.is_aborted = True
        self.has_been_asked.set()


@pytest.mark.parametrize(("rate", "is_closed"), [(protocol.MIN_SENT_BYTES, False), (protocol.MIN_SENT_BYTES - 1, True)])
async def test_a_client_that_reads_slowly_is_not_closed(
    monkeypatch: pytest.MonkeyPatch, rate: int, is_closed: bool
) -> None:
    """A client may take as long as it likes if it takes enough in each period."""
    monkeypatch.setattr(protocol, "SEND_S", 0.001)
    connection = LimitedProtocol.__new__(LimitedProtocol)
    connection._send_timer = protocol.Timer(asyncio.get_running_loop())
    transport = SlowTransport(100 * rate, rate)
    connection.transport = cast("asyncio.Transport", transport)
    connection._watch_sending()
    await transport.has_been_asked.wait()
    connection._send_timer.stop()
    assert transport.is_aborted == is_closed


@pytest.mark.parametrize(
    ("host", "peer"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("::ffff:192.0.2.7", "::ffff:192.0.2.7"),
        ("", ""),
        ("/run/socket", "/run/socket"),
    ],
)
def test_peers(host: str, peer: str) -> None:
    """An IPv6 client is its network of 64 bits, any other client is its address."""
    assert peer_of(host) == peer


@pytest.mark.parametrize(
    ("soft", "hard", "num", "raised"),
    [
        (10_000, 10_000, 4096, None),
        (1024, 1_048_576, 4096, (4192, 1_048_576)),
        (1024, resource.RLIM_INFINITY, 4096, (4192, resource.RLIM_INFINITY)),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 4096, None),
        (256, 256, 160, (256, 256)),
        (256, 1024, 928, (1024, 1024)),
        (32, 32, 1, (32, 32)),
    ],
)
def test_connections_leave_descriptors(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, num: int, raised: tuple[int, int] | None
) -> None:
    """The limit of open files is raised if it can be; otherwise there are fewer connections."""
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _which, limits: calls.append(limits))
    assert num_connections(4096) == num
    assert calls == ([raised] if raised else [])


def test_failed_accepts_are_logged_once_a_second(caplog: pytest.LogCaptureFixture) -> None:
    """The event loop reports each connection that it cannot accept; one report in a second is logged."""
    now = 0.0
    handle, loop = LoopErrors(ConnectionLimit(MAX_CONNECTIONS), lambda: now), asyncio.new_event_loop()
    for second in range(3):
        now = second * server.ACCEPT_LOG_S
        for _ in range(100):
            handle(loop, {"message": "socket.accept() out of system resource", "exception": OSError(24, "too many")})
    loop.close()
    assert len(caplog.messages) == 3
