"""FLUX.2's architecture with random weights, made where they are used, or the weights of a checkpoint.

Times do not depend on the values, so a full-size model with random weights measures FLUX.2 [dev]'s speed truly. It says
nothing of its pictures, nor of how much fp8 or a cache changes them. The weights are scaled so that activations stay
finite: each layer keeps the variance of what it is given, and 56 blocks add to the residual stream what a block adds.
"""

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Pipeline, Flux2Transformer2DModel
from torch import nn

SEED = 20260101
SCHEDULER: Mapping[str, Any] = MappingProxyType(
    {
        "num_train_timesteps": 1000,
        "shift": 3.0,
        "use_dynamic_shifting": True,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
        "time_shift_type": "exponential",
    }
)


@dataclass(frozen=True)
class Size:
    """An architecture: the arguments of diffusers' classes, whose defaults are FLUX.2 [dev]'s."""

    name: str
    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    num_text_tokens: int


FULL = Size("full", {}, {}, 512)
TINY = Size(
    "tiny",
    {
        "in_channels": 32,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 4,
        "joint_attention_dim": 96,
        "timestep_guidance_channels": 32,
        "axes_dims_rope": (4, 4, 4, 4),
    },
    {
        "block_out_channels": (8, 16, 16, 16),
        "latent_channels": 8,
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "sample_size": 128,
    },
    16,
)
SIZES = MappingProxyType({size.name: size for size in (FULL, TINY)})


@dataclass(frozen=True)
class Parts:
    """What a FLUX.2 generator is made of, on its device."""

    transformer: Any
    vae: Any
    scheduler: Any
    source: str
    """Where the weights come from."""
    num_text_tokens: int

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return next(self.transformer.parameters()).device

    def embedding(self, seed: int) -> torch.Tensor:
        """A ready embedding ``[1, L, D]`` on the CPU, of random numbers."""
        noise = torch.Generator("cpu").manual_seed(seed)
        shape = (1, self.num_text_tokens, self.transformer.config.joint_attention_dim)
        return torch.randn(shape, generator=noise).to(self.transformer.dtype)

    def pipeline(self) -> Flux2Pipeline:
        """The library's own pipeline around them, without a text encoder."""
        made = Flux2Pipeline(
            scheduler=self.scheduler, vae=self.vae, text_encoder=None, tokenizer=None, transformer=self.transformer
        )
        made.set_progress_bar_config(disable=True)
        return made


@dataclass(frozen=True)
class Source:
    """Makes the same parts again and again; none of what was done to the last ones stays."""

    size: Size
    device: torch.device
    dtype: torch.dtype
    folder: Path | None = None
    """Of a checkpoint, instead of random weights."""

    def parts(self) -> Parts:
        """Fresh parts. Those made before must be given up first where the device has room for one model only."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return loaded_parts(self) if self.folder else random_parts(self.size, self.device, self.dtype)


def random_parts(size: Size, device: torch.device, dtype: torch.dtype) -> Parts:
    """The architecture with random weights, drawn on ``device`` itself: full size takes seconds on a GPU."""
    with torch.device("meta"):
        transformer = Flux2Transformer2DModel(**size.transformer)
        vae = AutoencoderKLFlux2(**size.vae)
    noise = torch.Generator(device).manual_seed(SEED)
    for module in (transformer, vae):
        nn.Module.to(
            module, dtype
        )  # diffusers' own would warn of layers that must stay float32, of which there are none
        module.to_empty(device=device)
        fill(module, noise)
        module.eval().requires_grad_(requires_grad=False)
    scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    return Parts(transformer, vae, scheduler, f"random weights, {size.name} size", size.num_text_tokens)


def loaded_parts(source: Source) -> Parts:
    """The parts of a checkpoint."""
    assert source.folder is not None
    loaded = Flux2Pipeline.from_pretrained(
        source.folder, text_encoder=None, tokenizer=None, dtype=source.dtype, use_safetensors=True
    ).to(source.device)
    return Parts(
        loaded.transformer.eval(), loaded.vae.eval(), loaded.scheduler, source.folder.name, source.size.num_text_tokens
    )


@torch.no_grad()
def fill(module: nn.Module, noise: torch.Generator) -> None:
    """Draw every weight of a module that was made empty.

    Raises:
        ValueError: it has a buffer whose value is not known.
    """
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:  # a linear layer's or a convolution's
            fan_in = parameter[0].numel()
            parameter.normal_(0.0, fan_in**-0.5, generator=noise)
        else:  # a norm's scale, or a bias
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    known = {"running_mean": 0, "running_var": 1, "num_batches_tracked": 0}
    for name, buffer in module.named_buffers():
        last = name.rpartition(".")[2]
        if last not in known:
            raise ValueError(f"{name} is a buffer that nobody fills")
        buffer.fill_(known[last])
