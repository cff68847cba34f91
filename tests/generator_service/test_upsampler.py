"""Prompts that a chat model rewrites before they are drawn."""

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
    """What OpenAI's API answers, as far as it matters."""
    return json.dumps(
        {"id": "x", "choices": [{"index": 0, "message": {"role": "assistant", "content": content}}]}
    ).encode()


class ChatModel:
    """Stands behind the endpoint, and beside it as the text encoder; keeps what it was asked."""

    def __init__(self, answer: Callable[[], httpx.Response]) -> None:
        self.answer = answer
        self.asked: list[httpx.Request] = []
        self.embedded: list[str] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        """One request."""
        if request.url.path.endswith("/chat/completions"):
            self.asked.append(request)
            return self.answer()
        if request.url.path == "/predict":
            self.embedded.append(json.loads(request.content)["prompt"])
            return httpx.Response(200, content=dump_torch(torch.zeros(1, 32, 384)))
        return httpx.Response(404)


def upsampler(answer: Callable[[], httpx.Response]) -> tuple[Upsampler, ChatModel]:
    """A client, and what it talks to."""
    model = ChatModel(answer)
    return Upsampler("http://chat/v1/", "m", token=SecretStr("key"), transport=httpx.MockTransport(model)), model


async def test_the_question() -> None:
    """The chat model gets FLUX.2's own instruction, the prompt, temperature 0.15 and a bounded length."""
    client, model = upsampler(lambda: httpx.Response(200, content=completion(f" {BETTER}\n")))
    async with client:
        assert await client.rewrite("a red circle") == BETTER
    (request,) = model.asked
    assert str(request.url) == "http://chat/v1/chat/completions"
    assert request.headers["authorization"] == "Bearer key"
    body = json.loads(request.content)
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.15, 512)
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert "expert prompt engineer for FLUX.2" in body["messages"][0]["content"]
    assert body["messages"][1]["content"] == "a red circle"


async def test_an_edit_is_seen() -> None:
    """For an edit the instruction is the one for edits, and the pictures come along, scaled down."""
    client, model = upsampler(lambda: httpx.Response(200, content=completion(BETTER)))
    async with client:
        await client.rewrite("make it blue", [Image.new("RGB", (2000, 1000)), Image.new("RGB", (64, 80))])
    system, user = json.loads(model.asked[0].content)["messages"]
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
    """An endpoint that is not there."""

    def answer() -> httpx.Response:
        raise error

    return answer


@pytest.mark.parametrize(
    ("answer", "error"),
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
async def test_what_goes_wrong_has_a_name(answer: Callable[[], httpx.Response], error: type[Flux2Error]) -> None:
    """Whatever the endpoint does is one of two errors, which repeat nothing of it."""
    client, model = upsampler(answer)
    async with client:
        with pytest.raises(error) as caught:
            await client.rewrite("a")
    assert "secret" not in str(caught.value)
    assert len(model.asked) == 1


async def test_the_rewritten_prompt_is_drawn_and_told(serve_generator: Serve, tmp_path: Path) -> None:
    """It is embedded instead of the client's, and is in the header, the events, OpenAI's answer and the file."""
    model = ChatModel(lambda: httpx.Response(200, content=completion(BETTER)))
    body = SMALL | {"upsample_prompt": True}
    openai = {"prompt": "a", "size": "64x64", "upsample_prompt": True, "num_inference_steps": 2}
    async with serve_generator(httpx.MockTransport(model), upsampler_url="http://chat/v1") as http:
        plain = await http.post("/generate", json=body)
        streamed = await http.post("/generate", json=body, headers=STREAM)
        drawn = await http.post("/v1/images/generations", json=openai)
        unasked = await http.post("/generate", json=SMALL)
    assert unquote(plain.headers["x-revised-prompt"]) == BETTER
    told = all_events(streamed.text)
    assert [name for name, _ in told[:3]] == ["queued", "rewritten", "encoding"]
    assert told[1][1] == {"prompt": BETTER}
    assert unquote(told[-1][1]["x-revised-prompt"]) == BETTER
    assert drawn.json()["data"][0]["revised_prompt"] == BETTER
    (tmp_path / "a.png").write_bytes(plain.content)
    assert read_provenance(tmp_path / "a.png").prompt == BETTER
    assert model.embedded == [BETTER, SMALL["prompt"]]  # the others were known
    assert "x-revised-prompt" not in unasked.headers
    assert len(model.asked) == 3


async def test_a_failure_draws_nothing(serve_generator: Serve) -> None:
    """Without the rewritten prompt there is no picture, and no place stays taken."""
    model = ChatModel(lambda: httpx.Response(500))
    async with serve_generator(httpx.MockTransport(model), upsampler_url="http://chat/v1") as http:
        answer = await http.post("/generate", json=SMALL | {"upsample_prompt": True})
        after = await http.post("/generate", json=SMALL)
    assert (answer.status_code, answer.json()["code"]) == (503, "upsampler_unavailable")
    assert "retry-after" in answer.headers
    assert (after.status_code, model.embedded) == (200, [SMALL["prompt"]])


async def test_a_service_without_an_upsampler_says_so(serve_generator: Serve) -> None:
    """Nothing is silently left out."""
    async with serve_generator() as http:
        answer = await http.post("/generate", json=SMALL | {"upsample_prompt": True})
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "upsample_prompt")
    assert "has no prompt upsampler" in answer.json()["detail"]
