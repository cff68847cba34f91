"""Raw HTTP, for requests that no well-behaved client sends."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from tests.attacks.services import PATIENCE_S, Service

JSON = {"Content-Type": "application/json"}
PER_ADDRESS = 20


@dataclass(frozen=True)
class Connection:
    """An open connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def status(self, within_s: float = PATIENCE_S) -> int:
        """The status of the response; 0 if the connection was closed or nothing came."""
        try:
            line = await asyncio.wait_for(self.reader.readline(), within_s)
            return int(line.split()[1])
        except (OSError, TimeoutError, IndexError, ValueError):
            return 0

    async def is_closed(self, deadline: float) -> bool:
        """Whether the service closes the connection before ``deadline``, whatever it sends."""
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout_at(deadline):
                while await self.reader.read(65536):
                    pass
                return True
        return asyncio.get_running_loop().time() < deadline  # reset


@asynccontextmanager
async def connected(to: Service, number: int = 0, **options: int) -> AsyncIterator[Connection]:
    """A connection from one of many loopback addresses, so that a limit for each address does not decide alone."""
    address = f"127.0.{1 + number // PER_ADDRESS // 250}.{2 + number // PER_ADDRESS % 250}"
    reader, writer = await asyncio.open_connection("127.0.0.1", to.port, local_addr=(address, 0), **options)
    try:
        yield Connection(reader, writer)
    finally:
        writer.transport.abort()


def head(method: str, path: str, headers: Mapping[str, str]) -> bytes:
    """The head of a request."""
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", *(f"{name}: {value}" for name, value in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


async def post(to: Service, path: str, body: bytes, headers: Mapping[str, str], number: int = 0) -> tuple[int, float]:
    """The status of a POST and the seconds until it came; the rest of the body is sent meanwhile."""
    async with connected(to, number) as connection:
        declared = {"Content-Length": str(len(body)), **headers}
        began = time.monotonic()
        connection.writer.write(head("POST", path, declared))
        sending = asyncio.create_task(send(connection.writer, body))
        status = await connection.status()
        seconds = time.monotonic() - began
        sending.cancel()
        return status, seconds


async def send(writer: asyncio.StreamWriter, body: bytes) -> None:
    """Send in pieces, as fast as the service reads, until it does not read any more."""
    with contextlib.suppress(OSError):
        for start in range(0, len(body), 2**18):
            writer.write(body[start : start + 2**18])
            await writer.drain()
