"""``POST /predict`` and related routes over HTTP."""

import asyncio
import io
from collections.abc import AsyncIterator

import httpx
import pytest
import torch
from fastapi import FastAPI
from safetensors.torch import load
from starlette.types import Message, Receive, Scope, Send
from transformers import MistralModel, PreTrainedTokenizerBase

from tests.conftest import Serve
from tests.control import exchange

pytestmark = pytest.mark.anyio


async def test_one_prompt_is_one_row(serve_encoder: Serve) -> None:
    """A string gives a plain contiguous CPU tensor of one row, readable with torch.load's defaults."""
    async with serve_encoder(dtype="bfloat16") as http:
        response = await http.post("/predict", json={"prompt": "a red circle"})
    assert response.headers["content-type"] == "application/octet-stream"
    tensor = torch.load(io.BytesIO(response.content))
    assert (tensor.shape, tensor.dtype) == ((1, 32, 384), torch.bfloat16)
    assert tensor.is_contiguous()
    assert not tensor.requires_grad
    assert len(response.content) <= tensor.nbytes + 4096
    assert "x-truncated-prompts" not in response.headers


async def test_a_list_gives_a_row_each(serve_encoder: Serve) -> None:
    """A list gives its prompts' embeddings in order."""
    prompts = ["a red circle", "a blue square", "a red circle"]
    async with serve_encoder() as http:
        batch = torch.load(io.BytesIO((await http.post("/predict", json={"prompt": prompts})).content))
        single = torch.load(io.BytesIO((await http.post("/predict", json={"prompt": prompts[1]})).content))
    assert batch.shape == (3, 32, 384)
    assert torch.allclose(batch[1:2], single, atol=1e-4)
    assert torch.equal(batch[0], batch[2])


async def test_similar_prompts_are_different_prompts(serve_encoder: Serve) -> None:
    """The cache key is the exact prompt, and each prompt gets its own embedding again."""
    prompts = ["a red circle", "a red circle, a blue square", "a Red circle", "a red  circle"]
    async with serve_encoder() as http:
        first, again = [
            [(await http.post("/predict", json={"prompt": prompt})).content for prompt in prompts] for _ in range(2)
        ]
        metrics = (await http.get("/metrics")).text
    assert first[0] != first[1]
    assert first == again
    assert f'flux2_embedding_cache_total{{result="miss"}} {float(len(prompts))}' in metrics


async def test_a_body_that_is_declared_too_large_is_not_read(serve_encoder: Serve) -> None:
    """A declared length that is too large gives 413 before the first byte of the body is read."""
    async with (
        serve_encoder(max_body_bytes=1000) as http,
        exchange(http, "/predict", None, headers={"content-length": "1001"}) as client,
    ):
        problem = await client.read_until(b"}", within_s=10)
    assert b"payload_too_large" in problem


async def test_safetensors_on_request(serve_encoder: Serve) -> None:
    """``Accept: application/vnd.safetensors`` gives the same tensor as safetensors."""
    async with serve_encoder() as http:
        plain = await http.post("/predict", json={"prompt": "a red circle"})
        safe = await http.post(
            "/predict", json={"prompt": "a red circle"}, headers={"Accept": "application/vnd.safetensors"}
        )
    assert safe.headers["content-type"] == "application/vnd.safetensors"
    assert torch.equal(load(safe.content)["prompt_embeds"], torch.load(io.BytesIO(plain.content)))


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("Application/VND.safetensors;q=0.9, application/octet-stream;q=0.1", "application/vnd.safetensors"),
        ("application/vnd.safetensors;q=0, */*", "application/octet-stream"),
        ("application/octet-stream, application/vnd.safetensors;q=0.5", "application/octet-stream"),
        ("application/json", "application/octet-stream"),
    ],
)
async def test_accept_is_parsed(serve_encoder: Serve, accept: str, kind: str) -> None:
    """The format with the larger weight is sent; the default is ``torch.save``'s."""
    async with serve_encoder() as http:
        response = await http.post("/predict", json={"prompt": "a"}, headers={"Accept": accept})
    assert (response.status_code, response.headers["content-type"]) == (200, kind)


async def test_every_answer_names_the_model(serve_encoder: Serve) -> None:
    """Model and revision are in the headers of new and cached embeddings, single and in a batch, in both formats."""
    async with serve_encoder() as http:
        info = (await http.get("/info")).json()
        for accept in ("application/octet-stream", "application/vnd.safetensors"):
            for prompt in ("a", "a", ["a", "b"]):
                response = await http.post("/predict", json={"prompt": prompt}, headers={"Accept": accept})
                named = response.headers["x-model"], response.headers["x-model-revision"]
                assert named == (info["model"], info["revision"]) == ("weights", "local")


async def test_truncated_prompts_are_reported(serve_encoder: Serve) -> None:
    """The header lists the prompts that were truncated, whether they come from the device or from the cache."""
    long = "red " * 100
    async with serve_encoder() as http:
        for _ in range(2):
            response = await http.post("/predict", json={"prompt": ["short", long]})
            assert response.headers["x-truncated-prompts"] == "1"


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ({"prompt": []}, 422, "prompt"),
        ({"prompt": ["a"] * 33}, 422, "prompt"),
        ({"prompt": 7}, 422, "prompt"),
        ({"prompt": ["a", 7]}, 422, "prompt"),
        ({"prompt": None}, 422, "prompt"),
        ({"prompt": "x" * 20_001}, 422, "prompt"),
        ({}, 422, "prompt"),
        ({"prompt": "a", "prompts": "b"}, 422, "prompts"),
    ],
)
async def test_bad_bodies_name_the_field(serve_encoder: Serve, body: object, status: int, field: str) -> None:
    """Invalid values are refused with the field's name, in a body that every client can parse."""
    async with serve_encoder() as http:
        response = await http.post("/predict", json=body)
    problem = response.json()
    assert response.status_code == problem["status"] == status
    assert response.headers["content-type"] == "application/problem+json"
    assert problem["error"]["param"] == field
    assert problem["request_id"] == response.headers["x-request-id"]
    assert problem["error"]["message"] == problem["detail"]


async def test_malformed_requests_have_problem_details(serve_encoder: Serve) -> None:
    """Malformed JSON is 400, an unknown path 404, a wrong method 405, all in the same form."""
    async with serve_encoder() as http:
        broken = await http.post("/predict", content=b"{", headers={"content-type": "application/json"})
        absent, wrong = await http.get("/nowhere"), await http.get("/predict")
    assert [r.status_code for r in (broken, absent, wrong)] == [400, 404, 405]
    assert wrong.headers["allow"] == "POST"
    assert [r.json()["code"] for r in (broken, absent, wrong)] == [
        "malformed_body",
        "not_found",
        "method_not_allowed",
    ]


async def test_a_huge_prompt_never_reaches_the_tokenizer(serve_encoder: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """10 MB of prompt are refused as too large; a prompt that is only too long is refused without tokenizing it."""
    async with serve_encoder() as http:
        monkeypatch.setattr(PreTrainedTokenizerBase, "apply_chat_template", None)
        huge = await http.post("/predict", json={"prompt": "x" * 10_000_000})
        long = await http.post("/predict", json={"prompt": "x" * 20_001})
    assert (huge.status_code, huge.json()["code"]) == (413, "payload_too_large")
    assert (long.status_code, long.json()["error"]["param"]) == (422, "prompt")


async def test_a_body_without_a_length_is_limited_while_it_is_read(serve_encoder: Serve) -> None:
    """A chunked body is refused as soon as it exceeds the limit, in the same form; the rest is discarded."""

    async def long_body() -> AsyncIterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(10_000):
            yield b"x" * 1000
            sent.append(1)

    sent: list[int] = []
    num_sent_before: list[int] = []
    async with serve_encoder(max_body_bytes=5000) as http:
        app: FastAPI = http._transport.app  # type: ignore[attr-defined]  # httpx keeps it private

        async def noting_the_start(scope: Scope, receive: Receive, send: Send) -> None:
            async def send_and_note(message: Message) -> None:
                num_sent_before.append(len(sent))
                await send(message)

            await app(scope, receive, send_and_note)

        async with httpx.AsyncClient(transport=httpx.ASGITransport(noting_the_start), base_url="http://test") as client:
            response = await client.post("/predict", content=long_body(), headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["code"]) == (413, "payload_too_large")
    assert num_sent_before[0] < 10


async def test_concurrent_prompts_share_forward_passes(serve_encoder: Serve) -> None:
    """16 prompts at once need far fewer than 16 forward passes, and a repeated one needs none."""
    async with serve_encoder() as http:
        prompts = [f"a red circle {n}" for n in range(16)]
        await asyncio.gather(*(http.post("/predict", json={"prompt": p}) for p in prompts))
        await http.post("/predict", json={"prompt": prompts[0]})
        metrics = (await http.get("/metrics")).text
    lines = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if line and not line.startswith("#"))
    assert float(lines['flux2_stage_seconds_count{stage="encode"}']) <= 1 + 4  # the first warmed up
    assert float(lines['flux2_embedding_cache_total{result="hit"}']) == 1


async def test_prompts_that_exceed_the_queue_are_refused_together(serve_encoder: Serve) -> None:
    """A list that exceeds the queue is 429, and none of its prompts stays in the queue."""
    async with serve_encoder(max_waiting=1, max_batch=1) as http:
        refused = await http.post("/predict", json={"prompt": [f"a red circle {n}" for n in range(8)]})
        metrics = (await http.get("/metrics")).text
        after = await http.post("/predict", json={"prompt": "a"})
    assert (refused.status_code, refused.json()["code"]) == (429, "busy")
    assert "retry-after" in refused.headers
    assert "flux2_queue_depth 0.0" in metrics
    assert after.status_code == 200


async def test_a_batch_that_does_not_fit_is_oom(serve_encoder: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """An out-of-memory error is 503 ``oom`` without a retry or CUDA's message; later prompts are served."""

    def too_large(*_args: object, **_kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory at 0x7f")

    async with serve_encoder() as http:
        with monkeypatch.context() as small_gpu:
            small_gpu.setattr(MistralModel, "forward", too_large)
            refused = await http.post("/predict", json={"prompt": ["a", "b"]})
        after = await http.post("/predict", json={"prompt": ["a", "b"]})
    assert (refused.status_code, refused.json()["code"]) == (503, "oom")
    assert refused.headers["x-should-retry"] == "false"
    assert "0x7f" not in refused.text
    assert after.status_code == 200


async def test_info_and_health(serve_encoder: Serve) -> None:
    """The service describes its embeddings, and is alive and ready."""
    async with serve_encoder() as http:
        info = (await http.get("/info")).json()
        live, ready = await http.get("/health/live"), await http.get("/health/ready")
    assert info["hidden_layers"] == [1, 2, 3]
    assert (info["hidden_size"], info["max_sequence_length"], info["dtype"]) == (128, 32, "float32")
    assert (live.status_code, ready.status_code) == (200, 200)


@pytest.mark.parametrize(("token", "status"), [(None, 401), ("wrong", 401), ("right", 200)])
async def test_api_keys_can_be_required(serve_encoder: Serve, token: str | None, status: int) -> None:
    """With API keys only requests that carry one are served; health routes stay open."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with serve_encoder(token="right") as http:
        response = await http.post("/predict", json={"prompt": "a"}, headers=headers)
        assert (await http.get("/health/live")).status_code == 200
    assert response.status_code == status
