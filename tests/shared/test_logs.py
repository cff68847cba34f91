"""Log formats, and the request's id in both services."""

import json
import logging
import sys

import pytest

from flux2_shared.observability.logs import JsonFormatter, TextFormatter, request_id
from tests.conftest import Serve

SMALL = {"prompt": "a very secret prompt", "width": 64, "height": 64, "num_inference_steps": 2, "cache": "none"}


def make_record(message: str, **extra: object) -> logging.LogRecord:
    log_record = logging.LogRecord("flux2", logging.INFO, __file__, 1, message, (), None)
    log_record.__dict__.update(extra)
    return log_record


def test_json_lines() -> None:
    """A line is one JSON object with time, level, message, the request's id and the fields."""
    reset = request_id.set("r-1")
    json_line = JsonFormatter().format(make_record("done\nit", fields={"status": 200}))
    request_id.reset(reset)
    data = json.loads(json_line)
    assert "\n" not in json_line
    assert data.pop("time").endswith("Z")
    assert data == {
        "level": "info", "logger": "flux2", "message": "done\nit", "request_id": "r-1", "status": 200,
    }  # fmt: skip


def test_an_exception_is_in_the_json() -> None:
    """A traceback is a field of the JSON object."""
    try:
        raise ValueError("x")
    except ValueError:
        log_record = make_record("failed")
        log_record.exc_info = sys.exc_info()
    assert "ValueError: x" in json.loads(JsonFormatter().format(log_record))["exception"]


def test_text_lines_end_with_the_id() -> None:
    """Text ends with the id in brackets, except outside of a request."""
    assert TextFormatter().format(make_record("hello")) == "INFO flux2 hello"
    reset = request_id.set("r-2")
    assert TextFormatter().format(make_record("hello")) == "INFO flux2 hello [r-2]"
    request_id.reset(reset)


@pytest.mark.anyio
async def test_an_id_goes_through_both_services(serve_generator: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """The client's id is returned, and is in every line of both services; no line has the prompt."""
    seen: list[tuple[str, str]] = []
    handler = logging.Handler()
    handler.emit = lambda log_record: seen.append((request_id.get(), log_record.getMessage()))  # type: ignore[method-assign, assignment]
    logging.getLogger("flux2").addHandler(handler)
    caplog.set_level(logging.INFO, "flux2")
    try:
        async with serve_generator() as http:
            response = await http.post("/generate", json=SMALL, headers={"x-request-id": "request-77"})
            strange = await http.post("/generate", json=SMALL, headers={"x-request-id": "two\twords"})
    finally:
        logging.getLogger("flux2").removeHandler(handler)
    assert response.headers["x-request-id"] == "request-77"
    assert len(strange.headers["x-request-id"]) == 32
    routes = [message.split()[1] for id_, message in seen if id_ == "request-77"]
    assert set(routes) == {"/predict", "/generate", "completed"}
    assert "secret" not in caplog.text


@pytest.mark.anyio
async def test_probes_are_not_logged(serve_encoder: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """Successful probes and scrapes, which come every few seconds, are logged only at the level debug."""
    caplog.set_level(logging.INFO, "flux2")
    async with serve_encoder() as http:
        caplog.clear()
        for path in ("/health", "/health/live", "/health/ready", "/metrics", "/info"):
            await http.get(path)
        assert [message for message in caplog.messages if message.startswith("GET")] == [caplog.messages[-1]]
        assert caplog.messages[-1].startswith("GET /info 200 ok")
        http._transport.app.state.health.device_lost.set()  # type: ignore[attr-defined]
        await http.get("/health/live")
    assert any(message.startswith("GET /health/live 500") for message in caplog.messages)
