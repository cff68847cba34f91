"""The health of a service: starting with its progress, ready, or failed so that it must be restarted."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus

from fastapi import FastAPI, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from flux2_shared.errors import Starting

logger = logging.getLogger("flux2")


@dataclass(frozen=True)
class Readiness:
    """Whether a service can process requests."""

    is_ready: bool = True
    reason: str | None = None
    """Why it is not ready; if it is, what it lacks to process all of them."""


READY = Readiness()
ReadyCheck = Callable[[], Awaitable[Readiness]]
"""Returns whether the service is ready."""
RETRY_STARTING_S = 10.0


class Health:
    """The state of a service from startup to shutdown."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._stage = "starting"
        self._check: ReadyCheck | None = None
        self._close: Callable[[], None] = lambda: None
        self.device_lost = asyncio.Event()

    def report(self, stage: str) -> None:
        """Set and log the current stage of startup; a ``flux2_shared.report.Report``."""
        self._stage = stage
        logger.info("%s", stage)

    def start_serving(self, check: ReadyCheck, close: Callable[[], None]) -> None:
        """End startup; from now on ``check`` decides whether the service is ready.

        Args:
            check: returns whether the service is ready.
            close: fails all requests that still wait when the service ends.
        """
        self._check = check
        self._close = close

    def close(self) -> None:
        """Fail all requests that still wait; called at the end of graceful shutdown."""
        self._close()

    @property
    def progress(self) -> str:
        """The current stage of startup, and the seconds since the process started."""
        return f"{self._stage}, {time.monotonic() - self._began:.0f} s since the start"

    @property
    def is_starting(self) -> bool:
        return self._check is None

    def refuse_while_starting(self) -> None:
        """Raise ``Starting`` until the service serves."""
        if self._check is None:
            raise Starting(f"the service is starting: {self.progress}", retry_after_s=RETRY_STARTING_S)

    async def readiness(self) -> Readiness:
        """Return whether the service is ready."""
        if self.device_lost.is_set():
            return Readiness(is_ready=False, reason="the GPU has failed; the service restarts")
        return Readiness(is_ready=False, reason=self.progress) if self._check is None else await self._check()


def add_health_routes(app: FastAPI, health: Health, metrics: CollectorRegistry) -> None:
    """Add the routes for orchestrators and monitoring, which need no key."""

    @app.get("/health/live", tags=["health"])
    async def live(response: Response) -> dict[str, str]:
        """Liveness: the process responds and has not lost its device. After a 500 it must be restarted."""
        if health.device_lost.is_set():
            response.status_code = HTTPStatus.INTERNAL_SERVER_ERROR
            return {"status": "failed", "reason": "the GPU has failed"}
        return {"status": "alive"}

    @app.get("/health/ready", tags=["health"])
    async def ready(response: Response) -> dict[str, str]:
        """Readiness: the service can process requests, although perhaps not all; if not, 503 with the reason."""
        readiness = await health.readiness()
        if readiness.is_ready:
            degraded = {"degraded": readiness.reason} if readiness.reason else {}
            return {"status": "ready"} | degraded
        response.status_code = HTTPStatus.SERVICE_UNAVAILABLE
        return {"status": "starting" if health.is_starting else "not ready", "reason": str(readiness.reason)}

    app.add_api_route("/health", ready, methods=["GET"], tags=["health"])

    @app.get("/metrics", tags=["health"], response_class=PlainTextResponse)
    async def prometheus() -> Response:
        """Prometheus metrics."""
        return Response(generate_latest(metrics), media_type=CONTENT_TYPE_LATEST)
