"""The body of ``POST /generate``."""

from typing import Annotated, Literal

from pydantic import Field, StrictBool, StrictFloat, StrictInt, StrictStr, model_validator

from flux2_shared.schemas import Strict, Text
from generator_service.engine.imaging import ImageFormat

MAX_SEED = 2**63 - 1


class MaxError(Strict):
    """A ``cache`` that computes as few steps as keep every error within a bound: needs calibrated schedules."""

    max_error: Annotated[StrictFloat, Field(ge=0, allow_inf_nan=False)]


class LoraUse(Strict):
    """An adapter and how strongly it is applied."""

    name: StrictStr
    scale: Annotated[StrictFloat | StrictInt, Field(ge=-4, le=4, allow_inf_nan=False)] = 1.0


class Sampling(Strict):
    """How a picture is drawn, in every dialect."""

    num_inference_steps: Annotated[StrictInt, Field(ge=1, le=100)] = 50
    guidance_scale: Annotated[StrictFloat, Field(ge=0, le=100, allow_inf_nan=False)] = 4.0
    seed: Annotated[StrictInt | None, Field(ge=0, le=MAX_SEED, description="Drawn, and returned, if absent.")] = None
    cache: Annotated[
        StrictStr | StrictInt | MaxError | None,
        Field(
            description="none, slow, medium, fast, ultra, a schedule's name, or how many steps are computed.",
            examples=["fast", 12, {"max_error": 0.01}],
        ),
    ] = None
    lora: Annotated[
        StrictStr | Annotated[list[LoraUse], Field(min_length=1, max_length=4)] | None,
        Field(description="A LoRA adapter of the service's folder, or several with their scales."),
    ] = None
    upsample_prompt: Annotated[
        StrictBool, Field(description="A chat model of the operator's choice rewrites the prompt first.")
    ] = False


class GenerateRequest(Sampling):
    """What to draw. Everything but the prompt has a default."""

    prompt: Annotated[Text | None, Field(description="What to draw.", examples=["a large red circle"])] = None
    prompt_embeds: Annotated[
        StrictStr | None, Field(description="Instead of a prompt: its embedding, base64 of a safetensors file.")
    ] = None
    width: Annotated[StrictInt | None, Field(description="Pixels, a multiple of 16.")] = None
    height: Annotated[StrictInt | None, Field(description="Pixels, a multiple of 16.")] = None
    output_format: ImageFormat = "png"
    output_compression: Annotated[
        StrictInt | None, Field(ge=0, le=100, description="Quality of a JPEG or WebP file; 95 if absent.")
    ] = None
    images: Annotated[
        list[StrictStr],
        Field(default_factory=list, description="Reference images to edit: PNG, JPEG or WebP as base64 or data URI."),
    ]
    max_latency_ms: Annotated[
        StrictInt | None,
        Field(ge=1, description="Instead of cache: as many computed steps as fit into this time, waiting aside."),
    ] = None
    deadline_ms: Annotated[
        StrictInt | None, Field(ge=1, description="Refused with 504 if its drawing has not begun within this time.")
    ] = None
    previews: Annotated[
        StrictInt, Field(ge=0, le=10, description="How often a stream of events shows what the picture will be.")
    ] = 0
    compare: Annotated[
        StrictBool, Field(description="Draw it without a cache too: the answer has PSNR, SSIM and both side by side.")
    ] = False
    on_disconnect: Annotated[
        Literal["cancel", "keep"],
        Field(description="What happens when the client leaves: keep makes it a job, x-job-id, to come back to."),
    ] = "cancel"
    num_images: Annotated[StrictInt, Field(ge=1, description="Pictures with the seeds seed, seed + 1, ...")] = 1

    @model_validator(mode="after")
    def _has_one_prompt(self) -> "GenerateRequest":
        if (self.prompt is None) == (self.prompt_embeds is None):
            raise ValueError("give either prompt or prompt_embeds")
        return self
