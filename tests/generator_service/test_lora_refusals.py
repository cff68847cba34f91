"""LoRA and LoKr files that cannot be applied as a whole are refused, with the reason."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flux2_shared.errors import InvalidRequest
from generator_service.pipelines.flux2 import Flux2Model
from generator_service.pipelines.lora import Adapter
from tests.generator_service.lora_samples import (
    KOHYA,
    OUT,
    QUERY,
    SHAPES,
    Tensors,
    kohya,
    latents_of,
    load,
    lokr,
    lokr_of_qkv,
    lora,
    noise,
    structure,
    write,
)

NAN, INF = float("nan"), float("inf")
VALID, LEGACY, KRONECKER = lora(SHAPES), kohya(KOHYA), lokr("transformer.", QUERY)
ALPHA = "lora_unet_final_layer_linear.alpha"


def filled(value: float) -> torch.Tensor:
    return torch.full((4, 160), value, dtype=torch.float64)


def without(tensors: Tensors, part: str) -> Tensors:
    return {key: tensor for key, tensor in tensors.items() if part not in key}


def first(tensor: torch.Tensor) -> Tensors:
    """Replace a factor of a valid file."""
    return VALID | {f"transformer.{QUERY}.lora_A.weight": tensor}


def converted(convert: Callable[[torch.Tensor], torch.Tensor]) -> Tensors:
    return {key: convert(tensor) for key, tensor in VALID.items()}


def bfl(*modules: str) -> Tensors:
    return lora(dict.fromkeys(modules, (160, 160)), prefix="diffusion_model.")


OF_REASON: dict[str, dict[str, Tensors]] = {
    "it is not a LoRA file for FLUX.2": {
        "no tensors": {},
        "kohya's without lora_up": without(LEGACY, "linear.lora_up"),
        "another layer": bfl("img_in_2"),
        "BFL's with an alpha": bfl("img_in") | {"diffusion_model.img_in.alpha": torch.ones(())},
    },
    "it has DoRA scales in LyCORIS' format": {
        "diffusers": VALID | {f"transformer.{QUERY}.dora_scale": noise(160, 1)},
        "kohya's": LEGACY | {"lora_unet_final_layer_linear.dora_scale": noise(32, 1)},
        "LoKr": KRONECKER | {f"transformer.{QUERY}.dora_scale": noise(160, 1)},
    },
    "LoHa is not supported": {"LoHa": {"lora_unet_final_layer_linear.hada_w1_a": noise(32, 4)}},
    "it also changes a text encoder": {
        "CLIP": LEGACY | {"lora_te1_q.lora_down.weight": noise(4, 8), "lora_te1_q.lora_up.weight": noise(8, 4)},
        "T5": LEGACY | {"lora_te_q.alpha": torch.ones(())},
        "diffusers": VALID | lora({"q_proj": (8, 8)}, prefix="text_encoder."),
    },
    "2 of its 10 tensors cannot be applied": {
        name: LEGACY | kohya({name: (160, 160)})
        for name in ("guidance_in_in_layer", "double_blocks_0_img_mod_lin", "double_blocks_00_img_mlp_0", "unknown")
    },
    "1 of its 9 tensors cannot be applied": {
        "mid": LEGACY | {"lora_unet_img_in.lora_mid.weight": noise(4, 4)},
        "alpha of no module": LEGACY | {"lora_unet_img_in.alpha": torch.tensor(4.0)},
    },
    "1 of its 7 tensors cannot be applied": {
        "alpha": VALID | {"transformer.proj_out.alpha": torch.tensor(4.0)},
        "bias of lora_A": VALID | {"transformer.proj_out.lora_A.bias": noise(4)},
        "whole layer": VALID | {"transformer.proj_out.weight": noise(32, 160)},
        "name of an adapter": VALID | {"transformer.proj_out.lora_A.default.weight": noise(4, 160)},
    },
    "1 of its 4 tensors cannot be applied": {
        "LoKr's alpha of no module": lokr("", QUERY) | {"proj_out.alpha": torch.tensor(4.0)},
        "LoKr's Tucker decomposition": KRONECKER | {f"transformer.{QUERY}.lokr_t2": noise(2, 2)},
    },
    "6 of its 6 tensors cannot be applied": {"no prefix": lora(SHAPES, prefix="")},
    "it mixes the names of several formats": {
        "kohya's and diffusers": LEGACY | VALID,
        "a prefix that would be cut off": bfl("img_in") | lora({"x" * 16 + "img_in": (160, 32)}, prefix=""),
        "with and without": lokr("", QUERY) | KRONECKER,
    },
    "it changes a module twice": {"alias": bfl("transformer_blocks.0.attn.to_q", "sformer_blocks.0.attn.to_q")},
    "it changes blocks that no model has": {
        "BFL's": bfl("double_blocks.99999999999.img_mlp.0"),
        "with underscores": lokr("diffusion_model.", "double_blocks.9_999_999_999.img_mlp.0"),
        "in other digits": bfl("single_blocks.٩٩٩٩٩٩٩٩٩.linear1"),
        "kohya's": kohya({"single_blocks_99999999999_linear1": (1440, 160)}),
    },
    "an alpha is not a number": {
        str(alpha): LEGACY | {ALPHA: torch.tensor(alpha)} for alpha in (-4.0, -1, NAN, INF, [4.0, 4.0], [], True)
    }
    | {f"LoKr's {alpha}": lokr("", QUERY, alpha=alpha) for alpha in (NAN, -INF)},
    "a module does not have exactly the weights of LoRA or of LoKr": {
        "no lora_B": without(VALID, "lora_B"),
        "no lora_A": without(VALID, "lora_A"),
        "one missing": without(VALID, "proj_out.lora_B"),
        "old diffusers without up": without(lora(SHAPES, names="lora.down lora.up"), "out.lora.up"),
        "LoRA and LoKr": lora({OUT: (32, 160)}) | KRONECKER,
        "both in one module": lora({QUERY: (160, 160)}) | KRONECKER,
        **{f"no {part}": without(KRONECKER, part) for part in ("lokr_w1", "lokr_w2_a", "lokr_w2_b")},
        "a factor twice": KRONECKER | {f"transformer.{QUERY}.lokr_w2": noise(20, 20)},
    },
    "its shapes do not match this model": {
        "unequal ranks": first(noise(2, 160)),
        "rank 0": lora(SHAPES, 0),
        "other width": first(noise(4, 161)),
        "transposed": first(noise(160, 4)),
        "one dimension": first(noise(160)),
        "no dimension": first(torch.tensor(1.0)),
        "convolution": first(noise(4, 160, 1, 1)),
        "a bias missing": VALID | {"transformer.proj_out.lora_B.bias": noise(32)},
        "a magnitude missing": VALID | {"transformer.proj_out.lora_magnitude_vector": noise(32)},
        "short bias": lora({OUT: (32, 160)}) | {"transformer.proj_out.lora_B.bias": noise(31)},
        **{
            f"LoKr of {shape}": KRONECKER | {f"transformer.{QUERY}.lokr_w1": noise(*shape)}
            for shape in ((20, 20), (0, 8), (8, 9), (8,), (1, 1), (8, 8, 1, 1))
        },
        "LoKr of unequal ranks": KRONECKER | {f"transformer.{QUERY}.lokr_w2_a": noise(20, 3)},
    },
    "0 of the 1 modules that it changes are in this model": {
        "a block's attention": lora({"transformer_blocks.0.attn": (160, 160)}),
        "a norm": lora({"transformer_blocks.0.attn.norm_q": (32, 32)}),
        "a layer of the loaded adapter": lora({"proj_out.base_layer": (32, 160)}),
        "LoRA of fused projections": lora({"transformer_blocks.0.attn.to_qkv": (480, 160)}),
    },
    "projections would have to be fused": {
        "fused and separate": KRONECKER | lokr_of_qkv("transformer.transformer_blocks.1.attn.to_added_qkv")
    },
    "6 of the 7 modules that it changes are in this model": {
        "block 9": LEGACY | kohya({"single_blocks_9_linear2": (160, 640)})
    },
    "its weights are not finite numbers": {
        **{str(value): first(filled(value)) for value in (NAN, INF, -INF, 1e300)},
        "int8": converted(torch.Tensor.char),
        "bool": converted(torch.Tensor.bool),
        "complex": converted(lambda tensor: tensor.to(torch.complex64)),
    },
}
WITH_METADATA: dict[str, tuple[Tensors, dict[str, Any], str]] = {
    **{
        f"{name} {str(value)[:9]}": (VALID, {"r": 4, "lora_alpha": 4, name: value}, f"metadata has a value of {name} ")
        for name, values in {
            "r": (0, -4, 4.0, "4", None, True),
            "lora_alpha": (NAN, INF, 10**400, "16", True, None, [1]),
            "rank_pattern": ({"proj_out": 0}, [], None, "proj_out"),
            "alpha_pattern": ({"(a+)+": 2}, {"a*a*a*": 2}, {"proj_out": NAN}, {f"m{i}": 1 for i in range(600)}),
            "use_rslora": (1, "true", None),
            "alpha": (16,),
            "bias": ("all",),
            "modules_to_save": (["proj_out"],),
            "init_lora_weights": ("pissa", "olora", "mica", []),
            "layer_replication": ([[0, 2]],),
            "peft_type": ("LOHA",),
            "some_new_setting": (None, 1),
        }.items()
        for value in values
    },
    "a long name": (VALID, {"r": 4, "x" * 50: 1}, "its metadata has a value of an unknown setting"),
    **{
        f"{name} that does not match {value}": (VALID, {"r": 4, name: value}, "its metadata does not match its weights")
        for name, value in {"r": 8, "use_dora": True, "lora_bias": True, "rank_pattern": {"proj_out": 2}}.items()
    },
    "a huge rank": (VALID, {"r": 10**10}, "its metadata does not match its weights"),
    "an enormous rank": (VALID, {"r": 10**30}, "its metadata does not match its weights"),
    "no rank": (VALID, {"lora_alpha": 4}, "its metadata does not match its weights"),
    "LoKr with LoRA's": (KRONECKER, {"r": 2, "lora_alpha": 8}, "its metadata has a value of lora_alpha"),
    "LoKr of another factor": (KRONECKER, {"r": 2, "decompose_factor": 4}, "its metadata does not match its weights"),
}
FILES: dict[str, tuple[Tensors, dict[str, Any] | None, str]] = {
    f"{reason}: {name}": (tensors, None, reason)
    for reason, files in OF_REASON.items()
    for name, tensors in files.items()
}
FILES.update(WITH_METADATA)


@pytest.fixture(scope="module")
def plain(demo: Flux2Model) -> torch.Tensor:
    """The image without adapters."""
    return latents_of(demo)


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> tuple[Flux2Model, Path, torch.Tensor]:
    """A model, the file of its adapter ``bad``, which each test writes, and the image with the loaded ``ink``."""
    folder = tmp_path_factory.mktemp("lora")
    for name in ("bad", "ink"):
        write(folder / f"{name}.safetensors", VALID)
    model = load(folder, max_loras=1)
    return model, folder / "bad.safetensors", latents_of(model, Adapter("ink"))


@pytest.mark.parametrize("name", FILES)
def test_a_refusal_has_a_reason_and_no_effect(
    used: tuple[Flux2Model, Path, torch.Tensor], plain: torch.Tensor, name: str
) -> None:
    """The refusal names the adapter and the reason. Images, and the layers of a loaded adapter, are as before."""
    model, file, ink = used
    tensors, metadata, reason = FILES[name]
    write(file, tensors, metadata)
    before = structure(model)
    with pytest.raises(InvalidRequest, match=f"^lora: 'bad' cannot be used with this model: .*{reason}") as refusal:
        latents_of(model, Adapter("bad"))
    assert refusal.value.param == "lora"
    assert structure(model) == before
    assert torch.equal(latents_of(model), plain)
    assert torch.equal(latents_of(model, Adapter("ink")), ink)
    assert structure(model) == before
