"""Clients without a key, and clients that send too much."""

import gc
import json
import logging
import re
import time
from collections.abc import Iterator

import httpx
import psutil
import pytest
from fastapi import FastAPI

from generator_service.app import create_app as create_generator
from generator_service.settings import GeneratorSettings
from tests.conftest import Serve
from text_encoder_service.app import create_app as create_encoder
from text_encoder_service.settings import TextEncoderSettings

pytestmark = pytest.mark.anyio

OPEN = {"/health", "/health/live", "/health/ready", "/metrics"}
HUGE = "a" * (10 * 2**20)


def requests_of(app: FastAPI) -> Iterator[tuple[str, str]]:
    """Method and path of every route, with a value for each path parameter."""
    for path, methods in app.openapi()["paths"].items():
        for method in methods:
            yield method.upper(), re.sub(r"{.*?}", "0", path)


def test_every_route_is_tested() -> None:
    """The routes that the tests of keys request are all routes of the services."""
    encoder, generator = create_encoder(TextEncoderSettings()), create_generator(GeneratorSettings())
    assert {path for _, path in requests_of(encoder)} == OPEN | {"/predict", "/info"}
    assert {"/generate", "/jobs", "/v1/images/edits", "/v1/models"} | OPEN <= {p for _, p in requests_of(generator)}


@pytest.mark.parametrize("service", ["encoder", "generator"])
async def test_only_health_is_reachable_without_a_key(
    service: str, serve_encoder: Serve, serve_generator: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    """Every route responds with 401 to a missing and to a wrong key, and accepts a valid one; no key is logged."""
    caplog.set_level(logging.DEBUG)
    serve = serve_encoder if service == "encoder" else serve_generator
    async with serve(token="the right key") as http:
        app: FastAPI = http._transport.app  # type: ignore[attr-defined]
        hidden = [("POST", "/")] if service == "generator" else []
        for method, path in [*requests_of(app), *hidden]:
            for key, is_right in ((None, False), ("a wrong key", False), ("the right key", True)):
                headers = {"Authorization": f"Bearer {key}"} if key else {}
                status = (await http.request(method, path, headers=headers)).status_code
                assert (status == 401) == (path not in OPEN and not is_right), (method, path, key, status)
    assert "right key" not in caplog.text
    assert "wrong key" not in caplog.text


@pytest.mark.parametrize("route", ["/generate", "/jobs", "/v1/images/generations"])
async def test_a_huge_prompt_is_refused_quickly(serve_generator: Serve, route: str) -> None:
    """10 MB of prompt are refused in a small multiple of the time for parsing them as JSON, and are not kept."""
    body = b'{"prompt": "%s"}' % HUGE.encode()
    async with serve_generator() as http:
        refusing, reading, sizes = [], [], []
        for _ in range(10):
            began = time.perf_counter()
            json.loads(body)
            read = time.perf_counter()
            response = await http.post(route, content=body, headers={"content-type": "application/json"})
            reading.append(read - began)
            refusing.append(time.perf_counter() - read)
            assert response.status_code in (413, 422)
            assert len(response.content) < 2000
            gc.collect()  # tracebacks of the refusals refer to the bodies
            sizes.append(psutil.Process().memory_info().rss)
        assert sizes[-1] - sizes[0] < 50 * 2**20  # half of the bodies; the first one's memory is used again
    assert min(refusing) < 50 * min(reading)


async def test_a_wrong_key_is_refused_before_the_body_is_read(serve_generator: Serve) -> None:
    """The large body of an unauthenticated client is not read: it gets 401, whatever the body is."""
    async with serve_generator(token="the right key") as http:
        responses: list[httpx.Response] = [
            await http.post("/generate", content=content) for content in (b"", b"{", HUGE.encode())
        ]
    assert [response.status_code for response in responses] == [401] * 3
