"""Prompt upsampling by a chat model."""

import base64
import io
import json
from collections.abc import Callable
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
