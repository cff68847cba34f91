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
from diffusers import __version__ as diffusers_version
from PIL.Image import Image, fromarray

from flux2_shared.device.memory import run_within_memory
from flux2_shared.device.resolve import use_device
from flux2_shared.errors import ModelRefused, NonFiniteOutput, OutOfMemory
from flux2_shared.model.byte_cache import ByteBoundedCache
from flux2_shared.model.compilation import CompilationFailed
from flux2_shared.model.folder import ModelFolder
from generator_service.lemica import (
    CachedTransformer,
    Calibration,
    FeatureKind,
    Predictor,
    Schedule,
    TimeEmbeddings,
    Trajectory,
    TrajectoryRecorder,
    TransformerMismatch,
    check_transformer,
    small_example,
)
from generator_service.pipelines.callbacks import DenoisingCallback, PreviewDecoder, Previews
from generator_service.pipelines.components import (
    CPU,
    Components,
    ComponentsReader,
    ReferenceCachingPipeline,
    load_components,
)
from generator_service.pipelines.lora import Adapters
from generator_service.pipelines.model_info import ModelInfo
from generator_service.pipelines.optimizations.apply import Optimizations
from generator_service.pipelines.optimizations.compiled_model import ShapeKind
from generator_service.pipelines.optimizations.profiles import EXACT, Performance
from generator_service.pipelines.params import Params

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
        ModelRefused: a reused step would not mean on this transformer what it must.
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
        self._components = components
        components.vae.enable_slicing()  # of a batch each image is decoded as it would be alone
        self.device: torch.device = components.vae.device  # an offloaded transformer is in two places
        self.dtype: torch.dtype = components.transformer.dtype
        self._time_embeddings: LRUCache[tuple[float, float, int], torch.Tensor] = LRUCache(TIME_EMBEDDINGS)
        self._references = ByteBoundedCache[torch.Tensor](REFERENCE_CACHE_BYTES)
        pipeline = self._pipeline(components.transformer, components.scheduler)
        self.info = ModelInfo(
            name=folder.name,
            revision=folder.revision,
            fingerprint=f"transformer {folder.fingerprint('transformer')}",
            dtype=str(self.dtype).removeprefix("torch."),
            libraries=f"torch {torch.__version__}, diffusers {diffusers_version}",
            embedding_width=int(components.transformer.config.joint_attention_dim),
            default_side=int(components.vae.config.sample_size),
            pixels_per_token=2 * int(pipeline.vae_scale_factor),
        )
        self._optimizations = Optimizations(components, performance, self.info.default_num_tokens + TEXT_TOKENS)
        self.adapters = Adapters(components.transformer, lora_dir, max_loras, keeps=not self._optimizations.is_compiled)
        self.info = replace(self.info, adapters=tuple(self.adapters.names))
        try:
            with self._optimizations.serving():
                check_transformer(
                    components.transformer, small_example(components.transformer, self.device, self.dtype)
                )
        except TransformerMismatch as error:
            raise ModelRefused(str(error)) from error

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
        """The model in a checked folder.

        Args:
            folder: a diffusers pipeline.
            device: where it computes.
            dtype: of its weights.
            lora_dir: where LoRA adapters lie.
            max_loras: how many of them are kept on the device.
            performance: how it is made fast.
            read: where the weights come from; benchmarks make some up.

        Raises:
            ModelRefused: it is no FLUX.2 pipeline that can be used.
        """
        is_offloaded = "offload" in performance.optimizations
        use_device(device)
        components = read(folder, device, dtype, transformer_device=CPU if is_offloaded else None)
        return cls(folder, components, lora_dir, max_loras, performance)

    @property
    def components(self) -> Components:
        """The modules that run, as ``performance`` left them."""
        return self._components

    @property
    def performance(self) -> Performance:
        """What was done to make it fast."""
        return self._optimizations.performance

    def warm_up(self, params: Params, kind: ShapeKind = "static") -> GeneratedImage:
        """Generate before the first request, and compile what runs.

        Args:
            params: of an image like those that will be asked for.
            kind: compiled for images of this size alone (``static``), or of all other sizes (``dynamic``).

        Raises:
            OutOfMemory: the device has too little memory for an image of this size.
        """
        return self.warm_up_batch([params], kind)[0]

    def warm_up_batch(self, batch: Sequence[Params], kind: ShapeKind) -> list[GeneratedImage]:
        """As ``warm_up``, for images that share a run."""

        def generate() -> list[GeneratedImage]:
            try:
                return self._generate(batch, kind=kind)
            except CompilationFailed as error:
                self._optimizations.fall_back_to_eager(error)
            return self._generate(batch)

        return run_within_memory(generate, refusal_of(batch), num_attempts=ATTEMPTS)

    def generate(
        self, params: Params, on_step: StepListener | None = None, previews: Previews | None = None
    ) -> GeneratedImage:
        """Generate one image.

        What does not fit into memory is tried once more with nothing cached by the allocator. If it still does not
        fit, or the latents are not finite, it is tried with every step computed and no cached features.

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
        """Generate several images in one run; each equals the one that is generated alone up to rounding.

        Args:
            batch: parameters with one ``batch_key``.
            on_step: as for ``generate``.

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
        scheduler = self._scheduler()
        transformer = CachedTransformer(
            self._components.transformer,
            params.schedule,
            self.info.num_image_tokens(params.width, params.height),
            on_step,
            scheduler,
            None if params.adapters else TimeEmbeddings(params.guidance_scale, self._time_embeddings),
        )
        preview = PreviewDecoder(previews, params.width // self.info.pixels_per_token) if previews else None
        callback = DenoisingCallback(params.schedule.num_steps, self.device, preview)
        pipeline = self._pipeline(transformer, scheduler)
        compilation = self._optimizations.compiling(kind) if kind else self._optimizations.serving()
        began = time.perf_counter()
        with compilation, self.adapters.applied(params.adapters):
            pixels = pipeline(**self._inputs(batch), callback_on_step_end=callback, output_type="pt").images
        images = [to_pil(row) for row in pixels]
        ended = time.perf_counter()
        seconds = callback.ended - began, ended - callback.ended
        return [
            GeneratedImage(image, *seconds, latents, callback.previews_s, params.schedule)
            for image, latents in zip(images, torch.split(callback.latents, 1), strict=True)
        ]

    def record(
        self, params: Params, feature: FeatureKind = "residual", storage: torch.device | Path | None = None
    ) -> Trajectory:
        """The full run of an image, whatever its schedule, for calibration.

        Args:
            params: of the image.
            feature: what to keep of each step.
            storage: the device, or the folder, that keeps it; None for the model's own device.
        """
        scheduler = self._scheduler()
        recorder = TrajectoryRecorder(self._components.transformer, feature, storage or self.device)
        callback = DenoisingCallback(params.schedule.num_steps, self.device)
        pipeline = self._pipeline(recorder, scheduler)
        pipeline(**self._inputs([params]), callback_on_step_end=callback, output_type="latent")
        return recorder.trajectory(callback.latents, scheduler.sigmas)

    def calibration(
        self, trajectories: Sequence[Trajectory], predictor: Predictor, batch_size: int = 64
    ) -> Calibration:
        """The calibration of this model's transformer on recorded runs."""
        return Calibration(self._components.transformer, trajectories, predictor, batch_size)

    def _inputs(self, batch: Sequence[Params]) -> dict[str, Any]:
        """The pipeline's arguments for ``batch``; with references or adapters it has one image."""
        params = batch[0]
        embeds = [each.prompt_embeds for each in batch if each.prompt_embeds is not None]
        assert len(embeds) == len(batch)  # images are generated once the prompt is embedded
        return {
            "prompt_embeds": torch.cat(embeds).to(self.device, self.dtype),
            "image": [reference.image for reference in params.references] or None,
            "width": params.width,
            "height": params.height,
            "num_inference_steps": params.schedule.num_steps,
            "guidance_scale": params.guidance_scale,
            # On the CPU, so that a seed means the same noise on every device.
            "generator": [torch.Generator("cpu").manual_seed(each.seed) for each in batch],
        }

    def _scheduler(self) -> Any:
        """A scheduler for one run: it counts steps."""
        scheduler = self._components.scheduler
        return type(scheduler).from_config(scheduler.config)

    def _pipeline(self, transformer: Any, scheduler: Any) -> Flux2Pipeline:
        pipeline = ReferenceCachingPipeline(
            scheduler=scheduler,
            vae=self._components.vae,
            text_encoder=None,
            tokenizer=None,
            transformer=transformer,
        )
        pipeline.set_progress_bar_config(disable=True)
        pipeline.reference_cache = self._references
        return pipeline


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
