"""Large JSON bodies."""

import json
import threading
from typing import Any

import pytest

from flux2_shared.web import route as service_route
from generator_service.api.routes import large_body
from generator_service.api.routes.large_body import INLINE_BYTES
from tests.conftest import Serve

pytestmark = pytest.mark.anyio

ROUTES = ["/generate", "/jobs", "/v1/images/generations"]
LARGE = "a" * (INLINE_BYTES + 1)


@pytest.mark.parametrize("route", ROUTES)
async def test_large_bodies_are_parsed_off_the_event_loop(
    serve_generator: Serve, monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    """A body with images is parsed on a thread, a small one at once."""
    parsed_on: list[threading.Thread] = []

    class WatchedJSON:
        @staticmethod
        def loads(body: bytes) -> Any:
            parsed_on.append(threading.current_thread())
            return json.loads(body)

    for module in (service_route, large_body):
        monkeypatch.setattr(module, "json", WatchedJSON)
    async with serve_generator() as http:
        for prompt in (LARGE, "a"):
            response = await http.post(route, json={"prompt": prompt, "nothing": 1})
            assert (response.status_code, response.json()["error"]["param"]) == (422, "nothing")
    large, small = parsed_on
    assert large is not threading.main_thread()
    assert small is threading.main_thread()


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("body", ['{"prompt": "' + LARGE, "[" * (INLINE_BYTES + 1)], ids=["broken", "nested"])
async def test_large_bodies_that_are_not_json_are_refused(serve_generator: Serve, route: str, body: str) -> None:
    """They get the same error as small ones."""
    async with serve_generator() as http:
        response = await http.post(route, content=body, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["code"]) == (400, "malformed_body")
