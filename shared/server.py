"""Runs a service's app in this process; what cannot work is said in one line."""

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

from shared.errors import Flux2Error
from shared.logs import set_up_logs
from shared.settings import ServiceSettings

Settings = TypeVar("Settings", bound=ServiceSettings)

DEVICE_LOST_STATUS = 1
CLOSING_S = 2
"""How long answers to those who did not end within the drain may take."""
LAST_ANSWERS_S = 3.0
"""How long a service whose device is lost goes on answering."""
LAST_MOMENT_S = 4.5
"""After which it ends in any case."""
logger = logging.getLogger("flux2")


def serve(read_settings: Callable[[], Settings], create_app: Callable[[Settings], FastAPI]) -> None:
    """Read the settings, take the port, load the model and serve until SIGTERM or SIGINT.

    The port is taken first: that it is not free is known before minutes of loading. The process ends with status 1 if
    the service cannot start, or when its device is lost.
    """
    try:
        settings = read_settings()
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_input=False))
        sys.exit(f"flux2: bad setting: {told}")
    set_up_logs(settings.log_level, settings.log_format)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # until the server has its own handler
    try:
        asyncio.run(_serve(create_app(settings), take_port(settings.host, settings.port), settings.drain_s))
    except Flux2Error as error:
        sys.exit(f"flux2: {error}")
    except KeyboardInterrupt:
        sys.exit(0)


def take_port(host: str, port: int) -> socket.socket:
    """A socket that holds the port; nobody can connect yet. Ends the program if the port cannot be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named because asyncio sets TCP_NODELAY only where it is: without it a client that keeps its
    # connection waits 40 ms for each answer, which is sent in two pieces.
    taken = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((host, port))
    except OSError as error:
        sys.exit(f"flux2: port {port} of {host} cannot be used: {error.strerror}")
    return taken


async def _serve(app: FastAPI, port: socket.socket, drain_s: int) -> None:
    """Answer from the first moment, also while the app's lifespan starts: health routes say how far it is."""
    config = uvicorn.Config(
        app,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=drain_s + CLOSING_S,
    )
    server = _Server(config)
    has_started, ends = asyncio.Event(), asyncio.Event()
    lifespan = asyncio.create_task(_run_lifespan(app, server, has_started, ends))
    watches = [
        asyncio.create_task(_end_when_device_is_lost(app, server)),
        asyncio.create_task(_close_after_drain(app, server, drain_s)),
    ]
    try:
        await server.serve([port])
    finally:
        if app.state.health.device_lost.is_set():
            _leave(DEVICE_LOST_STATUS)
        if not has_started.is_set() and not lifespan.done():
            _leave(0)  # asked to end while the model is loaded, which cannot be interrupted
        for watch in watches:
            watch.cancel()
        ends.set()
        await lifespan


class _Server(uvicorn.Server):
    """Says when it has been asked to end."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ends = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """As uvicorn's signal handler."""
        super().handle_exit(sig, frame)
        self._loop.call_soon_threadsafe(self.ends.set)


async def _close_after_drain(app: FastAPI, server: _Server, drain_s: int) -> None:
    """Answer those whom the drain was too short for; uvicorn would cut them off."""
    await server.ends.wait()
    await asyncio.sleep(drain_s)
    app.state.health.close()


async def _run_lifespan(app: FastAPI, server: uvicorn.Server, has_started: asyncio.Event, ends: asyncio.Event) -> None:
    try:
        async with app.router.lifespan_context(app):
            gc.collect()
            gc.freeze()  # what is loaded stays: no later collection stops a generation to look through it
            has_started.set()
            await ends.wait()
    finally:
        server.should_exit = True  # what cannot start is not served


async def _end_when_device_is_lost(app: FastAPI, server: uvicorn.Server) -> None:
    """Leave some time for the last answers and for a probe, then end whatever runs."""
    await app.state.health.device_lost.wait()
    logger.critical("the device has failed and cannot be used by this process again: it ends with status 1")
    last_moment = threading.Timer(LAST_MOMENT_S, _leave, [DEVICE_LOST_STATUS])
    last_moment.daemon = True
    last_moment.start()
    await asyncio.sleep(LAST_ANSWERS_S)
    server.config.timeout_graceful_shutdown = 1
    server.should_exit = True


def _leave(status: int) -> None:
    """End the process now, without waiting for threads: one may be in the driver, or read weights for minutes."""
    logging.shutdown()
    os._exit(status)
