"""Runs the warm-up and the images of the queue on the device thread."""

import itertools
import logging
from collections.abc import Sequence
from functools import partial

from PIL.Image import Image

from flux2_shared.device.thread import DeviceThread, refuse_lost_device
from flux2_shared.errors import DeviceLost, OutOfMemory
from flux2_shared.report import Report
from flux2_shared.thread_pool import ThreadPool
from generator_service.engine.events import PendingPreview, Preview, StepStarted
from generator_service.engine.imaging import preview_file
from generator_service.engine.latency import LatencyModel, RunPace
from generator_service.engine.metrics import GeneratorMetrics
from generator_service.engine.queue import Queue
from generator_service.engine.slots import Work
from generator_service.engine.warm_up import ALONE, Batching, WarmUp
from generator_service.errors import NonFiniteOutput
from generator_service.pipelines.callbacks import Previews
from generator_service.pipelines.flux2 import Flux2Model, GeneratedImage, GenerationCancelled
from generator_service.pipelines.params import Params

logger = logging.getLogger("flux2")

ImageWork = Work[GeneratedImage]
ImageQueue = Queue[GeneratedImage]


class Worker:
    """Generates images with one model on the device thread, and records their latency.

    Args:
        model: loaded on the same thread.
        thread: the device thread.
        latencies: receives the times of images without adapters.
        metrics: receives the number of steps.
        batching: limits for images that share a run; disabled if the warm-up runs out of memory.
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
        self.previews = ThreadPool("previews", 1)
        """Encodes previews, which would cost the device's time on its own thread."""

    async def serve(self, queue: ImageQueue) -> None:
        """Run the batches of ``queue`` until the device is lost; then close the queue with ``DeviceLost``."""
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
        """Return the batch key of an image; None if it has to run alone."""
        is_small = work.params.width * work.params.height <= self.batching.max_pixels
        return work.params.batch_key if is_small and not work.generation.request.preview_steps else None

    def run(self, works: Sequence[ImageWork]) -> Sequence[GeneratedImage | Exception]:
        """Generate an image, or an exception if it fails, for each of ``works``. Runs on the device thread.

        Raises:
            DeviceLost: an error left the device unusable; all images are discarded.
        """
        together = self._run_together(works) if len(works) > 1 else None
        results = together or [self._run_alone(work) for work in works]
        for result in results:
            if isinstance(result, Exception):
                refuse_lost_device(result)
        return results

    def _run_together(self, works: Sequence[ImageWork]) -> Sequence[GeneratedImage | Exception] | None:
        """Generate all images in one run; return None if they have to be generated one by one."""
        params, alone = works[0].params, self._latencies.estimate(works[0].generation.request.num_tokens)
        pace = RunPace(alone and alone.for_batch(len(works)), params.schedule)
        for work in works:
            work.expected_s = pace.seconds_left(0)
        try:
            images = self.model.generate_batch([work.params for work in works], partial(self._on_step, works, pace))
        except (OutOfMemory, NonFiniteOutput) as error:
            logger.warning("%d images are generated one by one: %s", len(works), error)
        except GenerationCancelled:
            pass  # each of them is checked again by itself
        else:
            self._learn_batch(works, images)
            return images
        return None

    def _run_alone(self, work: ImageWork) -> GeneratedImage | Exception:
        try:
            previews = previews_of(work, self.previews) if work.generation.request.preview_steps else None
            pace = RunPace(self._latencies.estimate(work.generation.request.num_tokens), work.params.schedule)
            work.expected_s = pace.seconds_left(0)
            image = self.model.generate(work.params, partial(self._on_step, [work], pace), previews)
        except Exception as error:  # noqa: BLE001 - fails only the generation of this image
            return error
        if not work.params.adapters and image.schedule is work.params.schedule:  # other images take longer
            self._learn(work.params, work.generation.request.num_tokens, image)
        return image

    def _on_step(self, works: Sequence[ImageWork], pace: RunPace, step: int, is_computed: bool) -> None:
        """Emit the start of a step; raise ``GenerationCancelled`` if all generations of the run have ended."""
        wanted = [work for work in works if work.generation.is_wanted]
        if not wanted:
            raise GenerationCancelled
        self._metrics.steps.labels("computed" if is_computed else "reused").inc(len(wanted))
        left = pace.seconds_left(step)
        for work in wanted:
            if work.index is not None and work.generation.request.is_followed:
                work.generation.emit_threadsafe(StepStarted(work.index, step, is_computed, left))

    def warm_up(self, embedding_shape: tuple[int, int], sizes: Sequence[tuple[int, int]], report: Report) -> None:
        """Compile the model and measure its latency; see ``WarmUp.run``. Runs on the device thread."""
        self.batching = WarmUp(self.model, self.batching, self._learn).run(embedding_shape, sizes, report)

    def _learn(self, params: Params, num_tokens: int, image: GeneratedImage) -> None:
        self._latencies.observe(
            num_tokens,
            num_computed=params.schedule.num_computed,
            num_steps=params.schedule.num_steps,
            denoise_s=image.denoise_s - image.previews_s,
            decode_s=image.decode_s,
        )

    def _learn_batch(self, works: Sequence[ImageWork], images: Sequence[GeneratedImage]) -> None:
        schedule = works[0].params.schedule
        self._latencies.observe_batch(
            works[0].generation.request.num_tokens,
            len(works),
            num_computed=schedule.num_computed,
            num_steps=schedule.num_steps,
            denoise_s=images[0].denoise_s,
        )


def previews_of(work: ImageWork, threads: ThreadPool) -> Previews | None:
    """Return the previews of an image, which ``threads`` encode; None if the generation is not followed by a client."""
    index, generation = work.index, work.generation
    if index is None or not generation.request.is_followed:
        return None
    numbers = itertools.count()

    def show(image: Image) -> None:
        generation.emit_threadsafe(PendingPreview(index, threads.submit(encoded, index, next(numbers), image)))

    return Previews(frozenset(generation.request.preview_steps), show)


def encoded(index: int, number: int, image: Image) -> Preview:
    return Preview(index, number, preview_file(image))
