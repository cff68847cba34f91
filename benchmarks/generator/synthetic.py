"""Loads models for benchmarks, with random weights or those of a checkpoint.

Both are loaded by the service's ``load_model``. Times do not depend on the values, so a full-size model with random
weights has the speed of FLUX.2 [dev]. It says nothing about image quality, or the effect of fp8 or a cache on it. The
weights are scaled so that activations remain finite: each layer preserves the variance of its input.
"""

import argparse
import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Pipeline, Flux2Transformer2DModel
from torch import nn

from benchmarks.architectures import FULL, TINY
from demo_model.services import WEIGHTS
from flux2_shared.model.folder import ModelFolder, find_model, read_prompt_format
from flux2_shared.model.subfolders import SUBFOLDERS, Service
from generator_service.app import load_model
from generator_service.pipelines.components import Components, ComponentsReader, load_components
from generator_service.pipelines.flux2 import Flux2Model
from generator_service.settings import GeneratorSettings, ProfileName

SEED = 20260101


@dataclass(frozen=True)
class Source:
    """Loads new instances of a model, like the service does."""

    path: Path
    """Folder of the model."""
    has_weights: bool = False
    """Whether the folder has weights; otherwise they are random."""
    device: str = "auto"
    """Device, as ``GENERATOR_DEVICE``."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype, as ``GENERATOR_DTYPE``."""

    @property
    def name(self) -> str:
        """Describes the source of the weights."""
        if not self.has_weights:
            return f"random weights, {self.path.name} size"
        return "the demo model" if self.path == WEIGHTS else self.path.name

    def settings(self, profile: ProfileName = "exact") -> GeneratorSettings:
        """Return settings for this model."""
        return GeneratorSettings(
            model=str(self.path), revision="local", device=self.device, dtype=self.dtype, performance=profile
        )

    @property
    def torch_device(self) -> torch.device:
        """Device of the model."""
        return self.settings().torch_device()

    @property
    def torch_dtype(self) -> torch.dtype:
        """Dtype of the model."""
        return self.settings().torch_dtype()

    @property
    def default_side(self) -> int:
        """Default width and height of an image."""
        return int(read_config(self.path, "vae")["sample_size"])

    @contextmanager
    def model(self, profile: ProfileName) -> Iterator[Flux2Model]:
        """Load a model, and free its weights after the block, because a GPU holds only one model at full size."""
        backend = "inductor" if self.torch_device.type == "cuda" else "eager"  # on a CPU, only test that it runs
        model, _ = load_model(self.settings(profile), read=self._read, backend=backend)
        try:
            yield model
        finally:
            discard(model.components)

    @contextmanager
    def components(self) -> Iterator[Components]:
        """Load only the components, and free their weights after the block."""
        settings = self.settings()
        folder = find_model(settings.model, settings.revision, SUBFOLDERS[Service.GENERATOR])
        components = self._read(folder, settings.torch_device(), settings.torch_dtype())
        try:
            yield components
        finally:
            discard(components)

    def embedding(self, seed: int = 0) -> torch.Tensor:
        """Generate a random embedding ``[1, L, D]`` on the CPU."""
        num_tokens = read_prompt_format(ModelFolder(self.name, "local", self.path)).max_sequence_length
        width = int(read_config(self.path, "transformer")["joint_attention_dim"])
        noise = torch.Generator("cpu").manual_seed(seed)
        return torch.randn((1, num_tokens, width), generator=noise).to(self.torch_dtype)

    @property
    def _read(self) -> ComponentsReader:
        return load_components if self.has_weights else random_components


class IncompleteOptimizations(Exception):
    """Optimizations of the profile could not be applied, so the speed is not that of the profile."""


def check_optimizations(model: Flux2Model) -> None:
    """Check that all optimizations of the profile were applied. Compilation may fail later, in the warm-up.

    Raises:
        IncompleteOptimizations: an optimization was omitted.
    """
    if model.performance.left_out:
        raise IncompleteOptimizations(str(model.performance))


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that ``source_of`` reads."""
    parser.add_argument("--smoke", action="store_true", help="smoke test at a tiny size with few repeats")
    parser.add_argument("--model", type=Path, help="folder of a checkpoint, instead of random weights")


def source_of(args: argparse.Namespace) -> Source:
    """Return the source for the options: full size on a GPU, tiny on a CPU, where full size would take hours."""
    if args.model is not None:
        return Source(args.model.resolve(), has_weights=True)
    is_small = args.smoke or Source(TINY).torch_device.type == "cpu"
    return Source(TINY if is_small else FULL)


def pipeline_of(components: Components) -> Flux2Pipeline:
    """Create diffusers' pipeline, without a text encoder."""
    pipeline = Flux2Pipeline(
        scheduler=components.scheduler,
        vae=components.vae,
        text_encoder=None,
        tokenizer=None,
        transformer=components.transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def random_components(
    folder: ModelFolder, device: torch.device, dtype: torch.dtype, transformer_device: torch.device | None = None
) -> Components:
    """Create the architecture in ``folder`` with random weights on ``device``; a ``ComponentsReader``.

    This takes seconds at full size on a GPU, and needs no host memory.
    """
    components = empty_components(folder.path, dtype)
    for module, place in ((components.transformer, transformer_device or device), (components.vae, device)):
        module.to_empty(device=place)
        fill(module, torch.Generator(place).manual_seed(SEED))
    return components


def empty_components(path: Path, dtype: torch.dtype) -> Components:
    """Create the architecture in a folder on the meta device, without memory for the weights."""
    with torch.device("meta"):
        transformer = Flux2Transformer2DModel.from_config(read_config(path, "transformer"))
        vae = AutoencoderKLFlux2.from_config(read_config(path, "vae"))
    for module in (transformer, vae):
        nn.Module.to(module, dtype)  # the method of diffusers warns about layers that must stay float32; there are none
        module.eval().requires_grad_(requires_grad=False)
    return Components(transformer, vae, FlowMatchEulerDiscreteScheduler.from_pretrained(path, subfolder="scheduler"))


def read_config(path: Path, part: str) -> dict[str, Any]:
    """Read the configuration of a component."""
    config: dict[str, Any] = json.loads((path / part / "config.json").read_text(encoding="utf-8"))
    return config


def discard(components: Components) -> None:
    """Free the weights, even if a cache or compiled code still holds the modules."""
    for component in (components.transformer, components.vae):
        for module in component.modules():
            for name in [name for name, _ in module.named_parameters(recurse=False)]:
                delattr(module, name)
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@torch.no_grad()
def fill(module: nn.Module, noise: torch.Generator) -> None:
    """Initialize all weights of an empty module.

    Raises:
        ValueError: the module has an unknown buffer.
    """
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:  # weight of a linear layer or a convolution
            fan_in = parameter[0].numel()
            parameter.normal_(0.0, fan_in**-0.5, generator=noise)
        else:  # scale of a norm, or a bias
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    values = {"running_mean": 0, "running_var": 1, "num_batches_tracked": 0}
    for name, buffer in module.named_buffers():
        last = name.rpartition(".")[2]
        if last not in values:
            raise ValueError(f"{name} is an unknown buffer")
        buffer.fill_(values[last])
