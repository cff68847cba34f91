"""What the latency model learns, on a simulated clock where a computed step takes ten seconds and all else no time."""

import re
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from generator_service.pipelines.flux2 import Flux2Model
from tests.conftest import Serve
from tests.control import Clock, ModelControl
from tests.generator_service.test_generate import STREAM
from tests.generator_service.test_lora import adapter_file

pytestmark = pytest.mark.anyio

STEP_S = 10.0
UNCHANGED = pytest.approx([STEP_S] * 5, rel=0.1)
BODY: dict[str, Any] = {"prompt": "a red circle", "num_inference_steps": 12, "seed": 7}


@pytest.fixture(autouse=True)
def slow_steps(clock: Clock, model_control: ModelControl) -> None:
    """A computed step takes ``STEP_S``."""
    model_control.on_step = lambda: clock.advance(STEP_S)


async def seconds_per_step(http: httpx.AsyncClient) -> list[float]:
    """The expected duration of a computed step in each cache mode, from ``GET /modes``."""
    modes = (await http.get("/modes", params={"num_inference_steps": BODY["num_inference_steps"]})).json()["modes"]
    assert [mode["name"] for mode in modes] == ["none", "slow", "medium", "fast", "ultra"]
    return [mode["estimate_ms"] / 1000 / mode["computed"] for mode in modes]


async def generate(http: httpx.AsyncClient, headers: dict[str, str] | None = None, **fields: object) -> httpx.Response:
    """The response with an image."""
    response = await http.post("/generate", json=BODY | fields, headers=headers)
    assert response.status_code == 200, response.text
    return response


async def test_an_image_is_learned_from(serve_generator: Serve, clock: Clock, model_control: ModelControl) -> None:
    """An image that took twice as long raises the estimate."""
    async with serve_generator() as http:
        assert await seconds_per_step(http) == UNCHANGED
        model_control.on_step = lambda: clock.advance(2 * STEP_S)
        await generate(http, cache="none")
        assert (await seconds_per_step(http))[0] > 1.5 * STEP_S


async def test_previews_are_not_learned(serve_generator: Serve, clock: Clock, model_control: ModelControl) -> None:
    """The time of previews is excluded from the estimate, which is for images without previews."""
    decodes = []

    def slow_previews() -> None:
        decodes.append(1)
        if len(decodes) <= 3:  # the last one decodes the image itself
            clock.advance(100 * STEP_S)

    async with serve_generator() as http:
        model_control.on_decode = slow_previews
        await generate(http, STREAM, cache="none", previews=3)
        assert len(decodes) == 4
        assert await seconds_per_step(http) == UNCHANGED


async def test_a_regenerated_image_is_not_learned(serve_generator: Serve, model_control: ModelControl) -> None:
    """An image that was generated twice, because the first run was not finite, is not used for the estimate."""
    runs: list[int] = []

    def not_a_number(velocity: torch.Tensor) -> torch.Tensor:
        runs.append(1)
        return torch.full_like(velocity, float("nan")) if len(runs) <= 2 else velocity

    async with serve_generator() as http:
        model_control.change = not_a_number
        response = await generate(http, cache=2)
        assert response.headers["x-steps-computed"] == "12"
        assert await seconds_per_step(http) == UNCHANGED


async def test_adapters_are_not_learned(
    serve_generator: Serve, clock: Clock, model_control: ModelControl, demo: Flux2Model, tmp_path: Path
) -> None:
    """Steps are slower with LoRA adapters, so such an image does not change the estimate for those without."""
    adapter_file(tmp_path / "ink.safetensors", demo)
    async with serve_generator(lora_dir=tmp_path) as http:
        model_control.on_step = lambda: clock.advance(5 * STEP_S)
        await generate(http, cache="none", lora="ink")
        assert await seconds_per_step(http) == UNCHANGED


async def test_max_latency_chooses_the_number_of_steps(serve_generator: Serve) -> None:
    """``max_latency_ms`` computes as many steps as fit into it, at most all."""
    async with serve_generator() as http:
        plenty = await generate(http, max_latency_ms=1_000_000)
        half = await generate(http, max_latency_ms=round(1000 * 6.5 * STEP_S))
        impossible = await http.post("/generate", json=BODY | {"max_latency_ms": 1})
        both = await http.post("/generate", json=BODY | {"max_latency_ms": 100_000, "cache": "fast"})
    assert plenty.headers["x-steps-computed"] == "12"
    assert half.headers["x-steps-computed"] == "6"
    assert float(half.headers["x-estimate-ms"]) <= 1000 * 6.5 * STEP_S
    for refused in (impossible, both):
        assert (refused.status_code, refused.json()["error"]["param"]) == (422, "max_latency_ms")
    assert re.search(r"take at least \d+ ms, with 2 of them computed", impossible.json()["detail"])


async def test_a_latency_is_for_the_whole_request(serve_generator: Serve) -> None:
    """``max_latency_ms`` covers all ``num_images``: each of two images gets half of the steps that one would get."""
    limit: dict[str, Any] = {"max_latency_ms": round(1000 * 8.5 * STEP_S)}
    async with serve_generator() as http:
        one = await generate(http, **limit)
        two = await generate(http, {"Accept": "application/json"}, **limit, num_images=2)
    assert one.headers["x-steps-computed"] == "8"
    assert [image["x-steps-computed"] for image in two.json()["images"]] == ["4", "4"]


async def test_a_latency_never_goes_below_the_published_schedules(serve_generator: Serve) -> None:
    """A latency that even ``ultra`` exceeds is refused with the shortest possible time, and nothing is generated."""
    async with serve_generator() as http:
        refused = await http.post(
            "/generate", json=BODY | {"num_inference_steps": 50, "max_latency_ms": round(1000 * 9.6 * STEP_S)}
        )
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "max_latency_ms")
    assert "with 10 of them computed" in refused.json()["detail"]
