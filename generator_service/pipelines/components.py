"""Loads transformer, VAE and scheduler of a FLUX.2 pipeline from a checked folder to their device."""

import hashlib
import logging
import time
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Pipeline, Flux2Transformer2DModel
from diffusers import __version__ as diffusers_version
from diffusers.utils import logging as diffusers_logging

from flux2_shared.model.byte_cache import ByteBoundedCache
from flux2_shared.model.folder import ModelFolder
from flux2_shared.model.loading import loading_errors
from generator_service.pipelines.model_info import ModelInfo

CPU = torch.device("cpu")
logger = logging.getLogger("flux2")


@dataclass(frozen=True)
class Components:
    """Components of a pipeline, as instances of diffusers' classes, which have no type annotations."""

    transformer: Any
    vae: Any
    scheduler: Any
    """Only its configuration is used; each run creates a scheduler."""

    def new_pipeline(self, reference_cache: ByteBoundedCache[torch.Tensor]) -> Flux2Pipeline:
        """Create a pipeline for one run, without a text encoder, and with a new scheduler, which has state.

        Args:
            reference_cache: latents of reference images.
        """
        pipeline = ReferenceCachingPipeline(
            scheduler=type(self.scheduler).from_config(self.scheduler.config),
            vae=self.vae,
            text_encoder=None,
            tokenizer=None,
            transformer=self.transformer,
        )
        pipeline.set_progress_bar_config(disable=True)
        pipeline.reference_cache = reference_cache
        return pipeline


class ComponentsReader(Protocol):
    """A function that loads components, such as ``load_components``."""

    def __call__(
        self,
        folder: ModelFolder,
        device: torch.device,
        dtype: torch.dtype,
        transformer_device: torch.device | None = None,
    ) -> Components:
        """See ``load_components``."""


def load_components(
    folder: ModelFolder, device: torch.device, dtype: torch.dtype, transformer_device: torch.device | None = None
) -> Components:
    """Load the weights of ``folder`` shard by shard, so that the whole model is never in host memory.

    Args:
        folder: folder of a diffusers pipeline.
        device: device of the components.
        dtype: dtype of the weights.
        transformer_device: device of the transformer; default: ``device``.

    Raises:
        ModelRefused: the folder is not a FLUX.2 pipeline, or a file is missing or damaged.
        OutOfMemory: the weights do not fit into the device's memory.
    """
    diffusers_logging.disable_progress_bar()
    with loading_errors(f"the pipeline of {folder.name}", device):
        return Components(
            transformer=_load(Flux2Transformer2DModel, folder, "transformer", transformer_device or device, dtype),
            vae=_load(AutoencoderKLFlux2, folder, "vae", device, dtype),
            scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder.path, subfolder="scheduler"),
        )


def _load(kind: Any, folder: ModelFolder, part: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Load a component and log its loading speed."""
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
    """``Flux2Pipeline`` that caches the latents of reference images."""

    reference_cache: ByteBoundedCache[torch.Tensor]
    """Latents by a hash of the preprocessed pixels; set after construction."""

    def _encode_vae_image(self, image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        pixels = image.contiguous().cpu().view(torch.uint8).numpy().tobytes()
        key = hashlib.sha256(repr(tuple(image.shape)).encode() + pixels).hexdigest()
        latents = self.reference_cache.get(key)
        if latents is None:
            latents = super()._encode_vae_image(image=image, generator=generator)
            self.reference_cache.put(key, latents)
        return latents


def describe_model(folder: ModelFolder, components: Components) -> ModelInfo:
    """Collect the properties of a model that the API and the schedules need."""
    vae, transformer = components.vae, components.transformer
    scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)  # equals Flux2Pipeline.vae_scale_factor
    return ModelInfo(
        name=folder.name,
        revision=folder.revision,
        fingerprint=f"transformer {folder.fingerprint('transformer')}",
        dtype=str(transformer.dtype).removeprefix("torch."),
        libraries=f"torch {torch.__version__}, diffusers {diffusers_version}",
        embedding_width=int(transformer.config.joint_attention_dim),
        default_side=int(vae.config.sample_size),
        pixels_per_token=2 * scale_factor,
    )
