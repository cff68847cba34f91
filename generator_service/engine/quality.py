"""Compares images with a cache to images without: for ``compare``, and by sampling for the metrics."""

import logging
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from flux2_shared.errors import Flux2Error
from flux2_shared.thread_pool import ThreadPool
from generator_service.engine.generation import Comparison, Generation
from generator_service.engine.metrics import GeneratorMetrics
from generator_service.engine.queue import Queue
from generator_service.engine.slots import Work
from generator_service.pipelines.flux2 import GeneratedImage

MAX_PSNR_DB = 120.0
"""Recorded for equal images, because the sum of a histogram must be finite."""
logger = logging.getLogger("flux2")


class QualitySampler:
    """Generates images again without a cache, in the background, and records the difference in the metrics.

    Args:
        queue: the engine's queue; a sample takes a slot like a request.
        threads: run comparisons.
        metrics: receives PSNR and SSIM.
    """

    def __init__(self, queue: Queue[GeneratedImage], threads: ThreadPool, metrics: GeneratorMetrics) -> None:
        self._queue = queue
        self._threads = threads
        self._metrics = metrics

    async def sample(self, work: Work[GeneratedImage], image: GeneratedImage) -> None:
        """Compare ``image``, the result of ``work``, to the image without a cache, unless the queue is full."""
        request = replace(work.generation.request, params=work.params, num_images=1, is_followed=False)
        try:
            with self._queue.admit() as permit:
                generation = Generation(request, on_end=self._queue.leave)
                self._queue.enter(generation, permit)
        except Flux2Error:
            return  # the queue is full or closed
        try:
            full = image
            if not work.params.is_uncached:
                full = await self._queue.add(generation, work.params.uncached(), None).result
            comparison = await self._threads.run(compare, image.image, full.image)
        except Exception:
            logger.exception("a quality sample failed")
            return
        finally:
            generation.cancel()
        self._metrics.psnr.observe(min(comparison.psnr_db, MAX_PSNR_DB))
        self._metrics.ssim.observe(comparison.ssim)


def compare(image: Image.Image, reference: Image.Image) -> Comparison:
    """Compare ``image`` to ``reference``, whose steps are all computed."""
    ours, full = pixels(image), pixels(reference)
    both = Image.new("RGB", (reference.width + image.width, image.height))
    both.paste(reference, (0, 0))
    both.paste(image, (reference.width, 0))
    return Comparison(psnr(ours, full, peak=255), ssim(ours, full, peak=255), both)


def psnr(image: NDArray[np.float64], reference: NDArray[np.float64], *, peak: float) -> float:
    """Peak signal-to-noise ratio in dB; infinite for equal images.

    Args:
        image: an array of any shape.
        reference: an array of the same shape.
        peak: range of the values: 255 for 8-bit images, 2 for -1..1.
    """
    with np.errstate(divide="ignore"):
        return float(peak_signal_noise_ratio(reference, image, data_range=peak))  # type: ignore[no-untyped-call]


def ssim(image: NDArray[np.float64], reference: NDArray[np.float64], *, peak: float) -> float:
    """Structural similarity (Wang et al. 2004) of images ``[H, W, C]``; 1 for equal images."""
    value = structural_similarity(image, reference, channel_axis=2, data_range=peak)  # type: ignore[no-untyped-call]
    return float(value)


def pixels(image: Image.Image) -> NDArray[np.float64]:
    """Convert an image to ``[H, W, 3]`` with values from 0 to 255."""
    return np.asarray(image.convert("RGB"), dtype=np.float64)
