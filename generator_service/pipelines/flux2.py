"""Runs FLUX.2's pipeline without its text encoder, under a LeMiCa schedule.

Preparation, denoising loop and decoding are those of ``diffusers.Flux2Pipeline``. Each generation creates its own
pipeline object, scheduler and ``CachedTransformer`` around the shared weights, so generations share no state.
"""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Self

import torch
from cachetools import LRUCache
from PIL.Image import Image, fromarray

from flux2_shared.device.memory import run_within_memory
from flux2_shared.device.resolve import use_device
from flux2_shared.errors import ModelRefused, OutOfMemory
from flux2_shared.model.byte_cache import ByteBoundedCache
from flux2_shared.model.folder import ModelFolder
from generator_service.errors import NonFiniteOutput
from generator_service.lemica import (
    CachedTransformer,
    Schedule,
    TimeEmbeddings,
    TransformerMismatch,
    check_transformer,
    small_example,
)
from generator_service.pipelines.callbacks import DenoisingCallback, PreviewDecoder, Previews
from generator_service.pipelines.components import (
    CPU,
    Components,
    ComponentsReader,
    describe_model,
    load_components,
)
from generator_service.pipelines.lora import Adapters, refusing_overflow
from generator_service.pipelines.optimizations.apply import Optimizations
from generator_service.pipelines.optimizations.compiled_model import ShapeKind
from generator_service.pipelines.optimizations.profiles import EXACT, Performance
from generator_service.pipelines.params import Params, pipeline_arguments

TIME_EMBEDDINGS = 1024
"""Number of cached time embeddings, 12 KB each for FLUX.2 [dev]; enough for about a dozen numbers of steps."""
TEXT_TOKENS = 512
"""Assumed text tokens when attention backends are measured, because no prompt is known at that time."""
logger = logging.getLogger("flux2")

REFERENCE_CACHE_BYTES = 256 * 2**20
"""Size of the cache of reference latents on the device; an image of 1024x1024 takes 1 MiB in bfloat16."""
ATTEMPTS = 2
"""Attempts for an image that does not fit into memory, before its cached features are given up."""
TOO_LARGE = "does not fit into the device's memory now"
StepCallback = Callable[[int, bool], None]


class GenerationCancelled(Exception):
    """Raised by ``on_step`` to end a generation."""


@dataclass(frozen=True)
class GeneratedImage:
    """An image and its timings."""

    image: Image
    denoise_s: float
    decode_s: float
    latents: torch.Tensor = field(repr=False)
    """The final latents, ``[1, tokens, C]``, on the CPU."""
    previews_s: float
    """Part of ``denoise_s`` that was spent on previews."""
    schedule: Schedule
    """The schedule that was used: that of the parameters, or, after a failed attempt, one that computes every step."""


class Flux2Model:
    """A FLUX.2 model on one device. Not thread-safe.

    Args:
        folder: folder of the components, which has the model's name, revision and fingerprint.
        components: components on their device; modified in place by optimizations.
        lora_dir: folder of LoRA adapters.
        max_loras: largest number of adapters on the device.
        performance: optimizations to apply.

    Raises:
        ModelRefused: reused steps do not work with this transformer.
    """

    def __init__(
        self,
        folder: ModelFolder,
        components: Components,
        lora_dir: Path | None = None,
        max_loras: int = 1,
        performance: Performance = EXACT,
    ) -> None:
        self.folder = folder
        self.components = components
        components.vae.enable_slicing()  # decode images of a batch one by one, as without a batch
        self.device: torch.device = components.vae.device  # an offloaded transformer is in two places
        self.dtype: torch.dtype = components.transformer.dtype
        self._time_embeddings: LRUCache[tuple[float, float, int], torch.Tensor] = LRUCache(TIME_EMBEDDINGS)
        self.reference_cache = ByteBoundedCache[torch.Tensor](REFERENCE_CACHE_BYTES)
        info = describe_model(folder, components)
        self._optimizations = Optimizations(components, performance, info.default_num_tokens + TEXT_TOKENS)
        self.adapters = Adapters(components.transformer, lora_dir, max_loras, keeps=not self._optimizations.is_compiled)
        self.info = replace(info, adapters=tuple(self.adapters.names))
        with self._optimizations.serving():
            check_reuse(components)

    @classmethod
    def load(
        cls,
        folder: ModelFolder,
        device: torch.device,
        dtype: torch.dtype,
        lora_dir: Path | None = None,
        max_loras: int = 1,
        performance: Performance = EXACT,
        read: ComponentsReader = load_components,
    ) -> Self:
        """Load the components of ``folder`` with ``read``; the other arguments are those of the constructor.

        Raises:
            ModelRefused: the folder is not a usable FLUX.2 pipeline.
            OutOfMemory: the weights do not fit.
        """
        use_device(device)
        transformer_device = CPU if "offload" in performance.optimizations else None
        components = read(folder, device, dtype, transformer_device)
        return cls(folder, components, lora_dir, max_loras, performance)

    @property
    def performance(self) -> Performance:
        """The applied optimizations."""
        return self._optimizations.performance

    def warm_up(self, batch: Sequence[Params], kind: ShapeKind = "static") -> list[GeneratedImage]:
        """Generate images and compile the model for them.

        Args:
            batch: parameters of the images of one run.
            kind: compile for exactly this size (``static``) or for all other sizes (``dynamic``).

        Raises:
            OutOfMemory: the device has too little memory for these images.
        """
        attempt = partial(self._optimizations.run_compiled, partial(self._generate, batch), kind)
        return run_within_memory(attempt, refusal_of(batch), num_attempts=ATTEMPTS)

    def generate(
        self, params: Params, on_step: StepCallback | None = None, previews: Previews | None = None
    ) -> GeneratedImage:
        """Generate an image. If it does not fit into memory or is not finite, retry with every step computed.

        Args:
            params: parameters of the image.
            on_step: called before each step with its index and whether it is computed; starts again at 0 in a retry.
                It may raise ``GenerationCancelled``.
            previews: previews to show, each once. They do not change the image.

        Raises:
            OutOfMemory: the device has too little memory for an image of this size.
            NonFiniteOutput: the latents are not finite, even with every step computed.
            InvalidRequest: a LoRA adapter does not match this model, or makes the latents infinite or NaN.
        """
        attempt = partial(self._generate, on_step=on_step, previews=previews)
        refusal = f"an image of {params.width}x{params.height} {TOO_LARGE}"
        with refusing_overflow(params.adapters) if params.adapters else nullcontext():
            try:
                return run_within_memory(partial(attempt, [params]), refusal, num_attempts=ATTEMPTS)[0]
            except (NonFiniteOutput, OutOfMemory) as error:
                if params.is_uncached:
                    raise
                logger.warning("%s; trying again with every step computed, instead of %s", error, params.schedule)
            return run_within_memory(partial(attempt, [params.uncached()]), refusal)[0]

    def generate_batch(self, batch: Sequence[Params], on_step: StepCallback | None = None) -> list[GeneratedImage]:
        """Generate images with equal ``batch_key`` in one run. Each equals the image of a single run up to rounding.

        Raises:
            OutOfMemory: the device has too little memory for the batch.
            NonFiniteOutput: the latents of an image are not finite.
        """
        return run_within_memory(partial(self._generate, batch, on_step), refusal_of(batch))

    def _generate(
        self,
        batch: Sequence[Params],
        on_step: StepCallback | None = None,
        previews: Previews | None = None,
        kind: ShapeKind | None = None,
    ) -> list[GeneratedImage]:
        """Run the pipeline once; compile only if ``kind`` is given."""
        params = batch[0]  # for the values that all images share
        pipeline = self.components.new_pipeline(self.reference_cache)
        pipeline.transformer = CachedTransformer(
            self.components.transformer,
            params.schedule,
            self.info.num_image_tokens(params.width, params.height),
            on_step,
            pipeline.scheduler,
            None if params.adapters else TimeEmbeddings(params.guidance_scale, self._time_embeddings),
        )
        preview = PreviewDecoder(previews, params.width // self.info.pixels_per_token) if previews else None
        callback = DenoisingCallback(params.schedule.num_steps, self.device, preview)
        compilation = self._optimizations.compiling(kind) if kind else self._optimizations.serving()
        began = time.perf_counter()
        with compilation, self.adapters.applied(params.adapters):
            pixels = pipeline(
                **pipeline_arguments(batch, self.device, self.dtype), callback_on_step_end=callback, output_type="pt"
            ).images
        images = [to_pil(row) for row in pixels]
        ended = time.perf_counter()
        seconds = callback.ended - began, ended - callback.ended
        return [
            GeneratedImage(image, *seconds, latents, callback.previews_s, params.schedule)
            for image, latents in zip(images, torch.split(callback.latents, 1), strict=True)
        ]


def check_reuse(components: Components) -> None:
    """Raise ``ModelRefused`` if reused steps do not work with this transformer."""
    transformer, device = components.transformer, components.vae.device
    try:
        check_transformer(transformer, small_example(transformer, device, transformer.dtype))
    except TransformerMismatch as error:
        raise ModelRefused(str(error)) from error


def refusal_of(batch: Sequence[Params]) -> str:
    """Return the message of ``OutOfMemory`` for a batch."""
    return f"a run of {len(batch)} images of {batch[0].width}x{batch[0].height} {TOO_LARGE}"


def to_pil(pixels: torch.Tensor) -> Image:
    """Convert pixels ``[3, H, W]`` from 0 to 1 to an image.

    Rounds like diffusers, but on the device, so that only a quarter of the bytes is copied.

    Raises:
        NonFiniteOutput: a value is NaN.
    """
    if pixels.amax().isnan():  # amax propagates NaN; converted to bytes, NaN would be black
        raise NonFiniteOutput("the decoder returned NaN")
    rounded = (pixels.float() * 255).round().to(torch.uint8)
    return fromarray(rounded.permute(1, 2, 0).contiguous().cpu().numpy())
