"""Runs a service's app in this process; what cannot work is said in one line."""

import logging
import sys
from collections.abc import Callable
from typing import TypeVar

import uvicorn
from fastapi import FastAPI
from pydantic import ValidationError

from shared.settings import ServiceSettings

Settings = TypeVar("Settings", bound=ServiceSettings)


def serve(read_settings: Callable[[], Settings], create_app: Callable[[Settings], FastAPI]) -> None:
    """Read the settings, make the app and serve it until SIGTERM or SIGINT."""
    try:
        settings = read_settings()
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_input=False))
        sys.exit(f"flux2: bad setting: {told}")
    logging.basicConfig(level=settings.log_level.upper(), format="%(levelname)s %(name)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    uvicorn.run(
        create_app(settings),
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
    )
