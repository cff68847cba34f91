"""The warm-up of a model: it compiles all that will run, and measures its latency."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from flux2_shared.device.lock import alone_on_gpu
from flux2_shared.errors import OutOfMemory
from flux2_shared.report import Report
from generator_service.lemica import schedule_for
from generator_service.pipelines.flux2 import Flux2Model, GeneratedImage
from generator_service.pipelines.params import Params

logger = logging.getLogger("flux2")

WARM_UP_STEPS = 3
BATCHED_ROWS = 2
"""Code compiled for this many rows also serves more rows; PyTorch specializes code for one row."""
WarmUpStage = tuple[str, Callable[[], object]]
"""A name for progress reports, and a function to run."""


@dataclass(frozen=True)
class Batching:
    """Limits for images that share a run."""

    max_batch: int = 1
    max_pixels: int = 0
    """Largest image, in pixels, that may share a run; a larger one uses the whole GPU alone."""


ALONE = Batching()


class WarmUp:
    """Runs on the device thread, before the first request.

    Args:
        model: the model.
        batching: the wanted limits for images that share a run; they are disabled if a batch does not fit into memory.
        learn: receives the parameters, number of tokens and times of an image.
    """

    def __init__(
        self, model: Flux2Model, batching: Batching, learn: Callable[[Params, int, GeneratedImage], None]
    ) -> None:
        self._model = model
        self._batching = batching
        self._learn = learn

    def run(self, embedding_shape: tuple[int, int], sizes: Sequence[tuple[int, int]], report: Report) -> Batching:
        """Run a few computed and reused steps at each size; return the limits for images that share a run.

        Args:
            embedding_shape: tokens and width of a prompt embedding.
            sizes: image sizes (width, height) with compiled code for exactly that size; empty: the model's default.
            report: called with the progress as text.
        """
        side = self._model.info.default_side
        nothing = torch.zeros(1, *embedding_shape)
        schedule = schedule_for(1, WARM_UP_STEPS)
        stages: list[WarmUpStage] = []
        for width, height in sizes or [(side, side)]:
            params = Params(nothing, width, height, 4.0, 0, schedule)
            stages.append((f"{width}x{height}", partial(self._warm_up_size, params)))
        if "compile" in self._model.performance.optimizations:
            stages.append(("other sizes", partial(self._model.warm_up, [params], "dynamic")))
            stages += self._batch_stages(params)
        with alone_on_gpu(self._model.device, report):
            for number, (name, run) in enumerate(stages, 1):
                report(f"warming up: {number} of {len(stages)}, {name}")
                run()
        logger.info("%s", self._model.performance)
        return self._batching

    def _warm_up_size(self, params: Params) -> None:
        """Generate at one size with both kinds of steps. The first run is not measured."""
        self._model.warm_up([replace(params, schedule=schedule_for("none", 1))])
        for schedule in (schedule_for("none", WARM_UP_STEPS), params.schedule):
            timed = replace(params, schedule=schedule)
            num_tokens = self._model.info.num_image_tokens(params.width, params.height)
            (image,) = self._model.warm_up([timed])
            self._learn(timed, num_tokens, image)

    def _batch_stages(self, params: Params) -> list[WarmUpStage]:
        """Return the stages for runs of several images, at the largest size that may share a run."""
        unit = self._model.info.pixels_per_token
        side = min(math.isqrt(self._batching.max_pixels) // unit * unit, self._model.info.default_side)
        if self._batching.max_batch == 1 or side == 0:
            return []
        return [("runs of several images", partial(self._warm_up_batch, replace(params, width=side, height=side)))]

    def _warm_up_batch(self, params: Params) -> None:
        try:
            self._model.warm_up([params] * BATCHED_ROWS, "dynamic")
        except OutOfMemory as error:
            self._batching = ALONE
            logger.warning("images will not share runs: %s", error)
