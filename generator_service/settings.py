"""Settings of the generator, from ``GENERATOR_...`` and, for its text encoder, ``TEXT_ENCODER_...``."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AnyHttpUrl, BeforeValidator, DirectoryPath, Field, SecretStr, ValidationInfo, field_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from flux2_shared.settings import KeysFile, ServiceSettings, Token, read_keys, read_names, require_key

CacheName = str
"""``none`` or the name of a schedule."""
ProfileName = Literal["auto", "exact", "fast", "fastest", "offload"]
Optimization = Literal["attention", "compile", "fp8", "fused_qkv", "offload", "vae"]


def read_sizes(text: Any) -> Any:
    """Parse ``1024x1024,768x1344`` as (width, height) pairs; a value that is not a string is returned unchanged."""
    if not isinstance(text, str):
        return text
    sizes = [re.fullmatch(r"(\d+)x(\d+)", name) for name in read_names(text)]
    if not all(sizes):
        raise ValueError("give sizes as WIDTHxHEIGHT, separated by commas, like 1024x1024,768x1344")
    return [(int(size[1]), int(size[2])) for size in sizes if size]


class GeneratorSettings(ServiceSettings):
    """Settings of the generator service, with their defaults."""

    model_config = SettingsConfigDict(env_prefix="GENERATOR_")

    port: int = Field(8000, ge=0, le=65535)
    published_host: str | None = None
    """Address on which the host publishes a container's port; used for the warning about missing authentication."""
    max_body_bytes: int = Field(48 * 2**20, gt=0)
    max_waiting: int = Field(8, ge=1)
    max_batch: int = Field(1, ge=1)
    """Largest number of compatible images in one run."""
    max_batch_pixels: int = Field(512 * 512, ge=0)
    """Largest image, in pixels, that may share a run; larger images run alone."""
    max_pixels: int = Field(2048 * 2048, ge=256)
    min_side: int = Field(64, ge=16)
    max_side: int = Field(4096, ge=16)
    max_references: int = Field(8, ge=0)
    """Largest number of reference images in one request."""
    max_reference_pixels: int = Field(16 * 2**20, ge=4096)
    """Largest reference image in pixels, checked before it is decoded."""
    max_image_tokens: int = Field(40_960, ge=1)
    """Largest number of tokens of an image and its reference images; the default suits a GPU of 80 GB."""
    max_num_images: int = Field(4, ge=1)
    """Largest number of images in one request."""
    max_token_steps: int = Field(2**22, ge=1)
    """Largest product of steps, tokens (those of ``max_image_tokens``) and images of one request."""
    key_share: float = Field(0.5, gt=0, le=1)
    """Share of the queue that the requests of one key may have, where there are several keys."""
    max_jobs: int = Field(100, ge=1)
    """Number of ended jobs that are kept for each key; those without results are dropped first."""
    max_job_bytes: int = Field(512 * 2**20, ge=0)
    """Total size of the results of ended jobs of all keys, in bytes."""
    job_ttl_s: float = Field(3600.0, gt=0)
    """Time an ended job is kept, in seconds."""
    lora_dir: DirectoryPath | None = None
    """A folder with LoRA adapters, ``NAME.safetensors``."""
    max_loras: int = Field(4, ge=1)
    """Number of adapters that are kept on the device."""
    quality_sampling: float = Field(0.0, ge=0, le=1)
    """Share of images that are generated again without a cache, in the background, for the quality metrics."""
    default_cache: Annotated[int | CacheName, Field(union_mode="left_to_right")] = "medium"
    """Schedule for requests without ``cache``."""
    schedules_dir: DirectoryPath | None = Field(None, validation_alias="SCHEDULES_DIR")
    """A folder of calibrated schedules, used in addition to the built-in ones."""

    performance: ProfileName = "auto"
    """Optimization profile; ``auto`` is ``fast`` on a GPU, ``offload`` on a small GPU, ``exact`` on a CPU."""
    performance_without: Annotated[frozenset[Optimization], NoDecode, BeforeValidator(read_names)] = frozenset()
    """Optimizations of the profile that are not applied."""
    warm_up_sizes: Annotated[tuple[tuple[int, int], ...], NoDecode, BeforeValidator(read_sizes)] = ()
    """Image sizes with compiled code for exactly that size; empty: only the model's default size."""

    upsampler_url: AnyHttpUrl | None = None
    """Base URL of an OpenAI-compatible chat API, which rewrites prompts of requests with ``upsample_prompt``."""
    upsampler_model: str = "default"
    """Name of the chat model."""
    upsampler_token: Token | None = None
    """Bearer token for the chat API."""
    upsampler_timeout_s: float = Field(30.0, gt=0)
    """Timeout for one prompt, in seconds."""

    text_encoder_url: AnyHttpUrl = Field(AnyHttpUrl("http://127.0.0.1:8006"), validation_alias="TEXT_ENCODER_URL")
    """URL of the text encoder service, or of another service with the same protocol; ``/predict`` is optional."""
    text_encoder_token: Token | None = Field(None, validation_alias="TEXT_ENCODER_TOKEN")
    text_encoder_allow_unauthenticated: bool = Field(False, validation_alias="TEXT_ENCODER_ALLOW_UNAUTHENTICATED")
    """Whether the text encoder's keys file may hold no key, so that none is sent."""
    text_encoder_keys_file: KeysFile | None = Field(None, validation_alias="TEXT_ENCODER_KEYS_FILE")
    """The encoder's key file; without ``text_encoder_token``, its first key is sent."""
    text_encoder_timeout_s: float = Field(30.0, gt=0, validation_alias="TEXT_ENCODER_TIMEOUT_S")
    """Timeout for one prompt including retries, in seconds."""

    encoder_grace_s: float = Field(300.0, ge=0)
    """Time that the generator stays ready after the text encoder's last answer, in seconds."""

    @field_validator("text_encoder_keys_file")
    @classmethod
    def _require_key_to_send(cls, file: Path | None, info: ValidationInfo) -> Path | None:
        names = ("text_encoder_allow_unauthenticated", "text_encoder_token")
        return require_key(file, "TEXT_ENCODER_", is_open_allowed=any(info.data.get(name) for name in names))

    def queue_share(self) -> float:
        """Return the share of the queue that one owner of requests may have."""
        return self.key_share if len(set(self.tokens())) > 1 else 1.0

    def token_to_send(self) -> SecretStr | None:
        """Return the bearer token for the text encoder, if one is configured."""
        keys = read_keys(self.text_encoder_keys_file) if self.text_encoder_keys_file else ()
        return self.text_encoder_token or (SecretStr(keys[0]) if keys else None)
