"""Runs a service in this process. Startup errors are reported in one line."""

import asyncio
import gc
import logging
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any, TypeVar

import uvicorn
from fastapi import FastAPI
from pydantic import ValidationError

from flux2_shared.errors import Flux2Error
from flux2_shared.observability.logs import set_up_logs
from flux2_shared.settings import ServiceSettings
from flux2_shared.web.protocol import ConnectionLimit, LimitedProtocol

Settings = TypeVar("Settings", bound=ServiceSettings)

DEVICE_LOST_STATUS = 1
CLOSING_S = 1
"""Time for the error responses to requests that did not complete within the drain period."""
END_S = 1.8
"""When the process exits unconditionally after the drain period, whatever its threads still do."""
LAST_RESPONSES_S = 3.0
"""How long the service still responds after its device was lost."""
FORCED_EXIT_S = 4.5
"""When the process exits unconditionally after its device was lost."""
KEEP_ALIVE_S = 75
"""How long a connection without requests stays open: longer than the connection pools of HTTP clients keep it (httpx
5 s, urllib3 and Go up to 60 s and more), so that no client sends a request while the server closes the connection."""
BACKLOG = 2048
"""Connections that the operating system keeps until they are accepted."""
ACCEPTS_PER_TURN = 8
"""Connections that are accepted in one turn of the event loop, before those over the limit are closed."""
RESERVED_DESCRIPTORS = 96
"""Descriptors that are left for files, for connections to other services, and for those about to be closed."""
ACCEPT_LOG_S = 1.0
"""Shortest time between two log entries about connections that cannot be accepted."""
logger = logging.getLogger("flux2")


def serve(read_settings: Callable[[], Settings], create_app: Callable[[Settings], FastAPI]) -> None:
    """Read the settings, bind the port, load the model and serve until SIGTERM or SIGINT.

    The port is bound first, so that a port in use is reported before the model is loaded. The process exits with status
    1 if the service cannot start, or when its device is lost.
    """
    try:
        settings = read_settings()
    except ValidationError as error:
        details = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_input=False))
        sys.exit(f"flux2: bad setting: {details}")
    set_up_logs(settings.log_level, settings.log_format)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # until uvicorn installs its handler
    try:
        bound = bind_port(settings.host, settings.port)
        asyncio.run(_serve(create_app(settings), bound, settings.drain_s))
    except Flux2Error as error:
        sys.exit(f"flux2: {error}")
    except KeyboardInterrupt:
        sys.exit(0)


def bind_port(host: str, port: int) -> socket.socket:
    """Bind a socket that does not listen yet. Exits the program if the port cannot be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sets TCP_NODELAY only if the protocol is given explicitly. Without it, responses on a kept-alive
    # connection are delayed by 40 ms, because they are sent in two pieces.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        sys.exit(f"flux2: port {port} of {host} cannot be used: {error.strerror}")
    return bound


async def _serve(app: FastAPI, bound: socket.socket, drain_s: int) -> None:
    """Serve from the start, while the lifespan still loads the model, so that health routes can report its progress."""
    limit = ConnectionLimit(num_connections(app.state.max_connections))
    asyncio.get_running_loop().set_exception_handler(LoopErrors(limit))
    config = uvicorn.Config(
        app,
        http=partial(LimitedProtocol, limit=limit),  # type: ignore[arg-type]  # called like the class
        ws="none",
        backlog=ACCEPTS_PER_TURN,  # asyncio also accepts so many at a time
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # the app reads them, from the proxies in its settings
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=drain_s + CLOSING_S,
    )
    server = _Server(config)
    has_started, ends = asyncio.Event(), asyncio.Event()
    lifespan = asyncio.create_task(_run_lifespan(app, server, has_started, ends))
    watches = [
        asyncio.create_task(_stop_when_device_is_lost(app, server)),
        asyncio.create_task(_close_after_drain(app, server, drain_s)),
    ]
    try:
        await server.serve([bound])
    finally:
        if app.state.health.device_lost.is_set():
            _exit_now(DEVICE_LOST_STATUS)
        if not has_started.is_set() and not lifespan.done():
            _exit_now(0)  # asked to stop while loading the model, which cannot be interrupted
        for watch in watches:
            watch.cancel()
        ends.set()
        await lifespan


class _Server(uvicorn.Server):
    """A uvicorn server that sets ``ends`` when it is asked to stop."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ends = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self._loop.call_soon_threadsafe(self.ends.set)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listening in sockets or []:
            listening.listen(BACKLOG)


def num_connections(max_connections: int) -> int:
    """Return how many connections may be open, with the descriptors that this process can get."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max_connections + RESERVED_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return max_connections
    possible = max(1, soft - RESERVED_DESCRIPTORS)
    logger.warning("at most %d connections at once: the limit of open files (ulimit -n) is %d", possible, soft)
    return possible


class LoopErrors:
    """Exception handler of the event loop, which makes room if there are no descriptors for further connections.

    That happens if other parts of the process hold more than ``RESERVED_DESCRIPTORS``, or if the limit was lowered
    since the start. The log has it once a second, while asyncio reports it for each connection in the backlog
    (https://github.com/python/cpython/issues/151615).
    """

    def __init__(self, limit: ConnectionLimit, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._clock = clock
        self._next_report = 0.0

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if not str(context.get("message", "")).startswith("socket.accept()"):
            loop.default_exception_handler(context)
        elif self._clock() >= self._next_report:
            self._next_report = self._clock() + ACCEPT_LOG_S
            logger.error("connections cannot be accepted: %s", context.get("exception"))
            self._limit.reduce(RESERVED_DESCRIPTORS // 2)


async def _close_after_drain(app: FastAPI, server: _Server, drain_s: int) -> None:
    """After the drain period, fail the requests that still run; uvicorn would close their connections."""
    await server.ends.wait()
    exit_later(drain_s + END_S, 0)
    await asyncio.sleep(drain_s)
    app.state.health.close()


async def _run_lifespan(app: FastAPI, server: uvicorn.Server, has_started: asyncio.Event, ends: asyncio.Event) -> None:
    try:
        async with app.router.lifespan_context(app):
            gc.collect()
            gc.freeze()  # exclude the loaded model from later collections
            has_started.set()
            await ends.wait()
    finally:
        server.should_exit = True  # also if startup failed


async def _stop_when_device_is_lost(app: FastAPI, server: uvicorn.Server) -> None:
    """Leave some time for the last responses and for a probe, then stop the process."""
    await app.state.health.device_lost.wait()
    logger.critical("the device has failed and cannot be used by this process again; exiting with status 1")
    exit_later(FORCED_EXIT_S, DEVICE_LOST_STATUS)
    await asyncio.sleep(LAST_RESPONSES_S)
    server.config.timeout_graceful_shutdown = 1
    server.should_exit = True


def exit_later(seconds: float, status: int) -> None:
    """Exit after some time unless the process has ended by itself, even if its event loop or a thread hangs."""
    timer = threading.Timer(seconds, _exit_now, [status])
    timer.daemon = True
    timer.start()


def _exit_now(status: int) -> None:
    """Exit without joining threads: one may hang in the driver, or read weights for minutes."""
    logging.shutdown()
    os._exit(status)
