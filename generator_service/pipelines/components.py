"""The parts of a FLUX.2 pipeline that draw, loaded from a checked folder straight to their device."""

import hashlib
import logging
import time
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Pipeline, Flux2Transformer2DModel
from diffusers.utils import logging as diffusers_logging

from flux2_shared.model.byte_cache import ByteBoundedCache
from flux2_shared.model.folder import ModelFolder
from flux2_shared.model.loading import loading_errors

PARTS = ("scheduler", "transformer", "vae")
CPU = torch.device("cpu")
logger = logging.getLogger("flux2")


@dataclass(frozen=True)
class Components:
    """Diffusers' own classes, which ship no types."""

    transformer: Any
    vae: Any
    scheduler: Any
    """For its configuration: every generation makes one of its own."""


class ComponentsReader(Protocol):
    """Where parts come from; ``load_components`` is the one that reads their weights from files."""

    def __call__(
        self,
        folder: ModelFolder,
        device: torch.device,
        dtype: torch.dtype,
        transformer_device: torch.device | None = None,
    ) -> Components:
        """As ``load_components``."""


def load_components(
    folder: ModelFolder, device: torch.device, dtype: torch.dtype, transformer_device: torch.device | None = None
) -> Components:
    """Read the weights of ``folder``, shard by shard, to ``device``: host memory never holds the whole model.

    Args:
        folder: a diffusers pipeline.
        device: where they go.
        dtype: of the weights.
        transformer_device: where the transformer goes, if not there.

    Raises:
        ModelRefused: it is not a FLUX.2 pipeline, or a file is missing or broken.
        OutOfMemory: it does not fit into the device's memory.
    """
    diffusers_logging.disable_progress_bar()
    with loading_errors(f"the pipeline of {folder.name}", device):
        return Components(
            transformer=_load(Flux2Transformer2DModel, folder, "transformer", transformer_device or device, dtype),
            vae=_load(AutoencoderKLFlux2, folder, "vae", device, dtype),
            scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder.path, subfolder="scheduler"),
        )


def _load(kind: Any, folder: ModelFolder, part: str, device: torch.device, dtype: torch.dtype) -> Any:
    """One part, and a line in the log about how fast it came from the disk."""
    num_bytes = folder.num_bytes(part)
    logger.info("loading %s: %.1f GB", part, num_bytes / 1e9)
    began = time.perf_counter()
    model = kind.from_pretrained(
        folder.path, subfolder=part, dtype=dtype, use_safetensors=True, device_map={"": str(device)}
    )
    seconds = time.perf_counter() - began
    logger.info("loaded %s in %.1f s, %.2f GB/s", part, seconds, num_bytes / 1e9 / seconds)
    return model.eval().requires_grad_(False)


class ReferenceCachingPipeline(Flux2Pipeline):  # type: ignore[misc]  # diffusers ships no types
    """``Flux2Pipeline`` that encodes each reference image once, as long as ``reference_cache`` holds it."""

    reference_cache: ByteBoundedCache[torch.Tensor]
    """Latents by a hash of the prepared pixels; set after the construction."""

    def _encode_vae_image(self, image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        pixels = image.contiguous().cpu().view(torch.uint8).numpy().tobytes()
        key = hashlib.sha256(repr(tuple(image.shape)).encode() + pixels).hexdigest()
        latents = self.reference_cache.get(key)
        if latents is None:
            latents = super()._encode_vae_image(image=image, generator=generator)
            self.reference_cache.put(key, latents)
        return latents
