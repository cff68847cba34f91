"""LoRA and LoKr files of all formats are applied as diffusers applies them."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2Pipeline
from peft import LoraConfig

from demo_model.services import WEIGHTS
from flux2_shared.errors import InvalidRequest
from generator_service.pipelines.flux2 import Flux2Model
from generator_service.pipelines.lora import Adapter
from tests.generator_service.lora_samples import (
    BFL,
    KOHYA,
    OUT,
    QUERY,
    SHAPES,
    SINGLE,
    Tensors,
    kohya,
    latents_of,
    load,
    lokr,
    lokr_of_qkv,
    lora,
    noise,
    request,
    structure,
    write,
)

MIXED = lora({QUERY: (160, 160)}, 4) | lora({OUT: (32, 160)}, 2)
SPARSE = {
    "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": noise(6, 160),
    "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.kron(torch.eye(3), noise(160, 2)),
    "lora_unet_double_blocks_0_img_attn_qkv.alpha": torch.tensor(2),
}
LOKR_META = {"r": 2, "decompose_factor": 8}
KINDS: dict[str, tuple[Tensors, dict[str, Any] | None]] = {
    "diffusers": (lora(SHAPES), None),
    "alpha 1": (lora(SHAPES), {"r": 4, "lora_alpha": 1}),
    "alpha 16": (lora(SHAPES), {"r": 4, "lora_alpha": 16}),
    "fractional alpha": (lora(SHAPES), {"r": 4, "lora_alpha": 2.5}),
    "negative alpha": (lora(SHAPES), {"r": 4, "lora_alpha": -4}),
    "alpha 0": (lora(SHAPES), {"r": 4, "lora_alpha": 0}),
    "rslora": (lora(SHAPES), {"r": 4, "lora_alpha": 8, "use_rslora": True}),
    "alpha without rank": (lora(SHAPES, 8), {"lora_alpha": 2}),
    "mixed ranks": (MIXED, None),
    "patterns": (
        MIXED,
        {"r": 4, "lora_alpha": 4, "rank_pattern": {"^proj_out": 2}, "alpha_pattern": {".*to_q": 12, "proj_out": 1}},
    ),
    "bias": (lora({OUT: (32, 160)}) | {"transformer.proj_out.lora_B.bias": noise(32)}, None),
    "DoRA of PEFT": (
        lora({OUT: (32, 160)}) | {"transformer.proj_out.lora_magnitude_vector": noise(32).abs() + 1},
        None,
    ),
    "old diffusers": (lora(SHAPES, names="lora.down lora.up"), None),
    "BFL": (lora(BFL, prefix="diffusion_model."), None),
    "BFL with metadata": (lora(BFL, prefix="diffusion_model."), {"r": 4, "lora_alpha": 1}),
    "PEFT": (lora({QUERY: (160, 160), SINGLE: (160, 640)}, prefix="base_model.model."), None),
    "PEFT with BFL's names": (lora(BFL, prefix="base_model.model."), None),
    "kohya": (kohya(KOHYA), None),
    "kohya with alpha": (kohya(KOHYA, alpha=1.0), None),
    "kohya with a large alpha": (kohya(KOHYA, alpha=16), None),
    "kohya with projections side by side": (SPARSE, None),
    "kohya with rank 6": (kohya(KOHYA, 6, alpha=3), None),
    "kohya with alphas in float16": (kohya(KOHYA) | {"lora_unet_final_layer_linear.alpha": torch.ones(1).half()}, None),
    "kohya with alpha 0": (kohya(KOHYA, alpha=0), None),
    "kohya with metadata": (kohya(KOHYA, alpha=2.0), {"r": 4, "lora_alpha": 2}),
    "bfloat16": ({key: tensor.bfloat16() for key, tensor in lora(SHAPES).items()}, {"r": 4, "lora_alpha": 3}),
    "float64": ({key: tensor.double() for key, tensor in lora(SHAPES).items()}, None),
    "float8": ({key: tensor.to(torch.float8_e4m3fn) for key, tensor in lora(SHAPES).items()}, None),
    "LoKr": (lokr("transformer.", QUERY), None),
    "LoKr with alpha": (lokr("", QUERY, "transformer_blocks.1.attn.to_k", alpha=1.0), None),
    "LoKr of LyCORIS": (lokr("lycoris_", "transformer_blocks_0_attn_to_q", alpha=8.0), None),
    "LoKr of BFL": (lokr("diffusion_model.", "double_blocks.0.txt_attn.proj", alpha=0.5), None),
    "LoKr of BFL's fused projections": (
        lokr("diffusion_model.", "double_blocks.1.img_attn.proj", alpha=0.5)
        | lokr_of_qkv("diffusion_model.double_blocks.0.img_attn.qkv", "diffusion_model.double_blocks.1.txt_attn.qkv"),
        None,
    ),
    "LoKr with metadata": (lokr("transformer.", QUERY), LOKR_META | {"alpha": 8}),
    "LoKr with a pattern": (lokr("transformer.", QUERY), LOKR_META | {"alpha": 2, "alpha_pattern": {"to_q": 16}}),
    "LoKr without decomposition": (
        {f"transformer.{QUERY}.lokr_w1": noise(8, 8), f"transformer.{QUERY}.lokr_w2": noise(20, 20)},
        None,
    ),
    "LoKr with both decomposed": (
        {
            f"{QUERY}.lokr_{factor}": noise(*shape)
            for factor, shape in {"w1_a": (8, 2), "w1_b": (2, 8), "w2_a": (20, 2), "w2_b": (2, 20)}.items()
        }
        | {f"{QUERY}.alpha": torch.tensor(1)},
        None,
    ),
}


@pytest.fixture(scope="module")
def plain(demo: Flux2Model) -> torch.Tensor:
    """The image without adapters."""
    return latents_of(demo)


@pytest.fixture(scope="module")
def library() -> Flux2Pipeline:
    """The pipeline of diffusers, without adapters."""
    return Flux2Pipeline.from_pretrained(WEIGHTS, text_encoder=None, tokenizer=None, dtype=torch.float32)


def latents_of_library(library: Flux2Pipeline, folder: Path, *adapters: Adapter) -> torch.Tensor:
    """What diffusers generates with the files of adapters."""
    for adapter in adapters:
        library.load_lora_weights(folder, weight_name=f"{adapter.name}.safetensors", adapter_name=adapter.name)
    library.set_adapters([each.name for each in adapters], [each.scale for each in adapters])
    latents: list[torch.Tensor] = []

    def keep(_pipeline: Any, _step: int, _time: Any, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        latents.append(values["latents"])
        return {}

    params = request()
    library(
        prompt_embeds=params.prompt_embeds,
        width=params.width,
        height=params.height,
        num_inference_steps=params.schedule.num_steps,
        guidance_scale=params.guidance_scale,
        generator=torch.Generator().manual_seed(params.seed),
        callback_on_step_end=keep,
    )
    library.unload_lora_weights()
    library.transformer.unfuse_qkv_projections()
    return latents[-1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_images_equal_the_librarys(tmp_path: Path, library: Flux2Pipeline, kind: str, plain: torch.Tensor) -> None:
    """An image with a file of any format is bit-identical to diffusers', and one without it to that of before."""
    write(tmp_path / "it.safetensors", *KINDS[kind])
    model, adapter = load(tmp_path), Adapter("it", 0.7)
    before = structure(model)
    image = latents_of(model, adapter)
    assert torch.equal(image, latents_of_library(library, tmp_path, adapter))
    assert torch.equal(image, plain) == ("alpha 0" in kind)
    assert torch.equal(latents_of(model), plain)
    model.adapters._unload_all()
    assert structure(model) == before


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("keeps", [True, False])
def test_lora_and_lokr_take_turns(tmp_path: Path, library: Flux2Pipeline, plain: torch.Tensor, keeps: bool) -> None:
    """Alone and together, in any order, images equal diffusers', whatever was loaded before, and no layers remain."""
    write(tmp_path / "ink.safetensors", lora(SHAPES))
    write(tmp_path / "wool.safetensors", lora(SHAPES, 2), {"r": 2, "lora_alpha": 4})
    write(tmp_path / "kron.safetensors", lokr("transformer.", QUERY))
    write(tmp_path / "fused.safetensors", lokr_of_qkv("diffusion_model.double_blocks.0.img_attn.qkv"))
    write(tmp_path / "end.safetensors", lora({OUT: (32, 160)}))
    model = load(tmp_path)
    model.adapters._keeps = keeps
    before = structure(model)
    ink, wool, kron, fused, end = map(Adapter, ("ink", "wool", "kron", "fused", "end"), (1.0, 0.3, -0.5, 0.8, -1.0))
    uses = [[ink], [kron], [fused], [ink, kron], [kron, ink], [wool, kron, ink], [fused], [ink, wool], [wool, ink]]
    uses += [[end, fused], [kron, wool], [fused, end], [wool], [end]]
    for adapters in (*uses, *reversed(uses)):
        assert torch.equal(latents_of(model, *adapters), latents_of_library(library, tmp_path, *adapters))
        assert torch.equal(latents_of(model), plain)
    model.adapters._unload_all()
    assert structure(model) == before


def test_fused_and_separate_projections_are_not_combined(tmp_path: Path, plain: torch.Tensor) -> None:
    """A request with adapters of fused and of separate projections is refused, in any order and after any image."""
    write(tmp_path / "ink.safetensors", lora(SHAPES))
    write(tmp_path / "fused.safetensors", lokr_of_qkv("diffusion_model.double_blocks.1.txt_attn.qkv"))
    model, ink, fused = load(tmp_path), Adapter("ink"), Adapter("fused")
    for adapters in ([ink, fused], [fused, ink]):
        for previous in ([], [ink], [fused]):
            latents_of(model, *previous)
            with pytest.raises(InvalidRequest, match="cannot be used with this model: projections would have to be"):
                latents_of(model, *adapters)
    assert torch.equal(latents_of(model), plain)


def test_dropout_is_for_training(tmp_path: Path) -> None:
    """Metadata with dropout, which diffusers would apply to images, gives the image without it, every time."""
    settings = {"r": 4, "lora_alpha": 8}
    write(tmp_path / "without.safetensors", lora(SHAPES), settings)
    write(tmp_path / "with.safetensors", lora(SHAPES), settings | {"lora_dropout": 0.5})
    model = load(tmp_path)
    assert torch.equal(latents_of(model, Adapter("with")), latents_of(model, Adapter("without")))


def test_settings_of_training_are_accepted(tmp_path: Path) -> None:
    """The whole configuration that diffusers' training scripts write has no effect beyond that of its alpha."""
    full = LoraConfig(r=4, lora_alpha=8, init_lora_weights="gaussian", target_modules=["to_q", "proj_out", "to_out"])
    settings = json.loads(json.dumps(asdict(full) | {"runtime_config": None}, default=list))
    del settings["runtime_config"]  # diffusers leaves it out
    write(tmp_path / "full.safetensors", lora(SHAPES), settings)
    write(tmp_path / "short.safetensors", lora(SHAPES), {"r": 4, "lora_alpha": 8})
    model = load(tmp_path)
    assert torch.equal(latents_of(model, Adapter("full")), latents_of(model, Adapter("short")))
