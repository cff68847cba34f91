"""Times images end to end through the service's engine, from the request to the PNG file, without a text encoder.

Times are wall times of the caller. They include the device's work, because the file is complete at the end.
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
from flux2_shared.embedding import Embedding
from generator_service.engine.engine import Engine, Runtime
from generator_service.engine.generation import GenerationResult
from generator_service.engine.metrics import GeneratorMetrics
from generator_service.engine.request import Request
from generator_service.lemica import Schedule, schedule_for
from generator_service.pipelines.flux2 import Flux2Model
from generator_service.pipelines.params import Params, Reference

GUIDANCE = 4.0
LARGEST_REFERENCE = 1024
"""The pipeline downscales larger reference images to this side, in pixels."""


@dataclass(frozen=True)
class Shape:
    """Size of a square image and its number of reference images, which determine the time of a step."""

    side: int
    num_references: int = 0

    def num_image_tokens(self, pixels_per_token: int) -> int:
        """Number of tokens, including reference images of the same size, but at most 1024x1024."""
        reference_side = min(self.side, LARGEST_REFERENCE)
        return (self.side**2 + self.num_references * reference_side**2) // pixels_per_token**2

    def __str__(self) -> str:
        references = f" + {self.num_references} reference{'s' if self.num_references > 1 else ''}"
        return f"{self.side}x{self.side}" + (references if self.num_references else "")


@dataclass(frozen=True)
class Timing:
    """Time of an image in each stage, in seconds."""

    total_s: float
    denoise_s: float
    decode_s: float

    @property
    def rest_s(self) -> float:
        """Time for switching threads and encoding the PNG file."""
        return self.total_s - self.denoise_s - self.decode_s


class ReadyEncoder:
    """A prompt encoder that returns a given embedding."""

    def __init__(self, embedding: torch.Tensor) -> None:
        self._embedding = embedding

    def is_cached(self, _prompt: str) -> bool:
        """Return True: ``embed`` responds at once."""
        return True

    async def embed(self, prompt: str) -> tuple[Embedding, bool]:
        """Return the embedding, and that it was not cached."""
        del prompt
        return Embedding(self._embedding), False


class EngineBench:
    """Generates images one after the other. Created by ``open_bench``."""

    def __init__(self, runner: asyncio.Runner, engine: Engine, embedding: torch.Tensor) -> None:
        self._runner = runner
        self._embedding = embedding
        self.engine = engine

    def warm_up(self, shape: Shape) -> float:
        """Run both kinds of steps, which compiles the model if its profile does; return the seconds."""
        began = time.perf_counter()
        for schedule in (schedule_for("none", 1), schedule_for(1, 2)):
            params = self._request(shape, schedule, 0).params
            self.engine.model.warm_up([replace(params, prompt_embeds=self._embedding)])
        return time.perf_counter() - began

    def generate(self, shape: Shape, schedule: Schedule, seed: int = 0) -> Timing:
        """Generate an image. Reference images depend on the seed, so that their latents are not cached.

        Raises:
            Flux2Error: the generation failed, for example for lack of memory.
        """
        request = self._request(shape, schedule, seed)
        began = time.perf_counter()
        (result,) = self._runner.run(generate(self.engine, request))
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
def open_bench(model: Flux2Model, embedding: torch.Tensor) -> Iterator[EngineBench]:
    """Run an engine around ``model`` within the block."""
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        engine = runner.run(open_engine(stack, model, embedding))
        try:
            yield EngineBench(runner, engine, embedding)
        finally:
            runner.run(stack.aclose())


async def open_engine(stack: AsyncExitStack, model: Flux2Model, embedding: torch.Tensor) -> Engine:
    """Start an engine, which ``stack`` closes."""
    thread = await stack.enter_async_context(DeviceThread())
    engine = Engine(model, ReadyEncoder(embedding), Runtime(thread, GeneratorMetrics()), max_waiting=1)
    return await stack.enter_async_context(engine)


async def generate(engine: Engine, request: Request) -> list[GenerationResult]:
    """Submit a request and wait for its images."""
    with engine.admit() as permit:
        generation = engine.submit(request, permit)
    return await generation.images()


def noise_reference(shape: Shape, seed: int) -> Reference:
    """Create a reference image of noise, which depends on the seed."""
    side = min(shape.side, LARGEST_REFERENCE)
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Reference.of(Image.fromarray(pixels), hashlib.sha256(pixels.tobytes()).hexdigest())
