"""Settings of the text encoder, from ``TEXT_ENCODER_...``."""

from typing import Literal

import torch
from pydantic import Field
from pydantic_settings import SettingsConfigDict

from shared.settings import ServiceSettings
from text_encoder_service.quantisation import Weights


class TextEncoderSettings(ServiceSettings):
    """What can be set, and what holds if nothing is."""

    model_config = SettingsConfigDict(env_prefix="TEXT_ENCODER_")

    port: int = Field(8006, ge=0, le=65535)
    max_body_bytes: int = Field(2**20, gt=0)
    max_waiting: int = Field(256, ge=1)
    max_prompts: int = Field(32, ge=1)
    """Prompts in one request."""
    max_batch: int = Field(8, ge=1)
    """Prompts that share one forward pass."""
    max_wait_ms: float = Field(3.0, ge=0)
    """How long a prompt waits for others to share a forward pass with."""
    performance: Literal["auto", "exact", "fast"] = "auto"
    """``exact`` is bit-equal to diffusers, ``fast`` trimmed and compiled; ``auto`` is fast on GPUs from Ampere on."""
    weights: Weights = "full"
    """How the decoder layers' weights are stored; ``int8`` and ``int4`` need the extra ``quantization``."""

    def profile(self) -> Literal["exact", "fast"]:
        """The performance profile, ``auto`` resolved."""
        if self.performance != "auto":
            return self.performance
        device = self.torch_device()
        is_fast_there = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        return "fast" if is_fast_there else "exact"
