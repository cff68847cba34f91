"""Adds adapters to a transformer as diffusers does, and removes them without a rest."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lokr import LoKrLayer
from peft.tuners.lora import LoraLayer

from flux2_shared.device.errors import is_device_lost, is_out_of_memory
from generator_service.pipelines.lora.file import FUSED, LoraFile
from generator_service.pipelines.lora.metadata import LoraRefused

SEPARATE = frozenset(["to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"])
"""Projections that are not used while the fused ones are."""
OTHER_SHAPES = "its shapes do not match this model"
TRIAL = "trial"
"""Name of the adapter in the copy of the transformer in which it is tried."""


def check_adapter(transformer: Any, lora: LoraFile) -> None:
    """Raise ``LoraRefused`` if an adapter does not match a transformer.

    The adapter is added to a copy of the transformer without data, so that a failure changes nothing.
    """
    with torch.device("meta"):
        copy = type(transformer).from_config(transformer.config)
    if lora.kind == "fused LoKr":
        copy.fuse_qkv_projections()
    check_together(copy, lora)
    layers = {name: module for name, module in copy.named_modules() if isinstance(module, torch.nn.Linear)}
    num_known = len(lora.modules.keys() & layers.keys())
    if num_known < len(lora.modules):
        raise LoraRefused(f"{num_known} of the {len(lora.modules)} modules that it changes are in this model")
    if not all(fits(factors, layers[name]) for name, factors in lora.modules.items()):
        raise LoraRefused(OTHER_SHAPES)
    if not all(is_finite(tensor, transformer.dtype) for tensor in lora.weights.values()):
        raise LoraRefused("its weights are not finite numbers")
    reason = OTHER_SHAPES if lora.metadata is None else "its metadata does not match its weights"
    empty = LoraFile({name: on_meta(factors) for name, factors in lora.modules.items()}, lora.metadata)
    try:
        with torch.device("meta"):  # whatever rank the metadata has, nothing is allocated
            add_adapter(copy, empty, TRIAL)
    except Exception as error:
        if is_device_lost(error) or is_out_of_memory(error):
            raise
        raise LoraRefused(reason) from error
    added = {name.replace(f".{TRIAL}", "") for name, _ in copy.named_parameters() if f".{TRIAL}" in name}
    if added != {f"{key}.weight" if key.endswith("magnitude_vector") else key for key in lora.weights}:
        raise LoraRefused(reason)


def check_together(transformer: Any, lora: LoraFile) -> None:
    """Refuse an adapter of fused projections beside one of separate projections, which would have no effect."""
    added = {module.rpartition(".")[2] for module in lora.modules}
    names = added | {name.rpartition(".")[2] for name, _ in adapter_layers(transformer)}
    if names & FUSED and names & SEPARATE:
        raise LoraRefused("projections would have to be fused, and others of them would not")


def on_meta(factors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors of the same shapes without data."""
    return {name: torch.empty(factor.shape, device="meta") for name, factor in factors.items()}


def fits(factors: Mapping[str, torch.Tensor], layer: torch.nn.Linear) -> bool:
    """Return whether the product of a module's factors has the shape of its layer."""
    meta = on_meta(factors)
    if not all(tensor.numel() and tensor.ndim in (1, 2) for tensor in meta.values()):
        return False
    try:
        if "lora_A.weight" in meta:
            change = meta["lora_B.weight"] @ meta["lora_A.weight"]
        else:
            first, second = (
                meta[f"lokr_{w}"] if f"lokr_{w}" in meta else meta[f"lokr_{w}_a"] @ meta[f"lokr_{w}_b"]
                for w in ("w1", "w2")
            )
            change = torch.kron(first, second)
    except RuntimeError:
        return False
    return change.shape == layer.weight.shape


def is_finite(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Return whether the values of a tensor of real numbers are finite in ``dtype``."""
    return tensor.is_floating_point() and bool(tensor.to(dtype).isfinite().all())


def add_adapter(transformer: Any, lora: LoraFile, name: str) -> None:
    """Load an adapter into a transformer, as ``Flux2Pipeline.load_lora_weights`` does."""
    metadata = None if lora.metadata is None else dict(lora.metadata)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about several adapters, and about patterns that match nothing
        transformer.load_lora_adapter(
            lora.weights, prefix=None, adapter_name=name, metadata=metadata, low_cpu_mem_usage=True
        )


def remove_adapter(transformer: Any, name: str) -> None:
    """Remove an adapter, even one that was added only in part, and the layers that have no other adapter.

    Projections that diffusers fused for an adapter are separate again when none of their adapters is left.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about adapters that were active
        for _, layer in adapter_layers(transformer):
            layer.delete_adapter(name)
    for parent in list(transformer.modules()):
        for child_name, child in list(parent.named_children()):
            original = child
            while isinstance(original, LoraLayer | LoKrLayer) and not original.r:
                original = original.base_layer
            if original is not child:
                setattr(parent, child_name, original)
    if not any(path.rpartition(".")[2] in FUSED for path, _ in adapter_layers(transformer)):
        unfuse(transformer)
    configs = getattr(transformer, "peft_config", {})
    configs.pop(name, None)
    if not configs:  # diffusers' attributes as before the first adapter
        for attribute in ("peft_config", "_hf_peft_config_loaded"):
            vars(transformer).pop(attribute, None)


def adapter_layers(transformer: Any) -> list[tuple[str, LoraLayer | LoKrLayer]]:
    """Return the layers of all adapters with their names."""
    return [(name, each) for name, each in transformer.named_modules() if isinstance(each, LoraLayer | LoKrLayer)]


def unfuse(transformer: Any) -> None:
    """Remove fused projections, also those of a block in which fusing failed; the separate ones were kept."""
    for block in transformer.transformer_blocks:
        for name in FUSED:
            if hasattr(block.attn, name):
                delattr(block.attn, name)
        vars(block.attn).pop("fused_projections", None)  # False by its class; compiled code depends on attributes
