"""A small input of the transformer, to check what it does before it serves."""

from typing import Any

import torch


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
