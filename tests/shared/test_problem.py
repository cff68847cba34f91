"""Errors as problem details."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from fastapi import FastAPI

from flux2_shared.observability.metrics import Metrics
from flux2_shared.settings import ServiceSettings
from flux2_shared.web.app import make_app
from tests.conftest import served

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def nothing(_app: FastAPI) -> AsyncIterator[None]:
    yield


async def test_an_unexpected_exception_reveals_nothing() -> None:
    """A route that raises an unexpected exception gives 500 with the request id, without the exception's text."""
    app = make_app("test", "0", ServiceSettings(port=0, max_body_bytes=1024, max_waiting=1), nothing, Metrics())

    @app.get("/broken")
    async def broken() -> None:
        raise RuntimeError("a secret")

    async with served(app) as http:
        response = await http.get("/broken", headers={"x-request-id": "mine"})
    problem = response.json()
    assert (response.status_code, problem["code"], problem["request_id"]) == (500, "internal_error", "mine")
    assert "secret" not in response.text
