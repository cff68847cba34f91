"""What runs on the device's thread: the warm-up, and the images that the queue gives it."""

import itertools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from PIL.Image import Image

from flux2_shared.device.lock import alone_on_gpu
from flux2_shared.device.thread import DeviceThread, refuse_lost_device
from flux2_shared.errors import DeviceLost, OutOfMemory
from flux2_shared.report import Report
from generator_service.engine.events import Preview, StepStarted
from generator_service.engine.latency import LatencyModel
from generator_service.engine.metrics import GeneratorMetrics
from generator_service.engine.queue import Queue, Work
from generator_service.errors import NonFiniteOutput
from generator_service.lemica import schedule_for
from generator_service.pipelines.callbacks import Previews
from generator_service.pipelines.flux2 import Flux2Model, GeneratedImage, GenerationCancelled
from generator_service.pipelines.params import Params

logger = logging.getLogger("flux2")

WARM_UP_STEPS = 3
BATCHED_ROWS = 2
"""What is compiled for this many rows holds for more; for one row PyTorch compiles something else."""
WarmUpStage = tuple[str, Callable[[], object]]
"""A name for people, and what is run."""
ImageWork = Work[GeneratedImage]
ImageQueue = Queue[GeneratedImage]


@dataclass(frozen=True)
class Batching:
    """Which images may share a run."""

    max_batch: int = 1
    max_pixels: int = 0
    """Of each; larger ones keep a GPU busy alone."""


ALONE = Batching()


class Worker:
    """Generates images with one model on the device's thread, and learns how long they take.

    Args:
        model: loaded on the same thread.
        thread: the device's.
        latencies: learns from every usual image.
        metrics: counts steps.
        batching: which images may share a run; changes if the warm-up shows that there is too little memory.
    """

    def __init__(
        self,
        model: Flux2Model,
        thread: DeviceThread,
        latencies: LatencyModel,
        metrics: GeneratorMetrics,
        batching: Batching = ALONE,
    ) -> None:
        self.model = model
        self.batching = batching
        self._thread = thread
        self._latencies = latencies
        self._metrics = metrics

    async def serve(self, queue: ImageQueue) -> None:
        """Run what ``queue`` gives until the device is lost, which closes the queue."""
        while True:
            works = await queue.take()
            try:
                results = await self._thread.call(self.run, works)
            except DeviceLost:
                queue.close(DeviceLost)
                return
            queue.finish()
            for work, result in zip(works, results, strict=True):
                work.finish(result)

    def batch_key(self, work: ImageWork) -> object:
        """What images that share a run have in common; None for one that runs alone."""
        is_small = work.params.width * work.params.height <= self.batching.max_pixels
        return work.params.batch_key if is_small and not work.generation.request.preview_steps else None

    def run(self, works: Sequence[ImageWork]) -> Sequence[GeneratedImage | Exception]:
        """On the device's thread: an image, or the error that belongs to it alone, for each of ``works``.

        Raises:
            DeviceLost: an error left the device unusable, so none of the images is delivered.
        """
        together = self._run_together(works) if len(works) > 1 else None
        results = together or [self._run_alone(work) for work in works]
        for result in results:
            if isinstance(result, Exception):
                refuse_lost_device(result)
        return results

    def _run_together(self, works: Sequence[ImageWork]) -> Sequence[GeneratedImage | Exception] | None:
        """The images of one run, or None if they have to be generated one by one."""
        try:
            return self.model.generate_batch([work.params for work in works], partial(self._on_step, works))
        except (OutOfMemory, NonFiniteOutput) as error:
            logger.warning("%d images are generated one by one: %s", len(works), error)
        except GenerationCancelled:
            pass  # each of them ends by itself
        return None

    def _run_alone(self, work: ImageWork) -> GeneratedImage | Exception:
        try:
            previews = previews_of(work) if work.generation.request.preview_steps else None
            image = self.model.generate(work.params, partial(self._on_step, [work]), previews)
        except Exception as error:  # noqa: BLE001 - it belongs to this image's generation alone
            return error
        if not work.params.adapters and image.schedule is work.params.schedule:  # else it took longer
            self._learn(work.params, work.generation.request.num_tokens, image)
        return image

    def _on_step(self, works: Sequence[ImageWork], step: int, is_computed: bool) -> None:
        """Before each step; a run that nobody wants any more ends here."""
        wanted = [work for work in works if work.generation.is_wanted]
        if not wanted:
            raise GenerationCancelled
        self._metrics.steps.labels("computed" if is_computed else "reused").inc(len(wanted))
        for work in wanted:
            request = work.generation.request
            if work.index is not None and request.is_followed:
                left = request.seconds_left(work.params.schedule, step)
                work.generation.emit_threadsafe(StepStarted(work.index, step, is_computed, left))

    def warm_up(self, embedding_shape: tuple[int, int], sizes: Sequence[tuple[int, int]], report: Report) -> None:
        """Run a few steps of both kinds, on the device's thread: what is compiled, and what images cost, is known then.

        Args:
            embedding_shape: tokens and width of a prompt's embedding.
            sizes: widths and heights of images that are compiled by themselves; none: the model's default.
            report: hears how far it is.
        """
        side = self.model.info.default_side
        nothing = torch.zeros(1, *embedding_shape)
        schedule = schedule_for(1, WARM_UP_STEPS)
        stages: list[WarmUpStage] = []
        for width, height in sizes or [(side, side)]:
            params = Params(nothing, width, height, 4.0, 0, schedule)
            stages.append((f"{width}x{height}", partial(self._warm_up_size, params)))
        if "compile" in self.model.performance.optimizations:
            stages.append(("other sizes", partial(self.model.warm_up, [params], "dynamic")))
            stages += self._batch_stages(params)
        with alone_on_gpu(self.model.device, report):
            for number, (name, run) in enumerate(stages, 1):
                report(f"warming up: {number} of {len(stages)}, {name}")
                run()
        logger.info("%s", self.model.performance)

    def _warm_up_size(self, params: Params) -> None:
        """Generate at one size with each kind of step; the first run also pays for what happens once."""
        self.model.warm_up([replace(params, schedule=schedule_for("none", 1))])
        for schedule in (schedule_for("none", WARM_UP_STEPS), params.schedule):
            timed = replace(params, schedule=schedule)
            num_tokens = self.model.info.num_image_tokens(params.width, params.height)
            (image,) = self.model.warm_up([timed])
            self._learn(timed, num_tokens, image)

    def _batch_stages(self, params: Params) -> list[WarmUpStage]:
        """What runs of several images like ``params`` need, at the largest size that may share a run."""
        unit = self.model.info.pixels_per_token
        side = min(math.isqrt(self.batching.max_pixels) // unit * unit, self.model.info.default_side)
        if self.batching.max_batch == 1 or side == 0:
            return []
        return [("runs of several images", partial(self._warm_up_batch, replace(params, width=side, height=side)))]

    def _warm_up_batch(self, params: Params) -> None:
        try:
            self.model.warm_up([params] * BATCHED_ROWS, "dynamic")
        except OutOfMemory as error:
            self.batching = ALONE
            logger.warning("images will not share runs: %s", error)

    def _learn(self, params: Params, num_tokens: int, image: GeneratedImage) -> None:
        self._latencies.observe(
            num_tokens,
            num_computed=params.schedule.num_computed,
            num_steps=params.schedule.num_steps,
            denoise_s=image.denoise_s - image.previews_s,
            decode_s=image.decode_s,
        )


def previews_of(work: ImageWork) -> Previews | None:
    """The previews of an image whose generation a client follows."""
    index, generation = work.index, work.generation
    if index is None or not generation.request.is_followed:
        return None
    numbers = itertools.count()

    def show(image: Image) -> None:
        generation.emit_threadsafe(Preview(index, next(numbers), image))

    return Previews(frozenset(generation.request.preview_steps), show)
