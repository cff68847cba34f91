"""LoRA adapters of a folder: loaded on first use, and active for one generation at a time."""

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import Flux2LoraLoaderMixin
from safetensors.torch import load_file

from flux2_shared.errors import InvalidRequest

logger = logging.getLogger("flux2")

PREFIX = "transformer."


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
        self._files = {file.stem: file for file in sorted(folder.glob("*.safetensors"))} if folder else {}
        self._max_loaded = max_loaded
        self._keeps = keeps
        self._loaded: list[str] = []
        """Names, least recently used first."""

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
            if self._loaded and not self._keeps:
                self._transformer.unload_lora()
                self._loaded.clear()
            yield
            return
        for adapter in adapters:
            self._load(adapter.name, {other.name for other in adapters})
        try:
            self._transformer.enable_adapters()
            self._transformer.set_adapters([each.name for each in adapters], [each.scale for each in adapters])
            yield
        finally:
            self._transformer.disable_adapters()

    def _load(self, name: str, needed: set[str]) -> None:
        if name in self._loaded:
            self._loaded.remove(name)
        else:
            weights = self._weights(name)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are intended
                warnings.filterwarnings("ignore", "Adapter .* was active which is now deleted")  # intended
                self._make_room(needed)
                self._transformer.load_lora_adapter(weights, adapter_name=name)
            self._transformer.disable_adapters()
        self._loaded.append(name)

    def _make_room(self, needed: set[str]) -> None:
        for other in [other for other in self._loaded if other not in needed]:
            if len(self._loaded) >= self._max_loaded:
                self._transformer.delete_adapters(other)
                self._loaded.remove(other)

    def _weights(self, name: str) -> dict[str, Any]:
        """Load a file, convert its keys to diffusers' names, and check that they match this transformer."""
        try:
            weights: dict[str, Any] = Flux2LoraLoaderMixin.lora_state_dict(load_file(self._files[name]))
        except Exception as error:
            logger.warning("the adapter %s cannot be read: %s", name, error)
            raise refusal(name, "it is not a LoRA file for FLUX.2") from error
        modules = {PREFIX + name: module for name, module in self._transformer.named_modules()}
        of_adapter = {key.split(".lora_")[0].split(".lokr_")[0] for key in weights}
        matching = of_adapter & modules.keys()
        if not matching or matching != of_adapter:
            raise refusal(name, f"{len(matching)} of the {len(of_adapter)} modules that it changes are in this model")
        if not all(fits(key, tensor, modules) for key, tensor in weights.items()):
            raise refusal(name, "its shapes do not match this model")
        return weights


def fits(key: str, tensor: torch.Tensor, modules: Mapping[str, torch.nn.Module]) -> bool:
    """Return whether the shape of a LoRA factor matches its layer. Factors of LoKr are not checked."""
    layer = modules[key.split(".lora_", maxsplit=1)[0].split(".lokr_", maxsplit=1)[0]]
    if ".lora_A." in key:
        return tensor.shape[-1] == getattr(layer, "in_features", None)
    if ".lora_B." in key:
        return tensor.shape[0] == getattr(layer, "out_features", None)
    return True


def refusal(name: str, why: str) -> InvalidRequest:
    """Create the error for an adapter that does not match this model."""
    return InvalidRequest(f"lora: {name!r} cannot be used with this model: {why}", param="lora")
