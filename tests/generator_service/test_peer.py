"""The HTTP client of other services: what a peer, the environment and cancelled requests cannot change."""

import asyncio
from collections.abc import Callable
from contextlib import suppress

import httpx
import pytest
from pydantic import SecretStr

from generator_service.cli.client import post_generate
from generator_service.clients.peer import MAX_CONNECTIONS, PeerClient
from generator_service.doctor.network import get
from generator_service.errors import EncoderUnavailable
from tests.control import until

pytestmark = pytest.mark.anyio

CLOSED_PORT = "http://user:secret@127.0.0.1:9"
PROXIES = ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY")


def client_of(transport: httpx.AsyncBaseTransport | None = None, max_connections: int = MAX_CONNECTIONS) -> PeerClient:
    """A client of a peer, or of the network."""
    return PeerClient(
        lambda error: EncoderUnavailable(type(error).__name__),
        SecretStr("key"),
        timeout_s=30.0,
        connect_timeout_s=2.0,
        max_connections=max_connections,
        transport=transport,
    )


async def status_of(client: PeerClient, url: str = "http://peer/") -> int:
    async with client.stream("GET", url, headers={}) as response:
        return response.status_code


class Peer(httpx.AsyncBaseTransport):
    """Answers requests once it may, and records them."""

    def __init__(self, respond: Callable[[httpx.Request], httpx.Response]) -> None:
        self.respond = respond
        self.requests: list[httpx.Request] = []
        self.num_running = self.most_running = 0
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        try:
            await self.may_answer.wait()
        finally:
            self.num_running -= 1
        return self.respond(request)


async def test_cookies_are_not_kept() -> None:
    """However many cookies a peer sets, with whatever attributes, the next request has none."""
    cookies = [("set-cookie", f"name{index}={'x' * 4000}; Path=/; Max-Age=9999") for index in range(50)]
    peer = Peer(lambda _request: httpx.Response(200, headers=[*cookies, ("set-cookie", "a=b; Domain=peer")]))
    client = client_of(peer)
    for _ in range(3):
        assert await status_of(client) == 200
    assert all("cookie" not in request.headers for request in peer.requests)


@pytest.mark.parametrize(
    "location", ["http://elsewhere/", "/again", "http://", "\x00", "//elsewhere:99999/", "x" * 9000]
)
async def test_redirects_are_not_followed(location: str) -> None:
    """A redirect, also one that leads nowhere, ends with its own status or an own error, after one request."""
    peer = Peer(lambda _request: httpx.Response(302, headers={"location": location}))
    client = client_of(peer)
    with suppress(EncoderUnavailable):
        assert await status_of(client) == 302
    assert [request.url.host for request in peer.requests] == ["peer"]


async def test_the_environment_is_not_read(monkeypatch: pytest.MonkeyPatch, encoder_url: str) -> None:
    """Proxies and their credentials in the environment are for other programs; peers are asked directly."""
    for name in PROXIES:
        monkeypatch.setenv(name, CLOSED_PORT)
    client = client_of()
    assert await status_of(client, f"{encoder_url}/health/live") == 200
    assert (await asyncio.to_thread(get, f"{encoder_url}/health/live")).status == 200


def test_the_command_line_keeps_no_cookies() -> None:
    """``flux2 generate`` sends no cookies back either."""
    requests: list[httpx.Request] = []

    def respond(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return httpx.Response(200, headers={"set-cookie": "a=b; Path=/"})

    for _ in range(2):
        post_generate("http://generator", {}, transport=httpx.MockTransport(respond))
    assert len(requests) == 2
    assert all("cookie" not in request.headers for request in requests)


async def test_requests_wait_outside_the_pool() -> None:
    """There are never more requests than connections; those that wait may be cancelled, and the others are sent."""
    peer = Peer(lambda _request: httpx.Response(200))
    peer.may_answer.clear()
    client = client_of(peer, max_connections=2)
    requests = [asyncio.create_task(status_of(client)) for _ in range(50)]
    await until(lambda: peer.num_running == 2)
    for request in requests[1:40]:
        request.cancel()
    peer.may_answer.set()
    outcomes = await asyncio.gather(*requests, return_exceptions=True)
    assert [outcome for outcome in outcomes if outcome == 200] == [200] * 11
    assert peer.most_running == 2


async def test_cancelled_requests_cost_no_connection(encoder_url: str) -> None:
    """Requests that are cancelled at any stage leave all connections usable."""
    url = f"{encoder_url}/health/live"
    client = client_of(max_connections=3)
    for num_turns in range(30):
        requests = [asyncio.create_task(status_of(client, url)) for _ in range(10)]
        for _ in range(num_turns):
            await asyncio.sleep(0)
        for request in requests:
            request.cancel()
        await asyncio.gather(*requests, return_exceptions=True)
    assert await asyncio.gather(*(status_of(client, url) for _ in range(10))) == [200] * 10
