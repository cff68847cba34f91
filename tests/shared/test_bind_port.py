"""The socket that a service listens on."""

import asyncio
import socket

import pytest

from flux2_shared.web.server import bind_port

pytestmark = pytest.mark.anyio


def has_ipv6() -> bool:
    """Whether this machine has an IPv6 loopback interface."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", pytest.param("::1", marks=pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6"))],
)
async def test_accepted_connections_send_at_once(host: str) -> None:
    """Connections accepted at the port have ``TCP_NODELAY``, so the second part of a response is not delayed."""
    options: asyncio.Queue[int] = asyncio.Queue()

    async def note(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted: socket.socket = writer.get_extra_info("socket")
        options.put_nowait(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    async with await asyncio.start_server(note, sock=bind_port(host, 0)) as server:
        _, writer = await asyncio.open_connection(*server.sockets[0].getsockname()[:2])
        assert await options.get() != 0
        writer.close()
        await writer.wait_closed()
