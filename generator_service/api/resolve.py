"""Resolves request bodies: fills in defaults, checks every field, and returns a ``Request``."""

import json
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from flux2_shared.errors import InvalidRequest, ModelRefused
from flux2_shared.wire import parse_safetensors
from generator_service.api.base64_text import decode_base64
from generator_service.api.references import parse_reference
from generator_service.api.schemas import MAX_SEED, GenerateRequest, LoraUse, MaxError
from generator_service.engine.imaging import DEFAULT_QUALITY, MAX_JPEG_PROMPT_BYTES
from generator_service.engine.latency import LatencyEstimate, LatencyModel
from generator_service.engine.request import Request
from generator_service.lemica import (
    SHIPPED,
    ScheduleMismatch,
    ScheduleRegistry,
    load_registry,
    published_size,
)
from generator_service.pipelines.lora import Adapter
from generator_service.pipelines.model_info import ModelInfo
from generator_service.pipelines.params import Params, ReferenceSize
from generator_service.settings import GeneratorSettings

RANDOM_SEEDS = 2**32
"""Seeds of requests without ``seed`` are random numbers below this."""


def open_registry(settings: GeneratorSettings, model: ModelInfo) -> ScheduleRegistry:
    """Load the calibrated schedules of ``model``: the built-in ones and those in ``SCHEDULES_DIR``.

    Raises:
        ModelRefused: a file cannot be read as schedules, or ``GENERATOR_DEFAULT_CACHE`` names an unknown schedule.
    """
    folders = [SHIPPED, *([settings.schedules_dir] if settings.schedules_dir else [])]
    try:
        registry = load_registry(folders, model.fingerprint)
    except ScheduleMismatch as error:
        raise ModelRefused(f"SCHEDULES_DIR: {error}") from error
    if not registry.has(settings.default_cache):
        raise ModelRefused(f"GENERATOR_DEFAULT_CACHE: there is no schedule {settings.default_cache!r}")
    return registry


@dataclass(frozen=True)
class Resolver:
    """Resolves request bodies for one model under the limits of ``settings``."""

    settings: GeneratorSettings
    model: ModelInfo
    registry: ScheduleRegistry
    embedding_shape: tuple[int, int]
    """Tokens and width of a prompt embedding."""
    latencies: LatencyModel

    def resolve(self, body: GenerateRequest, is_followed: bool, sizes: Sequence[ReferenceSize] = ()) -> Request:
        """Fill in defaults and check every field.

        Args:
            body: the request body.
            is_followed: whether the client reads progress events.
            sizes: of reference images, to estimate a request without them; by default those of the body's images.

        Raises:
            InvalidRequest: a field is invalid; the error names it.
        """
        self._check(body)
        references = tuple(
            parse_reference(text, f"images[{index}]", self.settings.max_reference_pixels)
            for index, text in enumerate(body.images)
        )
        sizes = [reference.size for reference in references] or sizes
        width, height, num_tokens = self._size(body, sizes)
        latency = self.latencies.estimate(num_tokens)
        return Request(
            params=replace(self._params(body, (width, height), latency, is_edit=bool(sizes)), references=references),
            num_images=body.num_images,
            output_format=body.output_format,
            quality=DEFAULT_QUALITY if body.output_compression is None else body.output_compression,
            deadline_s=None if body.deadline_ms is None else body.deadline_ms / 1000,
            preview_steps=preview_steps(body.previews, body.num_inference_steps) if body.previews else (),
            is_upsampled=body.upsample_prompt,
            compare=body.compare,
            is_followed=is_followed,
            num_tokens=num_tokens,
            latency=latency,
        )

    def _params(
        self, body: GenerateRequest, size: tuple[int, int], latency: LatencyEstimate | None, *, is_edit: bool
    ) -> Params:
        width, height = size
        cache = self.settings.default_cache if body.cache is None else body.cache
        if body.max_latency_ms is not None:
            cache = cache_within(body, body.max_latency_ms, latency)
        adapters = () if body.lora is None else resolve_adapters(body.lora, self.model.adapters)
        signature = self.model.signature(
            num_steps=body.num_inference_steps,
            width=width,
            height=height,
            guidance_scale=body.guidance_scale,
            is_edit=is_edit,
            adapters=adapters,
        )
        embeds = body.prompt_embeds
        prompt_embeds = None if embeds is None else parse_embeds(embeds, self.embedding_shape)
        try:
            if isinstance(cache, MaxError):
                schedule = self.registry.cheapest_within(cache.max_error, signature)
            else:
                schedule = self.registry.find(cache, signature)
        except ScheduleMismatch as error:
            raise InvalidRequest(f"cache: {error}".replace("cache: cache:", "cache:"), param="cache") from None
        return Params(
            prompt_embeds=prompt_embeds,
            width=width,
            height=height,
            guidance_scale=body.guidance_scale,
            seed=secrets.randbelow(RANDOM_SEEDS) if body.seed is None else body.seed,
            schedule=schedule,
            adapters=adapters,
            prompt=body.prompt,
            cache=cache.model_dump() if isinstance(cache, MaxError) else cache,
        )

    def _check(self, body: GenerateRequest) -> None:
        """Check numbers and lengths before any image or tensor is decoded."""
        settings, prompt = self.settings, body.prompt
        if (prompt is None) == (body.prompt_embeds is None):
            raise InvalidRequest("prompt: give either prompt or prompt_embeds", param="prompt")
        if prompt is not None and len(prompt) > settings.max_prompt_chars:
            limit = f"at most {settings.max_prompt_chars} characters, not {len(prompt)}"
            raise InvalidRequest(f"prompt: {limit}", param="prompt")
        if prompt is not None and body.output_format == "jpeg" and len(json.dumps(prompt)) > MAX_JPEG_PROMPT_BYTES:
            raise InvalidRequest("prompt: too long for the metadata of a JPEG file; use png or webp", param="prompt")
        if body.num_images > settings.max_num_images:
            raise InvalidRequest(f"num_images: at most {settings.max_num_images}", param="num_images")
        if len(body.images) > settings.max_references:
            limit = f"at most {settings.max_references}, not {len(body.images)}"
            raise InvalidRequest(f"images: {limit}", param="images")
        if body.seed is not None and body.seed + body.num_images - 1 > MAX_SEED:
            raise InvalidRequest(f"seed: with {body.num_images} images at most 2^63 - {body.num_images}", param="seed")
        if body.upsample_prompt and settings.upsampler_url is None:
            raise InvalidRequest("upsample_prompt: this service has no prompt upsampler", param="upsample_prompt")
        if body.upsample_prompt and prompt is None:
            raise InvalidRequest("upsample_prompt: there is no prompt to rewrite", param="upsample_prompt")

    def _size(self, body: GenerateRequest, sizes: Sequence[ReferenceSize]) -> tuple[int, int, int]:
        """Return width, height, and the number of tokens including the reference images.

        The size is that of the body, else of the first reference image, else the model's default.
        """
        unit, settings = self.model.pixels_per_token, self.settings
        default_side = self.model.default_side
        default = sizes[0].prepared(unit) if sizes else (default_side, default_side)
        width = default[0] if body.width is None else body.width
        height = default[1] if body.height is None else body.height
        for name, side in (("width", width), ("height", height)):
            if side % unit or not settings.min_side <= side <= settings.max_side:
                limits = f"must be a multiple of {unit} from {settings.min_side} to {settings.max_side}, not {side}"
                raise InvalidRequest(f"{name}: {limits}", param=name)
        if width * height > settings.max_pixels:
            raise InvalidRequest(f"width: {width}x{height} is more than {settings.max_pixels} pixels", param="width")
        image_tokens = self.model.num_image_tokens(width, height)
        num_tokens = image_tokens + sum(size.num_tokens(unit) for size in sizes)
        if num_tokens > settings.max_image_tokens:
            limit = f"({image_tokens} of the image itself) are more than {settings.max_image_tokens}"
            message = f"images: {num_tokens} image tokens {limit}; send fewer or smaller images"
            raise InvalidRequest(message, param="images")
        num_images = body.num_images * (2 if body.compare else 1)
        token_steps = num_images * num_tokens * body.num_inference_steps
        if token_steps > settings.max_token_steps:
            work = f"{num_images} images of {num_tokens} tokens in {body.num_inference_steps} steps"
            limit = f"{token_steps} token steps, more than {settings.max_token_steps}"
            message = f"num_inference_steps: {work} are {limit}; ask for fewer images, fewer steps, or smaller images"
            raise InvalidRequest(message, param="num_inference_steps")
        return width, height, num_tokens


def cache_within(body: GenerateRequest, limit_ms: int, latency: LatencyEstimate | None) -> str | int:
    """Return the cache mode with the most computed steps that keeps all images of the request within the limit."""
    if body.cache is not None:
        raise InvalidRequest("max_latency_ms: cannot be combined with cache", param="max_latency_ms")
    if latency is None:
        reason = "the speed of this device is not known yet; generate one image first"
        raise InvalidRequest(f"max_latency_ms: {reason}", param="max_latency_ms")
    num_steps = body.num_inference_steps
    fewest = published_size("ultra", num_steps)
    for num_computed in range(num_steps, fewest - 1, -1):
        if 1000 * body.num_images * latency.total_s(num_computed, num_steps) <= limit_ms:
            return "none" if num_computed == num_steps else num_computed
    least = math.ceil(1000 * body.num_images * latency.total_s(fewest, num_steps))
    bound = f"{num_steps} steps of this size take at least {least} ms, with {fewest} of them computed"
    raise InvalidRequest(f"max_latency_ms: {bound}", param="max_latency_ms")


def resolve_adapters(lora: str | list[LoraUse], known: Sequence[str]) -> tuple[Adapter, ...]:
    """Return the LoRA adapters of a request; raise ``InvalidRequest`` if one is not ``known`` or is named twice."""
    uses = [LoraUse(name=lora)] if isinstance(lora, str) else lora
    names = [use.name for use in uses]
    for name in names:
        if name not in known:
            available = f"available are {', '.join(known)}" if known else "this service has none"
            raise InvalidRequest(f"lora: there is no adapter {name!r}; {available}", param="lora")
    if len(set(names)) < len(names):
        raise InvalidRequest("lora: names an adapter twice", param="lora")
    return tuple(Adapter(use.name, float(use.scale)) for use in uses)


def preview_steps(count: int, num_steps: int) -> tuple[int, ...]:
    """Return the steps after which previews are shown: evenly spaced, never after the first or the last step."""
    return tuple(
        sorted({max(1, num_steps * (k + 1) // (count + 1)) for k in range(count)} & set(range(1, num_steps - 1)))
    )


def parse_embeds(text: str, shape: tuple[int, int]) -> torch.Tensor:
    """Decode a tensor ``[1, L, D]`` from a base64 safetensors file."""
    try:
        return parse_safetensors(decode_base64(text), (1, *shape))
    except ValueError as error:  # from base64, or a WireError
        expected = f"must be a base64 safetensors file with one tensor of shape {[1, *shape]}"
        raise InvalidRequest(f"prompt_embeds: {expected}: {error}", param="prompt_embeds") from None
