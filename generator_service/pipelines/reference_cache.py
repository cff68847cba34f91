"""diffusers' pipeline with a cache of encoded reference images."""

import hashlib

import torch
from diffusers import Flux2Pipeline

from flux2_shared.model.byte_cache import ByteBoundedCache


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
