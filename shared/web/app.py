"""Builds the app of a service with everything but its own routes."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from fastapi import FastAPI

from flux2_shared.observability.metrics import Metrics
from flux2_shared.observability.tracing import tracing_of
from flux2_shared.settings import ServiceSettings
from flux2_shared.web.draining import DrainUnreadBody
from flux2_shared.web.health import Health, add_health_routes
from flux2_shared.web.middleware import BodyLimit, RequestContext
from flux2_shared.web.problem import PROBLEM_MEDIA_TYPE, add_error_handlers, problem_schema


def make_app(
    title: str,
    version: str,
    settings: ServiceSettings,
    lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]],
    metrics: Metrics,
) -> FastAPI:
    """Create an app with everything except the service's routes. ``lifespan`` reports to ``app.state.health``."""
    errors: dict[int | str, dict[str, Any]] = {
        "default": {"description": "Any error", "content": {PROBLEM_MEDIA_TYPE: {"schema": problem_schema()}}}
    }
    app = FastAPI(title=title, version=version, lifespan=lifespan, responses=errors)
    app.state.metrics = metrics
    app.state.tracing = tracing_of(title)
    app.state.health = Health()
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    app.add_middleware(RequestContext, metrics=app.state.metrics)
    add_error_handlers(app)
    add_health_routes(app, app.state.health, app.state.metrics.registry)
    app.state.tracing.trace_app(app)
    app.add_middleware(DrainUnreadBody)
    return app
