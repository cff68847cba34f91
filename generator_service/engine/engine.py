"""Generates images for resolved requests with one model on one device.

The life of a generation, in the order of the code:

1. ``admit`` returns a permit, or raises ``Busy``.
2. ``submit`` enters the generation into the queue and starts the task that drives it.
3. The prompt is upsampled if the request asks for it, and embedded by the cache or the text encoder.
4. The images are added to the queue; the worker takes them in the order of admission.
5. Each image is encoded, with its parameters as metadata, on another thread.
"""

import asyncio
import random
import time
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol, Self

from PIL.Image import Image

from flux2_shared.device.thread import DeviceThread
from flux2_shared.embedding import Embedding
from flux2_shared.errors import ShuttingDown
from flux2_shared.observability.tracing import Tracing
from flux2_shared.report import Report, ignore
from flux2_shared.thread_pool import ThreadPool
from generator_service.clients.upsampler import Upsampler
from generator_service.engine.admission import Permit
from generator_service.engine.events import EncodingPrompt, PromptUpsampled
from generator_service.engine.generation import Generation, GenerationResult, Timings
from generator_service.engine.imaging import Provenance, encode_image
from generator_service.engine.latency import LatencyModel
from generator_service.engine.metrics import GeneratorMetrics
from generator_service.engine.quality import QualitySampler, compare
from generator_service.engine.queue import Queue
from generator_service.engine.request import Request
from generator_service.engine.warm_up import ALONE, Batching
from generator_service.engine.worker import ImageQueue, ImageWork, Worker
from generator_service.pipelines.flux2 import Flux2Model
from generator_service.pipelines.model_info import ModelInfo
from generator_service.pipelines.params import Params

NO_TRACING = Tracing()


class PromptEncoder(Protocol):
    """Source of prompt embeddings."""

    async def embed(self, prompt: str) -> tuple[Embedding, bool]:
        """Return the prompt's embedding, of shape ``[1, L, D]``, and whether it was cached."""

    def is_cached(self, prompt: str, /) -> bool:
        """Return whether ``embed`` would respond at once."""


class ImageGenerator(Protocol):
    """Interface between the API and the engine of one machine or a fleet of engines."""

    @property
    def info(self) -> ModelInfo:
        """The served model."""

    @property
    def latencies(self) -> LatencyModel:
        """Estimates the time of an image."""

    def is_cached(self, prompt: str, /) -> bool:
        """Return whether the prompt's embedding is cached."""

    def admit(self, owner: str = "", is_embedded: Callable[[], bool] = lambda: False) -> AbstractContextManager[Permit]:
        """See ``Admission.admit``."""

    def submit(self, request: Request, permit: Permit) -> Generation:
        """See ``Engine.submit``."""

    def close(self) -> None:
        """See ``Engine.close``."""


@dataclass(frozen=True)
class Runtime:
    """Resources of the process that an engine uses."""

    thread: DeviceThread
    metrics: GeneratorMetrics
    tracing: Tracing = NO_TRACING
    report: Report = ignore
    """Called with the progress of the warm-up as text."""


class Engine:
    """Generates images while its async context is entered.

    Args:
        model: loaded on the runtime's device thread.
        encoder: embeds prompts.
        runtime: device thread, metrics and tracing.
        max_waiting: largest number of waiting generations, in addition to the running ones.
        quality_sampling: share of images that are generated again without a cache, for the quality metrics.
        upsampler: rewrites prompts.
        batching: limits for images that share a run.
        share: share of the queue that one owner may have.
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
        share: float = 1.0,
    ) -> None:
        self.model = model
        self.info = model.info
        self.latencies = LatencyModel()
        self.worker = Worker(model, runtime.thread, self.latencies, runtime.metrics, batching)
        self.queue: ImageQueue = Queue(
            lambda: max_waiting + batching.max_batch,
            max_batch=batching.max_batch,
            batch_key=self.worker.batch_key,
            share=share,
            is_cached=encoder.is_cached,
        )
        self.admit, self.is_cached = self.queue.admit, encoder.is_cached
        self._encoder = encoder
        self._thread = runtime.thread
        self._metrics = runtime.metrics
        self._tracing = runtime.tracing
        self._upsampler = upsampler
        self._quality_sampling = quality_sampling
        self._files = ThreadPool("files")
        self._sampler = QualitySampler(self.queue, self._files, runtime.metrics)
        self._tasks: set[asyncio.Task[None]] = set()
        runtime.metrics.queue_depth.set_function(lambda: self.queue.num_in_flight)
        model.adapters.on_load = self._metrics.lora_loads.inc

    async def __aenter__(self) -> Self:
        await self._files.__aenter__()
        self._spawn(self.worker.serve(self.queue), "worker")
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._files.__aexit__()
        await self.worker.previews.__aexit__()

    def submit(self, request: Request, permit: Permit) -> Generation:
        """Start a generation without blocking.

        Raises:
            DeviceLost, ShuttingDown: the device has failed, or the engine was closed, after the permit was issued.
        """
        generation = Generation(request, on_end=self._end)
        self.queue.enter(generation, permit)
        generation.start(self._generate, permit.admitted)
        return generation

    def _end(self, generation: Generation) -> None:
        self.queue.leave(generation)
        self._metrics.record_end(generation)

    def close(self) -> None:
        """Fail all live generations with ``ShuttingDown`` and stop admitting requests."""
        self.queue.close(ShuttingDown)
        for task in self._tasks:
            task.cancel()

    async def _generate(self, generation: Generation) -> list[GenerationResult]:
        """Upsample the prompt if requested, embed it, wait for the images, and encode them."""
        began = time.monotonic()
        request = generation.request
        params = await self._upsampled(generation) if request.is_upsampled else request.params
        if params.prompt_embeds is None:
            assert params.prompt is not None
            generation.emit(EncodingPrompt())
            generation.is_encoding = True
            with self._tracing.span("encode"):
                embedding, was_cached = await self._encoder.embed(params.prompt)
            generation.is_encoding = False
            self._metrics.cache.labels("hit" if was_cached else "miss").inc()
            params = replace(params, prompt_embeds=embedding.tensor, is_truncated=embedding.is_truncated)
        request = replace(request, params=params)
        encode_s = time.monotonic() - began
        works = [self.queue.add(generation, params, index) for index, params in enumerate(request.all_params())]
        references = [self._add_reference(work) if request.compare else None for work in works]
        try:
            return [
                await self._result(work, reference, encode_s) for work, reference in zip(works, references, strict=True)
            ]
        finally:
            for work in (*works, *filter(None, references)):
                abandon(work)

    async def _upsampled(self, generation: Generation) -> Params:
        """Return the generation's parameters with the rewritten prompt."""
        params = generation.request.params
        assert self._upsampler is not None
        assert params.prompt is not None
        with self._tracing.span("upsample"):
            images = [reference.image for reference in params.references]
            prompt = await self._upsampler.rewrite(params.prompt, images)
        generation.emit(PromptUpsampled(prompt))
        return replace(params, prompt=prompt)

    def _add_reference(self, work: ImageWork) -> ImageWork | None:
        """Add the same image without a cache to the queue, unless ``work`` is uncached itself."""
        if work.params.is_uncached:
            return None
        return self.queue.add(work.generation, work.params.uncached(), None)

    async def _result(self, work: ImageWork, reference: ImageWork | None, encode_s: float) -> GenerationResult:
        request = work.generation.request
        with self._tracing.span("draw"):
            image = await work.result
        params = replace(work.params, schedule=image.schedule)
        with self._tracing.span("write"):
            data = await self._files.run(self._file, image.image, params, request)
        comparison, side_by_side = None, b""
        if request.compare:
            full = image if reference is None else await reference.result
            comparison = await self._files.run(compare, image.image, full.image)
            side_by_side = await self._files.run(self._file, comparison.side_by_side, params, request)
        elif random.random() < self._quality_sampling:  # noqa: S311 - not a secret
            self._spawn(self._sampler.sample(work, image), "quality sample")
        self._thread.refuse_if_lost()  # if it was lost meanwhile, the image may be wrong
        timings = Timings(work.queue_s, encode_s, image.denoise_s, image.decode_s, work.expected_s)
        self._metrics.record_image(timings, mode_of(params))
        return GenerationResult(params.without_tensors(), data, timings, comparison, side_by_side)

    def _file(self, image: Image, params: Params, request: Request) -> bytes:
        return encode_image(image, request.output_format, Provenance.of(params, self.model), request.quality)

    def _spawn(self, work: Coroutine[None, None, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def mode_of(params: Params) -> str:
    """Return the cache mode as a label of metrics. Numbers of steps and error bounds share one label."""
    return params.cache if isinstance(params.cache, str) else "other"


def abandon(work: ImageWork) -> None:
    """Cancel a work whose result is not needed, or mark its exception as retrieved."""
    if not work.result.cancel() and not work.result.cancelled():
        work.result.exception()
