"""Runs a service's app in this process; what cannot work is said in one line."""

import asyncio
import gc
import signal
import socket
import sys
from collections.abc import Callable
from typing import TypeVar

import uvicorn
from fastapi import FastAPI
from pydantic import ValidationError

from shared.errors import Flux2Error
from shared.logs import set_up_logs
from shared.settings import ServiceSettings

Settings = TypeVar("Settings", bound=ServiceSettings)


def serve(read_settings: Callable[[], Settings], create_app: Callable[[Settings], FastAPI]) -> None:
    """Read the settings, take the port, load the model and serve until SIGTERM or SIGINT.

    The port is taken first: that it is not free is known before minutes of loading.
    """
    try:
        settings = read_settings()
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_input=False))
        sys.exit(f"flux2: bad setting: {told}")
    set_up_logs(settings.log_level, settings.log_format)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the lifespan ends in order, as by Ctrl-C
    try:
        asyncio.run(_serve(create_app(settings), take_port(settings.host, settings.port), settings.drain_s))
    except Flux2Error as error:
        sys.exit(f"flux2: {error}")
    except KeyboardInterrupt:
        sys.exit(0)


def take_port(host: str, port: int) -> socket.socket:
    """A socket that holds the port; nobody can connect yet. Ends the program if the port cannot be had."""
    taken = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((host, port))
    except OSError as error:
        sys.exit(f"flux2: port {port} of {host} cannot be used: {error.strerror}")
    return taken


async def _serve(app: FastAPI, port: socket.socket, drain_s: int) -> None:
    """Run the app's lifespan around the server, so that its errors are ours to tell."""
    config = uvicorn.Config(
        app,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=drain_s,
    )
    async with app.router.lifespan_context(app):
        gc.collect()
        gc.freeze()  # what is loaded stays: no later collection stops a picture to look through it
        await uvicorn.Server(config).serve([port])
