"""What a client asked for, with every default filled in and every field checked."""

import base64
import json
import secrets
from dataclasses import dataclass

import torch

from generator_service.api.schemas import GenerateRequest, MaxError
from generator_service.imaging import MAX_JPEG_PROMPT_BYTES, ImageFormat
from generator_service.lemica import SHIPPED, Schedule, ScheduleMismatch, Shelf, Signature, load_shelf
from generator_service.pipelines.flux2 import Flux2Model
from generator_service.settings import GeneratorSettings
from shared.errors import InvalidRequest, ModelRefused
from shared.wire import parse_safetensors

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
    cache: str | int | dict[str, float]
    schedule: Schedule
    output_format: ImageFormat = "png"


def open_shelf(settings: GeneratorSettings, model: Flux2Model) -> Shelf:
    """The calibrated schedules of ``model``: those that come with the product, and those of ``SCHEDULES_DIR``.

    Raises:
        ModelRefused: a file there holds no schedules, or ``GENERATOR_DEFAULT_CACHE`` names none that there is.
    """
    folders = [SHIPPED, *([settings.schedules_dir] if settings.schedules_dir else [])]
    try:
        shelf = load_shelf(folders, model.fingerprint)
    except ScheduleMismatch as error:
        raise ModelRefused(f"SCHEDULES_DIR: {error}") from error
    if not shelf.knows(settings.default_cache):
        raise ModelRefused(f"GENERATOR_DEFAULT_CACHE: there is no schedule {settings.default_cache!r}")
    return shelf


def make_order(
    body: GenerateRequest,
    settings: GeneratorSettings,
    model: Flux2Model,
    shelf: Shelf,
    embedding_shape: tuple[int, int],
) -> Order:
    """Fill in what the body leaves open and check the rest against the settings and the model.

    Raises:
        InvalidRequest: a field is outside its limits; the error names it.
    """
    if body.prompt is not None:
        check_prompt(body.prompt, body.output_format, settings)
    width = checked_side("width", body.width, settings, model)
    height = checked_side("height", body.height, settings, model)
    if width * height > settings.max_pixels:
        raise InvalidRequest(f"width: {width}x{height} is more than {settings.max_pixels} pixels", param="width")
    cache = settings.default_cache if body.cache is None else body.cache
    wanted = model.signature(
        num_steps=body.num_inference_steps, width=width, height=height, guidance_scale=body.guidance_scale
    )
    return Order(
        prompt=body.prompt,
        prompt_embeds=None if body.prompt_embeds is None else parse_embeds(body.prompt_embeds, embedding_shape),
        width=width,
        height=height,
        guidance_scale=body.guidance_scale,
        seed=secrets.randbelow(DRAWN_SEEDS) if body.seed is None else body.seed,
        cache=cache.model_dump() if isinstance(cache, MaxError) else cache,
        schedule=checked_schedule(cache, shelf, wanted),
        output_format=body.output_format,
    )


def check_prompt(prompt: str, output_format: ImageFormat, settings: GeneratorSettings) -> None:
    """Refuse a prompt that is too long for this service, or for a JPEG file's record of it."""
    if len(prompt) > settings.max_prompt_chars:
        told = f"prompt: at most {settings.max_prompt_chars} characters, not {len(prompt)}"
        raise InvalidRequest(told, param="prompt")
    if output_format == "jpeg" and len(json.dumps(prompt)) > MAX_JPEG_PROMPT_BYTES:
        raise InvalidRequest("prompt: too long to be recorded in a JPEG file: choose png or webp", param="prompt")


def checked_side(name: str, side: int | None, settings: GeneratorSettings, model: Flux2Model) -> int:
    """``side``, or the model's own, if it is a multiple of the model's token size within the settings' limits."""
    unit = model.pixels_per_token
    side = model.default_side if side is None else side
    if side % unit or not settings.min_side <= side <= settings.max_side:
        raise InvalidRequest(
            f"{name}: must be a multiple of {unit} from {settings.min_side} to {settings.max_side}, not {side}",
            param=name,
        )
    return side


def checked_schedule(cache: str | int | MaxError, shelf: Shelf, wanted: Signature) -> Schedule:
    """The schedule that ``cache`` asks for."""
    try:
        if isinstance(cache, MaxError):
            return shelf.cheapest_within(cache.max_error, wanted)
        return shelf.find(cache, wanted)
    except ScheduleMismatch as error:
        raise InvalidRequest(f"cache: {error}".replace("cache: cache:", "cache:"), param="cache") from None


def parse_embeds(text: str, shape: tuple[int, int]) -> torch.Tensor:
    """The tensor ``[1, L, D]`` in a base64 safetensors file."""
    try:
        return parse_safetensors(base64.b64decode(text, validate=True), (1, *shape))
    except ValueError as error:  # of base64, or a WireError
        told = f"prompt_embeds: must be base64 of a safetensors file with one tensor of shape {[1, *shape]}: {error}"
        raise InvalidRequest(told, param="prompt_embeds") from None
