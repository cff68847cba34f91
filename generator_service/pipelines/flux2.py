"""FLUX.2's pipeline without its text encoder: from parameters to an image, under a LeMiCa schedule.

The denoising loop, preparation and decoding are ``diffusers.Flux2Pipeline``'s own. Every generation gets a pipeline
object, a scheduler and a ``CachedTransformer`` of its own around the shared weights, so that nothing one generation
does, or leaves undone, can reach another.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from cachetools import LRUCache
from diffusers import Flux2Pipeline
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
from generator_service.pipelines.lora import Adapters
from generator_service.pipelines.optimizations.apply import Optimizations
from generator_service.pipelines.optimizations.compiled_model import ShapeKind
from generator_service.pipelines.optimizations.profiles import EXACT, Performance
from generator_service.pipelines.params import Params, pipeline_arguments

TIME_EMBEDDINGS = 1024
"""How many are kept, 12 KB each for FLUX.2 [dev]: a dozen lengths of runs."""
TEXT_TOKENS = 512
"""Of the image that attention is measured for; how many there are is known only with the first prompt."""
logger = logging.getLogger("flux2")

REFERENCE_CACHE_BYTES = 256 * 2**20
"""For the latents of reference images, on the device; one of 1024x1024 takes 1 MiB in bfloat16."""
ATTEMPTS = 2
"""How often an image that does not fit into memory is tried as it is."""
TOO_LARGE = "does not fit into the device's memory now"
StepListener = Callable[[int, bool], None]


class GenerationCancelled(Exception):
    """The image is not wanted any more."""


@dataclass(frozen=True)
class GeneratedImage:
    """An image, and how long it took."""

    image: Image
    denoise_s: float
    decode_s: float
    latents: torch.Tensor = field(repr=False)
    """The final latents, ``[1, tokens, C]``, on the CPU."""
    previews_s: float
    """The part of ``denoise_s`` that previews took."""
    schedule: Schedule
    """That of the parameters, or one that computes every step if that one did not give an image."""


class Flux2Model:
    """The weights of a FLUX.2 model on one device. Use it from one thread at a time.

    Args:
        folder: where ``components`` come from: their name, revision and fingerprint.
        components: on their device. They are changed in place as ``performance`` says.
        lora_dir: where LoRA adapters lie.
        max_loras: how many of them are kept on the device.
        performance: how it is made fast.

    Raises:
        ModelRefused: reused steps do not work on this transformer.
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
        components.vae.enable_slicing()  # of a batch each image is decoded as it would be alone
        self.device: torch.device = components.vae.device  # an offloaded transformer is in two places
        self.dtype: torch.dtype = components.transformer.dtype
        self._time_embeddings: LRUCache[tuple[float, float, int], torch.Tensor] = LRUCache(TIME_EMBEDDINGS)
        self._references = ByteBoundedCache[torch.Tensor](REFERENCE_CACHE_BYTES)
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
        """Load a checked folder onto ``device`` by ``read``; the other arguments are those of the class.

        Raises:
            ModelRefused: it is not a FLUX.2 pipeline that can be used.
            OutOfMemory: the weights do not fit.
        """
        use_device(device)
        transformer_device = CPU if "offload" in performance.optimizations else None
        components = read(folder, device, dtype, transformer_device)
        return cls(folder, components, lora_dir, max_loras, performance)

    @property
    def performance(self) -> Performance:
        """What was done to make it fast."""
        return self._optimizations.performance

    def warm_up(self, batch: Sequence[Params], kind: ShapeKind = "static") -> list[GeneratedImage]:
        """Generate before the first request, and compile what runs.

        Args:
            batch: parameters like those of the images that will share a run.
            kind: compiled for images of this size alone (``static``), or of all other sizes (``dynamic``).

        Raises:
            OutOfMemory: the device has too little memory for such images.
        """
        attempt = partial(self._optimizations.run_compiled, partial(self._generate, batch), kind)
        return run_within_memory(attempt, refusal_of(batch), num_attempts=ATTEMPTS)

    def generate(
        self, params: Params, on_step: StepListener | None = None, previews: Previews | None = None
    ) -> GeneratedImage:
        """Generate one image; if it does not fit into memory, or is not finite, once more without cached features.

        Args:
            params: of the image.
            on_step: called with each step's number and whether it is computed, from 0 on in each attempt;
                ``GenerationCancelled`` raised there ends the generation.
            previews: shown meanwhile, each once; they do not change the image.

        Raises:
            OutOfMemory: the device has too little memory for an image of this size.
            NonFiniteOutput: the latents are not finite, even with every step computed.
            InvalidRequest: a LoRA adapter does not fit this model.
        """
        attempt = partial(self._generate, on_step=on_step, previews=previews)
        refusal = f"an image of {params.width}x{params.height} {TOO_LARGE}"
        try:
            return run_within_memory(partial(attempt, [params]), refusal, num_attempts=ATTEMPTS)[0]
        except (NonFiniteOutput, OutOfMemory) as error:
            if params.is_uncached:
                raise
            logger.warning("%s; trying again with every step computed, instead of %s", error, params.schedule)
        return run_within_memory(partial(attempt, [params.uncached()]), refusal)[0]

    def generate_batch(self, batch: Sequence[Params], on_step: StepListener | None = None) -> list[GeneratedImage]:
        """Generate images with equal ``batch_key`` in one run; each equals the one generated alone up to rounding.

        Raises:
            OutOfMemory: the device has too little memory for so many.
            NonFiniteOutput: the latents of one of them are not finite.
        """
        return run_within_memory(partial(self._generate, batch, on_step), refusal_of(batch))

    def _generate(
        self,
        batch: Sequence[Params],
        on_step: StepListener | None = None,
        previews: Previews | None = None,
        kind: ShapeKind | None = None,
    ) -> list[GeneratedImage]:
        """One run of the pipeline; compiles only for a ``kind``."""
        params = batch[0]  # what they have in common
        scheduler = self.components.new_scheduler()
        transformer = CachedTransformer(
            self.components.transformer,
            params.schedule,
            self.info.num_image_tokens(params.width, params.height),
            on_step,
            scheduler,
            None if params.adapters else TimeEmbeddings(params.guidance_scale, self._time_embeddings),
        )
        preview = PreviewDecoder(previews, params.width // self.info.pixels_per_token) if previews else None
        callback = DenoisingCallback(params.schedule.num_steps, self.device, preview)
        pipeline = self.pipeline(transformer, scheduler)
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

    def pipeline(self, transformer: Any, scheduler: Any) -> Flux2Pipeline:
        """Diffusers' pipeline around ``transformer``, which stands in for the model's own."""
        return self.components.pipeline(transformer, scheduler, self._references)


def check_reuse(components: Components) -> None:
    """Raise ``ModelRefused`` if reused steps do not work on this transformer."""
    transformer, device = components.transformer, components.vae.device
    try:
        check_transformer(transformer, small_example(transformer, device, transformer.dtype))
    except TransformerMismatch as error:
        raise ModelRefused(str(error)) from error


def refusal_of(batch: Sequence[Params]) -> str:
    """The error message if the device has too little memory for ``batch``."""
    return f"a run of {len(batch)} images of {batch[0].width}x{batch[0].height} {TOO_LARGE}"


def to_pil(pixels: torch.Tensor) -> Image:
    """``[3, H, W]`` from 0 to 1, rounded on their device as the library rounds them on the host: a quarter to copy.

    Raises:
        NonFiniteOutput: one of the values is not a number.
    """
    if pixels.amax().isnan():  # a maximum keeps NaN, which would be black in bytes
        raise NonFiniteOutput("the decoder gave no image: not every value is a number")
    rounded = (pixels.float() * 255).round().to(torch.uint8)
    return fromarray(rounded.permute(1, 2, 0).contiguous().cpu().numpy())
