"""The limits around Serve's HTTP proxy, with a proxy that reads bodies as Serve's does."""

import importlib.util
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from flux2_ray.proxy import middleware

pytestmark = pytest.mark.anyio

LIMIT = 1000
KEY = {"Authorization": "Bearer a-key-of-20-letters-"}


class ServeProxy:
    """Receives the whole body before anything else, and responds with its size unless the client has left."""

    def __init__(self) -> None:
        self.num_received = 0
        self.headers: list[dict[bytes, bytes]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.headers.append(dict(scope["headers"]))
        more_body = True
        while more_body:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            self.num_received += len(message.get("body", b""))
            more_body = message.get("more_body", False)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


@asynccontextmanager
async def behind(
    proxy: ServeProxy, monkeypatch: pytest.MonkeyPatch, **settings: str
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of Serve's proxy within our middleware, applied in Serve's order."""
    for name, value in {"MAX_BODY_BYTES": str(LIMIT), **settings}.items():
        monkeypatch.setenv(f"GENERATOR_{name}", value)
    app: Any = proxy
    for each in middleware():
        app = each.cls(app, *each.args, **each.kwargs)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        yield http


async def in_pieces(num_pieces: int, size: int = 100) -> AsyncIterator[bytes]:
    """A body without a declared length."""
    for _ in range(num_pieces):
        yield b"a" * size


@pytest.mark.parametrize("authorization", [None, "Bearer wrong", "Basic a-key-of-20-letters-", "Bearer", "B\xe9"])
async def test_a_body_without_a_key_is_not_received(monkeypatch: pytest.MonkeyPatch, authorization: str | None) -> None:
    """The headers alone decide; requests without a body go to the API, which knows the open routes."""
    proxy = ServeProxy()
    headers = [(b"Authorization", authorization.encode("latin-1"))] if authorization else []
    async with behind(proxy, monkeypatch, TOKEN="a-key-of-20-letters-") as http:
        for body in (b"a" * 10, in_pieces(3)):
            response = await http.post("/generate", content=body, headers=headers)
            assert (response.status_code, response.json()["code"]) == (401, "unauthorized")
            assert response.headers["x-request-id"] == response.json()["request_id"]
        assert (await http.get("/health/live", headers=headers)).status_code == 200
        assert proxy.num_received == 0
        assert (await http.post("/generate", content=b"a" * 10, headers=KEY)).status_code == 200
        assert (await http.post("/generate", content=in_pieces(2), headers=KEY)).status_code == 200
    assert proxy.num_received == 210


async def test_a_large_body_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that is declared too large is not received, one of unknown length only up to the limit."""
    proxy = ServeProxy()
    async with behind(proxy, monkeypatch) as http:
        declared = await http.post("/generate", content=b"a" * (LIMIT + 1))
        assert proxy.num_received == 0
        streamed = await http.post("/generate", content=in_pieces(50))
        assert proxy.num_received <= LIMIT
        fits = await http.post("/generate", content=in_pieces(10))
    assert [response.status_code for response in (declared, streamed, fits)] == [413, 413, 200]
    assert declared.json()["code"] == streamed.json()["code"] == "payload_too_large"


async def test_bodies_of_all_requests_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Further bytes are refused while others hold as much as is allowed, and accepted after they have ended."""
    proxy = ServeProxy()

    async def nested(depth: int) -> AsyncIterator[bytes]:
        yield b"a" * LIMIT
        if depth:
            statuses.append((await http.post("/generate", content=nested(depth - 1))).status_code)

    statuses: list[int] = []
    async with behind(proxy, monkeypatch, MAX_BODIES_BYTES=str(3 * LIMIT)) as http:
        statuses.append((await http.post("/generate", content=nested(3))).status_code)
        assert statuses == [429] + [200] * 3
        assert (await http.post("/generate", content=in_pieces(10))).status_code == 200


async def test_clients_do_not_control_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers with which Serve lets a client choose a replica or disable a timeout do not reach it, others do."""
    proxy = ServeProxy()
    ours = ("X-Request-Timeout-Seconds", "x-request-disconnect-disabled", "Serve-Multiplexed-Model-Id", "x_session_id")
    async with behind(proxy, monkeypatch) as http:
        await http.get("/modes", headers=dict.fromkeys(ours, "0") | {"Idempotency-Key": "1"})
    (headers,) = proxy.headers
    assert headers[b"idempotency-key"] == b"1"
    assert not any(name.lower().encode() in headers for name in ours)


@pytest.mark.filterwarnings("ignore")  # Ray makes deprecated calls of pydantic
def test_serve_accepts_the_middleware(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve's own function takes it from the import path of the manifests; the test is skipped without Ray."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("the extra ray is not installed")
    from ray.serve._private import constants, http_util  # noqa: PLC0415 - optional
    from ray.serve.config import HTTPOptions  # noqa: PLC0415 - optional

    assert constants.SERVE_HTTP_REQUEST_TIMEOUT_S_HEADER == "x-request-timeout-seconds"
    monkeypatch.setattr(http_util, "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "flux2_ray.proxy:middleware")
    configured = http_util.configure_http_middlewares(HTTPOptions()).middlewares
    assert [each.cls.__name__ for each in configured] == ["ProxyLimits", "BodyLimit"]
