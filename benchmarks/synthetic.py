"""FLUX.2's architecture with random weights, made where they are used, or the weights of a checkpoint.

Both are loaded by the service's own ``load_model``; only where the weights come from differs. Times do not depend on
the values, so a full-size model with random weights measures FLUX.2 [dev]'s speed truly. It says nothing of its
pictures, nor of how much fp8 or a cache changes them. The weights are scaled so that activations stay finite: each
layer keeps the variance of what it is given, and 56 blocks add to the residual stream what a block adds.
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
    """Loads the same model again and again, as the service does; none of what was done to the last one stays."""

    path: Path
    """A model's folder."""
    has_weights: bool = False
    """Whether the folder has weights; else they are random."""
    device: str = "auto"
    """As ``GENERATOR_DEVICE``."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """As ``GENERATOR_DTYPE``."""

    @property
    def name(self) -> str:
        """Where the weights come from."""
        if not self.has_weights:
            return f"random weights, {self.path.name} size"
        return "the demo model" if self.path == WEIGHTS else self.path.name

    def settings(self, profile: ProfileName = "exact") -> GeneratorSettings:
        """Those of a service with this model."""
        return GeneratorSettings(
            model=str(self.path), revision="local", device=self.device, dtype=self.dtype, performance=profile
        )

    @property
    def torch_device(self) -> torch.device:
        """Where the model is loaded."""
        return self.settings().torch_device()

    @property
    def torch_dtype(self) -> torch.dtype:
        """What it is loaded in."""
        return self.settings().torch_dtype()

    @property
    def default_side(self) -> int:
        """Of a picture whose size nobody says."""
        return int(read_config(self.path, "vae")["sample_size"])

    @contextmanager
    def model(self, profile: ProfileName) -> Iterator[Flux2Model]:
        """A fresh model; its weights are freed after the block: a GPU has room for one model at full size."""
        backend = "inductor" if self.torch_device.type == "cuda" else "eager"  # there, it is only to be seen to run
        model, _ = load_model(self.settings(profile), read=self._read, backend=backend)
        try:
            yield model
        finally:
            discard(model.components)

    @contextmanager
    def components(self) -> Iterator[Components]:
        """Fresh parts alone, for other code than the service's; likewise freed after the block."""
        settings = self.settings()
        folder = find_model(settings.model, settings.revision, SUBFOLDERS[Service.GENERATOR])
        parts = self._read(folder, settings.torch_device(), settings.torch_dtype())
        try:
            yield parts
        finally:
            discard(parts)

    def embedding(self, seed: int = 0) -> torch.Tensor:
        """A ready embedding ``[1, L, D]`` on the CPU, of random numbers."""
        num_tokens = read_prompt_format(ModelFolder(self.name, "local", self.path)).max_sequence_length
        width = int(read_config(self.path, "transformer")["joint_attention_dim"])
        noise = torch.Generator("cpu").manual_seed(seed)
        return torch.randn((1, num_tokens, width), generator=noise).to(self.torch_dtype)

    @property
    def _read(self) -> ComponentsReader:
        return load_components if self.has_weights else random_parts


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
    if args.model is not None:
        return Source(args.model.resolve(), has_weights=True)
    is_small = args.smoke or Source(TINY).torch_device.type == "cpu"
    return Source(TINY if is_small else FULL)


def pipeline_of(parts: Components) -> Flux2Pipeline:
    """The library's own pipeline around ``parts``, without a text encoder."""
    made = Flux2Pipeline(
        scheduler=parts.scheduler, vae=parts.vae, text_encoder=None, tokenizer=None, transformer=parts.transformer
    )
    made.set_progress_bar_config(disable=True)
    return made


def random_parts(
    folder: ModelFolder, device: torch.device, dtype: torch.dtype, transformer_device: torch.device | None = None
) -> Components:
    """The architecture in ``folder`` with random weights, made on ``device`` itself; a ``ComponentsReader``.

    Full size takes seconds on a GPU, and never goes through host memory.
    """
    parts = empty_components(folder.path, dtype)
    for module, place in ((parts.transformer, transformer_device or device), (parts.vae, device)):
        module.to_empty(device=place)
        fill(module, torch.Generator(place).manual_seed(SEED))
    return parts


def empty_components(path: Path, dtype: torch.dtype) -> Components:
    """The architecture in a folder, on the meta device: with the sizes of all weights, and no memory for them."""
    with torch.device("meta"):
        transformer = Flux2Transformer2DModel.from_config(read_config(path, "transformer"))
        vae = AutoencoderKLFlux2.from_config(read_config(path, "vae"))
    for module in (transformer, vae):
        nn.Module.to(module, dtype)  # diffusers' own would warn of layers that must stay float32: there are none
        module.eval().requires_grad_(requires_grad=False)
    return Components(transformer, vae, FlowMatchEulerDiscreteScheduler.from_pretrained(path, subfolder="scheduler"))


def read_config(path: Path, part: str) -> dict[str, Any]:
    """The configuration of a part of the model in a folder."""
    config: dict[str, Any] = json.loads((path / part / "config.json").read_text(encoding="utf-8"))
    return config


def discard(parts: Components) -> None:
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
