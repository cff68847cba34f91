"""Prompt upsampling by a chat model."""

import asyncio
import base64
import io
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import pytest
import torch
from PIL import Image
from pydantic import SecretStr

from flux2_shared.errors import Flux2Error
from flux2_shared.wire import dump_torch
from generator_service.clients.upsampler import MAX_PROMPT_CHARS, MAX_RESPONSE_BYTES, Upsampler
from generator_service.engine.imaging import read_provenance
from generator_service.errors import BadUpsamplerResponse, UpsamplerUnavailable
from tests.conftest import Serve
from tests.generator_service.test_generate import SMALL, STREAM, all_events

pytestmark = pytest.mark.anyio

BETTER = "a red circle, glossy, café light: 100 % studio"


def completion(content: Any) -> bytes:
    """A response of OpenAI's chat API, reduced to the fields that are read."""
    return json.dumps(
        {"id": "x", "choices": [{"index": 0, "message": {"role": "assistant", "content": content}}]}
    ).encode()


class ChatModel:
    """A chat model, and a text encoder at the same host; records what it was sent."""

    def __init__(self, reply: Callable[[], httpx.Response]) -> None:
        self.reply = reply
        self.requests: list[httpx.Request] = []
        self.embedded: list[str] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/chat/completions"):
            self.requests.append(request)
            return self.reply()
        if request.url.path == "/predict":
            self.embedded.append(json.loads(request.content)["prompt"])
            return httpx.Response(200, content=dump_torch(torch.zeros(1, 32, 384)))
        return httpx.Response(404)


def upsampler(reply: Callable[[], httpx.Response]) -> tuple[Upsampler, ChatModel]:
    """A client, and the chat model that it uses."""
    model = ChatModel(reply)
    return Upsampler("http://chat/v1/", "m", token=SecretStr("key"), transport=httpx.MockTransport(model)), model


async def test_the_request_to_the_chat_model() -> None:
    """The chat model gets FLUX.2's own instruction, the prompt, temperature 0.15 and a bounded length."""
    client, model = upsampler(lambda: httpx.Response(200, content=completion(f" {BETTER}\n")))
    async with client:
        assert await client.rewrite("a red circle") == BETTER
    (request,) = model.requests
    assert str(request.url) == "http://chat/v1/chat/completions"
    assert request.headers["authorization"] == "Bearer key"
    body = json.loads(request.content)
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.15, 512)
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert "expert prompt engineer for FLUX.2" in body["messages"][0]["content"]
    assert body["messages"][1]["content"] == "a red circle"


async def test_reference_images_are_sent() -> None:
    """For an edit the instruction is the one for edits, and scaled-down reference images are included."""
    client, model = upsampler(lambda: httpx.Response(200, content=completion(BETTER)))
    async with client:
        await client.rewrite("make it blue", [Image.new("RGB", (2000, 1000)), Image.new("RGB", (64, 80))])
    system, user = json.loads(model.requests[0].content)["messages"]
    first, second, text = user["content"]
    sizes = []
    for part in (first, second):
        kind, data = part["image_url"]["url"].split(",")
        assert (part["type"], kind) == ("image_url", "data:image/jpeg;base64")
        sizes.append(Image.open(io.BytesIO(base64.b64decode(data))).size)
    assert sizes == [(1086, 543), (64, 80)]
    assert text == {"type": "text", "text": "make it blue"}
    assert "editing" in system["content"]


def fails(error: Exception) -> Callable[[], httpx.Response]:
    """An endpoint that cannot be reached."""

    def reply() -> httpx.Response:
        raise error

    return reply


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (fails(httpx.ConnectError("secret")), UpsamplerUnavailable),
        (fails(httpx.ReadTimeout("secret")), UpsamplerUnavailable),
        (lambda: httpx.Response(503, text="secret"), UpsamplerUnavailable),
        (lambda: httpx.Response(429, text="secret"), UpsamplerUnavailable),
        (lambda: httpx.Response(401, text="secret"), BadUpsamplerResponse),
        (lambda: httpx.Response(302, headers={"location": "http://secret/"}), BadUpsamplerResponse),
        (lambda: httpx.Response(200, text="secret"), BadUpsamplerResponse),
        (lambda: httpx.Response(200, json={"choices": []}), BadUpsamplerResponse),
        (lambda: httpx.Response(200, json={"choices": [{"message": {"content": ["secret"]}}]}), BadUpsamplerResponse),
        (lambda: httpx.Response(200, content=completion("  ")), BadUpsamplerResponse),
        (lambda: httpx.Response(200, content=completion("s" * (MAX_PROMPT_CHARS + 1))), BadUpsamplerResponse),
        (lambda: httpx.Response(200, content=bytes(MAX_RESPONSE_BYTES + 1)), BadUpsamplerResponse),
    ],
)
async def test_failures_are_own_errors(reply: Callable[[], httpx.Response], error: type[Flux2Error]) -> None:
    """Every failure of the endpoint is one of two errors, which quote nothing from its response."""
    client, model = upsampler(reply)
    async with client:
        with pytest.raises(error) as caught:
            await client.rewrite("a")
    assert "secret" not in str(caught.value)
    assert len(model.requests) == 1


def message(content: str) -> bytes:
    """A response whose content is this JSON text."""
    return b'{"choices":[{"message":{"role":"assistant","content":' + content.encode() + b"}}]}"


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 200_000,
        b'{"choices":' * 20_000,
        b'{"unknown":' + b"[" * 100_000 + b"]" * 100_000 + b',"choices":[]}',
        message('"\\ud800"'),
        message('"a\\udfffb"'),
        message("NaN"),
        message("1" * 10_000),
        message("-1e999"),
        message("null"),
        message("true"),
        message('{"text":"a"}'),
        message('["a"]'),
        message('"\\u200b\\u00a0\\n"'),
        message('"\\u0000"'),
        message('"' + "😀" * 7000 + '"'),
        message('"a"')[:-3],
        message('"a"').replace(b'"a"', b'"\xff"'),
        message('"a"').decode().encode("utf-16"),
        b"",
        b"null",
        b"[]",
        b'{"choices":{}}',
        b'{"choices":[null]}',
        b'{"choices":[{"message":"a"}]}',
        b'{"choices":[],"choices":null}',
    ],
    ids=lambda body: repr(body[:40]),
)
async def test_a_malformed_completion_is_502(body: bytes) -> None:
    """Nesting, lone surrogates, numbers, other types, nothing visible, too long, truncated or other bytes."""
    client, _ = upsampler(lambda: httpx.Response(200, content=body))
    async with client:
        with pytest.raises(BadUpsamplerResponse):
            await client.rewrite("a")


@pytest.mark.parametrize(
    ("body", "prompt"),
    [
        (message('"a\\tb\\u0001\\n"'), "a\tb\x01"),
        (message('"\\ud83d\\ude00"'), "😀"),
        (message('"x"').replace(b'{"choices"', b'{"usage":{"x":1e999,"y":NaN},"choices":[],"choices"'), "x"),
        (message('"x","content":"y"'), "y"),
    ],
)
async def test_an_unusual_completion_is_read(body: bytes, prompt: str) -> None:
    """Control characters stay, pairs of surrogates are one character, of repeated names the last counts."""
    client, _ = upsampler(lambda: httpx.Response(200, content=body))
    async with client:
        assert await client.rewrite("a") == prompt


async def drips(_request: httpx.Request) -> httpx.Response:
    """Send a byte now and then, for ever."""

    async def chunks() -> AsyncIterator[bytes]:
        while True:
            yield b" "
            await asyncio.sleep(0.01)

    return httpx.Response(200, content=chunks())


async def hangs(_request: httpx.Request) -> httpx.Response:
    """Accept the request and answer nothing."""
    await asyncio.Event().wait()
    raise AssertionError


@pytest.mark.parametrize("model", [drips, hangs])
async def test_there_is_one_time_limit(model: Callable[[httpx.Request], Awaitable[httpx.Response]]) -> None:
    """The limit holds for connecting, sending and reading together."""
    transport = httpx.MockTransport(model)  # type: ignore[arg-type]  # it accepts coroutines
    async with Upsampler("http://chat/v1/", "m", timeout_s=0.1, transport=transport) as client:
        with pytest.raises(UpsamplerUnavailable, match=r"within 0\.1 s"):
            await client.rewrite("a")


async def test_images_are_scaled_on_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither scaling nor encoding them as JSON stops the event loop."""
    threads: set[str] = set()
    resize, dumps = Image.Image.resize, json.dumps

    def watched_resize(image: Image.Image, *args: Any, **kwargs: Any) -> Image.Image:
        threads.add(threading.current_thread().name)
        return resize(image, *args, **kwargs)

    def watched_dumps(*args: Any, **kwargs: Any) -> str:
        if "messages" in args[0]:
            threads.add(threading.current_thread().name)
        return dumps(*args, **kwargs)

    client, _ = upsampler(lambda: httpx.Response(200, content=completion(BETTER)))
    monkeypatch.setattr(Image.Image, "resize", watched_resize)
    monkeypatch.setattr(json, "dumps", watched_dumps)
    async with client:
        await client.rewrite("make it blue", [Image.new("RGB", (2000, 1000))])
    assert threads == {"upsampling_0"}


async def test_the_upsampled_prompt_is_used_and_reported(serve_generator: Serve, tmp_path: Path) -> None:
    """It is embedded instead of the client's, and is in the header, the events, OpenAI's response and the file."""
    model = ChatModel(lambda: httpx.Response(200, content=completion(BETTER)))
    body = SMALL | {"upsample_prompt": True}
    openai = {"prompt": "a", "size": "64x64", "upsample_prompt": True, "num_inference_steps": 2}
    async with serve_generator(httpx.MockTransport(model), upsampler_url="http://chat/v1") as http:
        plain = await http.post("/generate", json=body)
        streamed = await http.post("/generate", json=body, headers=STREAM)
        openai_response = await http.post("/v1/images/generations", json=openai)
        plain_response = await http.post("/generate", json=SMALL)
    assert unquote(plain.headers["x-revised-prompt"]) == BETTER
    stream_events = all_events(streamed.text)
    assert [name for name, _ in stream_events[:3]] == ["queued", "rewritten", "encoding"]
    assert stream_events[1][1] == {"prompt": BETTER}
    assert unquote(stream_events[-1][1]["x-revised-prompt"]) == BETTER
    assert openai_response.json()["data"][0]["revised_prompt"] == BETTER
    (tmp_path / "a.png").write_bytes(plain.content)
    assert read_provenance(tmp_path / "a.png").prompt == BETTER
    assert model.embedded == [BETTER, SMALL["prompt"]]  # the others were cached
    assert "x-revised-prompt" not in plain_response.headers
    assert len(model.requests) == 3


async def test_a_failed_upsampling_frees_the_slot(serve_generator: Serve) -> None:
    """Without the upsampled prompt no image is generated, and the slot is freed."""
    model = ChatModel(lambda: httpx.Response(500))
    async with serve_generator(httpx.MockTransport(model), upsampler_url="http://chat/v1") as http:
        response = await http.post("/generate", json=SMALL | {"upsample_prompt": True})
        after = await http.post("/generate", json=SMALL)
    assert (response.status_code, response.json()["code"]) == (503, "upsampler_unavailable")
    assert "retry-after" in response.headers
    assert (after.status_code, model.embedded) == (200, [SMALL["prompt"]])


async def test_upsampling_needs_an_upsampler(serve_generator: Serve) -> None:
    """The field is refused, not silently ignored."""
    async with serve_generator() as http:
        response = await http.post("/generate", json=SMALL | {"upsample_prompt": True})
    assert (response.status_code, response.json()["error"]["param"]) == (422, "upsample_prompt")
    assert "has no prompt upsampler" in response.json()["detail"]
