"""What stands between the generator and a text encoder: a relay that can be turned, silenced, or made to lie."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

MAX_HEAD_BYTES = 16 * 2**20
"""Heads that are full of cookies are passed on: it is the encoder that refuses them."""
Answer = Callable[[bytes, bytes], Awaitable[bytes | None]]
"""Makes a whole response from a request's head and body; None is silence."""


@dataclass
class Relay:
    """A listening server whose behavior can be changed while it runs."""

    port: int = 0
    target: int | None = None
    """The port to which connections are passed; None: ``answer`` makes the responses."""
    answer: Answer | None = None
    num_connections: int = 0
    heads: list[bytes] = field(default_factory=list)
    """The heads of the requests that ``answer`` got."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def turn(self, target: int | None = None, answer: Answer | None = None) -> None:
        """Pass new requests to another port, or answer them; without either they get no answer."""
        self.target, self.answer = target, answer

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection; each response ends it, so that the behavior never lags behind."""
        self.num_connections += 1
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, ValueError, asyncio.CancelledError):
            request_head, body = await read_request(reader)
            self.heads.append(request_head)
            if self.target is not None:
                writer.write(await forward(self.target, request_head, body))
            elif self.answer is not None:
                response = await self.answer(request_head, body)
                if response is None:
                    await asyncio.sleep(3600)
                else:
                    writer.write(response)
            else:
                await asyncio.sleep(3600)
            await writer.drain()
        writer.close()


@asynccontextmanager
async def relaying(target: int | None = None, answer: Answer | None = None) -> AsyncIterator[Relay]:
    """A relay that listens until the block ends."""
    relay = Relay(target=target, answer=answer)
    server = await asyncio.start_server(relay.handle, "127.0.0.1", 0, limit=MAX_HEAD_BYTES)
    relay.port = server.sockets[0].getsockname()[1]
    try:
        yield relay
    finally:
        server.close()


async def read_request(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """The head and the body of a request with a declared length."""
    request_head = await reader.readuntil(b"\r\n\r\n")
    lengths = [
        line.split(b":")[1] for line in request_head.lower().split(b"\r\n") if line.startswith(b"content-length")
    ]
    return request_head, await reader.readexactly(int(lengths[0])) if lengths else b""


async def forward(port: int, request_head: bytes, body: bytes) -> bytes:
    """The response of the service at a port, which closes its connection then."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    lines = [line for line in request_head[:-4].split(b"\r\n") if not line.lower().startswith(b"connection:")]
    writer.write(b"\r\n".join([*lines, b"Connection: close"]) + b"\r\n\r\n" + body)
    response = await reader.read()
    writer.close()
    return response


def respond(body: bytes, kind: str = "application/octet-stream", *headers: str) -> bytes:
    """A whole response with status 200."""
    lines = ["HTTP/1.1 200 OK", f"Content-Type: {kind}", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body
