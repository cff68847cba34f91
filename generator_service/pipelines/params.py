"""What an image depends on, beside the model's weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL.Image import Image

from generator_service.lemica import Schedule, schedule_for
from generator_service.pipelines.lora import Adapter

LARGEST_AREA = 1024 * 1024
"""``Flux2Pipeline`` scales larger reference images down to this many pixels."""
CacheChoice = str | int | dict[str, float]
"""The name of a schedule, a number of computed steps, or ``{"max_error": ...}``."""


@dataclass(frozen=True)
class Reference:
    """An image to edit, or to take something from."""

    image: Image = field(repr=False)
    sha256: str = ""
    """Of the file that was sent."""

    def prepared_size(self, unit: int) -> tuple[int, int]:
        """Width and height with which ``Flux2Pipeline`` encodes it, multiples of ``unit``."""
        width, height = self.image.size
        if width * height > LARGEST_AREA:
            scale = math.sqrt(LARGEST_AREA / (width * height))
            width, height = int(width * scale), int(height * scale)
        return width // unit * unit, height // unit * unit

    def num_tokens(self, unit: int) -> int:
        """How many tokens it takes in the transformer, of ``unit`` x ``unit`` pixels each."""
        width, height = self.prepared_size(unit)
        return width * height // unit**2


@dataclass(frozen=True)
class Params:
    """Everything an image depends on, beside the weights."""

    prompt_embeds: torch.Tensor | None
    """``[1, L, D]``, on the CPU, of any floating dtype; None until the prompt is embedded."""
    width: int
    height: int
    guidance_scale: float
    seed: int
    schedule: Schedule
    references: tuple[Reference, ...] = ()
    adapters: tuple[Adapter, ...] = ()
    prompt: str | None = None
    """None if the client sent ``prompt_embeds`` instead."""
    cache: CacheChoice = "none"
    """What ``schedule`` was chosen by."""

    @property
    def embeddings(self) -> torch.Tensor:
        """``prompt_embeds``, which must be there: images are generated once the prompt is embedded."""
        if self.prompt_embeds is None:
            raise ValueError("the prompt is not embedded yet")
        return self.prompt_embeds

    @property
    def is_uncached(self) -> bool:
        """Whether every step is computed."""
        return self.schedule.num_computed == self.schedule.num_steps

    def uncached(self) -> "Params":
        """The same image with every step computed."""
        return replace(self, schedule=schedule_for("none", self.schedule.num_steps))

    def without_tensors(self) -> "Params":
        """The same without the embedding and the reference images, which are large."""
        return replace(self, prompt_embeds=None, references=())

    @property
    def batch_key(self) -> object:
        """Images with equal keys can be generated in one run; None for one that has to run alone."""
        if self.references or self.adapters or self.prompt_embeds is None:
            return None
        embeds = self.prompt_embeds
        return self.width, self.height, self.guidance_scale, self.schedule, embeds.shape, embeds.dtype


def pipeline_arguments(batch: Sequence[Params], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of diffusers' pipeline for ``batch``; one with references or adapters has one image."""
    params = batch[0]  # what they have in common
    embeds = [each.prompt_embeds for each in batch if each.prompt_embeds is not None]
    assert len(embeds) == len(batch)  # images are generated once the prompt is embedded
    return {
        "prompt_embeds": torch.cat(embeds).to(device, dtype),
        "image": [reference.image for reference in params.references] or None,
        "width": params.width,
        "height": params.height,
        "num_inference_steps": params.schedule.num_steps,
        "guidance_scale": params.guidance_scale,
        # On the CPU, so that a seed means the same noise on every device.
        "generator": [torch.Generator("cpu").manual_seed(each.seed) for each in batch],
    }
