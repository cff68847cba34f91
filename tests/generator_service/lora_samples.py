"""Sample LoRA and LoKr files in all formats, with shapes of the demo model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from demo_model.services import WEIGHTS
from flux2_shared.model.folder import ModelFolder
from generator_service.lemica import schedule_for
from generator_service.pipelines.flux2 import Flux2Model
from generator_service.pipelines.lora import Adapter
from generator_service.pipelines.params import Params
from tests.conftest import CPU

Tensors = dict[str, torch.Tensor]
FOLDER = ModelFolder("weights", "local", WEIGHTS)
QUERY, OUT, SINGLE = "transformer_blocks.0.attn.to_q", "proj_out", "single_transformer_blocks.1.attn.to_out"
SHAPES = {QUERY: (160, 160), OUT: (32, 160), SINGLE: (160, 640)}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def lora(
    shapes: Mapping[str, tuple[int, int]], rank: int = 4, prefix: str = "transformer.", names: str = "lora_A lora_B"
) -> Tensors:
    """Random factors for modules of some shapes."""
    first, second = names.split()
    return {
        f"{prefix}{module}.{name}.weight": noise(*shape, seed=seed)
        for seed, (module, (rows, columns)) in enumerate(shapes.items())
        for name, shape in ((first, (rank, columns)), (second, (rows, rank)))
    }


def kohya(shapes: Mapping[str, tuple[int, int]], rank: int = 4, alpha: float | None = None) -> Tensors:
    """Factors with kohya's names, and their alphas."""
    tensors = lora(shapes, rank, "lora_unet_", "lora_down lora_up")
    alphas = {} if alpha is None else {f"lora_unet_{module}.alpha": torch.tensor(alpha) for module in shapes}
    return tensors | alphas


def lokr(prefix: str, *modules: str, alpha: float | None = None) -> Tensors:
    """Kronecker factors for layers of 160x160, the second one as a product of rank 2."""
    tensors = {}
    for seed, module in enumerate(modules):
        tensors[f"{prefix}{module}.lokr_w1"] = noise(8, 8, seed=seed)
        tensors[f"{prefix}{module}.lokr_w2_a"] = noise(20, 2, seed=seed + 10)
        tensors[f"{prefix}{module}.lokr_w2_b"] = noise(2, 20, seed=seed + 20)
        if alpha is not None:
            tensors[f"{prefix}{module}.alpha"] = torch.tensor(alpha)
    return tensors


def lokr_of_qkv(*modules: str, seed: int = 3) -> Tensors:
    """Kronecker factors for fused projections."""
    shapes = {"lokr_w1": (8, 8), "lokr_w2_a": (60, 2), "lokr_w2_b": (2, 20)}
    return {f"{module}.{name}": noise(*shape, seed=seed) for module in modules for name, shape in shapes.items()}


BFL = {
    "double_blocks.0.img_attn.qkv": (480, 160),
    "double_blocks.1.txt_attn.proj": (160, 160),
    "single_blocks.2.linear1": (1440, 160),
    "final_layer.linear": (32, 160),
}
KOHYA = {
    "double_blocks_0_img_attn_qkv": (480, 160),
    "double_blocks_1_txt_mlp_0": (960, 160),
    "single_blocks_3_linear2": (160, 640),
    "final_layer_linear": (32, 160),
}


def write(file: Path, tensors: Tensors, metadata: Mapping[str, Any] | None = None) -> None:
    """Write a file, with metadata as diffusers writes it."""
    header = None
    if metadata is not None:
        settings = {
            f"transformer.{key}": value for key, value in ({"target_modules": ["to_q"]} | dict(metadata)).items()
        }
        header = {"lora_adapter_metadata": json.dumps(settings)}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file, metadata=header)


def request(*adapters: Adapter) -> Params:
    """A small image with adapters."""
    return Params(torch.zeros(1, 32, 384), 64, 64, 4.0, 7, schedule_for("none", 3), adapters=adapters)


def latents_of(model: Flux2Model, *adapters: Adapter) -> torch.Tensor:
    return model.generate(request(*adapters)).latents


def structure(model: Flux2Model) -> tuple[dict[str, int], set[str]]:
    """The identities of all modules and parameters, and the attributes of the transformer."""
    transformer = model.components.transformer
    parts = {name: id(part) for name, part in [*transformer.named_modules(), *transformer.named_parameters()]}
    return parts, set(vars(transformer))


def load(folder: Path, max_loras: int = 2) -> Flux2Model:
    return Flux2Model.load(FOLDER, CPU, torch.float32, folder, max_loras=max_loras)
