"""Batching: several images in one run."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from flux2_shared.errors import OutOfMemory
from generator_service.errors import NonFiniteOutput
from generator_service.lemica import schedule_for
from generator_service.pipelines.flux2 import Flux2Model, GeneratedImage
from generator_service.pipelines.params import Params
from tests.conftest import Serve
from tests.control import ModelControl, until, until_queued
from tests.generator_service.test_generate import SMALL, events, metrics, pixels
from tests.memory_errors import KINDS

TOLERANCE = 1e-4
"""For final latents, whose values are around 1. Products of more rows are summed in another order, which changes the
float32 rounding of a run. 2e-5 was measured."""


def wanted(seed: int, cache: str | int = "medium") -> Params:
    noise = torch.randn(1, 32, 384, generator=torch.Generator().manual_seed(seed))
    return Params(noise, 64, 64, 4.0, seed, schedule_for(cache, 20))


@pytest.mark.parametrize("cache", ["none", "medium", 5])
def test_rows_equal_single_results(demo: Flux2Model, cache: str | int) -> None:
    """Each image of a batch equals the one generated alone up to rounding, with its own prompt and seed."""
    requests = [wanted(seed, cache) for seed in range(3)]
    together, alone = demo.generate_batch(requests), [demo.generate(request) for request in requests]
    for ours, single in zip(together, alone, strict=True):
        torch.testing.assert_close(ours.latents, single.latents, atol=TOLERANCE, rtol=0)
        values = [np.asarray(image.image, dtype=int) for image in (ours, single)]
        assert abs(values[0] - values[1]).max() <= 1
        assert ours.schedule == single.schedule


class Batches:
    """The seeds of each batch that was generated."""

    def __init__(self) -> None:
        self.seeds: list[list[int]] = []
        self.fails_with: Exception | None = None


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> Batches:
    """Record every batch, and raise the error that a test sets."""
    recorded, original = Batches(), Flux2Model.generate_batch

    def generate_batch(
        self: Flux2Model, requests: Sequence[Params], on_step: Callable[[int, bool], None] | None = None
    ) -> list[GeneratedImage]:
        recorded.seeds.append([request.seed for request in requests])
        if recorded.fails_with is not None:
            raise recorded.fails_with
        return original(self, requests, on_step)

    monkeypatch.setattr(Flux2Model, "generate_batch", generate_batch)
    return recorded


async def responses_behind_a_running_image(
    http: httpx.AsyncClient, control: ModelControl, bodies: list[dict[str, Any]]
) -> list[httpx.Response]:
    """The responses to requests that were queued in this order while another image was generated."""
    with control.holding():
        calls = [asyncio.create_task(http.post("/generate", json=SMALL))]
        await control.is_held()
        for body in bodies:
            calls.append(asyncio.create_task(http.post("/generate", json=body)))
            await until_queued(http, len(calls))
    _, *responses = await asyncio.gather(*calls)
    return responses


def small(seed: int, **more: Any) -> dict[str, Any]:
    """The body of an image that may share a run."""
    return SMALL | {"seed": seed, "num_inference_steps": 8} | more


@pytest.mark.anyio
async def test_compatible_requests_share_a_run(
    serve_generator: Serve, model_control: ModelControl, batches: Batches
) -> None:
    """Images of the same size, guidance and schedule share a run; other images run separately, and none is starved."""
    bodies = [small(1), small(2, guidance_scale=3.0), small(3), small(4, width=96), small(5), small(6)]
    async with serve_generator(max_batch=3) as http:
        responses = await responses_behind_a_running_image(http, model_control, bodies)
        alone = [await http.post("/generate", json=body) for body in bodies]
    assert [response.status_code for response in responses] == [200] * 6
    assert batches.seeds == [[1, 3, 5]]
    for ours, single in zip(responses, alone, strict=True):
        assert abs(pixels(ours.content).astype(int) - pixels(single.content)).max() <= 1
        assert ours.headers["x-schedule"] == single.headers["x-schedule"]


@pytest.mark.anyio
@pytest.mark.parametrize("change", [{"cache": 2}, {"height": 80}, {"guidance_scale": 2.0}], ids=str)
async def test_incompatible_requests_run_separately(
    serve_generator: Serve, model_control: ModelControl, change: dict[str, Any]
) -> None:
    """Requests that differ in schedule, height or guidance never share a run; each gets the image it gets alone."""
    bodies = [small(1), small(2, **change)]
    async with serve_generator(max_batch=2) as http:
        alone = [await http.post("/generate", json=body) for body in bodies]
        responses = await responses_behind_a_running_image(http, model_control, bodies)
    for ours, single in zip(responses, alone, strict=True):
        assert np.array_equal(pixels(ours.content), pixels(single.content))
        for name in ("x-schedule", "x-steps-computed"):
            assert ours.headers[name] == single.headers[name]


@pytest.mark.anyio
async def test_it_is_off_by_default(serve_generator: Serve, model_control: ModelControl, batches: Batches) -> None:
    """Without ``max_batch`` every image runs alone."""
    async with serve_generator() as http:
        await responses_behind_a_running_image(http, model_control, [small(1), small(2)])
    assert batches.seeds == []


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("settings", "more"),
    [({"max_batch_pixels": 64 * 64 - 1}, {}), ({}, {"previews": 2})],
    ids=["large", "with previews"],
)
async def test_large_and_followed_images_run_alone(
    serve_generator: Serve,
    model_control: ModelControl,
    batches: Batches,
    settings: dict[str, int],
    more: dict[str, Any],
) -> None:
    """Large images and images with previews or streamed events never share a run."""
    async with serve_generator(max_batch=4, **settings) as http:
        responses = await responses_behind_a_running_image(http, model_control, [small(1, **more), small(2, **more)])
    assert [response.status_code for response in responses] == [200] * 2
    assert batches.seeds == []


@pytest.mark.anyio
@pytest.mark.parametrize("error", [OutOfMemory("too large"), NonFiniteOutput("no image")])
async def test_images_of_a_failed_batch_run_one_by_one(
    serve_generator: Serve, model_control: ModelControl, batches: Batches, error: Exception
) -> None:
    """If a batch fails, its images are generated one by one, and each request succeeds."""
    batches.fails_with = error
    async with serve_generator(max_batch=4) as http:
        responses = await responses_behind_a_running_image(http, model_control, [small(1), small(2)])
    assert batches.seeds == [[1, 2]]
    assert [response.status_code for response in responses] == [200] * 2


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["torch", "cublas", "cudnn", "compiler"])
async def test_images_of_a_batch_that_does_not_fit_run_one_by_one(
    serve_generator: Serve, model_control: ModelControl, batches: Batches, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """If a batch runs out of memory, in any library, its images are generated one by one, and each request succeeds."""
    alone = Flux2Model._generate

    def generate(model: Flux2Model, requests: Sequence[Params], *more: Any, **options: Any) -> Any:
        if len(requests) > 1:
            error = KINDS[kind]()
            raise error
        return alone(model, requests, *more, **options)

    monkeypatch.setattr(Flux2Model, "_generate", generate)
    async with serve_generator(max_batch=4) as http:
        responses = await responses_behind_a_running_image(http, model_control, [small(1), small(2)])
    assert batches.seeds == [[1, 2]]
    assert [response.status_code for response in responses] == [200] * 2


@pytest.mark.anyio
async def test_cancelling_one_job_of_a_batch_keeps_the_others(
    serve_generator: Serve, model_control: ModelControl, batches: Batches
) -> None:
    """A cancelled job leaves its batch; the other image is finished, and all its steps are reported."""
    long = small(1) | {"num_inference_steps": 60}
    async with serve_generator(max_batch=4) as http:
        with model_control.holding():
            first = asyncio.create_task(http.post("/generate", json=SMALL))
            await model_control.is_held()
            cancelled, kept = [(await http.post("/jobs", json=long | {"seed": seed})).json()["id"] for seed in (1, 2)]
            await until_queued(http, 3)
        assert (await first).status_code == 200
        await until(lambda: batches.seeds != [])
        await http.delete(f"/jobs/{cancelled}")
        job_events = events((await http.get(f"/jobs/{kept}/events")).text)
        assert (await http.get(f"/jobs/{cancelled}")).json()["status"] == "cancelled"
        assert (await metrics(http))["flux2_queue_depth"] == 0
    assert batches.seeds == [[1, 2]]
    assert [name for name, _ in job_events] == ["step"] * 60 + ["completed"]


def test_images_of_a_batch_report_the_time_of_their_run(demo: Flux2Model) -> None:
    """Each image of a batch reports the duration of the whole run."""
    images = demo.generate_batch([wanted(1), replace(wanted(2), seed=3)])
    assert images[0].denoise_s == images[1].denoise_s > 0
