"""Logs: their form, and the request's id through both services."""

import json
import logging
import sys

import pytest

from flux2_shared.observability.logs import JsonFormatter, TextFormatter, request_id
from tests.conftest import Serve

SMALL = {"prompt": "a very secret prompt", "width": 64, "height": 64, "num_inference_steps": 2, "cache": "none"}


def record(message: str, **extra: object) -> logging.LogRecord:
    """What a logger makes."""
    made = logging.LogRecord("flux2", logging.INFO, __file__, 1, message, (), None)
    made.__dict__.update(extra)
    return made


def test_json_lines() -> None:
    """A line is one JSON object with time, level, message, the request's id and the fields."""
    reset = request_id.set("r-1")
    line = JsonFormatter().format(record("done\nit", fields={"status": 200}))
    request_id.reset(reset)
    told = json.loads(line)
    assert "\n" not in line
    assert told.pop("time").endswith("Z")
    assert told == {
        "level": "info", "logger": "flux2", "message": "done\nit", "request_id": "r-1", "status": 200,
    }  # fmt: skip


def test_an_exception_is_in_the_line() -> None:
    """A traceback does not break the form."""
    try:
        raise ValueError("x")
    except ValueError:
        made = record("failed")
        made.exc_info = sys.exc_info()
    assert "ValueError: x" in json.loads(JsonFormatter().format(made))["exception"]


def test_text_lines_end_with_the_id() -> None:
    """Text has the id in brackets, and none outside of a request."""
    assert TextFormatter().format(record("hello")) == "INFO flux2 hello"
    reset = request_id.set("r-2")
    assert TextFormatter().format(record("hello")) == "INFO flux2 hello [r-2]"
    request_id.reset(reset)


@pytest.mark.anyio
async def test_an_id_goes_through_both_services(serve_generator: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """The client's id comes back, stands in every line of both services, and the prompt in none."""
    seen: list[tuple[str, str]] = []
    handler = logging.Handler()
    handler.emit = lambda made: seen.append((request_id.get(), made.getMessage()))  # type: ignore[method-assign, assignment]
    logging.getLogger("flux2").addHandler(handler)
    caplog.set_level(logging.INFO, "flux2")
    try:
        async with serve_generator() as http:
            answer = await http.post("/generate", json=SMALL, headers={"x-request-id": "order-77"})
            strange = await http.post("/generate", json=SMALL, headers={"x-request-id": "two\twords"})
    finally:
        logging.getLogger("flux2").removeHandler(handler)
    assert answer.headers["x-request-id"] == "order-77"
    assert len(strange.headers["x-request-id"]) == 32
    routes = [message.split()[1] for who, message in seen if who == "order-77"]
    assert set(routes) == {"/predict", "/generate"}
    assert "secret" not in caplog.text
