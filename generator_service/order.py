"""What a client asked for, with every default filled in and every field checked."""

import base64
import binascii
import secrets
from dataclasses import dataclass

import torch

from generator_service.api.schemas import GenerateRequest
from generator_service.imaging import ImageFormat
from generator_service.lemica import Schedule, ScheduleMismatch, schedule_for
from generator_service.pipelines.flux2 import Flux2Model
from generator_service.settings import GeneratorSettings
from shared.errors import InvalidRequest
from shared.wire import WireError, parse_safetensors

DRAWN_SEEDS = 2**32


@dataclass(frozen=True)
class Order:
    """What a client asked for, checked and complete."""

    prompt: str | None
    prompt_embeds: torch.Tensor | None
    """``[1, L, D]``; given instead of ``prompt``."""
    width: int
    height: int
    guidance_scale: float
    seed: int
    cache: str | int
    schedule: Schedule
    output_format: ImageFormat = "png"


def make_order(
    body: GenerateRequest, settings: GeneratorSettings, model: Flux2Model, embedding_shape: tuple[int, int]
) -> Order:
    """Fill in what the body leaves open and check the rest against the settings and the model.

    Raises:
        InvalidRequest: a field is outside its limits; the error names it.
    """
    if body.prompt is not None and len(body.prompt) > settings.max_prompt_chars:
        told = f"prompt: at most {settings.max_prompt_chars} characters, not {len(body.prompt)}"
        raise InvalidRequest(told, param="prompt")
    width = checked_side("width", body.width, settings, model)
    height = checked_side("height", body.height, settings, model)
    if width * height > settings.max_pixels:
        raise InvalidRequest(f"width: {width}x{height} is more than {settings.max_pixels} pixels", param="width")
    cache = settings.default_cache if body.cache is None else body.cache
    return Order(
        prompt=body.prompt,
        prompt_embeds=None if body.prompt_embeds is None else parse_embeds(body.prompt_embeds, embedding_shape),
        width=width,
        height=height,
        guidance_scale=body.guidance_scale,
        seed=secrets.randbelow(DRAWN_SEEDS) if body.seed is None else body.seed,
        cache=cache,
        schedule=checked_schedule(cache, body.num_inference_steps),
        output_format=body.output_format,
    )


def checked_side(name: str, side: int | None, settings: GeneratorSettings, model: Flux2Model) -> int:
    """``side``, or the model's own, if it is a multiple of the model's token size within the settings' limits."""
    unit = model.pixels_per_token
    if side is None:
        return model.default_side
    if side % unit or not settings.min_side <= side <= settings.max_side:
        raise InvalidRequest(
            f"{name}: must be a multiple of {unit} from {settings.min_side} to {settings.max_side}, not {side}",
            param=name,
        )
    return side


def checked_schedule(cache: str | int, num_steps: int) -> Schedule:
    """The schedule that ``cache`` asks for."""
    try:
        return schedule_for(cache, num_steps)
    except ScheduleMismatch as error:
        raise InvalidRequest(f"cache: {error}".replace("cache: cache:", "cache:"), param="cache") from None


def parse_embeds(text: str, shape: tuple[int, int]) -> torch.Tensor:
    """The tensor ``[1, L, D]`` in a base64 safetensors file."""
    try:
        return parse_safetensors(base64.b64decode(text, validate=True), (1, *shape))
    except (WireError, binascii.Error) as error:
        told = f"prompt_embeds: must be base64 of a safetensors file with one tensor of shape {[1, *shape]}: {error}"
        raise InvalidRequest(told, param="prompt_embeds") from None
