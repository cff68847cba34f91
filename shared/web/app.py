"""Builds the app of a service with everything but its own routes."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from flux2_shared.observability.metrics import Metrics
from flux2_shared.observability.tracing import tracing_of
from flux2_shared.settings import ServiceSettings
from flux2_shared.web.body import BodyLimit, BodyLimits
from flux2_shared.web.docs import add_docs_routes
from flux2_shared.web.health import Health, add_health_routes
from flux2_shared.web.middleware import RequestContext
from flux2_shared.web.problem import PROBLEM_MEDIA_TYPE, add_error_handlers, problem_schema
from flux2_shared.web.routing import LenientRouting, ProxyPrefix
from flux2_shared.web.sites import ANY, SiteCheck


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
    app = FastAPI(
        title=title,
        version=version,
        lifespan=lifespan,
        responses=errors,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
    )
    app.state.metrics = metrics
    app.state.tracing = tracing_of(title)
    app.state.health = Health()
    app.state.tokens = settings.tokens()
    app.state.max_connections = settings.max_connections
    add_error_handlers(app)
    add_health_routes(app, app.state.health, app.state.metrics.registry)
    add_docs_routes(app)
    add_middleware(app, settings)
    return app


def add_middleware(app: FastAPI, settings: ServiceSettings) -> None:
    """Add what every request passes, from the innermost to the outermost."""
    app.add_middleware(LenientRouting)
    # Browsers do not send a key by themselves, so a service with keys may have any name.
    hosts = (ANY,) if app.state.tokens else (*settings.allowed_hosts, settings.host)
    app.add_middleware(SiteCheck, allowed_hosts=hosts, allowed_origins=settings.allowed_origins)
    if settings.allowed_origins:
        origins = settings.allowed_origins
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=[ANY], allow_headers=[ANY], expose_headers=[ANY]
        )
    app.add_middleware(RequestContext, metrics=app.state.metrics, max_body_bytes=settings.max_body_bytes)
    app.state.tracing.trace_app(app)
    app.add_middleware(ProxyHeadersMiddleware, trusted_hosts=[str(proxy) for proxy in settings.trusted_proxies])
    if settings.root_path or settings.trusted_proxies:
        # Before the client's address replaces the proxy's.
        app.add_middleware(ProxyPrefix, root_path=settings.root_path or "", trusted_proxies=settings.trusted_proxies)
    bytes_of_all = max(settings.max_body_bytes, settings.max_bodies_bytes)
    app.add_middleware(BodyLimit, limits=BodyLimits(settings.max_body_bytes, bytes_of_all))
