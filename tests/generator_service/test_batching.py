"""Pictures that share a run."""

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
"""Of final latents, whose values are around 1: float32 rounding over a run, since products of more rows are summed up
in another order. 2e-5 was seen."""


def wanted(seed: int, cache: str | int = "medium") -> Params:
    """A small picture."""
    noise = torch.randn(1, 32, 384, generator=torch.Generator().manual_seed(seed))
    return Params(noise, 64, 64, 4.0, seed, schedule_for(cache, 20))


@pytest.mark.parametrize("cache", ["none", "medium", 5])
def test_rows_are_what_they_are_alone(demo: Flux2Model, cache: str | int) -> None:
    """Each picture of a batch equals the one that is drawn alone up to rounding, by its own prompt and seed."""
    requests = [wanted(seed, cache) for seed in range(3)]
    together, alone = demo.generate_batch(requests), [demo.generate(request) for request in requests]
    for ours, single in zip(together, alone, strict=True):
        torch.testing.assert_close(ours.latents, single.latents, atol=TOLERANCE, rtol=0)
        values = [np.asarray(picture.image, dtype=int) for picture in (ours, single)]
        assert abs(values[0] - values[1]).max() <= 1
        assert ours.schedule == single.schedule


class Batches:
    """The seeds of the batches that were drawn."""

    def __init__(self) -> None:
        self.seeds: list[list[int]] = []
        self.fails_with: Exception | None = None


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> Batches:
    """Notes every batch, and lets it fail if a test wants that."""
    noted, draw = Batches(), Flux2Model.generate_batch

    def generate_batch(
        self: Flux2Model, requests: Sequence[Params], on_step: Callable[[int, bool], None] | None = None
    ) -> list[GeneratedImage]:
        noted.seeds.append([request.seed for request in requests])
        if noted.fails_with is not None:
            raise noted.fails_with
        return draw(self, requests, on_step)

    monkeypatch.setattr(Flux2Model, "generate_batch", generate_batch)
    return noted


async def drawn_behind_another(
    http: httpx.AsyncClient, control: ModelControl, bodies: list[dict[str, Any]]
) -> list[httpx.Response]:
    """Answers to requests that all waited, in this order, for an image that was being generated."""
    with control.holding():
        calls = [asyncio.create_task(http.post("/generate", json=SMALL))]
        await control.is_held()
        for body in bodies:
            calls.append(asyncio.create_task(http.post("/generate", json=body)))
            await until_queued(http, len(calls))
    _, *answers = await asyncio.gather(*calls)
    return answers


def small(seed: int, **more: Any) -> dict[str, Any]:
    """A body whose picture can share a run."""
    return SMALL | {"seed": seed, "num_inference_steps": 8} | more


@pytest.mark.anyio
async def test_what_fits_together_is_drawn_together(
    serve_generator: Serve, model_control: ModelControl, batches: Batches
) -> None:
    """Pictures of the same size, guidance and schedule share a run; others do not, and none is starved."""
    bodies = [small(1), small(2, guidance_scale=3.0), small(3), small(4, width=96), small(5), small(6)]
    async with serve_generator(max_batch=3) as http:
        answers = await drawn_behind_another(http, model_control, bodies)
        alone = [await http.post("/generate", json=body) for body in bodies]
    assert [answer.status_code for answer in answers] == [200] * 6
    assert batches.seeds == [[1, 3, 5]]
    for ours, single in zip(answers, alone, strict=True):
        assert abs(pixels(ours.content).astype(int) - pixels(single.content)).max() <= 1
        assert ours.headers["x-schedule"] == single.headers["x-schedule"]


@pytest.mark.anyio
@pytest.mark.parametrize("change", [{"cache": 2}, {"height": 80}, {"guidance_scale": 2.0}], ids=str)
async def test_what_differs_is_generated_apart(
    serve_generator: Serve, model_control: ModelControl, change: dict[str, Any]
) -> None:
    """Requests with another schedule, height or guidance never share a run: each gets the image it gets alone."""
    bodies = [small(1), small(2, **change)]
    async with serve_generator(max_batch=2) as http:
        alone = [await http.post("/generate", json=body) for body in bodies]
        answers = await drawn_behind_another(http, model_control, bodies)
    for ours, single in zip(answers, alone, strict=True):
        assert np.array_equal(pixels(ours.content), pixels(single.content))
        for name in ("x-schedule", "x-steps-computed"):
            assert ours.headers[name] == single.headers[name]


@pytest.mark.anyio
async def test_it_is_off_by_default(serve_generator: Serve, model_control: ModelControl, batches: Batches) -> None:
    """Unless it is wanted, every picture is drawn alone."""
    async with serve_generator() as http:
        await drawn_behind_another(http, model_control, [small(1), small(2)])
    assert batches.seeds == []


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("settings", "more"),
    [({"max_batch_pixels": 64 * 64 - 1}, {}), ({}, {"previews": 2})],
    ids=["large", "with previews"],
)
async def test_what_is_drawn_alone(
    serve_generator: Serve,
    model_control: ModelControl,
    batches: Batches,
    settings: dict[str, int],
    more: dict[str, Any],
) -> None:
    """Large pictures, and those that somebody watches, share no run."""
    async with serve_generator(max_batch=4, **settings) as http:
        answers = await drawn_behind_another(http, model_control, [small(1, **more), small(2, **more)])
    assert [answer.status_code for answer in answers] == [200] * 2
    assert batches.seeds == []


@pytest.mark.anyio
@pytest.mark.parametrize("error", [OutOfMemory("too large"), NonFiniteOutput("no picture")])
async def test_a_batch_that_fails_is_drawn_one_by_one(
    serve_generator: Serve, model_control: ModelControl, batches: Batches, error: Exception
) -> None:
    """What several pictures together cannot do harms none of them."""
    batches.fails_with = error
    async with serve_generator(max_batch=4) as http:
        answers = await drawn_behind_another(http, model_control, [small(1), small(2)])
    assert batches.seeds == [[1, 2]]
    assert [answer.status_code for answer in answers] == [200] * 2


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["torch", "cublas", "cudnn", "compiler"])
async def test_a_batch_that_does_not_fit_is_drawn_one_by_one(
    serve_generator: Serve, model_control: ModelControl, batches: Batches, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Whichever library has too little memory for several pictures together, each of them is delivered."""
    alone = Flux2Model._generate

    def generate(model: Flux2Model, requests: Sequence[Params], *more: Any, **options: Any) -> Any:
        if len(requests) > 1:
            error = KINDS[kind]()
            raise error
        return alone(model, requests, *more, **options)

    monkeypatch.setattr(Flux2Model, "_generate", generate)
    async with serve_generator(max_batch=4) as http:
        answers = await drawn_behind_another(http, model_control, [small(1), small(2)])
    assert batches.seeds == [[1, 2]]
    assert [answer.status_code for answer in answers] == [200] * 2


@pytest.mark.anyio
async def test_who_leaves_stops_nobody_else(
    serve_generator: Serve, model_control: ModelControl, batches: Batches
) -> None:
    """A job of a batch that is cancelled is cancelled; the other's picture is finished, and all its steps are told."""
    long = small(1) | {"num_inference_steps": 60}
    async with serve_generator(max_batch=4) as http:
        with model_control.holding():
            first = asyncio.create_task(http.post("/generate", json=SMALL))
            await model_control.is_held()
            gone, stays = [(await http.post("/jobs", json=long | {"seed": seed})).json()["id"] for seed in (1, 2)]
            await until_queued(http, 3)
        assert (await first).status_code == 200
        await until(lambda: batches.seeds != [])
        await http.delete(f"/jobs/{gone}")
        told = events((await http.get(f"/jobs/{stays}/events")).text)
        assert (await http.get(f"/jobs/{gone}")).json()["status"] == "cancelled"
        assert (await metrics(http))["flux2_queue_depth"] == 0
    assert batches.seeds == [[1, 2]]
    assert [name for name, _ in told] == ["step"] * 60 + ["completed"]


def test_a_batch_costs_what_it_costs(demo: Flux2Model) -> None:
    """The seconds of a picture of a batch are the run's."""
    pictures = demo.generate_batch([wanted(1), replace(wanted(2), seed=3)])
    assert pictures[0].denoise_s == pictures[1].denoise_s > 0
