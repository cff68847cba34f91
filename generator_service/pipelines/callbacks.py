"""Pipeline callbacks: measure the steps of a run, check its latents, and decode previews."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL.Image import Image

from generator_service.errors import NonFiniteOutput

STEPS_AHEAD = 4
"""Largest number of steps that the host queues ahead of the GPU. More would delay progress events and cancellation."""
PreviewCallback = Callable[[Image], None]


@dataclass(frozen=True)
class Previews:
    """Requested previews of an unfinished image."""

    steps: frozenset[int]
    """Steps after which a preview is shown. Step 0 is ignored, because its velocity is unknown."""
    callback: PreviewCallback
    """Called on the device thread."""
    shown: set[int] = field(default_factory=set, compare=False)
    """Steps whose preview was shown; a repeated run shows only the others."""


class PreviewDecoder:
    """Decodes previews by extrapolating the latents with the velocity of the last step; flows are nearly straight.

    Args:
        previews: the requested previews.
        width: width of the image in tokens.
    """

    def __init__(self, previews: Previews, width: int) -> None:
        self._previews = previews
        self._width = width
        self._before = torch.empty(0)

    def is_due(self, step: int) -> bool:
        return step in self._previews.steps - self._previews.shown and step > 0

    def __call__(self, pipeline: Any, step: int, latents: torch.Tensor) -> None:
        """Decode and show a preview if one is due."""
        if self.is_due(step):
            sigmas = pipeline.scheduler.sigmas
            velocity = (latents.float() - self._before) / (sigmas[step + 1] - sigmas[step])
            self._previews.callback(self._decode(pipeline, latents.float() - sigmas[step + 1] * velocity))
            self._previews.shown.add(step)
        self._before = latents.float()

    def _decode(self, pipeline: Any, latents: torch.Tensor) -> Image:
        vae = pipeline.vae
        maps = latents.to(vae.dtype).transpose(1, 2).reshape(1, latents.shape[2], -1, self._width)
        mean, variance = (moment.view(1, -1, 1, 1) for moment in (vae.bn.running_mean, vae.bn.running_var))
        maps = maps * torch.sqrt(variance + vae.config.batch_norm_eps) + mean
        latents = pipeline._unpatchify_latents(maps)  # noqa: SLF001 - as the pipeline decodes
        decoded = vae.decode(latents, return_dict=False)[0]
        image: Image = pipeline.image_processor.postprocess(decoded, output_type="pil")[0]
        return image


@dataclass
class DenoisingCallback:
    """Callback for ``callback_on_step_end``: records the end of the last step and checks the final latents.

    Before the last step, only previews synchronize with the device.
    """

    num_steps: int
    device: torch.device
    preview: PreviewDecoder | None = None
    ended: float = 0.0
    """When the last step ended, by ``time.perf_counter``."""
    latents: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """The final ones, on the CPU."""
    previews_s: float = 0.0
    """Time that the previews took, in seconds."""
    _events: "deque[torch.cuda.Event]" = field(default_factory=deque)

    def __call__(
        self, pipeline: Any, step: int, _timestep: object, tensors: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Handle the end of a step; raise ``NonFiniteOutput`` if the final latents are not finite."""
        if self.device.type == "cuda":
            self._throttle_host()
        if self.preview is not None:
            self._show(self.preview, pipeline, step, tensors["latents"])
        if step == self.num_steps - 1:
            self.latents = tensors["latents"].cpu()  # synchronizes with the device
            self.ended = time.perf_counter()
            if not self.latents.isfinite().all():
                raise NonFiniteOutput("the model generated latents that are not finite")
        return tensors

    def _throttle_host(self) -> None:
        """Wait until the device has finished the step ``STEPS_AHEAD`` steps ago."""
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        self._events.append(event)
        if len(self._events) > STEPS_AHEAD:
            self._events.popleft().synchronize()

    def _show(self, preview: PreviewDecoder, pipeline: Any, step: int, latents: torch.Tensor) -> None:
        if self.device.type == "cuda" and preview.is_due(step):
            torch.cuda.synchronize(self.device)  # so that the time of earlier steps is not attributed to the preview
        began = time.perf_counter()
        preview(pipeline, step, latents)
        self.previews_s += time.perf_counter() - began
