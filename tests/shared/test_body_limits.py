"""Bodies that arrive slowly, that are too many at once, or that contain too much."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.types import Message

from flux2_shared.schemas import MAX_FIELDS
from flux2_shared.web.body import BodyLimit, BodyLimits, DrainLimits
from flux2_shared.web.problem import add_error_handlers
from flux2_shared.web.route import LARGE_BYTES, MAX_COMMAS
from generator_service.app import create_app as create_generator
from generator_service.settings import GeneratorSettings
from tests.conftest import Serve
from text_encoder_service.app import create_app as create_encoder
from text_encoder_service.settings import TextEncoderSettings

pytestmark = pytest.mark.anyio

JSON = {"content-type": "application/json"}
PART = b"x" * 100
LIMITS = BodyLimits(max_bytes=1000, max_bytes_of_all=1500, initial_s=0.2, min_rate=10_000)


class Client:
    """Sends a request whose body the test provides in parts, and records the response."""

    def __init__(self, app: Any, path: str = "/read", headers: dict[str, str] | None = None) -> None:
        fields = {"transfer-encoding": "chunked"} | (headers or {})
        encoded = [(name.encode(), value.encode()) for name, value in fields.items()]
        self.scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b""}
        self.scope |= {"headers": encoded, "http_version": "1.1", "scheme": "http", "root_path": "", "app": app}
        self.parts: asyncio.Queue[Message] = asyncio.Queue()
        self.status = 0
        self.body = b""
        self.num_received = 0
        self.num_received_before = -1
        """Parts that were received before the response began."""
        self.has_received = asyncio.Event()
        self._app = app

    def send(self, body: bytes, *, more_body: bool = True) -> None:
        """Send a part of the body."""
        self.parts.put_nowait({"type": "http.request", "body": body, "more_body": more_body})

    async def run(self) -> int:
        """Send the request and return the status of the response."""
        await self._app(self.scope, self._receive, self._record)
        return self.status

    async def _receive(self) -> Message:
        message = await self.parts.get()
        self.num_received += 1
        self.has_received.set()
        return message

    async def _record(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status, self.num_received_before = message["status"], self.num_received
        self.body += message.get("body", b"")


@pytest.fixture
def app() -> FastAPI:
    """An app whose only route reads its body, and then waits for ``app.state.goes_on``."""
    app = FastAPI()
    app.state.goes_on = asyncio.Event()
    add_error_handlers(app)
    app.add_middleware(BodyLimit, limits=LIMITS, drain_limits=DrainLimits(total_s=0.1, idle_s=0.1))

    @app.post("/read")
    async def read(request: Request) -> JSONResponse:
        body = await request.body()
        await app.state.goes_on.wait()
        return JSONResponse(len(body))

    return app


async def test_a_body_that_stops_is_408(app: FastAPI) -> None:
    """A body that does not arrive in time is refused, also if a part of it did."""
    for parts in (0, 1):
        client = Client(app)
        for _ in range(parts):
            client.send(PART)
        assert await client.run() == 408
        assert json.loads(client.body)["code"] == "request_timeout"


async def test_a_body_that_drips_is_408(app: FastAPI) -> None:
    """Parts that arrive at less than the minimum rate do not extend the time by more than they are worth."""
    client = Client(app)

    async def drip() -> None:
        while True:
            client.send(b"x")
            await asyncio.sleep(0.01)

    dripping = asyncio.create_task(drip())
    assert await client.run() == 408
    dripping.cancel()


async def test_a_body_that_is_complete_has_no_time_limit(app: FastAPI) -> None:
    """The time limit is that of the body, not that of the response."""
    client = Client(app)
    client.send(PART, more_body=False)
    running = asyncio.create_task(client.run())
    await asyncio.sleep(2 * LIMITS.initial_s)
    app.state.goes_on.set()
    assert (await running, client.body) == (200, b"100")


async def test_the_bytes_of_all_bodies_are_bounded(app: FastAPI) -> None:
    """Bodies are refused while those of other requests hold all bytes, until these requests end."""
    first, second, third = Client(app), Client(app), Client(app)
    for client, size in ((first, 900), (second, 700), (third, 700)):
        client.send(bytes(size), more_body=False)
    running = asyncio.create_task(first.run())
    await first.has_received.wait()
    assert await second.run() == 429
    assert json.loads(second.body)["detail"] == "the service is busy: too many large bodies are being received"
    app.state.goes_on.set()
    assert await running == 200
    assert await third.run() == 200


async def test_refused_bodies_do_not_count(app: FastAPI) -> None:
    """Bodies that were refused, for any reason, free their bytes."""
    app.state.goes_on.set()
    for _ in range(3):
        client = Client(app)
        client.send(bytes(LIMITS.max_bytes + 1), more_body=False)
        assert await client.run() == 413
    client = Client(app)
    client.send(bytes(LIMITS.max_bytes), more_body=False)
    assert await client.run() == 200


ROUTES = [
    ("encoder", "/predict"),
    ("generator", "/generate"),
    ("generator", "/jobs"),
    ("generator", "/"),
    ("generator", "/v1/images/generations"),
    ("generator", "/v1/images/edits"),
]


@pytest.mark.parametrize(("service", "path"), ROUTES)
@pytest.mark.parametrize("key", [None, "Bearer wrong", "Basic secret", "Bearer"])
async def test_nothing_is_received_without_a_key(service: str, path: str, key: str | None) -> None:
    """A request without a valid key is refused by its headers: nothing of its body is received before the response."""
    settings: Any = {"model": "unused", "token": "secret"}
    app = (
        create_encoder(TextEncoderSettings(**settings))
        if service == "encoder"
        else create_generator(GeneratorSettings(**settings))
    )
    client = Client(app, path, JSON | ({} if key is None else {"authorization": key}))
    client.send(b"{}", more_body=False)  # is discarded after the response
    assert (await client.run(), client.num_received_before) == (401, 0)


def hostile_bodies(count: int) -> Iterator[tuple[str, bytes]]:
    """Bodies that consist of very many values."""
    fields = ",".join(f'"a{index}":1' for index in range(count)).encode()
    numbers, lists = b",".join([b"1"] * count), b",".join([b"[]"] * count)
    for name in (b"prompt", b"images", b"lora", b"seed", b"nothing"):
        for values in (b"[%s]" % numbers, b"[%s]" % lists, b"{%s}" % fields):
            yield f"{name!r}: {values[:10]!r}", b'{"prompt":"x","%s":%s}' % (name, values)
    yield "fields", b'{"prompt":"x",%s}' % fields
    yield "parameters", b'{"inputs":"x","parameters":{%s}}' % fields
    yield "a list", b"[%s]" % numbers


@pytest.mark.parametrize("count", [10_000, MAX_COMMAS // 2, LARGE_BYTES])
async def test_bodies_of_many_values_get_few_errors(serve_encoder: Serve, serve_generator: Serve, count: int) -> None:
    """A list of wrong items or an object with unknown fields is one short error, on every JSON route."""
    bodies = list(hostile_bodies(count))
    async with serve_encoder() as encoder, serve_generator() as generator:
        for service, path in ROUTES[:-1]:
            http = encoder if service == "encoder" else generator
            for name, body in bodies:
                response = await http.post(path, content=body, headers=JSON)
                assert response.status_code in (400, 413, 422), (path, name)
                assert len(response.content) < 3000, (path, name)


async def test_large_bodies_may_have_images(serve_generator: Serve) -> None:
    """The number of values is limited, not the size: commas of a prompt and of large images are no problem."""
    body = {"prompt": "a," * 9000, "images": ["A" * LARGE_BYTES]}
    async with serve_generator() as http:
        response = await http.post("/generate", json=body)
    assert (response.status_code, response.json()["code"]) == (415, "unsupported_image_type")


@pytest.mark.parametrize("num_fields", [MAX_FIELDS, MAX_FIELDS + 1])
async def test_the_error_names_the_limit(serve_generator: Serve, num_fields: int) -> None:
    """Up to the limit unknown fields are named, above it their number is."""
    async with serve_generator() as http:
        response = await http.post("/generate", json={f"a{index}": 1 for index in range(num_fields)})
    expected = f"body: has {num_fields} fields, more than {MAX_FIELDS}" if num_fields > MAX_FIELDS else "a0: Extra"
    assert response.json()["detail"].startswith(expected)


async def parts() -> AsyncIterator[bytes]:
    """A body without a declared length."""
    yield b'{"prompt":'
    yield b'"a red circle"}'


async def test_errors_while_receiving_keep_their_code(serve_generator: Serve) -> None:
    """An error that is raised while FastAPI receives or parses the body reaches the client as what it is."""
    async with serve_generator(max_body_bytes=10) as http:
        response = await http.post("/generate", content=parts(), headers=JSON)
    assert (response.status_code, response.json()["code"]) == (413, "payload_too_large")
