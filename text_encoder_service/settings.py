"""Settings of the text encoder, from ``TEXT_ENCODER_...``."""

from typing import Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from flux2_shared.settings import ServiceSettings

Profile = Literal["exact", "fast"]
Weights = Literal["full", "int8", "int4"]
AMPERE = (8, 0)
"""The minimum compute capability for which ``auto`` compiles."""


class TextEncoderSettings(ServiceSettings):
    """The text encoder's settings and their defaults."""

    model_config = SettingsConfigDict(env_prefix="TEXT_ENCODER_")

    port: int = Field(8006, ge=0, le=65535)
    max_body_bytes: int = Field(2**20, gt=0)
    max_bodies_bytes: int = Field(64 * 2**20, gt=0)
    max_waiting: int = Field(256, ge=1)
    max_prompts: int = Field(32, ge=1)
    """The most prompts in one request."""
    max_batch: int = Field(8, ge=1)
    """The most prompts in one forward pass."""
    max_wait_ms: float = Field(3.0, ge=0)
    """How long a prompt waits for others to share a forward pass with."""
    performance: Literal["auto", "exact", "fast"] = "auto"
    """``exact`` is bit-exact with diffusers, ``fast`` trimmed and compiled; ``auto`` is ``fast`` from Ampere on."""
    weights: Weights = "full"
    """How the decoder layers' weights are stored; ``int8`` and ``int4`` need the extra ``quantization``."""

    def profile(self) -> Profile:
        """Resolve the performance profile for this machine."""
        import torch  # noqa: PLC0415 - settings can be read and checked where torch cannot be imported

        device = self.torch_device()
        return self.profile_on(torch.cuda.get_device_capability(device) if device.type == "cuda" else None)

    def profile_on(self, capability: tuple[int, int] | None) -> Profile:
        """Resolve the performance profile for a GPU of this compute capability, or for the CPU (None)."""
        if self.performance != "auto":
            return self.performance
        return "fast" if capability is not None and capability >= AMPERE else "exact"
