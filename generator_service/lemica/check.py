"""Checks at start that reuse works on a transformer."""

from typing import Any

import torch

from generator_service.lemica.cached_transformer import REQUIRED_MODULES, CachedTransformer
from generator_service.lemica.errors import TransformerMismatch
from generator_service.lemica.schedule import Schedule
from generator_service.lemica.signature import Signature


@torch.no_grad()
def check_transformer(transformer: Any, example: dict[str, Any]) -> None:
    """Check at startup that residual reuse is valid for this transformer.

    At the same input the residual is exact, so a computed step followed by a reused one must give the same velocity up
    to rounding.

    Args:
        transformer: the transformer to check.
        example: keyword arguments of one small forward pass without reference tokens.

    Raises:
        TransformerMismatch: a required module is missing, or the two velocities differ.
    """
    missing = [name for name in REQUIRED_MODULES if not hasattr(transformer, name)]
    if missing:
        raise TransformerMismatch(
            f"the transformer has no {', '.join(missing)}: this version of diffusers is not supported"
        )
    schedule = Schedule("check", 2, (0,), "check", Signature("any", 2))
    try:
        cached = CachedTransformer(transformer, schedule, example["hidden_states"].shape[1])
        (computed,), (reused,) = cached(**example), cached(**example)
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise TransformerMismatch("a reused step does not run on this transformer") from error
    tolerance = 8 * torch.finfo(computed.dtype).eps * max(1.0, computed.abs().max().item())
    difference = (computed - reused).abs().max().item()
    if not difference <= tolerance * 8:
        raise TransformerMismatch(f"a reused step differs from the computed one by {difference:.3g} at the same input")


def small_example(transformer: Any, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of one forward pass over 2 x 2 image tokens and 8 text tokens."""
    noise = torch.Generator("cpu").manual_seed(0)
    image_ids = torch.cartesian_prod(*(torch.arange(n) for n in (1, 2, 2, 1)))
    text_ids = torch.cartesian_prod(*(torch.arange(n) for n in (1, 1, 1, 8)))
    latents = torch.randn(1, 4, transformer.config.in_channels, generator=noise)
    text = torch.randn(1, 8, transformer.config.joint_attention_dim, generator=noise)
    return {
        "hidden_states": latents.to(device, dtype),
        "timestep": torch.full([1], 0.5, device=device, dtype=dtype),
        "guidance": torch.full([1], 4.0, device=device),
        "encoder_hidden_states": text.to(device, dtype),
        "img_ids": image_ids.to(device),
        "txt_ids": text_ids.to(device),
    }
