"""A permanent failure of the GPU: nothing it computed is returned, and the service asks to be restarted."""

import asyncio
from typing import Any

import httpx
import pytest
import torch

from generator_service.engine.imaging import encode_image
from generator_service.pipelines.flux2 import Flux2Model
from tests.conftest import Serve
from tests.generator_service.test_generate import events
from text_encoder_service.encoder import MistralEncoder

pytestmark = pytest.mark.anyio

SMALL: dict[str, Any] = {"prompt": "a red circle", "width": 64, "height": 64, "num_inference_steps": 10, "seed": 7}
STICKY = [
    torch.AcceleratorError("CUDA error: device-side assert triggered\nCompile with `TORCH_USE_CUDA_DSA`"),
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"),
    RuntimeError("Triton Error [CUDA]: unspecified launch failure"),
]
real_generate = Flux2Model.generate


def break_at_step_7(patch: pytest.MonkeyPatch, error: Exception) -> None:
    """Make every generation fail in its middle."""

    def generate(model: Flux2Model, request: Any, on_step: Any, previews: Any) -> Any:
        def fail(step: int, is_computed: bool) -> None:
            on_step(step, is_computed)
            if step == 7:
                raise error

        return real_generate(model, request, fail, previews)

    patch.setattr(Flux2Model, "generate", generate)


async def status_of(http: httpx.AsyncClient, route: str) -> int:
    """The status of a probe."""
    return (await http.get(route)).status_code


@pytest.mark.parametrize("error", STICKY, ids=str)
async def test_no_image_is_returned_after_the_fault(
    serve_generator: Serve, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Running, waiting and later requests get a retryable 503 ``device_lost``; live is 500, ready 503."""
    async with serve_generator() as http:
        with monkeypatch.context() as broken:
            break_at_step_7(broken, error)
            responses = await asyncio.gather(*(http.post("/generate", json=SMALL | {"seed": k}) for k in range(4)))
        responses.append(await http.post("/generate", json=SMALL))  # the model itself works again
        responses.append(await http.post("/jobs", json=SMALL))
        for response in responses[:5]:
            assert (response.status_code, response.json()["code"]) == (503, "device_lost")
            assert response.headers["x-should-retry"] == "true"
            assert "CUDA" not in response.text
            assert "assert" not in response.text
        assert responses[5].status_code == 503
        assert (await status_of(http, "/health/live"), await status_of(http, "/health/ready")) == (500, 503)


async def test_a_stream_and_a_job_end_with_the_fault(serve_generator: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their last event, and the job's state, report the failure of the device."""
    async with serve_generator() as http:
        break_at_step_7(monkeypatch, STICKY[0])
        job = (await http.post("/jobs", json=SMALL)).json()
        stream = await http.post("/generate", json=SMALL, headers={"Accept": "text/event-stream"})
        last = events(stream.text)[-1]
        assert (last[0], last[1]["code"]) == ("error", "device_lost")
        job_events = events((await http.get(f"/jobs/{job['id']}/events")).text)
        assert (job_events[-1][0], job_events[-1][1]["code"]) == ("error", "device_lost")


async def test_an_image_that_is_being_encoded_is_not_returned(
    serve_generator: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image that was generated just before the fault, and whose file is not written yet, is not returned."""
    loop = asyncio.get_running_loop()
    is_encoding, may_go_on = asyncio.Event(), asyncio.Event()

    def slow_encode(*args: Any) -> bytes:
        loop.call_soon_threadsafe(is_encoding.set)
        asyncio.run_coroutine_threadsafe(may_go_on.wait(), loop).result()
        return encode_image(*args)

    monkeypatch.setattr("generator_service.engine.engine.encode_image", slow_encode)
    async with serve_generator() as http:
        before = asyncio.create_task(http.post("/generate", json=SMALL))
        await is_encoding.wait()
        break_at_step_7(monkeypatch, STICKY[0])
        assert (await http.post("/generate", json=SMALL)).json()["code"] == "device_lost"
        may_go_on.set()
        assert (await before).json()["code"] == "device_lost"


async def test_an_ordinary_error_is_not_a_fault(serve_generator: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception of the model is a 500 for its own request: the service stays live and ready, and serves the next."""
    async with serve_generator() as http:
        with monkeypatch.context() as broken:
            break_at_step_7(broken, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
            assert (await http.post("/generate", json=SMALL)).json()["code"] == "internal_error"
        assert (await http.post("/generate", json=SMALL)).status_code == 200
        assert (await status_of(http, "/health/live"), await status_of(http, "/health/ready")) == (200, 200)


@pytest.mark.parametrize("error", STICKY, ids=str)
async def test_the_encoder_returns_nothing_after_the_fault(
    serve_encoder: Serve, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The encoder behaves like the generator, for prompts in the failing batch and for all later ones."""

    def fail(_encoder: MistralEncoder, _prompts: Any) -> Any:
        raise error

    async with serve_encoder() as http:
        with monkeypatch.context() as broken:
            broken.setattr(MistralEncoder, "encode", fail)
            responses = await asyncio.gather(*(http.post("/predict", json={"prompt": str(k)}) for k in range(3)))
        responses.append(await http.post("/predict", json={"prompt": ["one", "two"]}))
        for response in responses:
            assert (response.status_code, response.json()["code"]) == (503, "device_lost")
            assert response.headers["x-should-retry"] == "true"
        assert (await status_of(http, "/health/live"), await status_of(http, "/health/ready")) == (500, 503)


async def test_an_ordinary_error_of_the_encoder_is_not_a_fault(
    serve_encoder: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next prompt is embedded."""

    def fail(_encoder: MistralEncoder, _prompts: Any) -> Any:
        raise ValueError("the tokenizer does not know this")

    async with serve_encoder() as http:
        with monkeypatch.context() as broken:
            broken.setattr(MistralEncoder, "encode", fail)
            assert (await http.post("/predict", json={"prompt": "a"})).status_code == 500
        assert (await http.post("/predict", json={"prompt": "a"})).status_code == 200
        assert await status_of(http, "/health/live") == 200
