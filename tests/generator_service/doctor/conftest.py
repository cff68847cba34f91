"""Model folders for the tests of ``flux2 doctor``."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from torch import nn

from demo_model.services import WEIGHTS
from tests.generator_service.doctor.hosts import write_safetensors, write_shards


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the demo model that tests may damage."""
    return shutil.copytree(WEIGHTS, tmp_path / "model")


@pytest.fixture(scope="session")
def flux2_dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files, names, shapes and dtypes of FLUX.2 [dev] whose weights are sparse files."""
    folder = tmp_path_factory.mktemp("dev") / "FLUX.2-dev"
    shutil.copytree(WEIGHTS, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    with torch.device("meta"):
        transformer, vae = Flux2Transformer2DModel(), AutoencoderKLFlux2()
    write_shards(folder / "transformer", "diffusion_pytorch_model", shapes_of(transformer), 7)
    write_safetensors(folder / "vae" / "diffusion_pytorch_model.safetensors", shapes_of(vae), "F32")
    write_shards(folder / "text_encoder", "model", encoder_shapes(), 10)
    transformer.save_config(folder / "transformer")
    vae.save_config(folder / "vae")
    text = {"hidden_size": 5120, "intermediate_size": 32_768, "num_hidden_layers": 40}
    config = {"model_type": "mistral3", "text_config": text}
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter by its name, without buffers."""
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def encoder_shapes() -> dict[str, tuple[int, ...]]:
    """The shapes of FLUX.2 [dev]'s text encoder: 40 layers, the head, and a part of the vision tower."""
    layer = {
        "self_attn.q_proj": (4096, 5120),
        "self_attn.k_proj": (1024, 5120),
        "self_attn.v_proj": (1024, 5120),
        "self_attn.o_proj": (5120, 4096),
        "mlp.gate_proj": (32_768, 5120),
        "mlp.up_proj": (32_768, 5120),
        "mlp.down_proj": (5120, 32_768),
        "input_layernorm": (5120,),
        "post_attention_layernorm": (5120,),
    }
    layers = {f"language_model.model.layers.{k}.{n}.weight": shape for k in range(40) for n, shape in layer.items()}
    return layers | {
        "language_model.model.embed_tokens.weight": (131_072, 5120),
        "language_model.model.norm.weight": (5120,),
        "language_model.lm_head.weight": (131_072, 5120),
        "vision_tower.transformer.layers.0.attention.q_proj.weight": (1024, 1024),
        "multi_modal_projector.linear_1.weight": (5120, 1024),
    }
