"""OpenTelemetry traces over both services."""

import sys

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from flux2_shared.errors import ModelRefused
from flux2_shared.observability import tracing
from tests.conftest import Serve

BODY = {"prompt": "a red circle", "width": 64, "height": 64, "num_inference_steps": 2, "seed": 7}


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """An exporter for the spans of services that are created from now on."""
    exporter = InMemorySpanExporter()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://nowhere.invalid")
    monkeypatch.setattr(tracing, "_processor", lambda: SimpleSpanProcessor(exporter))
    return exporter


def parent_of(span: ReadableSpan, spans: tuple[ReadableSpan, ...]) -> ReadableSpan | None:
    """The parent of ``span``."""
    return next((s for s in spans if span.parent and s.context and s.context.span_id == span.parent.span_id), None)


@pytest.mark.anyio
async def test_one_trace_over_both_services(serve_generator: Serve, exporter: InMemorySpanExporter) -> None:
    """A request is one trace: encode, with the encoder's own span inside, draw, and write; no span has the prompt."""
    async with serve_generator() as http:
        exporter.clear()
        trace_id = "0af7651916cd43dd8448eb211c80319c"
        sent = {"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"}
        assert (await http.post("/generate", json=BODY, headers=sent)).status_code == 200
        await http.get("/health/live")
    spans = exporter.get_finished_spans()
    assert {f"{span.context.trace_id:032x}" for span in spans if span.context} == {trace_id}
    named = {span.name: span for span in spans}
    assert named.keys() == {"POST /generate", "encode", "POST", "POST /predict", "draw", "write"}
    services = {span.resource.attributes["service.name"] for span in spans}
    assert services == {"FLUX.2 generator", "FLUX.2 text encoder"}
    chain = [named["POST /predict"]]
    while (parent := parent_of(chain[-1], spans)) is not None:
        chain.append(parent)
    assert [span.name for span in chain] == ["POST /predict", "POST", "encode", "POST /generate"]
    assert all("circle" not in str(value) for span in spans for value in (span.attributes or {}).values())


@pytest.mark.anyio
async def test_tracing_is_off_by_default(
    serve_generator: Serve, exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an endpoint there are no spans."""
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT")
    async with serve_generator() as http:
        assert (await http.post("/generate", json=BODY)).status_code == 200
    assert not exporter.get_finished_spans()


def test_a_missing_extra_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """If tracing is configured without its packages, the start fails with the extra to install."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    with pytest.raises(ModelRefused, match="the extra otel is not installed"):
        tracing.tracing_of("any")
