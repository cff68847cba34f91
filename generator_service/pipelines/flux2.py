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
from typing import Any

import torch
from diffusers import Flux2Pipeline
from diffusers import __version__ as diffusers_version
from diffusers.utils import logging as diffusers_logging
from PIL.Image import Image

from generator_service.lemica import (
    CachedTransformer,
    Calibration,
    Predictor,
    Schedule,
    Trace,
    Trajectory,
    TrajectoryRecorder,
    TransformerMismatch,
    check_transformer,
    schedule_for,
)
from generator_service.pipelines.card import ModelCard
from generator_service.pipelines.lora import Adapter, Adapters
from shared.byte_cache import ByteBoundedCache
from shared.errors import ModelRefused, NonFiniteOutput, OutOfMemory
from shared.model_folder import ModelFolder

PARTS = ("scheduler", "transformer", "vae")
logger = logging.getLogger("flux2")

REFERENCE_CACHE_BYTES = 256 * 2**20
"""For the latents of reference images, on the device; one of 1024x1024 takes 1 MiB in bfloat16."""
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


PreviewListener = Callable[[Image], None]


@dataclass(frozen=True)
class Previews:
    """Wants to see, after some steps, what the picture will be as far as it is known."""

    steps: frozenset[int]
    """After which; 0 gives none, since one step has no direction yet."""
    listener: PreviewListener
    """Called on the thread that draws."""


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
    """The weights of a FLUX.2 model on one device. Use it from one thread at a time."""

    def __init__(
        self,
        folder: ModelFolder,
        device: torch.device,
        dtype: torch.dtype,
        lora_dir: Path | None = None,
        max_loras: int = 1,
    ) -> None:
        self.folder = folder
        diffusers_logging.disable_progress_bar()
        try:
            pipeline = Flux2Pipeline.from_pretrained(
                folder.path, text_encoder=None, tokenizer=None, dtype=dtype, use_safetensors=True
            )
        except (OSError, ValueError) as error:
            raise ModelRefused(f"{folder.name} cannot be loaded as a FLUX.2 pipeline") from error
        pipeline.to(device)
        self.device = device
        self.dtype = dtype
        self._components = {
            "vae": pipeline.vae.eval(),
            "scheduler": pipeline.scheduler,
            "transformer": pipeline.transformer.eval(),
        }
        self.adapters = Adapters(self._components["transformer"], lora_dir, max_loras)
        self.card = ModelCard(
            name=folder.name,
            revision=folder.revision,
            fingerprint=f"transformer {folder.fingerprint('transformer')}",
            dtype=str(dtype).removeprefix("torch."),
            libraries=f"torch {torch.__version__}, diffusers {diffusers_version}",
            embedding_width=int(pipeline.transformer.config.joint_attention_dim),
            default_side=int(pipeline.vae.config.sample_size),
            pixels_per_token=2 * int(pipeline.vae_scale_factor),
            adapters=tuple(self.adapters.names),
        )
        self._encoded_references = ByteBoundedCache[torch.Tensor](REFERENCE_CACHE_BYTES)
        try:
            check_transformer(self._components["transformer"], self._small_example())
        except TransformerMismatch as error:
            raise ModelRefused(str(error)) from error

    def generate(
        self, request: GenerationRequest, on_step: StepListener | None = None, previews: Previews | None = None
    ) -> GeneratedPicture:
        """Make one picture.

        Args:
            request: what to make.
            on_step: called with each step's number and whether it is computed; ``GenerationCancelled`` raised there
                ends the generation.
            previews: what is shown meanwhile; it does not change the picture.

        Raises:
            OutOfMemory: the device has too little memory for a picture of this size.
            NonFiniteOutput: the latents are no finite numbers, even with every step computed.
            InvalidRequest: a LoRA adapter is none of this model.
        """
        try:
            with self.adapters.applied(request.adapters):
                return self._finite(request, on_step, previews)
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            size = f"{request.width}x{request.height}"
            raise OutOfMemory(f"a picture of {size} does not fit into the memory of the GPU now") from error

    def _finite(
        self, request: GenerationRequest, on_step: StepListener | None, previews: Previews | None
    ) -> GeneratedPicture:
        """A picture, drawn once more with every step computed if it is none."""
        try:
            return self._generate(request, on_step, previews)
        except NonFiniteOutput:
            logger.warning("latents are not finite with %s: drawing again without a cache", request.schedule)
        everything = schedule_for("none", request.schedule.num_steps)
        return self._generate(replace(request, schedule=everything), on_step, previews)

    def _generate(
        self, request: GenerationRequest, on_step: StepListener | None, previews: Previews | None
    ) -> GeneratedPicture:
        scheduler = self._scheduler()
        transformer = CachedTransformer(
            self._components["transformer"],
            request.schedule,
            self.card.num_image_tokens(request.width, request.height),
            on_step,
            scheduler,
        )
        clock = _LastStepClock(request.schedule.num_steps, self.device)
        clock.preview = _PreviewTaker(previews, request.width // self.card.pixels_per_token) if previews else None
        began = time.perf_counter()
        image = self._run(request, self._pipeline(transformer, scheduler), clock)
        ended = time.perf_counter()
        return GeneratedPicture(
            image, clock.ended - began, ended - clock.ended, clock.latents, clock.previews_s, request.schedule
        )

    def record(
        self, request: GenerationRequest, trace: Trace = "residual", keep: torch.device | Path | None = None
    ) -> Trajectory:
        """The full run of a request, whatever its schedule, for calibration.

        Args:
            request: what to make.
            trace: what to keep of each step.
            keep: the device, or the folder, that keeps it; None for the model's own device.
        """
        scheduler = self._scheduler()
        recorder = TrajectoryRecorder(self._components["transformer"], trace, keep or self.device)
        clock = _LastStepClock(request.schedule.num_steps, self.device)
        self._run(request, self._pipeline(recorder, scheduler), clock, output_type="latent")
        return recorder.trajectory(clock.latents, scheduler.sigmas)

    def calibration(
        self, trajectories: Sequence[Trajectory], predictor: Predictor, batch_size: int = 64
    ) -> Calibration:
        """The calibration of this model's transformer on recorded runs."""
        return Calibration(self._components["transformer"], trajectories, predictor, batch_size)

    def _run(
        self, request: GenerationRequest, pipeline: Flux2Pipeline, clock: "_LastStepClock", output_type: str = "pil"
    ) -> Any:
        """What the library's pipeline makes of a request."""
        return pipeline(
            prompt_embeds=request.prompt_embeds.to(self.device, self.dtype),
            image=list(request.references) or None,
            width=request.width,
            height=request.height,
            num_inference_steps=request.schedule.num_steps,
            guidance_scale=request.guidance_scale,
            # On the CPU, so that a seed means the same noise on every device.
            generator=torch.Generator("cpu").manual_seed(request.seed),
            callback_on_step_end=clock,
            output_type=output_type,
        ).images[0]

    def _scheduler(self) -> Any:
        """A scheduler for one generation: it counts steps."""
        scheduler = self._components["scheduler"]
        return type(scheduler).from_config(scheduler.config)

    def _pipeline(self, transformer: CachedTransformer | TrajectoryRecorder, scheduler: Any) -> Flux2Pipeline:
        pipeline = _RememberingPipeline(
            scheduler=scheduler,
            vae=self._components["vae"],
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
        channels = self._components["transformer"].config.in_channels
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


class _LastStepClock:
    """A pipeline callback that notes when the last step ended, on the device too, and checks what it left."""

    def __init__(self, num_steps: int, device: torch.device) -> None:
        self._last = num_steps - 1
        self._device = device
        self.ended = 0.0
        self.latents = torch.empty(0)
        self.preview: _PreviewTaker | None = None
        self.previews_s = 0.0

    def __call__(
        self, pipeline: Any, step: int, _timestep: object, tensors: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        if self.preview is not None:
            self._show(self.preview, pipeline, step, tensors["latents"])
        if step == self._last:
            self.latents = tensors["latents"].cpu()  # waits for the device
            self.ended = time.perf_counter()
            if not self.latents.isfinite().all():
                raise NonFiniteOutput("the model drew no picture: not every value is a finite number")
        return tensors

    def _show(self, preview: "_PreviewTaker", pipeline: Any, step: int, latents: torch.Tensor) -> None:
        if self._device.type == "cuda" and preview.is_due(step):
            torch.cuda.synchronize(self._device)  # the steps' own time is not the preview's
        began = time.perf_counter()
        preview(pipeline, step, latents)
        self.previews_s += time.perf_counter() - began


class _PreviewTaker:
    """Shows where the latents would end if they went on as in the last step, which they nearly do: flows are straight.

    Args:
        previews: after which steps, and who wants to see it.
        width: the picture's, in tokens.
    """

    def __init__(self, previews: Previews, width: int) -> None:
        self._previews = previews
        self._width = width
        self._before = torch.empty(0)

    def is_due(self, step: int) -> bool:
        """Whether there is a preview after this step."""
        return step in self._previews.steps and step > 0

    def __call__(self, pipeline: Any, step: int, latents: torch.Tensor) -> None:
        if self.is_due(step):
            sigmas = pipeline.scheduler.sigmas
            velocity = (latents.float() - self._before) / (sigmas[step + 1] - sigmas[step])
            self._previews.listener(self._decoded(pipeline, latents.float() - sigmas[step + 1] * velocity))
        self._before = latents.float()

    def _decoded(self, pipeline: Any, latents: torch.Tensor) -> Image:
        vae = pipeline.vae
        maps = latents.to(vae.dtype).transpose(1, 2).reshape(1, latents.shape[2], -1, self._width)
        mean, variance = (moment.view(1, -1, 1, 1) for moment in (vae.bn.running_mean, vae.bn.running_var))
        maps = maps * torch.sqrt(variance + vae.config.batch_norm_eps) + mean
        decoded = vae.decode(torch.nn.functional.pixel_shuffle(maps, 2), return_dict=False)[0]
        picture: Image = pipeline.image_processor.postprocess(decoded, output_type="pil")[0]
        return picture
