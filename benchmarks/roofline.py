"""What FLUX.2's transformer must compute, counted from its configuration, and the least time that takes on a GPU.

Nothing is measured here. The counts are of the matrix products alone, two operations for a product and its sum, batch
1, nothing left out and nothing hoisted out of the loop.
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
"""The transformer's configuration, as far as it is counted."""
NUM_TEXT_TOKENS = 512
BF16_FLOP_PER_S = 790e12
"""What a large bf16 matrix product reached on one H200, on random data."""
FP8_SPEEDUP = 2.0
"""Of fp8 over bf16 matrix products, at best."""
FP8_PROFILES = frozenset({"fastest"})
"""The profiles whose block linears are fp8; their attention stays bf16."""


@dataclass(frozen=True)
class Work:
    """Floating-point operations of one step of the whole transformer."""

    linear: float
    """In the linear layers of the blocks."""
    attention: float
    """In the products of queries, keys and values."""
    rest: float
    """In the layers before and after the blocks."""

    def roofline_s(self, profile: str) -> float:
        """The least seconds on one H200, under a profile of the generator."""
        speedup = FP8_SPEEDUP if profile in FP8_PROFILES else 1.0
        return (self.linear / speedup + self.attention + self.rest) / BF16_FLOP_PER_S


def step_work(config: Mapping[str, Any], num_image_tokens: int, num_text_tokens: int = NUM_TEXT_TOKENS) -> Work:
    """The work of one computed step.

    Args:
        config: of a ``Flux2Transformer2DModel``.
        num_image_tokens: of the picture and its reference images.
        num_text_tokens: of the prompt, padding included.
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
