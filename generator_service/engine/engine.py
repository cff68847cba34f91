"""Turns resolved requests into finished files, with one model on one device.

A generation's life, in the order of the code:

1. ``admit`` gives it a permit, or refuses it at once.
2. ``submit`` gives it a place in the queue and starts a task that drives it.
3. The prompt is upsampled if that is wanted, and its embedding comes from the cache or the text encoder.
4. Its images are added to the queue; the worker takes them in the order of admission.
5. Each image is encoded, with its parameters inside, on a thread of its own kind.
"""

import asyncio
import logging
import random
import time
from collections.abc import Coroutine, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from PIL.Image import Image

from generator_service.comparison import Comparison, compare
from generator_service.cost import CostModel
from generator_service.engine.events import EncodingPrompt, PromptUpsampled
from generator_service.engine.generation import Generation, GenerationResult, Timings
from generator_service.engine.provenance import generation_request, provenance
from generator_service.engine.queue import Permit, Queue
from generator_service.engine.worker import ALONE, Batching, ImageQueue, ImageWork, Worker
from generator_service.imaging import encode_image
from generator_service.lemica import schedule_for
from generator_service.order import Order
from generator_service.pipelines.card import ModelCard
from generator_service.pipelines.flux2 import Flux2Model, GeneratedPicture
from generator_service.upsampler import Upsampler
from shared.device_thread import DeviceThread
from shared.errors import DeviceLost, Flux2Error, ShuttingDown
from shared.metrics import Metrics
from shared.report import Report, ignore
from shared.thread_pool import ThreadPool
from shared.tracing import Tracing

NO_TRACING = Tracing()
MAX_PSNR_DB = 120.0
"""Stands for equal images in the metrics: a histogram's sum takes no infinity."""
logger = logging.getLogger("flux2")


class PromptEncoder(Protocol):
    """Where embeddings come from."""

    async def embed(self, prompt: str) -> tuple[torch.Tensor, bool]:
        """The prompt's embedding ``[1, L, D]``, and whether it was cached."""


class ImageGenerator(Protocol):
    """What the API needs: an engine on this machine, or many on others."""

    @property
    def card(self) -> ModelCard:
        """The model."""

    @property
    def cost(self) -> CostModel:
        """What images take."""

    def admit(self) -> AbstractContextManager[Permit]:
        """As ``Engine.admit``."""

    def submit(self, orders: Sequence[Order], permit: Permit, *, is_followed: bool) -> Generation:
        """As ``Engine.submit``."""

    def close(self) -> None:
        """As ``Engine.close``."""


@dataclass(frozen=True)
class Runtime:
    """What a process provides for its engine."""

    thread: DeviceThread
    metrics: Metrics
    tracing: Tracing = NO_TRACING
    report: Report = ignore
    """Hears how far the warm-up is."""


class Engine:
    """Generates images as long as it is entered.

    Args:
        model: loaded on the runtime's thread.
        encoder: embeds prompts.
        runtime: the device's thread, and where to report to.
        max_waiting: how many generations may wait beside those that run.
        quality_sampling: the share of images that are generated again without a cache, for the metrics.
        upsampler: rewrites prompts.
        batching: which images may share a run.
    """

    def __init__(
        self,
        model: Flux2Model,
        encoder: PromptEncoder,
        runtime: Runtime,
        max_waiting: int,
        quality_sampling: float = 0.0,
        upsampler: Upsampler | None = None,
        batching: Batching = ALONE,
    ) -> None:
        self.model = model
        self.card = model.card
        self.cost = CostModel()
        self.worker = Worker(model, runtime.thread, self.cost, runtime.metrics, batching)
        self.queue: ImageQueue = Queue(
            lambda: max_waiting + batching.max_batch, max_batch=batching.max_batch, batch_key=self.worker.batch_key
        )
        self._encoder = encoder
        self._thread = runtime.thread
        self._metrics = runtime.metrics
        self._tracing = runtime.tracing
        self._upsampler = upsampler
        self._quality_sampling = quality_sampling
        self._files = ThreadPool("files")
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closed = False
        self._metrics.queue_depth.set_function(lambda: self.queue.num_in_flight)

    async def __aenter__(self) -> Self:
        await self._files.__aenter__()
        self._spawn(self._serve(), "worker")
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._files.__aexit__()

    def admit(self) -> AbstractContextManager[Permit]:
        """A permit for one generation, given back at the end of the block if none was submitted.

        Raises:
            Busy: the queue is full.
            DeviceLost: nothing can run any more.
            ShuttingDown: the engine was closed.
        """
        self._refuse_at_the_end()
        return self.queue.admit()

    def submit(self, orders: Sequence[Order], permit: Permit, *, is_followed: bool = False) -> Generation:
        """Begin to generate; never waits.

        Args:
            orders: one for each image; they have the prompt in common.
            permit: of ``admit``.
            is_followed: whether somebody reads the events.

        Raises:
            DeviceLost, ShuttingDown: meanwhile the device failed, or the engine was closed.
        """
        self._refuse_at_the_end()
        generation = Generation(orders, is_followed=is_followed, on_end=self.queue.leave)
        self.queue.enter(generation, permit)
        generation.start(self._generate, orders[0].deadline_s)
        return generation

    def close(self) -> None:
        """End everything that has not ended with ``ShuttingDown``; nothing is admitted any more."""
        self._is_closed = True
        self._fail_all(ShuttingDown())
        for task in self._tasks:
            task.cancel()

    def _refuse_at_the_end(self) -> None:
        self._thread.refuse_if_lost()
        if self._is_closed:
            raise ShuttingDown

    async def _serve(self) -> None:
        try:
            await self.worker.serve(self.queue)
        except DeviceLost as error:
            self._fail_all(error)

    def _fail_all(self, error: Flux2Error) -> None:
        for generation in self.queue.generations:
            generation.fail(error)

    async def _generate(self, generation: Generation) -> list[GenerationResult]:
        """A generation's results: embed, wait for the device, write the files."""
        began = time.monotonic()
        orders = await self._upsampled(generation)
        with self._tracing.span("encode"):
            embeddings = await self._embeddings(orders[0], generation)
        encode_s = time.monotonic() - began
        works = [self._add(generation, order, embeddings, index) for index, order in enumerate(orders)]
        references = [self._add_reference(work) if work.order.compare else None for work in works]
        try:
            return [
                await self._result(work, reference, encode_s) for work, reference in zip(works, references, strict=True)
            ]
        finally:
            for work in (*works, *filter(None, references)):
                abandon(work)

    def _add(self, generation: Generation, order: Order, embeddings: torch.Tensor, index: int | None) -> ImageWork:
        return self.queue.add(generation, order, generation_request(order, embeddings), index)

    def _add_reference(self, work: ImageWork) -> ImageWork | None:
        """The same image with every step computed, unless it is that already."""
        schedule = work.params.schedule
        if schedule.num_computed == schedule.num_steps:
            return None
        order = replace(work.order, schedule=schedule_for("none", schedule.num_steps))
        return self._add(work.generation, order, work.params.prompt_embeds, None)

    async def _result(self, work: ImageWork, reference: ImageWork | None, encode_s: float) -> GenerationResult:
        with self._tracing.span("draw"):
            image = await work.result
        order = replace(work.order, schedule=image.schedule)
        with self._tracing.span("write"):
            data = await self._files.run(self._file, image.image, order, work.params.prompt_embeds)
        comparison, side_by_side = None, b""
        if order.compare:
            comparison = await self._compared(image, reference)
            both = comparison.side_by_side
            side_by_side = await self._files.run(self._file, both, order, work.params.prompt_embeds)
        elif random.random() < self._quality_sampling:  # noqa: S311 - not a secret
            self._spawn(self._sample(work, image), "quality sample")
        self._thread.refuse_if_lost()  # meanwhile: then what came before may be wrong, too
        timings = Timings(work.queue_s, encode_s, image.denoise_s, image.decode_s)
        self._observe(timings, order)
        return GenerationResult(order.without_inputs(), data, timings, comparison, side_by_side)

    def _observe(self, timings: Timings, order: Order) -> None:
        for stage in ("queue", "encode", "denoise", "decode"):
            self._metrics.seconds.labels(stage).observe(getattr(timings, f"{stage}_s"))
        self._metrics.images.labels(mode_of(order)).observe(timings.denoise_s + timings.decode_s)

    def _file(self, image: Image, order: Order, embeddings: torch.Tensor) -> bytes:
        record = provenance(order, self.model, embeddings)
        return encode_image(image, order.output_format, record, order.quality)

    async def _compared(self, image: GeneratedPicture, reference: ImageWork | None) -> Comparison:
        full = image if reference is None else await reference.result
        return await self._files.run(compare, image.image, full.image)

    async def _sample(self, work: ImageWork, image: GeneratedPicture) -> None:
        """Compare an image with the one without a cache, in the background, for the metrics."""
        try:
            with self.admit() as permit:
                sample = Generation([work.order], is_followed=False, on_end=self.queue.leave)
                self.queue.enter(sample, permit)
        except Flux2Error:
            return  # the queue is full, and the requests come first; or the engine ends
        try:
            reference = self._add_reference(replace(work, generation=sample))
            comparison = await self._compared(image, reference)
        except Exception:
            logger.exception("a quality sample failed")
            return
        finally:
            sample.cancel()
        self._metrics.psnr.observe(min(comparison.psnr_db, MAX_PSNR_DB))
        self._metrics.ssim.observe(comparison.ssim)

    async def _upsampled(self, generation: Generation) -> Sequence[Order]:
        """The generation's orders, with the rewritten prompt if they want that."""
        first = generation.orders[0]
        if not first.is_upsampled:
            return generation.orders
        assert self._upsampler is not None
        assert first.prompt is not None
        with self._tracing.span("upsample"):
            prompt = await self._upsampler.rewrite(first.prompt, [reference.image for reference in first.references])
        generation.emit(PromptUpsampled(prompt))
        return [replace(order, prompt=prompt) for order in generation.orders]

    async def _embeddings(self, order: Order, generation: Generation) -> torch.Tensor:
        if order.prompt_embeds is not None:
            return order.prompt_embeds
        assert order.prompt is not None
        generation.emit(EncodingPrompt())
        embeddings, was_cached = await self._encoder.embed(order.prompt)
        self._metrics.cache.labels("hit" if was_cached else "miss").inc()
        return embeddings

    def _spawn(self, work: Coroutine[None, None, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def mode_of(order: Order) -> str:
    """The order's schedule as a metric's label: the names are few, while numbers of steps and bounds are many."""
    return order.cache if isinstance(order.cache, str) else "other"


def abandon(work: ImageWork) -> None:
    """Nobody waits for the image any more; an error that nobody has read is not reported as lost."""
    if not work.result.cancel() and not work.result.cancelled():
        work.result.exception()
