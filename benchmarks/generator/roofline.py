"""Counts the operations of FLUX.2's transformer from its configuration, and computes the roofline on a GPU.

Only matrix products are counted, as two operations per multiply-add, for a batch of one, without hoisting anything out
of the denoising loop.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

FLUX2_DEV: Mapping[str, Any] = MappingProxyType(
    {
        "num_layers": 8,
        "num_single_layers": 48,
        "num_attention_heads": 48,
        "attention_head_dim": 128,
        "mlp_ratio": 3.0,
        "in_channels": 128,
        "out_channels": None,
        "joint_attention_dim": 15360,
        "timestep_guidance_channels": 256,
        "guidance_embeds": True,
    }
)
"""The parts of the transformer's configuration that determine the count."""
NUM_TEXT_TOKENS = 512
BF16_FLOP_PER_S = 790e12
"""Measured for a large bf16 matrix product on one H200, on random data."""
FP8_SPEEDUP = 2.0
"""Largest speedup of fp8 over bf16 matrix products."""
FP8_PROFILES = frozenset({"fastest"})
"""Profiles whose blocks have linear layers in fp8; attention remains in bf16."""


@dataclass(frozen=True)
class Work:
    """Floating-point operations of one computed step."""

    linear: float
    """In the linear layers of the blocks."""
    attention: float
    """In the products of queries, keys and values."""
    rest: float
    """In the layers before and after the blocks."""

    def roofline_s(self, profile: str) -> float:
        """Return the minimum time on one H200 under a profile, in seconds."""
        speedup = FP8_SPEEDUP if profile in FP8_PROFILES else 1.0
        return (self.linear / speedup + self.attention + self.rest) / BF16_FLOP_PER_S


def step_work(config: Mapping[str, Any], num_image_tokens: int, num_text_tokens: int = NUM_TEXT_TOKENS) -> Work:
    """Count the operations of one computed step.

    Args:
        config: configuration of a ``Flux2Transformer2DModel``.
        num_image_tokens: tokens of the image and its reference images.
        num_text_tokens: tokens of the prompt, including padding.
    """
    width = config["num_attention_heads"] * config["attention_head_dim"]
    num_tokens = num_image_tokens + num_text_tokens
    num_blocks = config["num_layers"] + config["num_single_layers"]
    # Both kinds of block have q, k, v, out (4) and a gated MLP: in (2 * ratio), out (ratio), in units of width^2.
    weights = num_blocks * int((4 + 3 * config["mlp_ratio"]) * width**2)
    num_channels_out = config["out_channels"] or config["in_channels"]
    per_image_token = (config["in_channels"] + num_channels_out) * width
    per_text_token = config["joint_attention_dim"] * width
    modulation = (6 + 6 + 3 + 2) * width**2  # of both double streams, the single stream and the end: one token
    embedding = config["timestep_guidance_channels"] * width + width**2
    num_embeddings = 2 if config["guidance_embeds"] else 1
    return Work(
        linear=2.0 * weights * num_tokens,
        attention=4.0 * num_blocks * width * num_tokens**2,
        rest=2.0
        * (
            per_image_token * num_image_tokens
            + per_text_token * num_text_tokens
            + modulation
            + num_embeddings * embedding
        ),
    )
