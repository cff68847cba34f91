"""Request body of ``POST /generate``."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StrictBool, StrictFloat, StrictInt, model_validator

from flux2_shared.schemas import MAX_FIELDS, Strict, Text, too_many_fields
from generator_service.engine.imaging import ImageFormat

MAX_SEED = 2**63 - 1
MAX_IMAGES = 100
"""Bounds the list of reference images before its items are checked; the service's limit is a setting."""
MAX_MS = 24 * 60 * 60 * 1000
"""Longest time that a client may give, in milliseconds: a day."""


def validate_prompt(prompt: str) -> str:
    """Return ``prompt``; raise ``ValueError`` if nothing of it is visible."""
    if not any(character.isprintable() and not character.isspace() for character in prompt):
        raise ValueError("must not be blank")
    return prompt


Prompt = Annotated[Text, AfterValidator(validate_prompt)]


class RequestBody(Strict):
    """Base class of request bodies. Many clients send null for a field that is not set, so null means the default."""

    @model_validator(mode="before")
    @classmethod
    def _bound_fields(cls, data: Any) -> Any:  # instead of the one of ``Strict``
        if not isinstance(data, dict):
            return data
        if len(data) > MAX_FIELDS:
            raise too_many_fields(len(data))
        fields = cls.model_fields
        return {k: v for k, v in data.items() if v is not None or k not in fields or fields[k].is_required()}


class MaxError(Strict):
    """A ``cache`` with the fewest computed steps whose errors stay within a bound; needs calibrated schedules."""

    max_error: Annotated[StrictFloat, Field(ge=0, allow_inf_nan=False)]


class LoraUse(RequestBody):
    """A LoRA adapter and its scale."""

    name: Text
    scale: Annotated[StrictFloat | StrictInt, Field(ge=-4, le=4, allow_inf_nan=False)] = 1.0


class Sampling(RequestBody):
    """Sampling parameters, common to the bodies of all APIs."""

    num_inference_steps: Annotated[StrictInt, Field(ge=1, le=100)] = 50
    guidance_scale: Annotated[StrictFloat, Field(ge=0, le=100, allow_inf_nan=False)] = 4.0
    seed: Annotated[
        StrictInt | None, Field(ge=0, le=MAX_SEED, description="Random if absent; the response returns it.")
    ] = None
    cache: Annotated[
        Text | StrictInt | MaxError | None,
        Field(
            description="none, slow, medium, fast, ultra, the name of a schedule, or the number of computed steps.",
            examples=["fast", 12, {"max_error": 0.01}],
        ),
    ] = None
    lora: Annotated[
        Text | Annotated[list[LoraUse], Field(min_length=1, max_length=4, fail_fast=True)] | None,
        Field(description="Name of a LoRA adapter of the service, or a list of adapters with scales."),
    ] = None
    upsample_prompt: Annotated[
        StrictBool, Field(description="Whether a chat model, chosen by the operator, rewrites the prompt first.")
    ] = False


class GenerateRequest(Sampling):
    """A request for images. Every field except the prompt has a default."""

    prompt: Annotated[Prompt | None, Field(description="What the image shows.", examples=["a large red circle"])] = None
    prompt_embeds: Annotated[
        Text | None,
        Field(description="Embedding of the prompt, instead of the prompt: a safetensors file as base64 or data URI."),
    ] = None
    width: Annotated[StrictInt | None, Field(description="Pixels, a multiple of 16.")] = None
    height: Annotated[StrictInt | None, Field(description="Pixels, a multiple of 16.")] = None
    output_format: ImageFormat = "png"
    output_compression: Annotated[
        StrictInt | None, Field(ge=0, le=100, description="Quality of a JPEG or WebP file. Default: 95.")
    ] = None
    images: Annotated[
        list[Text],
        Field(
            default_factory=list,
            max_length=MAX_IMAGES,
            fail_fast=True,
            description="Reference images to edit: PNG, JPEG or WebP files as base64 or data URIs.",
        ),
    ]
    max_latency_ms: Annotated[
        StrictInt | None,
        Field(
            ge=1,
            le=MAX_MS,
            description="Instead of cache: compute as many steps as fit into this time, without waiting time.",
        ),
    ] = None
    deadline_ms: Annotated[
        StrictInt | None,
        Field(ge=1, le=MAX_MS, description="Fail with 504 if the images are not finished within this time."),
    ] = None
    previews: Annotated[
        StrictInt, Field(ge=0, le=10, description="Number of preview images in a stream of events.")
    ] = 0
    compare: Annotated[
        StrictBool,
        Field(description="Also generate without a cache, and return PSNR, SSIM and both images side by side."),
    ] = False
    on_disconnect: Annotated[
        Literal["cancel", "keep"],
        Field(description="What happens if the client disconnects; keep makes the request a job (header x-job-id)."),
    ] = "cancel"
    num_images: Annotated[
        StrictInt, Field(ge=1, description="Number of images, with the seeds seed, seed + 1, ...")
    ] = 1
