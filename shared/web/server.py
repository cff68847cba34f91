"""Runs a service in this process. Startup errors are reported in one line."""

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

import uvicorn
from fastapi import FastAPI
from pydantic import ValidationError

from flux2_shared.errors import Flux2Error
from flux2_shared.observability.logs import set_up_logs
from flux2_shared.settings import ServiceSettings

Settings = TypeVar("Settings", bound=ServiceSettings)

DEVICE_LOST_STATUS = 1
CLOSING_S = 2
"""Time for the error responses to requests that did not complete within the drain period."""
LAST_RESPONSES_S = 3.0
"""How long the service still responds after its device was lost."""
FORCED_EXIT_S = 4.5
"""When the process exits unconditionally after its device was lost."""
KEEP_ALIVE_S = 75
"""How long a connection without requests stays open: longer than the connection pools of HTTP clients keep it (httpx
5 s, urllib3 and Go up to 60 s and more), so that no client sends a request while the server closes the connection."""
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
    config = uvicorn.Config(
        app,
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


async def _close_after_drain(app: FastAPI, server: _Server, drain_s: int) -> None:
    """After the drain period, fail the requests that still run; uvicorn would close their connections."""
    await server.ends.wait()
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
    forced_exit = threading.Timer(FORCED_EXIT_S, _exit_now, [DEVICE_LOST_STATUS])
    forced_exit.daemon = True
    forced_exit.start()
    await asyncio.sleep(LAST_RESPONSES_S)
    server.config.timeout_graceful_shutdown = 1
    server.should_exit = True


def _exit_now(status: int) -> None:
    """Exit without joining threads: one may hang in the driver, or read weights for minutes."""
    logging.shutdown()
    os._exit(status)
