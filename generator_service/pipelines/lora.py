"""LoRA adapters of a folder: loaded on first use, and active for one generation at a time."""

import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lokr import LoKrLayer
from peft.tuners.lora import LoraLayer

from flux2_shared.device.errors import is_device_lost, is_out_of_memory
from flux2_shared.errors import InvalidRequest
from generator_service.pipelines.lora_file import LoraFile, read_lora
from generator_service.pipelines.lora_metadata import LoraRefused

logger = logging.getLogger("flux2")

SUFFIX = ".safetensors"
OTHER_SHAPES = "its shapes do not match this model"
TRIAL = "trial"
"""Name of the adapter in the copy of the transformer in which it is tried."""


@dataclass(frozen=True)
class Adapter:
    """Name and scale of an adapter."""

    name: str
    scale: float = 1.0

    def __str__(self) -> str:
        return f"{self.name}*{self.scale:g}"


class Adapters:
    """The adapters of a transformer. Use it on the device thread.

    Args:
        transformer: diffusers' ``Flux2Transformer2DModel``.
        folder: folder with files ``NAME.safetensors``; None for no adapters.
        max_loaded: largest number of adapters on the device; the least recently used one is unloaded first.
        keeps: whether adapters stay loaded during generations without adapters. Compiled code requires the original
            layers, so it must be False for compiled models.
    """

    def __init__(self, transformer: Any, folder: Path | None, max_loaded: int, *, keeps: bool = True) -> None:
        self._transformer = transformer
        self._files = adapter_files(folder) if folder else {}
        self._layer_names = {name: f"adapter_{index}" for index, name in enumerate(self._files)}
        """Names of the adapters in PEFT's layers, which cannot have dots or be attributes of ``ModuleDict``."""
        self._max_bytes = num_bytes(transformer)
        self._max_loaded = max_loaded
        self._keeps = keeps
        self._loaded: dict[str, bool] = {}
        """Names, least recently used first, and whether they are LoKr."""

    @property
    def names(self) -> list[str]:
        """Names of all adapters."""
        return list(self._files)

    @contextmanager
    def applied(self, adapters: Sequence[Adapter]) -> Iterator[None]:
        """Apply ``adapters`` within the block.

        Raises:
            InvalidRequest: a file is not an adapter for this transformer.
        """
        if not adapters:
            if not self._keeps:
                self._unload_all()
            yield
            return
        self._load_all([each.name for each in adapters])
        try:
            self._transformer.enable_adapters()
            names = [self._layer_names[each.name] for each in adapters]
            self._transformer.set_adapters(names, [each.scale for each in adapters])
            yield
        finally:
            self._transformer.disable_adapters()

    def _load_all(self, names: Sequence[str]) -> None:
        """Load adapters. An image does not depend on those of earlier images, not even by rounding.

        PEFT adds LoRA and LoKr in different layers, one around the other, and sums their outputs in the order of
        loading. So if there are both, only the adapters of the image are loaded, in their order.
        """
        if self._is_mixed:
            self._unload_all()
        are_first = not self._loaded
        for name in names:
            self._load(name, names)
        if self._is_mixed and not are_first:
            self._unload_all()
            for name in names:
                self._load(name, names)

    @property
    def _is_mixed(self) -> bool:
        return len(set(self._loaded.values())) > 1

    def _load(self, name: str, needed: Sequence[str]) -> None:
        if name in self._loaded:
            is_lokr = self._loaded.pop(name)
        else:
            lora = self._read(name)
            is_lokr = lora.is_lokr
            for other in [other for other in self._loaded if other not in needed]:
                if len(self._loaded) >= self._max_loaded or self._loaded[other] != is_lokr:
                    self._unload(other)
            try:
                add_adapter(self._transformer, lora, self._layer_names[name])
            except Exception:
                remove_adapter(self._transformer, self._layer_names[name])
                raise
            self._transformer.disable_adapters()
        self._loaded[name] = is_lokr

    def _unload(self, name: str) -> None:
        remove_adapter(self._transformer, self._layer_names[name])
        del self._loaded[name]

    def _unload_all(self) -> None:
        for name in list(self._loaded):
            self._unload(name)

    def _read(self, name: str) -> LoraFile:
        """Read a file, and check that the whole of it can be applied to this transformer."""
        try:
            lora = read_lora(self._files[name], self._max_bytes)
            check_adapter(self._transformer, lora)
        except LoraRefused as error:
            logger.warning("the adapter %r is refused: %s", name, error, exc_info=error.__cause__)
            raise InvalidRequest(f"lora: {name!r} cannot be used with this model: {error}", param="lora") from error
        return lora


def adapter_files(folder: Path) -> dict[str, Path]:
    """Return the files of a folder by the names of their adapters; skip folders and names that JSON cannot have."""
    files = {}
    for file in sorted(folder.glob(f"*{SUFFIX}")):
        name = file.name.removesuffix(SUFFIX)
        if name and name.isprintable() and os.path.isfile(file):  # noqa: PTH113 -- Path.is_file may raise
            files[name] = file
        else:
            logger.warning("%r is not the file of an adapter", str(file))
    return files


def check_adapter(transformer: Any, lora: LoraFile) -> None:
    """Raise ``LoraRefused`` if an adapter does not match a transformer.

    The adapter is added to a copy of the transformer without data, so that a failure changes nothing.
    """
    with torch.device("meta"):
        copy = type(transformer).from_config(transformer.config)
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
    """Remove an adapter, even one that was added only in part, and the layers that have no other adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about adapters that were active
        for layer in [module for module in transformer.modules() if isinstance(module, LoraLayer | LoKrLayer)]:
            layer.delete_adapter(name)
    for parent in list(transformer.modules()):
        for child_name, child in list(parent.named_children()):
            original = child
            while isinstance(original, LoraLayer | LoKrLayer) and not original.r:
                original = original.base_layer
            if original is not child:
                setattr(parent, child_name, original)
    configs = getattr(transformer, "peft_config", {})
    configs.pop(name, None)
    if not configs:  # diffusers' attributes as before the first adapter
        for attribute in ("peft_config", "_hf_peft_config_loaded"):
            vars(transformer).pop(attribute, None)


def num_bytes(transformer: Any) -> int:
    """Return the size of a transformer's weights."""
    return sum(parameter.numel() * parameter.element_size() for parameter in transformer.parameters())
