"""Parameters of an image."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from PIL.Image import Image, frombytes

from generator_service.lemica import Schedule, schedule_for
from generator_service.pipelines.lora import Adapter

LARGEST_AREA = 1024 * 1024
"""``Flux2Pipeline`` downscales larger reference images to this many pixels."""
CacheChoice = str | int | dict[str, float]
"""The name of a schedule, a number of computed steps, or ``{"max_error": ...}``."""


@dataclass(frozen=True)
class ReferenceSize:
    """Size of a reference image, in pixels."""

    width: int
    height: int

    def prepared(self, unit: int) -> tuple[int, int]:
        """Return width and height after preprocessing by ``Flux2Pipeline``, as multiples of ``unit``."""
        width, height = self.width, self.height
        if width * height > LARGEST_AREA:
            scale = math.sqrt(LARGEST_AREA / (width * height))
            width, height = int(width * scale), int(height * scale)
        return width // unit * unit, height // unit * unit

    def num_tokens(self, unit: int) -> int:
        """Return the number of tokens in the transformer, with ``unit`` x ``unit`` pixels each."""
        width, height = self.prepared(unit)
        return width * height // unit**2


def downscaled(image: Image) -> Image:
    """Scale an image down to ``LARGEST_AREA``, exactly as ``Flux2Pipeline`` would, which then leaves it as it is."""
    smaller: Image = Flux2ImageProcessor._resize_if_exceeds_area(image, LARGEST_AREA)  # noqa: SLF001 - its own function
    return smaller


@dataclass(frozen=True)
class Reference:
    """A reference image, in three bytes per pixel, where Pillow needs four: they wait with their requests."""

    size: ReferenceSize
    pixels: bytes = field(repr=False)
    sha256: str = ""
    """Hash of the file that the client sent."""

    @classmethod
    def of(cls, image: Image, sha256: str = "") -> Self:
        """Keep the pixels of an RGB image."""
        return cls(ReferenceSize(*image.size), image.tobytes(), sha256)

    @property
    def image(self) -> Image:
        return frombytes("RGB", (self.size.width, self.size.height), self.pixels)


@dataclass(frozen=True)
class Params:
    """Everything that determines an image, except the weights. Picklable."""

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
    """The value of ``cache`` that ``schedule`` was resolved from."""
    is_truncated: bool = False
    """Whether the end of ``prompt`` was ignored, because it is longer than the text encoder's maximum."""

    @property
    def embeddings(self) -> torch.Tensor:
        """``prompt_embeds``; raises ``ValueError`` if the prompt is not embedded yet."""
        if self.prompt_embeds is None:
            raise ValueError("the prompt is not embedded yet")
        return self.prompt_embeds

    @property
    def is_uncached(self) -> bool:
        return self.schedule.num_computed == self.schedule.num_steps

    def uncached(self) -> "Params":
        """Return a copy that computes every step."""
        return replace(self, schedule=schedule_for("none", self.schedule.num_steps))

    def without_tensors(self) -> "Params":
        """Return a copy without the embedding and the reference images, which are large."""
        return replace(self, prompt_embeds=None, references=())

    @property
    def batch_key(self) -> object:
        """Images with equal keys may share a run; None for an image that has to run alone."""
        if self.references or self.adapters or self.prompt_embeds is None:
            return None
        embeds = self.prompt_embeds
        return self.width, self.height, self.guidance_scale, self.schedule, embeds.shape, embeds.dtype


def pipeline_arguments(batch: Sequence[Params], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return the arguments of diffusers' pipeline. A batch with references or adapters must have one image."""
    params = batch[0]  # for the values that all images share
    return {
        "prompt_embeds": torch.cat([each.embeddings for each in batch]).to(device, dtype),
        "image": [reference.image for reference in params.references] or None,
        "width": params.width,
        "height": params.height,
        "num_inference_steps": params.schedule.num_steps,
        "guidance_scale": params.guidance_scale,
        # On the CPU, so that a seed gives the same noise on every device.
        "generator": [torch.Generator("cpu").manual_seed(each.seed) for each in batch],
    }
