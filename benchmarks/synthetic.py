"""FLUX.2's architecture with random weights, made where they are used, or the weights of a checkpoint.

Times do not depend on the values, so a full-size model with random weights measures FLUX.2 [dev]'s speed truly. It says
nothing of its pictures, nor of how much fp8 or a cache changes them. The weights are scaled so that activations stay
finite: each layer keeps the variance of what it is given, and 56 blocks add to the residual stream what a block adds.
"""

import argparse
import gc
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Pipeline, Flux2Transformer2DModel
from torch import nn

from demo_model.services import WEIGHTS
from generator_service.pipelines.flux2 import Flux2Model
from generator_service.pipelines.parts import PARTS, Parts, load_parts
from generator_service.pipelines.performance import Machine, choose
from generator_service.settings import ProfileName
from shared.device import resolve_device
from shared.model_folder import ModelFolder, find_model, read_prompt_format

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
class Source:
    """Makes the same parts again and again; none of what was done to the last ones stays."""

    size: Size
    device: torch.device
    dtype: torch.dtype
    folder: ModelFolder | None = None
    """Of a checkpoint, instead of random weights."""

    @property
    def name(self) -> str:
        """Where the weights come from."""
        if self.folder is None:
            return f"random weights, {self.size.name} size"
        return "the demo model" if self.folder.path == WEIGHTS else self.folder.name

    @property
    def default_side(self) -> int:
        """Of a picture whose size nobody says."""
        if self.folder is not None:
            config = json.loads((self.folder.path / "vae" / "config.json").read_text(encoding="utf-8"))
            return int(config["sample_size"])
        return int(self.size.vae.get("sample_size", 1024))

    @contextmanager
    def parts(self) -> Iterator[Parts]:
        """Fresh parts, whose weights are freed after the block: a GPU has room for one model at full size."""
        parts = load_parts(self.folder, self.device, self.dtype) if self.folder else self._random_parts()
        try:
            yield parts
        finally:
            discard(parts)

    def _random_parts(self) -> Parts:
        return random_parts(self.size, self.device, self.dtype)

    def embedding(self, parts: Parts, seed: int = 0) -> torch.Tensor:
        """A ready embedding ``[1, L, D]`` on the CPU, of random numbers."""
        noise = torch.Generator("cpu").manual_seed(seed)
        shape = (1, self.size.num_text_tokens, parts.transformer.config.joint_attention_dim)
        return torch.randn(shape, generator=noise).to(self.dtype)

    def model(self, parts: Parts, profile: ProfileName) -> Flux2Model:
        """The generator's model around ``parts``, which are changed in place as ``profile`` says."""
        performance = choose(profile, Machine.of(self.device))
        if self.device.type != "cuda":  # there, compiled code is only to be seen to run
            performance = replace(performance, backend="eager")
        folder = self.folder or ModelFolder(self.name, "local", Path("random weights"))
        return Flux2Model.load(folder, self.device, self.dtype, performance=performance, parts=parts)


class NotWhole(Exception):
    """A model is not what its profile says, so its speed is not the profile's."""


def check_whole(model: Flux2Model) -> None:
    """Check that everything was done to a model that its profile says; compiling can still fail when it is prepared.

    Raises:
        NotWhole: something could not be done.
    """
    if model.performance.left_out:
        raise NotWhole(str(model.performance))


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """The options that ``source_of`` reads."""
    parser.add_argument("--smoke", action="store_true", help="the tiny size and few repeats: only to see that it runs")
    parser.add_argument("--model", type=Path, help="a checkpoint's folder, instead of random weights")


def source_of(args: argparse.Namespace) -> Source:
    """What the options ask for: full size on a GPU, tiny on a CPU, where full size would take hours."""
    device = resolve_device("auto", "device")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    size = TINY if args.smoke or device.type == "cpu" else FULL
    if args.model is None:
        return Source(size, device, dtype)
    folder = find_model(str(args.model), "local", PARTS)
    size = replace(size, num_text_tokens=read_prompt_format(folder).max_sequence_length)
    return Source(size, device, dtype, folder)


def pipeline_of(parts: Parts) -> Flux2Pipeline:
    """The library's own pipeline around ``parts``, without a text encoder."""
    made = Flux2Pipeline(
        scheduler=parts.scheduler, vae=parts.vae, text_encoder=None, tokenizer=None, transformer=parts.transformer
    )
    made.set_progress_bar_config(disable=True)
    return made


def random_parts(size: Size, device: torch.device, dtype: torch.dtype) -> Parts:
    """The architecture with random weights, drawn on ``device`` itself: full size takes seconds on a GPU."""
    with torch.device("meta"):
        transformer = Flux2Transformer2DModel(**size.transformer)
        vae = AutoencoderKLFlux2(**size.vae)
    noise = torch.Generator(device).manual_seed(SEED)
    for module in (transformer, vae):
        nn.Module.to(module, dtype)  # diffusers' own would warn of layers that must stay float32: there are none
        module.to_empty(device=device)
        fill(module, noise)
        module.eval().requires_grad_(requires_grad=False)
    return Parts(transformer, vae, FlowMatchEulerDiscreteScheduler(**SCHEDULER))


def discard(parts: Parts) -> None:
    """Free the weights, even if a cache or compiled code still holds the modules."""
    for part in (parts.transformer, parts.vae):
        for module in part.modules():
            for name in [name for name, _ in module.named_parameters(recurse=False)]:
                delattr(module, name)
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
