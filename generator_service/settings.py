"""Settings of the generator, from ``GENERATOR_...`` and, for the encoder it asks, ``TEXT_ENCODER_...``."""

import re
from typing import Annotated, Any, Literal

from pydantic import AnyHttpUrl, BeforeValidator, DirectoryPath, Field, FilePath, SecretStr
from pydantic_settings import NoDecode, SettingsConfigDict

from flux2_shared.settings import ServiceSettings, read_keys

CacheName = str
"""``none``, or the name of a schedule."""
ProfileName = Literal["auto", "exact", "fast", "fastest", "offload"]
Optimization = Literal["attention", "compile", "fp8", "fused_qkv", "offload", "vae"]


def read_names(text: Any) -> Any:
    """``a,b`` as a list; what is no text is left as it is."""
    return [name.strip() for name in text.split(",") if name.strip()] if isinstance(text, str) else text


def read_sizes(text: Any) -> Any:
    """``1024x1024,768x1344`` as pairs of width and height; what is no text is left as it is."""
    if not isinstance(text, str):
        return text
    found = [re.fullmatch(r"(\d+)x(\d+)", name) for name in read_names(text)]
    if not all(found):
        raise ValueError("give sizes as WIDTHxHEIGHT, separated by commas, like 1024x1024,768x1344")
    return [(int(size[1]), int(size[2])) for size in found if size]


class GeneratorSettings(ServiceSettings):
    """What can be set, and what holds if nothing is."""

    model_config = SettingsConfigDict(env_prefix="GENERATOR_")

    port: int = Field(8000, ge=0, le=65535)
    published_host: str | None = None
    """Where a container's port is published, which the container cannot know: for the warning about missing keys."""
    max_body_bytes: int = Field(48 * 2**20, gt=0)
    max_waiting: int = Field(8, ge=1)
    max_batch: int = Field(1, ge=1)
    """How many pictures that fit together share a run."""
    max_batch_pixels: int = Field(512 * 512, ge=0)
    """Of each of them; a larger picture is drawn alone."""
    max_pixels: int = Field(2048 * 2048, ge=256)
    min_side: int = Field(64, ge=16)
    max_side: int = Field(4096, ge=16)
    max_references: int = Field(8, ge=0)
    """Reference images in one request."""
    max_reference_pixels: int = Field(16 * 2**20, ge=4096)
    """Of one reference image, before it is decoded."""
    max_image_tokens: int = Field(40_960, ge=1)
    """Of the picture and its reference images together; what a GPU of 80 GB is expected to hold."""
    max_num_images: int = Field(4, ge=1)
    """Pictures of one request."""
    max_jobs: int = Field(100, ge=1)
    """Ended jobs that are kept."""
    max_job_bytes: int = Field(512 * 2**20, ge=0)
    """Their results, together."""
    job_ttl_s: float = Field(3600.0, gt=0)
    """How long a job is kept after its end."""
    lora_dir: DirectoryPath | None = None
    """A folder with LoRA adapters, ``NAME.safetensors``."""
    max_loras: int = Field(4, ge=1)
    """How many of them are kept on the device."""
    quality_sampling: float = Field(0.0, ge=0, le=1)
    """The share of pictures that are drawn once more without a cache, in the background, for the metrics."""
    default_cache: Annotated[int | CacheName, Field(union_mode="left_to_right")] = "medium"
    """The schedule of requests that do not choose one."""
    schedules_dir: DirectoryPath | None = Field(None, validation_alias="SCHEDULES_DIR")
    """A folder of calibrated schedules, beside those that come with the product."""

    performance: ProfileName = "auto"
    """How the model is made fast; ``auto`` is ``fast`` on a GPU, ``offload`` on a small one, ``exact`` on a CPU."""
    performance_without: Annotated[frozenset[Optimization], NoDecode, BeforeValidator(read_names)] = frozenset()
    """What of the profile is left out."""
    warm_up_sizes: Annotated[tuple[tuple[int, int], ...], NoDecode, BeforeValidator(read_sizes)] = ()
    """Widths and heights of pictures that are compiled by themselves at start; none: the model's default size."""

    upsampler_url: AnyHttpUrl | None = None
    """The base of an API with OpenAI's chat completions, that rewrites prompts where a request asks for it."""
    upsampler_model: str = "default"
    """The chat model's name there."""
    upsampler_token: SecretStr | None = None
    """Sent to it as a bearer token."""
    upsampler_timeout_s: float = Field(30.0, gt=0)
    """For one prompt."""

    text_encoder_url: AnyHttpUrl = Field(AnyHttpUrl("http://127.0.0.1:8006"), validation_alias="TEXT_ENCODER_URL")
    """Ours, or any service of the same protocol. With or without ``/predict``."""
    text_encoder_token: SecretStr | None = Field(None, validation_alias="TEXT_ENCODER_TOKEN")
    text_encoder_keys_file: FilePath | None = Field(None, validation_alias="TEXT_ENCODER_KEYS_FILE")
    """The encoder's own keys: without a token, the first of them is sent."""
    text_encoder_timeout_s: float = Field(30.0, gt=0, validation_alias="TEXT_ENCODER_TIMEOUT_S")
    """In all, retries included."""

    def token_to_send(self) -> SecretStr | None:
        """The bearer token for the text encoder, if it asks for one."""
        keys = read_keys(self.text_encoder_keys_file) if self.text_encoder_keys_file else ()
        return self.text_encoder_token or (SecretStr(keys[0]) if keys else None)
