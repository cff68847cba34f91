"""OpenTelemetry tracing of both services, enabled by the standard ``OTEL_`` environment variables."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI

from flux2_shared.errors import ModelRefused

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
UNTRACED = "health,metrics"
"""Routes that are polled and not related to a request, as a list of patterns."""


class Tracing:
    """Creates the spans of one service.

    Args:
        provider: an ``opentelemetry.sdk.trace.TracerProvider``; None disables tracing.
    """

    def __init__(self, provider: Any = None) -> None:
        self._provider = provider
        self.is_enabled = provider is not None

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Trace the block as a part of the current request."""
        if self._provider is None:
            yield
        else:
            with self._provider.get_tracer("flux2").start_as_current_span(name):
                yield

    def trace_app(self, app: FastAPI) -> None:
        """Trace each request to the app, as a child of the client's span if it sends one."""
        if self._provider is not None:
            from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware  # noqa: PLC0415 - optional

            app.add_middleware(
                OpenTelemetryMiddleware,
                tracer_provider=self._provider,
                excluded_urls=UNTRACED,
                exclude_spans=["send", "receive"],
            )

    def trace_client(self, http: Any) -> None:
        """Trace each request of an ``httpx`` client, and propagate the span to the other service."""
        if self._provider is not None:
            from opentelemetry.instrumentation.httpx import HTTPXClientInstrumentor  # noqa: PLC0415 - optional

            HTTPXClientInstrumentor.instrument_client(http, tracer_provider=self._provider)


def tracing_of(service: str) -> Tracing:
    """Set up tracing from the environment; ``OTEL_SERVICE_NAME`` overrides ``service``.

    Raises:
        ModelRefused: tracing is enabled, but the extra ``otel`` is not installed.
    """
    if not any(os.environ.get(name) for name in ENDPOINTS):
        return Tracing()
    try:
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415 - optional
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    except ImportError as error:
        raise ModelRefused(f"{ENDPOINTS[0]} is set, but the extra otel is not installed") from error
    name = os.environ.get("OTEL_SERVICE_NAME", service)
    provider = TracerProvider(resource=Resource.create({"service.name": name}))
    provider.add_span_processor(_processor())
    return Tracing(provider)


def _processor() -> Any:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415 - optional
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    return BatchSpanProcessor(OTLPSpanExporter())
