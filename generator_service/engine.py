"""A request's way through the generator: admit, embed, wait for the device, draw, encode.

1. A place in the bounded queue is taken, or the request is refused at once.
2. The prompt's embedding comes from the cache or the text encoder; the device is free for others meanwhile.
3. The one thread that owns the device draws the picture; a request that was given up is dropped or stopped there.
4. The picture is encoded, with its parameters inside, on another thread.
"""

import asyncio
import itertools
import logging
import math
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Protocol

import torch
from PIL.Image import Image

from generator_service.comparison import Comparison, compare
from generator_service.cost import CostModel
from generator_service.happenings import Encoding, Listener, Preview, Rewritten, StepBegun, ignore
from generator_service.imaging import Provenance, encode_image
from generator_service.lemica import schedule_for
from generator_service.line import Line
from generator_service.order import Order
from generator_service.pipelines.card import ModelCard
from generator_service.pipelines.flux2 import (
    Flux2Model,
    GeneratedPicture,
    GenerationCancelled,
    GenerationRequest,
)
from generator_service.pipelines.step_clock import Previews
from generator_service.upsampler import Upsampler
from shared.cpu_tensors import float32_sha256
from shared.device_queue import Answer, DeviceQueue
from shared.device_thread import DeviceThread
from shared.errors import Busy, NonFiniteOutput, OutOfMemory, ShuttingDown
from shared.gpu_lock import alone_on_gpu
from shared.metrics import Metrics
from shared.report import Report
from shared.report import ignore as ignore_report
from shared.tracing import Tracing

WARM_UP_STEPS = 3
BATCHED_ROWS = 2
"""What is compiled for this many rows holds for more; for one row PyTorch compiles something else."""
WarmUpStage = tuple[str, Callable[[], object]]
"""A name for people, and what is run."""
NO_TRACING = Tracing()
MAX_PSNR_DB = 120.0
"""Stands for equal pictures in the metrics: a histogram's sum takes no infinity."""
logger = logging.getLogger("flux2")


@dataclass(frozen=True)
class Timings:
    """Where a request's time went, in seconds."""

    queue_s: float
    encode_s: float
    denoise_s: float
    decode_s: float


@dataclass(frozen=True)
class Delivery:
    """A finished file and what it was made to."""

    order: Order
    data: bytes
    timings: Timings
    comparison: Comparison | None = None
    """With the picture without a cache, if the order wants one."""
    side_by_side: bytes = b""
    """The file of the comparison."""

    @property
    def file(self) -> bytes:
        """What whoever can take only one file gets."""
        return self.side_by_side if self.comparison else self.data


@dataclass(frozen=True)
class Job:
    """A picture on its way to the device thread, and the flag that stops it."""

    order: Order
    request: GenerationRequest
    index: int
    listener: Listener | None
    cancelled: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class Batching:
    """Which pictures may share a run."""

    max_batch: int = 1
    max_pixels: int = 0
    """Of each; larger ones keep a GPU busy alone."""


ALONE = Batching()


class PromptEncoder(Protocol):
    """Where embeddings come from."""

    async def embed(self, prompt: str) -> tuple[torch.Tensor, bool]:
        """The prompt's embedding ``[1, L, D]``, and whether it was cached."""


class PictureMaker(Protocol):
    """What the API needs: an engine on this machine, or many on others."""

    @property
    def card(self) -> ModelCard:
        """The model."""

    @property
    def cost(self) -> CostModel:
        """What pictures take."""

    async def deliver(self, orders: Sequence[Order], listener: Listener | None = None) -> list[Delivery]:
        """Make a request's pictures; as ``Engine.deliver``."""


@dataclass(frozen=True)
class Runtime:
    """What a process provides for its engine."""

    thread: DeviceThread
    metrics: Metrics
    tracing: Tracing = NO_TRACING
    report: Report = ignore_report
    """Hears how far the warm-up is."""


class Engine:
    """Turns orders into pictures with one model. Its queue must have been entered by the app's lifespan."""

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
        self.encoder = encoder
        self._batching = batching
        self.queue = DeviceQueue[Job, GeneratedPicture](
            self._run, runtime.thread, max_waiting=max_waiting, max_batch=batching.max_batch, key=self._common
        )
        self.cost = CostModel()
        self._line = Line()
        self._thread = runtime.thread
        self._metrics = runtime.metrics
        self._tracing = runtime.tracing
        self._report = runtime.report
        self._upsampler = upsampler
        self._quality_sampling = quality_sampling
        self._samples: set[asyncio.Task[None]] = set()
        self._metrics.queue_depth.set_function(lambda: self.queue.depth)

    async def deliver(self, orders: Sequence[Order], listener: Listener | None = None) -> list[Delivery]:
        """Make a request's pictures, one after the other, in one place of the queue.

        Args:
            orders: at least one; they have the prompt in common.
            listener: called with the request's place in the line, then on the device thread before each step of each
                picture and with its previews.

        Raises:
            Busy: the queue is full.
            Flux2Error: the encoder or the device failed; the error says how.
        """
        tell = listener or ignore
        with self.queue.place(), self._line.waiting(work_s(orders), tell):
            began = time.monotonic()
            orders = await self._upsampled(orders, tell)
            with self._tracing.span("encode"):
                embeddings = await self._embeddings(orders[0], tell)
            encode_s = time.monotonic() - began
            return [
                await self._deliver_one(
                    Job(order, generation_request(order, embeddings), index, listener), embeddings, began, encode_s
                )
                for index, order in enumerate(orders)
            ]

    def warm_up(self, embedding_shape: tuple[int, int], sizes: Sequence[tuple[int, int]] = ()) -> None:
        """Draw a few steps of both kinds, before the queue runs: the first picture's cost is known then.

        Args:
            embedding_shape: tokens and width of a prompt's embedding.
            sizes: widths and heights of pictures that are compiled by themselves; none: the model's default.
        """
        side = self.card.default_side
        nothing = torch.zeros(1, *embedding_shape)
        schedule = schedule_for(1, WARM_UP_STEPS)
        stages: list[WarmUpStage] = []
        for width, height in sizes or [(side, side)]:
            request = GenerationRequest(nothing, width, height, 4.0, 0, schedule)
            stages.append((f"{width}x{height}", partial(self._warm_up_size, request)))
        if "compile" in self.model.performance.optimisations:
            stages.append(("other sizes", partial(self.model.prepare, request, "any")))
            stages += self._batch_stages(request)
        with alone_on_gpu(self.model.device, self._report):
            for number, (name, run) in enumerate(stages, 1):
                self._report(f"warming up: {number} of {len(stages)}, {name}")
                run()
        logger.info("%s", self.model.performance)

    def _warm_up_size(self, request: GenerationRequest) -> None:
        """Generate at one size with each kind of step; the first run also pays for what happens once."""
        self.model.prepare(replace(request, schedule=schedule_for("none", 1)))
        for schedule in (schedule_for("none", WARM_UP_STEPS), request.schedule):
            timed = replace(request, schedule=schedule)
            self._learn(timed, self.card.num_image_tokens(request.width, request.height), self.model.prepare(timed))

    def _batch_stages(self, request: GenerationRequest) -> list[WarmUpStage]:
        """What runs of several images like ``request`` need, at the largest size that may share a run."""
        unit = self.card.pixels_per_token
        side = min(math.isqrt(self._batching.max_pixels) // unit * unit, self.card.default_side)
        if self._batching.max_batch == 1 or side == 0:
            return []
        return [("runs of several images", partial(self._warm_up_batch, replace(request, width=side, height=side)))]

    def _warm_up_batch(self, request: GenerationRequest) -> None:
        try:
            self.model.prepare_batch([request] * BATCHED_ROWS, "any")
        except OutOfMemory as error:
            self._batching = ALONE
            logger.warning("images will not share runs: %s", error)

    def _learn(self, request: GenerationRequest, num_tokens: int, picture: GeneratedPicture) -> None:
        self.cost.observe(
            num_tokens,
            num_computed=request.schedule.num_computed,
            num_steps=request.schedule.num_steps,
            denoise_s=picture.denoise_s - picture.previews_s,
            decode_s=picture.decode_s,
        )

    async def _deliver_one(self, job: Job, embeddings: torch.Tensor, began: float, encode_s: float) -> Delivery:
        deadline_s = job.order.deadline_s if job.index == 0 else None  # once begun, all of a request is drawn
        with self._tracing.span("draw"):
            within_s = None if deadline_s is None else max(0.0, began + deadline_s - time.monotonic())
            answer = await self._draw(job, within_s)
        picture = answer.value
        order = replace(job.order, schedule=picture.schedule)
        record = await asyncio.to_thread(provenance, order, self.model, embeddings)
        with self._tracing.span("write"):
            data = await asyncio.to_thread(encode_image, picture.image, order.output_format, record, order.quality)
        comparison, side_by_side = None, b""
        if order.compare:
            comparison = await self._compared(job, picture)
            both = comparison.side_by_side
            side_by_side = await asyncio.to_thread(encode_image, both, order.output_format, record, order.quality)
        elif random.random() < self._quality_sampling:  # noqa: S311 - not a secret
            self._sample(job, picture)
        timings = Timings(answer.queue_s, encode_s, picture.denoise_s, picture.decode_s)
        for stage in ("queue", "encode", "denoise", "decode"):
            self._metrics.seconds.labels(stage).observe(getattr(timings, f"{stage}_s"))
        self._metrics.pictures.labels(mode_of(order)).observe(picture.denoise_s + picture.decode_s)
        self._thread.refuse_if_lost()  # meanwhile: then what came before may be wrong, too
        return Delivery(order.without_inputs(), data, timings, comparison, side_by_side)

    async def _compared(self, job: Job, picture: GeneratedPicture) -> Comparison:
        """``picture`` beside the same with every step computed, which takes its turn in the queue."""
        reference = picture
        if picture.schedule.num_computed < picture.schedule.num_steps:
            everything = schedule_for("none", picture.schedule.num_steps)
            request = replace(job.request, schedule=everything)
            silent = Job(replace(job.order, schedule=everything), request, job.index, listener=None)
            reference = (await self._draw(silent, None)).value
        return await asyncio.to_thread(compare, picture.image, reference.image)

    def _sample(self, job: Job, picture: GeneratedPicture) -> None:
        """Compare in the background, for the metrics."""

        async def measure() -> None:
            try:
                with self.queue.place():
                    comparison = await self._compared(job, picture)
            except Busy:
                return  # the requests come first
            except Exception:
                logger.exception("a quality sample failed")
                return
            self._metrics.psnr.observe(min(comparison.psnr_db, MAX_PSNR_DB))
            self._metrics.ssim.observe(comparison.ssim)

        task = asyncio.create_task(measure(), name="quality sample")
        self._samples.add(task)
        task.add_done_callback(self._samples.discard)

    async def close(self) -> None:
        """Give up the samples that still run."""
        for task in self._samples:
            task.cancel()
        await asyncio.gather(*self._samples, return_exceptions=True)

    async def _upsampled(self, orders: Sequence[Order], tell: Listener) -> Sequence[Order]:
        """The orders with the rewritten prompt, if they want that."""
        first = orders[0]
        if not first.is_upsampled:
            return orders
        assert self._upsampler is not None
        assert first.prompt is not None
        with self._tracing.span("upsample"):
            prompt = await self._upsampler.rewrite(first.prompt, [reference.image for reference in first.references])
        tell(Rewritten(prompt))
        return [replace(order, prompt=prompt) for order in orders]

    async def _embeddings(self, order: Order, tell: Listener) -> torch.Tensor:
        if order.prompt_embeds is not None:
            return order.prompt_embeds
        assert order.prompt is not None
        tell(Encoding())
        embeddings, was_cached = await self.encoder.embed(order.prompt)
        self._metrics.cache.labels("hit" if was_cached else "miss").inc()
        return embeddings

    async def _draw(self, job: Job, within_s: float | None) -> Answer[GeneratedPicture]:
        try:
            return await self.queue.submit(job, within_s)
        except (asyncio.CancelledError, ShuttingDown):
            job.cancelled.set()
            raise

    def _common(self, job: Job) -> object:
        """What pictures that share a run have in common; None for one that is drawn alone."""
        request, order = job.request, job.order
        is_small = request.width * request.height <= self._batching.max_pixels
        if not is_small or request.references or request.adapters or order.preview_steps:
            return None
        embeds = request.prompt_embeds
        return (request.width, request.height, request.guidance_scale, request.schedule, embeds.shape, embeds.dtype)

    def _run(self, jobs: Sequence[Job]) -> list[GeneratedPicture | Exception]:
        """On the device thread."""
        if len(jobs) > 1:
            try:
                return list(
                    self.model.generate_batch([job.request for job in jobs], lambda *step: self._tell(jobs, *step))
                )
            except (OutOfMemory, NonFiniteOutput) as error:
                logger.warning("%d pictures are drawn one by one: %s", len(jobs), error)
        return [self._run_one(job) for job in jobs]

    def _run_one(self, job: Job) -> GeneratedPicture | Exception:
        try:
            picture = self.model.generate(job.request, lambda *step: self._tell([job], *step), previews_of(job))
        except Exception as error:  # noqa: BLE001 - it belongs to this picture's caller alone
            return error
        is_usual = not job.order.adapters and picture.schedule is job.request.schedule  # else it took longer
        if is_usual:
            self._learn(job.request, job.order.num_tokens, picture)
        return picture

    def _tell(self, jobs: Sequence[Job], step: int, is_computed: bool) -> None:
        """Before each step; a run that nobody wants any more ends here."""
        wanted = [job for job in jobs if not job.cancelled.is_set()]
        if not wanted:
            raise GenerationCancelled
        self._metrics.steps.labels("computed" if is_computed else "reused").inc(len(wanted))
        for job in wanted:
            if job.listener is not None:
                job.listener(StepBegun(job.index, step, is_computed, job.order.seconds_left(step)))


def work_s(orders: Sequence[Order]) -> float | None:
    """How long a request's pictures will keep the device."""
    estimates = [order.estimate_s for order in orders]
    return None if None in estimates else sum(estimate for estimate in estimates if estimate is not None)


def mode_of(order: Order) -> str:
    """The order's schedule as a metric's label: the names are few, while numbers of steps and bounds are many."""
    return order.cache if isinstance(order.cache, str) else "other"


def previews_of(job: Job) -> Previews | None:
    """The previews that somebody listens to."""
    if job.listener is None or not job.order.preview_steps:
        return None
    listener, numbers = job.listener, itertools.count()

    def show(image: Image) -> None:
        listener(Preview(job.index, next(numbers), image))

    return Previews(frozenset(job.order.preview_steps), show)


def generation_request(order: Order, embeddings: torch.Tensor) -> GenerationRequest:
    """What the model needs to know of an order."""
    return GenerationRequest(
        prompt_embeds=embeddings,
        width=order.width,
        height=order.height,
        guidance_scale=order.guidance_scale,
        seed=order.seed,
        schedule=order.schedule,
        references=tuple(reference.image for reference in order.references),
        adapters=order.adapters,
    )


def provenance(order: Order, model: Flux2Model, embeddings: torch.Tensor) -> Provenance:
    """The record that goes into the file."""
    return Provenance(
        prompt=order.prompt,
        width=order.width,
        height=order.height,
        num_inference_steps=order.schedule.num_steps,
        guidance_scale=order.guidance_scale,
        seed=order.seed,
        cache=order.cache,
        schedule=str(order.schedule),
        computed_steps=list(order.schedule.computed_steps),
        model=model.card.name,
        revision=model.card.revision,
        performance=model.performance.profile,
        prompt_embeds_sha256=float32_sha256(embeddings) if order.prompt is None else None,
        lora=[asdict(adapter) for adapter in order.adapters],
        references_sha256=[reference.sha256 for reference in order.references],
    )
