"""LoRA adapters of a folder: loaded on first use, and active for one generation at a time."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flux2_shared.errors import InvalidRequest
from generator_service.errors import NonFiniteOutput
from generator_service.pipelines.lora.file import Kind, LoraFile, read_lora
from generator_service.pipelines.lora.layers import add_adapter, check_adapter, check_together, remove_adapter
from generator_service.pipelines.lora.metadata import LoraRefused

logger = logging.getLogger("flux2")

SUFFIX = ".safetensors"


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
        self._loaded: dict[str, Kind] = {}
        """Names, least recently used first, and their kinds."""
        self.on_load: Callable[[], None] = lambda: None
        """Called after an adapter was loaded."""

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
            if not self._keeps or "fused LoKr" in self._loaded.values():
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
        loading. So if there are several kinds, only the adapters of the image are loaded, in their order.
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
            kind = self._loaded.pop(name)
        else:
            with refusing(name):
                lora = read_lora(self._files[name], self._max_bytes)
                check_adapter(self._transformer, lora)
                kind = lora.kind
                for other in [other for other in self._loaded if other not in needed]:
                    if len(self._loaded) >= self._max_loaded or self._loaded[other] != kind:
                        self._unload(other)
                check_together(self._transformer, lora)
            self._add(name, lora)
        self._loaded[name] = kind

    def _add(self, name: str, lora: LoraFile) -> None:
        """Add the layers of an adapter, which are not active; undo it if it fails."""
        try:
            add_adapter(self._transformer, lora, self._layer_names[name])
        except Exception:
            remove_adapter(self._transformer, self._layer_names[name])
            raise
        self._transformer.disable_adapters()

    def _unload(self, name: str) -> None:
        remove_adapter(self._transformer, self._layer_names[name])
        del self._loaded[name]

    def _unload_all(self) -> None:
        for name in list(self._loaded):
            self._unload(name)


@contextmanager
def refusing(name: str) -> Iterator[None]:
    """Raise ``InvalidRequest`` with the adapter's name for ``LoraRefused``, and log the cause."""
    try:
        yield
    except LoraRefused as error:
        logger.warning("the adapter %r is refused: %s", name, error, exc_info=error.__cause__)
        raise InvalidRequest(f"lora: {name!r} cannot be used with this model: {error}", param="lora") from error


@contextmanager
def refusing_overflow(adapters: Sequence[Adapter]) -> Iterator[None]:
    """Raise ``InvalidRequest`` for ``NonFiniteOutput`` of an image with adapters: finite weights can be too large."""
    try:
        yield
    except NonFiniteOutput as error:
        if not adapters:
            raise
        names = ", ".join(repr(each.name) for each in adapters)
        raise InvalidRequest(f"lora: the image with {names} is not finite; try smaller scales", param="lora") from error


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


def num_bytes(transformer: Any) -> int:
    """Return the size of a transformer's weights."""
    return sum(parameter.numel() * parameter.element_size() for parameter in transformer.parameters())
