"""What a client asked for, with every default filled in and every field checked."""

import base64
import json
import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from generator_service.api.schemas import MAX_SEED, GenerateRequest, LoraUse, MaxError
from generator_service.cost import Cost
from generator_service.imaging import DEFAULT_QUALITY, MAX_JPEG_PROMPT_BYTES, ImageFormat
from generator_service.lemica import (
    SHIPPED,
    Schedule,
    ScheduleMismatch,
    ScheduleRegistry,
    Signature,
    load_registry,
    published_size,
)
from generator_service.pipelines.card import ModelCard
from generator_service.pipelines.lora import Adapter
from generator_service.references import Reference, parse_reference
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
    references: tuple[Reference, ...] = ()
    adapters: tuple[Adapter, ...] = ()
    num_tokens: int = 0
    """Of the picture and its reference images."""
    cost: Cost | None = None
    """What a picture of this size takes, as far as it is known."""
    deadline_s: float | None = None
    """How long it may take until the drawing begins."""
    quality: int = DEFAULT_QUALITY
    """Of a JPEG or WebP file, 0 to 100."""
    preview_steps: tuple[int, ...] = ()
    """After which steps a listener gets a preview."""
    is_upsampled: bool = False
    """Whether the prompt is rewritten before it is embedded."""
    compare: bool = False
    """Whether the picture without a cache is drawn too, to say how near this one is."""

    @property
    def estimate_s(self) -> float | None:
        """How long the picture will take once its turn has come."""
        return self.seconds_left(0)

    def seconds_left(self, step: int) -> float | None:
        """How long the picture will take from the beginning of ``step``."""
        if self.cost is None:
            return None
        computed = sum(later >= step for later in self.schedule.computed_steps)
        return self.cost.total_s(computed, self.schedule.num_steps - step)

    def without_inputs(self) -> "Order":
        """This order without its embedding and reference images, which are large."""
        return replace(self, prompt_embeds=None, references=())

    def siblings(self, count: int) -> "list[Order]":
        """This order and others like it, with the seeds that follow."""
        return [replace(self, seed=self.seed + k) for k in range(count)]


def open_registry(settings: GeneratorSettings, model: ModelCard) -> ScheduleRegistry:
    """The calibrated schedules of ``model``: those that come with the product, and those of ``SCHEDULES_DIR``.

    Raises:
        ModelRefused: a file there holds no schedules, or ``GENERATOR_DEFAULT_CACHE`` names none that there is.
    """
    folders = [SHIPPED, *([settings.schedules_dir] if settings.schedules_dir else [])]
    try:
        registry = load_registry(folders, model.fingerprint)
    except ScheduleMismatch as error:
        raise ModelRefused(f"SCHEDULES_DIR: {error}") from error
    if not registry.has(settings.default_cache):
        raise ModelRefused(f"GENERATOR_DEFAULT_CACHE: there is no schedule {settings.default_cache!r}")
    return registry


def make_order(
    body: GenerateRequest,
    settings: GeneratorSettings,
    model: ModelCard,
    registry: ScheduleRegistry,
    embedding_shape: tuple[int, int],
    cost_of: Callable[[int], Cost | None] = lambda _num_tokens: None,
) -> Order:
    """Fill in what the body leaves open and check the rest against the settings and the model.

    Raises:
        InvalidRequest: a field is outside its limits; the error names it.
    """
    if body.prompt is not None:
        check_prompt(body.prompt, body.output_format, settings)
    if body.num_images > settings.max_num_images:
        raise InvalidRequest(f"num_images: at most {settings.max_num_images}", param="num_images")
    references = checked_references(body.images, settings)
    width, height = checked_size(body, references, settings, model)
    num_tokens = count_tokens(width, height, references, model)
    cost = cost_of(num_tokens)
    cache = checked_cache(body, settings, cost)
    adapters = checked_adapters(body.lora, model.adapters)
    wanted = model.signature(
        num_steps=body.num_inference_steps,
        width=width,
        height=height,
        guidance_scale=body.guidance_scale,
        is_edit=bool(references),
        adapters=adapters,
    )
    return Order(
        prompt=body.prompt,
        prompt_embeds=None if body.prompt_embeds is None else parse_embeds(body.prompt_embeds, embedding_shape),
        width=width,
        height=height,
        guidance_scale=body.guidance_scale,
        seed=checked_seed(body),
        cache=cache.model_dump() if isinstance(cache, MaxError) else cache,
        schedule=checked_schedule(cache, registry, wanted),
        output_format=body.output_format,
        references=references,
        adapters=adapters,
        num_tokens=num_tokens,
        cost=cost,
        deadline_s=None if body.deadline_ms is None else body.deadline_ms / 1000,
        quality=DEFAULT_QUALITY if body.output_compression is None else body.output_compression,
        preview_steps=preview_steps(body.previews, body.num_inference_steps),
        is_upsampled=checked_upsampling(body, settings),
        compare=body.compare,
    )


def check_prompt(prompt: str, output_format: ImageFormat, settings: GeneratorSettings) -> None:
    """Refuse a prompt that is too long for this service, or for a JPEG file's record of it."""
    if len(prompt) > settings.max_prompt_chars:
        told = f"prompt: at most {settings.max_prompt_chars} characters, not {len(prompt)}"
        raise InvalidRequest(told, param="prompt")
    if output_format == "jpeg" and len(json.dumps(prompt)) > MAX_JPEG_PROMPT_BYTES:
        raise InvalidRequest("prompt: too long to be recorded in a JPEG file: choose png or webp", param="prompt")


def checked_references(images: Sequence[str], settings: GeneratorSettings) -> tuple[Reference, ...]:
    """The reference images, decoded."""
    if len(images) > settings.max_references:
        raise InvalidRequest(f"images: at most {settings.max_references}, not {len(images)}", param="images")
    return tuple(parse_reference(text, f"images[{k}]", settings.max_reference_pixels) for k, text in enumerate(images))


def checked_upsampling(body: GenerateRequest, settings: GeneratorSettings) -> bool:
    """Whether to rewrite the prompt."""
    if body.upsample_prompt and settings.upsampler_url is None:
        raise InvalidRequest("upsample_prompt: this service has no prompt upsampler", param="upsample_prompt")
    if body.upsample_prompt and body.prompt is None:
        raise InvalidRequest("upsample_prompt: there is no prompt to rewrite", param="upsample_prompt")
    return body.upsample_prompt


def checked_adapters(asked: str | list[LoraUse] | None, known: Sequence[str]) -> tuple[Adapter, ...]:
    """The LoRA adapters that a request names."""
    uses = [LoraUse(name=asked)] if isinstance(asked, str) else asked or []
    names = [use.name for use in uses]
    for name in names:
        if name not in known:
            there = f"there are {', '.join(known)}" if known else "this service has none"
            raise InvalidRequest(f"lora: there is no adapter {name!r}: {there}", param="lora")
    if len(set(names)) < len(names):
        raise InvalidRequest("lora: names an adapter twice", param="lora")
    return tuple(Adapter(use.name, float(use.scale)) for use in uses)


def preview_steps(count: int, num_steps: int) -> tuple[int, ...]:
    """After which steps to show a picture ``count`` times: evenly, never after the first, nor after the last."""
    return tuple(
        sorted({max(1, num_steps * (k + 1) // (count + 1)) for k in range(count)} & set(range(1, num_steps - 1)))
    )


def checked_seed(body: GenerateRequest) -> int:
    """The first picture's seed; drawn if the body has none."""
    if body.seed is None:
        return secrets.randbelow(DRAWN_SEEDS)
    if body.seed + body.num_images - 1 > MAX_SEED:
        raise InvalidRequest(f"seed: with {body.num_images} images at most 2^63 - {body.num_images}", param="seed")
    return body.seed


def checked_size(
    body: GenerateRequest, references: Sequence[Reference], settings: GeneratorSettings, model: ModelCard
) -> tuple[int, int]:
    """Width and height: as given, else the first reference image's, else the model's own; if they fit."""
    unit = model.pixels_per_token
    own = references[0].prepared_size(unit) if references else (model.default_side, model.default_side)
    width = checked_side("width", own[0] if body.width is None else body.width, settings, unit)
    height = checked_side("height", own[1] if body.height is None else body.height, settings, unit)
    if width * height > settings.max_pixels:
        raise InvalidRequest(f"width: {width}x{height} is more than {settings.max_pixels} pixels", param="width")
    num_tokens = count_tokens(width, height, references, model)
    if num_tokens > settings.max_image_tokens:
        drawn = model.num_image_tokens(width, height)
        told = f"{num_tokens} image tokens ({drawn} of the picture) are more than {settings.max_image_tokens}"
        raise InvalidRequest(f"images: {told}: send fewer or smaller ones", param="images")
    return width, height


def count_tokens(width: int, height: int, references: Sequence[Reference], model: ModelCard) -> int:
    """Tokens of the picture and its reference images."""
    of_references = sum(reference.num_tokens(model.pixels_per_token) for reference in references)
    return model.num_image_tokens(width, height) + of_references


def checked_cache(body: GenerateRequest, settings: GeneratorSettings, cost: Cost | None) -> str | int | MaxError:
    """What ``cache`` asks for; with ``max_latency_ms``, as many computed steps as fit."""
    if body.max_latency_ms is None:
        return settings.default_cache if body.cache is None else body.cache
    if body.cache is not None:
        raise InvalidRequest("max_latency_ms: chooses the cache: give one of the two", param="max_latency_ms")
    if cost is None:
        raise InvalidRequest("max_latency_ms: nothing is known of this device's speed yet", param="max_latency_ms")
    num_steps = body.num_inference_steps
    fewest = published_size("ultra", num_steps)
    for num_computed in range(num_steps, fewest - 1, -1):
        if 1000 * body.num_images * cost.total_s(num_computed, num_steps) <= body.max_latency_ms:
            return "none" if num_computed == num_steps else num_computed
    least = math.ceil(1000 * body.num_images * cost.total_s(fewest, num_steps))
    told = f"{num_steps} steps of this size take {least} ms at least, with {fewest} of them computed"
    raise InvalidRequest(f"max_latency_ms: {told}", param="max_latency_ms")


def checked_side(name: str, side: int, settings: GeneratorSettings, unit: int) -> int:
    """``side``, if it is a multiple of ``unit``, the size of a token, within the settings' limits."""
    if side % unit or not settings.min_side <= side <= settings.max_side:
        raise InvalidRequest(
            f"{name}: must be a multiple of {unit} from {settings.min_side} to {settings.max_side}, not {side}",
            param=name,
        )
    return side


def checked_schedule(cache: str | int | MaxError, registry: ScheduleRegistry, wanted: Signature) -> Schedule:
    """The schedule that ``cache`` asks for."""
    try:
        if isinstance(cache, MaxError):
            return registry.cheapest_within(cache.max_error, wanted)
        return registry.find(cache, wanted)
    except ScheduleMismatch as error:
        raise InvalidRequest(f"cache: {error}".replace("cache: cache:", "cache:"), param="cache") from None


def parse_embeds(text: str, shape: tuple[int, int]) -> torch.Tensor:
    """The tensor ``[1, L, D]`` in a base64 safetensors file."""
    try:
        return parse_safetensors(base64.b64decode(text, validate=True), (1, *shape))
    except ValueError as error:  # of base64, or a WireError
        told = f"prompt_embeds: must be base64 of a safetensors file with one tensor of shape {[1, *shape]}: {error}"
        raise InvalidRequest(told, param="prompt_embeds") from None
