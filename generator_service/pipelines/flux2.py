"""FLUX.2's pipeline without its text encoder: embeddings in, a picture out, under a LeMiCa schedule.

The denoising loop, preparation and decoding are ``diffusers.Flux2Pipeline``'s own. Every generation gets a pipeline
object, a scheduler and a ``CachedTransformer`` of its own around the shared weights, so that nothing one generation
does, or leaves undone, can reach another.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from cachetools import LRUCache
from diffusers import Flux2Pipeline
from diffusers import __version__ as diffusers_version
from PIL.Image import Image, fromarray

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
    schedule_for,
)
from generator_service.pipelines.card import ModelCard
from generator_service.pipelines.compiled_model import Kind
from generator_service.pipelines.lora import Adapter, Adapters
from generator_service.pipelines.optimised import Optimised
from generator_service.pipelines.parts import CPU, Parts, PartsReader, load_parts
from generator_service.pipelines.performance import EXACT, Performance
from generator_service.pipelines.step_clock import Previews, PreviewTaker, StepClock
from shared.byte_cache import ByteBoundedCache
from shared.compilation import CompilationFailed
from shared.device import use_device
from shared.device_memory import run_within_memory
from shared.errors import ModelRefused, NonFiniteOutput, OutOfMemory
from shared.model_folder import ModelFolder

TIME_EMBEDDINGS = 1024
"""How many are kept, 12 KB each for FLUX.2 [dev]: a dozen lengths of runs."""
TEXT_TOKENS = 512
"""Of the picture that attention is measured for; how many there are is known only with the first prompt."""
logger = logging.getLogger("flux2")

REFERENCE_CACHE_BYTES = 256 * 2**20
"""For the latents of reference images, on the device; one of 1024x1024 takes 1 MiB in bfloat16."""
ATTEMPTS = 2
"""How often a picture that does not fit into memory is tried as it is."""
StepListener = Callable[[int, bool], None]


class GenerationCancelled(Exception):
    """Whoever asked for the picture does not want it any more."""


@dataclass(frozen=True)
class GenerationRequest:
    """Everything a picture depends on, beside the weights."""

    prompt_embeds: torch.Tensor
    """``[1, L, D]``, on the CPU, of any floating dtype."""
    width: int
    height: int
    guidance_scale: float
    seed: int
    schedule: Schedule
    references: tuple[Image, ...] = ()
    adapters: tuple[Adapter, ...] = ()


@dataclass(frozen=True)
class GeneratedPicture:
    """A picture and what it took."""

    image: Image
    denoise_s: float
    decode_s: float
    latents: torch.Tensor = field(repr=False)
    """The final latents, ``[1, tokens, C]``, on the CPU."""
    previews_s: float
    """What of ``denoise_s`` went into previews."""
    schedule: Schedule
    """The request's, or one that computes every step if with the request's there was no picture."""


class Flux2Model:
    """The weights of a FLUX.2 model on one device. Use it from one thread at a time.

    Args:
        folder: where ``parts`` come from: their name, revision and fingerprint.
        parts: on their device. They are changed in place as ``performance`` says.
        lora_dir: where LoRA adapters lie.
        max_loras: how many of them are kept on the device.
        performance: how it is made fast.

    Raises:
        ModelRefused: a reused step would not mean on this transformer what it must.
    """

    def __init__(
        self,
        folder: ModelFolder,
        parts: Parts,
        lora_dir: Path | None = None,
        max_loras: int = 1,
        performance: Performance = EXACT,
    ) -> None:
        self.folder = folder
        self._parts = parts
        parts.vae.enable_slicing()  # of a batch each picture is decoded as it would be alone
        self.device: torch.device = parts.vae.device  # an offloaded transformer is in two places
        self.dtype: torch.dtype = parts.transformer.dtype
        self._time_embeddings: LRUCache[tuple[float, float, int], torch.Tensor] = LRUCache(TIME_EMBEDDINGS)
        self._encoded_references = ByteBoundedCache[torch.Tensor](REFERENCE_CACHE_BYTES)
        pipeline = self._pipeline(parts.transformer, parts.scheduler)
        self.card = ModelCard(
            name=folder.name,
            revision=folder.revision,
            fingerprint=f"transformer {folder.fingerprint('transformer')}",
            dtype=str(self.dtype).removeprefix("torch."),
            libraries=f"torch {torch.__version__}, diffusers {diffusers_version}",
            embedding_width=int(parts.transformer.config.joint_attention_dim),
            default_side=int(parts.vae.config.sample_size),
            pixels_per_token=2 * int(pipeline.vae_scale_factor),
        )
        self._optimised = Optimised(parts, performance, self.card.default_num_tokens + TEXT_TOKENS)
        self.adapters = Adapters(parts.transformer, lora_dir, max_loras, keeps=not self._optimised.is_compiled)
        self.card = replace(self.card, adapters=tuple(self.adapters.names))
        try:
            with self._optimised.serving():
                check_transformer(parts.transformer, self._small_example())
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
        read: PartsReader = load_parts,
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
        is_offloaded = "offload" in performance.optimisations
        use_device(device)
        parts = read(folder, device, dtype, transformer_device=CPU if is_offloaded else None)
        return cls(folder, parts, lora_dir, max_loras, performance)

    @property
    def parts(self) -> Parts:
        """The modules that run, as ``performance`` left them."""
        return self._parts

    @property
    def performance(self) -> Performance:
        """What was done to make it fast."""
        return self._optimised.performance

    def prepare(self, request: GenerationRequest, kind: Kind = "this") -> GeneratedPicture:
        """Draw before anyone waits, and have what it runs compiled.

        Args:
            request: what to draw.
            kind: compiled for pictures of ``this`` size, or of ``any`` that was not prepared.

        Raises:
            OutOfMemory: the device has too little memory for a picture of this size.
        """
        return self.prepare_batch([request], kind)[0]

    def prepare_batch(self, requests: Sequence[GenerationRequest], kind: Kind) -> list[GeneratedPicture]:
        """As ``prepare``, for pictures that are drawn together."""

        def prepare() -> list[GeneratedPicture]:
            try:
                with self._optimised.preparing(kind):
                    return self._generate(requests)
            except CompilationFailed as error:
                self._optimised.give_up_compiling(error)
            return self._generate(requests)

        return run_within_memory(prepare, refusal(requests), num_attempts=ATTEMPTS)

    def generate(
        self, request: GenerationRequest, on_step: StepListener | None = None, previews: Previews | None = None
    ) -> GeneratedPicture:
        """Make one picture.

        What does not fit into memory is tried once more with nothing cached by the allocator. If it still does not
        fit, or leaves no finite numbers, it is tried with every step computed and nothing kept of the steps before.

        Args:
            request: what to make.
            on_step: called with each step's number and whether it is computed, from 0 on in each attempt;
                ``GenerationCancelled`` raised there ends the generation.
            previews: what is shown meanwhile, each once; it does not change the picture.

        Raises:
            OutOfMemory: the device has too little memory for a picture of this size.
            NonFiniteOutput: the latents are no finite numbers, even with every step computed.
            InvalidRequest: a LoRA adapter is none of this model.
        """
        try:
            return self._serve([request], on_step, previews, ATTEMPTS)[0]
        except (NonFiniteOutput, OutOfMemory) as error:
            if request.schedule.num_computed == request.schedule.num_steps:
                raise
            logger.warning("%s; trying again with every step computed, instead of %s", error, request.schedule)
        everything = schedule_for("none", request.schedule.num_steps)
        return self._serve([replace(request, schedule=everything)], on_step, previews)[0]

    def generate_batch(
        self, requests: Sequence[GenerationRequest], on_step: StepListener | None = None
    ) -> list[GeneratedPicture]:
        """Make several pictures in one run; each equals the one that is drawn alone up to rounding.

        Args:
            requests: of one size, guidance scale, schedule and shape of embedding, without references and adapters.
            on_step: as for ``generate``.

        Raises:
            OutOfMemory: the device has too little memory for so many.
            NonFiniteOutput: the latents of one of them are no finite numbers.
        """
        return self._serve(requests, on_step)

    def _serve(
        self,
        requests: Sequence[GenerationRequest],
        on_step: StepListener | None,
        previews: Previews | None = None,
        num_attempts: int = 1,
    ) -> list[GeneratedPicture]:
        """Generate with the first request's adapters, without compiling anything."""

        def serve() -> list[GeneratedPicture]:
            with self._optimised.serving(), self.adapters.applied(requests[0].adapters):
                return self._generate(requests, on_step, previews)

        return run_within_memory(serve, refusal(requests), num_attempts=num_attempts)

    def _generate(
        self,
        requests: Sequence[GenerationRequest],
        on_step: StepListener | None = None,
        previews: Previews | None = None,
    ) -> list[GeneratedPicture]:
        request = requests[0]  # what they have in common
        scheduler = self._scheduler()
        transformer = CachedTransformer(
            self._parts.transformer,
            request.schedule,
            self.card.num_image_tokens(request.width, request.height),
            on_step,
            scheduler,
            None if request.adapters else TimeEmbeddings(request.guidance_scale, self._time_embeddings),
        )
        taker = PreviewTaker(previews, request.width // self.card.pixels_per_token) if previews else None
        clock = StepClock(request.schedule.num_steps, self.device, taker)
        began = time.perf_counter()
        pixels = self._run(requests, self._pipeline(transformer, scheduler), clock)
        images = [picture_of(row) for row in pixels]
        ended = time.perf_counter()
        seconds = clock.ended - began, ended - clock.ended
        return [
            GeneratedPicture(image, *seconds, latents, clock.previews_s, request.schedule)
            for image, latents in zip(images, torch.split(clock.latents, 1), strict=True)
        ]

    def record(
        self, request: GenerationRequest, feature: FeatureKind = "residual", storage: torch.device | Path | None = None
    ) -> Trajectory:
        """The full run of a request, whatever its schedule, for calibration.

        Args:
            request: what to make.
            feature: what to keep of each step.
            storage: the device, or the folder, that keeps it; None for the model's own device.
        """
        scheduler = self._scheduler()
        recorder = TrajectoryRecorder(self._parts.transformer, feature, storage or self.device)
        clock = StepClock(request.schedule.num_steps, self.device)
        self._run([request], self._pipeline(recorder, scheduler), clock, output_type="latent")
        return recorder.trajectory(clock.latents, scheduler.sigmas)

    def calibration(
        self, trajectories: Sequence[Trajectory], predictor: Predictor, batch_size: int = 64
    ) -> Calibration:
        """The calibration of this model's transformer on recorded runs."""
        return Calibration(self._parts.transformer, trajectories, predictor, batch_size)

    def _run(
        self,
        requests: Sequence[GenerationRequest],
        pipeline: Flux2Pipeline,
        clock: StepClock,
        output_type: str = "pt",
    ) -> torch.Tensor:
        """What the library's pipeline makes of requests: pixels ``[B, 3, H, W]`` from 0 to 1, on the device."""
        request = requests[0]
        use_device(self.device)
        made: torch.Tensor = pipeline(
            prompt_embeds=torch.cat([each.prompt_embeds for each in requests]).to(self.device, self.dtype),
            image=list(request.references) or None,
            width=request.width,
            height=request.height,
            num_inference_steps=request.schedule.num_steps,
            guidance_scale=request.guidance_scale,
            # On the CPU, so that a seed means the same noise on every device.
            generator=[torch.Generator("cpu").manual_seed(each.seed) for each in requests],
            callback_on_step_end=clock,
            output_type=output_type,
        ).images
        return made

    def _scheduler(self) -> Any:
        """A scheduler for one generation: it counts steps."""
        scheduler = self._parts.scheduler
        return type(scheduler).from_config(scheduler.config)

    def _pipeline(self, transformer: Any, scheduler: Any) -> Flux2Pipeline:
        pipeline = _RememberingPipeline(
            scheduler=scheduler,
            vae=self._parts.vae,
            text_encoder=None,
            tokenizer=None,
            transformer=transformer,
        )
        pipeline.set_progress_bar_config(disable=True)
        pipeline.encoded = self._encoded_references
        return pipeline

    def _small_example(self) -> dict[str, Any]:
        """Arguments of one forward pass over 2 x 2 image tokens and 8 text tokens."""
        noise = torch.Generator("cpu").manual_seed(0)
        channels = self._parts.transformer.config.in_channels
        image_ids = torch.cartesian_prod(*(torch.arange(n) for n in (1, 2, 2, 1)))
        text = torch.randn(1, 8, self.card.embedding_width, generator=noise)
        text_ids = torch.cartesian_prod(*(torch.arange(n) for n in (1, 1, 1, 8)))
        return {
            "hidden_states": torch.randn(1, 4, channels, generator=noise).to(self.device, self.dtype),
            "timestep": torch.full([1], 0.5, device=self.device, dtype=self.dtype),
            "guidance": torch.full([1], 4.0, device=self.device),
            "encoder_hidden_states": text.to(self.device, self.dtype),
            "img_ids": image_ids.to(self.device),
            "txt_ids": text_ids.to(self.device),
        }


class _RememberingPipeline(Flux2Pipeline):  # type: ignore[misc]  # diffusers ships no types
    """The library's pipeline, which encodes a reference image that it has seen before only once."""

    encoded: ByteBoundedCache[torch.Tensor]

    def _encode_vae_image(self, image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        pixels = image.contiguous().cpu().view(torch.uint8).numpy().tobytes()
        key = hashlib.sha256(repr(tuple(image.shape)).encode() + pixels).hexdigest()
        found = self.encoded.get(key)
        if found is None:
            found = super()._encode_vae_image(image=image, generator=generator)
            self.encoded.put(key, found)
        return found


def refusal(requests: Sequence[GenerationRequest]) -> str:
    """What the client reads if the device has too little memory for ``requests``."""
    first = requests[0]
    what = "a picture" if len(requests) == 1 else f"a run of {len(requests)} pictures"
    return f"{what} of {first.width}x{first.height} does not fit into the device's memory now"


def picture_of(pixels: torch.Tensor) -> Image:
    """``[3, H, W]`` from 0 to 1, rounded on their device as the library rounds them on the host: a quarter to copy.

    Raises:
        NonFiniteOutput: one of the values is not a number.
    """
    if pixels.amax().isnan():  # not lost in the largest one, and in bytes it would be black
        raise NonFiniteOutput("the decoder gave no image: not every value is a number")
    rounded = (pixels.float() * 255).round().to(torch.uint8)
    return fromarray(rounded.permute(1, 2, 0).contiguous().cpu().numpy())
