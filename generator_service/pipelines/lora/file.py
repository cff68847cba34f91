"""Reads LoRA and LoKr files as diffusers does, and refuses those of which diffusers would leave out a part.

Knows the names of the weights in a file, but not the transformer: ``layers`` checks that they match it.
"""

import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from diffusers.loaders import Flux2LoraLoaderMixin
from diffusers.utils import convert_unet_state_dict_to_peft

from generator_service.pipelines.lora.metadata import LoraRefused, parse_metadata

logger = logging.getLogger("flux2")
Weights = dict[str, torch.Tensor]
Kind = Literal["LoRA", "LoKr", "fused LoKr"]

FUSED = frozenset(["to_qkv", "to_added_qkv"])
"""Names of fused projections."""

PREFIX = "transformer."
PREFIXES = (PREFIX, "diffusion_model.", "base_model.model.", "lora_unet_", "lycoris_")
"""Prefixes of the formats that diffusers converts; with several in one file it would leave out some weights."""
UNSUPPORTED = {
    "dora_scale": "it has DoRA scales in LyCORIS' format, which diffusers does not apply",
    "lora_te": "it also changes a text encoder",
    "text_encoder": "it also changes a text encoder",
    "hada_": "LoHa is not supported, only LoRA and LoKr",
}
"""Parts of names, and why a file with them is refused."""
NOT_LORA = "it is not a LoRA file for FLUX.2"
FACTOR = re.compile(r"(.+)\.(lora_[AB]\.weight|lora_B\.bias|lora_magnitude_vector|lokr_w[12](?:_[ab])?)")
LORA = frozenset(["lora_A.weight", "lora_B.weight"])
OPTIONAL = frozenset(["lora_B.bias", "lora_magnitude_vector"])
LOKR = frozenset(
    frozenset([*first, *second])
    for first in (["lokr_w1"], ["lokr_w1_a", "lokr_w1_b"])
    for second in (["lokr_w2"], ["lokr_w2_a", "lokr_w2_b"])
)
"""The sets of factors that a module of a LoKr file may have."""


@dataclass(frozen=True)
class LoraFile:
    """What diffusers makes of a file: weights with the names of its transformer, and a configuration for PEFT."""

    modules: Mapping[str, Mapping[str, torch.Tensor]]
    """The weights of each module by their names in PEFT, such as ``lora_A.weight``."""
    metadata: Mapping[str, Any] | None
    """None if PEFT's configuration is inferred from the weights."""

    @property
    def kind(self) -> Kind:
        """The kind of the file's layers. LoKr for fused projections makes diffusers fuse those of all blocks."""
        if not any(name.startswith("lokr_") for factors in self.modules.values() for name in factors):
            return "LoRA"
        return "fused LoKr" if any(name.rpartition(".")[2] in FUSED for name in self.modules) else "LoKr"

    @property
    def weights(self) -> Weights:
        """The weights in one dictionary. The first is a ``lora_A``, by which diffusers recognizes PEFT's names."""
        return {
            f"{module}.{name}": factors[name] for module, factors in self.modules.items() for name in sorted(factors)
        }


def read_lora(file: Path, max_bytes: int) -> LoraFile:
    """Read and convert a file.

    Raises:
        LoraRefused: the file cannot be read, or diffusers would not apply the whole of it.
    """
    tensors, header = read_file(file, max_bytes)
    check_names(tensors)
    check_alphas(tensors)
    modules = by_module(convert(tensors))
    lora = LoraFile(modules, None)
    return replace(lora, metadata=parse_metadata(header, modules, is_lokr=lora.kind != "LoRA"))


def read_file(file: Path, max_bytes: int) -> tuple[Weights, Mapping[str, str]]:
    """Return the tensors and the metadata of a safetensors file.

    The file is copied: as a memory map, an adapter would change, or end the process, when its file is overwritten.
    """
    try:
        if not file.is_file():  # a named pipe would block
            raise LoraRefused("its file no longer exists")
        with file.open("rb") as opened:
            data = opened.read(max_bytes + 1)
    except OSError as error:
        raise LoraRefused("its file cannot be read") from error
    if len(data) > max_bytes:
        raise LoraRefused("its file is larger than the transformer")
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise LoraRefused(NOT_LORA) from error
    return tensors, header.get("__metadata__") or {}


def check_names(tensors: Weights) -> None:
    """Refuse files with names that diffusers would drop, confuse, or take for those of a huge model."""
    for key in tensors:
        for part, reason in UNSUPPORTED.items():
            if part in key:
                raise LoraRefused(reason)
        if re.search(r"\d{4}", key.replace("_", "")):  # diffusers' converters count up to the number of a block
            raise LoraRefused("it changes blocks that no model has")
    prefixes = {next((prefix for prefix in PREFIXES if key.startswith(prefix)), "") for key in tensors}
    if len(prefixes) > 1:
        raise LoraRefused("it mixes the names of several formats")


def check_alphas(tensors: Weights) -> None:
    """Check tensors ``.alpha``: diffusers drops those of no module, and never returns from negative ones of kohya's."""
    modules = {re.split(r"\.(?:lora|lokr)_", key, maxsplit=1)[0] for key in tensors if not key.endswith(".alpha")}
    for key, alpha in tensors.items():
        if not key.endswith(".alpha"):
            continue
        if key.removesuffix(".alpha") not in modules:
            raise unused([key], tensors)
        is_number = alpha.numel() == 1 and not alpha.is_complex() and alpha.dtype != torch.bool
        if not is_number or not alpha.double().isfinite() or (is_kohya(tensors) and alpha.double() < 0):
            raise LoraRefused("an alpha is not a number from which a strength can be computed")


def convert(tensors: Weights) -> Weights:
    """Convert names and alphas as diffusers does; refuse the file if a tensor is not used."""
    remaining = dict(tensors)
    try:
        weights: Weights = Flux2LoraLoaderMixin.lora_state_dict(remaining)
    except Exception as error:
        raise LoraRefused(NOT_LORA) from error
    if not any("lora_A" in key or ".lokr_" in key for key in weights):  # names of old versions of diffusers
        weights = convert_unet_state_dict_to_peft(weights)
    if is_kohya(tensors) and remaining:  # its converter removes what it uses, and only logs the rest
        raise unused(remaining, tensors)
    others = [key for key in weights if not (key.startswith(PREFIX) and FACTOR.fullmatch(key))]
    if others:
        raise unused(others, weights)
    if not is_kohya(tensors) and len(weights) != sum(map(num_converted, tensors)):
        raise LoraRefused("it changes a module twice")
    return {key.removeprefix(PREFIX): tensor for key, tensor in weights.items()}


def is_kohya(tensors: Weights) -> bool:
    """Return whether diffusers takes a file for one in kohya's format."""
    return any(".lora_down.weight" in key for key in tensors)


def num_converted(key: str) -> int:
    """Return how many tensors a converter makes of one: LoRA of fused projections is split, alphas are multiplied."""
    if key.endswith(".alpha"):
        return 0
    return 3 if key.startswith(("diffusion_model.", "base_model.model.")) and ".qkv.lora_" in key else 1


def by_module(weights: Weights) -> dict[str, Weights]:
    """Group weights by module, and check that each module has all its factors, of the same method."""
    modules: dict[str, Weights] = {}
    for key, tensor in weights.items():
        match = FACTOR.fullmatch(key)
        assert match is not None  # checked by ``convert``
        modules.setdefault(match[1], {})[match[2]] = tensor
    names = [frozenset(factors) for factors in modules.values()]
    if not names:
        raise LoraRefused(NOT_LORA)
    if not (all(each in LOKR for each in names) or all(LORA <= each <= LORA | OPTIONAL for each in names)):
        raise LoraRefused("a module does not have exactly the weights of LoRA or of LoKr")
    return dict(sorted(modules.items()))


def unused(keys: Iterable[str], tensors: Weights) -> LoraRefused:
    """Create the error for tensors that diffusers would leave out."""
    names = sorted(keys)
    logger.warning("tensors of a LoRA file that cannot be applied: %s", ", ".join(name[:100] for name in names[:10]))
    return LoraRefused(f"{len(names)} of its {len(tensors)} tensors cannot be applied")
