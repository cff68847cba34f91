"""The HTTP client of another service: what every request to one has in common.

Nothing changes the client: it follows no redirects, and takes no credentials or proxies from the environment. Each
request has a connection of its own. So no cookies are kept, and cancelled requests cost nothing: a pool of httpcore
1.0.9 loses a connection for good if a request is cancelled while it waits for it, or between connecting and sending
(encode/httpcore#1093).
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import cache
from typing import Any

import httpx
from pydantic import SecretStr

from flux2_shared.errors import Flux2Error
from flux2_shared.observability.tracing import Tracing
from generator_service.clients.bounded_body import IDENTITY, BodyRefused

MAX_CONNECTIONS = 32


@cache
def certificates() -> ssl.SSLContext:
    """Return the trusted certificates, with those that ``SSL_CERT_FILE`` or ``SSL_CERT_DIR`` names."""
    return httpx.create_ssl_context()


class PeerClient:
    """HTTP client of one service.

    Args:
        own_error: returns what to raise instead of an ``httpx.TransportError`` or ``BodyRefused``.
        token: sent as a bearer token.
        timeout_s: timeout for reading and writing, between two pieces of data.
        connect_timeout_s: timeout for name resolution and connecting.
        max_connections: further requests wait for the end of another one.
        transport: replaces the network, for tests.
    """

    def __init__(
        self,
        own_error: Callable[[Exception], Flux2Error],
        token: SecretStr | None = None,
        *,
        timeout_s: float,
        connect_timeout_s: float,
        max_connections: int = MAX_CONNECTIONS,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._own_error = own_error
        self._headers = IDENTITY | ({"Authorization": f"Bearer {token.get_secret_value()}"} if token else {})
        self._timeout = httpx.Timeout(timeout_s, connect=connect_timeout_s)
        self._certificates = certificates()
        self._transport = transport
        self._permits = asyncio.Semaphore(max_connections)
        self._tracing: Tracing | None = None

    def trace(self, tracing: Tracing) -> None:
        """Record requests as spans and propagate the trace context."""
        self._tracing = tracing if tracing.is_enabled else None

    @asynccontextmanager
    async def stream(
        self, method: str, url: str, *, json: Any = None, content: bytes | None = None, headers: Mapping[str, str]
    ) -> AsyncIterator[httpx.Response]:
        """Send a request; the body of the response is read in the block.

        Raises:
            Flux2Error: the request failed, or the block did while it read the body.
        """
        async with self._permits:
            http = httpx.AsyncClient(
                headers=self._headers,
                timeout=self._timeout,
                transport=self._transport,
                follow_redirects=False,
                trust_env=False,
                verify=self._certificates,
            )
            if self._tracing is not None:
                self._tracing.trace_client(http)
            try:
                async with http, http.stream(method, url, json=json, content=content, headers=headers) as response:
                    yield response
            except (httpx.TransportError, BodyRefused) as error:
                raise self._own_error(error) from error
