"""Pictures end to end, from a request to the bytes of a PNG file, through the engine that the service runs.

The text encoder is left out: an embedding is ready. Times are wall times of the caller; the device is waited for, since
the file is there at the end.
"""

import asyncio
import hashlib
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from flux2_shared.device.thread import DeviceThread
from generator_service.engine.engine import Engine, Runtime
from generator_service.engine.generation import GenerationResult
from generator_service.engine.metrics import GeneratorMetrics
from generator_service.engine.request import Request
from generator_service.lemica import Schedule, schedule_for
from generator_service.pipelines.flux2 import Flux2Model
from generator_service.pipelines.params import Params, Reference

GUIDANCE = 4.0
LARGEST_REFERENCE = 1024
"""Pixels along a side: what the pipeline scales larger ones down to."""


@dataclass(frozen=True)
class Shape:
    """What of a picture decides how long its steps take."""

    side: int
    num_references: int = 0

    def num_image_tokens(self, pixels_per_token: int) -> int:
        """Of the picture and its reference images, which are as large as it is, but at most 1024x1024."""
        reference_side = min(self.side, LARGEST_REFERENCE)
        return (self.side**2 + self.num_references * reference_side**2) // pixels_per_token**2

    def __str__(self) -> str:
        references = f" + {self.num_references} reference{'s' if self.num_references > 1 else ''}"
        return f"{self.side}x{self.side}" + (references if self.num_references else "")


@dataclass(frozen=True)
class Timing:
    """Where one picture's time went, in seconds."""

    total_s: float
    denoise_s: float
    decode_s: float

    @property
    def rest_s(self) -> float:
        """Waiting between threads, and writing the PNG file."""
        return self.total_s - self.denoise_s - self.decode_s


class ReadyEncoder:
    """Has the one embedding that is asked for."""

    def __init__(self, embedding: torch.Tensor) -> None:
        self._embedding = embedding

    async def embed(self, prompt: str) -> tuple[torch.Tensor, bool]:
        """The embedding, whatever the prompt is; and that it was not cached."""
        del prompt
        return self._embedding, False


class Bench:
    """Draws one picture after the other. Made by ``opened_bench``."""

    def __init__(self, runner: asyncio.Runner, engine: Engine, embedding: torch.Tensor) -> None:
        self._runner = runner
        self._embedding = embedding
        self.engine = engine

    def warm_up(self, shape: Shape) -> float:
        """Compile for pictures of this shape, where the model is compiled, and run both kinds of step; the seconds."""
        began = time.perf_counter()
        for schedule in (schedule_for("none", 1), schedule_for(1, 2)):
            params = self._request(shape, schedule, 0).params
            self.engine.model.warm_up([replace(params, prompt_embeds=self._embedding)])
        return time.perf_counter() - began

    def draw(self, shape: Shape, schedule: Schedule, seed: int = 0) -> Timing:
        """One picture; another seed has other reference images, so that none is found encoded.

        Raises:
            Flux2Error: it cannot be drawn, for want of memory for instance.
        """
        request = self._request(shape, schedule, seed)
        began = time.perf_counter()
        (result,) = self._runner.run(generated(self.engine, request))
        total_s = time.perf_counter() - began
        return Timing(total_s, result.timings.denoise_s, result.timings.decode_s)

    def _request(self, shape: Shape, schedule: Schedule, seed: int) -> Request:
        params = Params(
            prompt_embeds=None,
            width=shape.side,
            height=shape.side,
            guidance_scale=GUIDANCE,
            seed=seed,
            schedule=schedule,
            references=tuple(noise_reference(shape, 1000 * seed + k) for k in range(shape.num_references)),
            prompt="a benchmark",
            cache=schedule.name,
        )
        return Request(params, num_tokens=shape.num_image_tokens(self.engine.info.pixels_per_token))


@contextmanager
def opened_bench(model: Flux2Model, embedding: torch.Tensor) -> Iterator[Bench]:
    """An engine around ``model`` whose device thread runs as long as the block does."""
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        engine = runner.run(opened_engine(stack, model, embedding))
        try:
            yield Bench(runner, engine, embedding)
        finally:
            runner.run(stack.aclose())


async def opened_engine(stack: AsyncExitStack, model: Flux2Model, embedding: torch.Tensor) -> Engine:
    """An engine whose thread and queue ``stack`` closes."""
    thread = await stack.enter_async_context(DeviceThread())
    engine = Engine(model, ReadyEncoder(embedding), Runtime(thread, GeneratorMetrics()), max_waiting=1)
    return await stack.enter_async_context(engine)


async def generated(engine: Engine, request: Request) -> list[GenerationResult]:
    """The result of one request."""
    with engine.admit() as permit:
        generation = engine.submit(request, permit)
    return await generation.images()


def noise_reference(shape: Shape, seed: int) -> Reference:
    """A reference image that no other seed has."""
    side = min(shape.side, LARGEST_REFERENCE)
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Reference(Image.fromarray(pixels), hashlib.sha256(pixels.tobytes()).hexdigest())
