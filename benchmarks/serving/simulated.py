"""Simulated generators whose steps sleep instead of computing, so that many fit on a few cores."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from flux2_ray.generator import GeneratorReplica
from flux2_shared.model.folder import find_model, read_prompt_format
from flux2_shared.model.subfolders import SUBFOLDERS, Service
from generator_service.pipelines.callbacks import Previews
from generator_service.pipelines.components import load_components
from generator_service.pipelines.flux2 import Flux2Model, GeneratedImage, StepCallback
from generator_service.pipelines.optimizations.compiled_model import ShapeKind
from generator_service.pipelines.params import Params
from generator_service.settings import GeneratorSettings


class SimulatedModel(Flux2Model):
    """The demo model with simulated steps; its images are noise."""

    step_s = 0.0

    def generate(
        self, params: Params, on_step: StepCallback | None = None, previews: Previews | None = None
    ) -> GeneratedImage:
        """Sleep during each step, like a thread that waits for a GPU."""
        del previews
        began = time.perf_counter()
        for step in range(params.schedule.num_steps):
            if on_step is not None:
                on_step(step, params.schedule.is_computed(step))
            time.sleep(self.step_s)
        image = Image.effect_noise((params.width, params.height), 64).convert("RGB")
        return GeneratedImage(image, time.perf_counter() - began, 0.0, torch.empty(0), 0.0, params.schedule)

    def warm_up(self, batch: Sequence[Params], kind: ShapeKind = "static") -> list[GeneratedImage]:
        """Generate the images; there is nothing to compile."""
        del kind
        return [self.generate(params) for params in batch]


class SimulatedGenerator(GeneratorReplica):
    """A generator replica with a simulated model.

    Args:
        encoder: handle of the ``EncoderReplica`` deployment.
        step_s: duration of a step.
    """

    async def __init__(self, encoder: Any, step_s: float) -> None:  # type: ignore[misc]  # Serve awaits it
        self._step_s = step_s
        await super().__init__(encoder)

    def load(self, settings: GeneratorSettings) -> tuple[Flux2Model, tuple[int, int]]:
        """Load the simulated model."""
        folder = find_model(settings.model, settings.revision, SUBFOLDERS[Service.GENERATOR])
        model = SimulatedModel(folder, load_components(folder, settings.torch_device(), settings.torch_dtype()))
        model.step_s = self._step_s
        return model, (read_prompt_format(folder).max_sequence_length, model.info.embedding_width)
