"""What happens after each step of a run: when it ended, whether it left numbers, and what the picture will be."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL.Image import Image

from generator_service.errors import NonFiniteOutput

STEPS_AHEAD = 4
"""How far the host may be ahead of a GPU: so far that it never waits, so near that progress and cancel are true."""
PreviewListener = Callable[[Image], None]


@dataclass(frozen=True)
class Previews:
    """Wants to see, after some steps, what the picture will be as far as it is known."""

    steps: frozenset[int]
    """After which; 0 gives none, since one step has no direction yet."""
    listener: PreviewListener
    """Called on the thread that draws."""
    shown: set[int] = field(default_factory=set, compare=False)
    """The steps whose preview it has seen: a run that is started again shows only the others."""


class PreviewDecoder:
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
        return step in self._previews.steps - self._previews.shown and step > 0

    def __call__(self, pipeline: Any, step: int, latents: torch.Tensor) -> None:
        """Call the listener with the preview, if one is due."""
        if self.is_due(step):
            sigmas = pipeline.scheduler.sigmas
            velocity = (latents.float() - self._before) / (sigmas[step + 1] - sigmas[step])
            self._previews.listener(self._decoded(pipeline, latents.float() - sigmas[step + 1] * velocity))
            self._previews.shown.add(step)
        self._before = latents.float()

    def _decoded(self, pipeline: Any, latents: torch.Tensor) -> Image:
        vae = pipeline.vae
        maps = latents.to(vae.dtype).transpose(1, 2).reshape(1, latents.shape[2], -1, self._width)
        mean, variance = (moment.view(1, -1, 1, 1) for moment in (vae.bn.running_mean, vae.bn.running_var))
        maps = maps * torch.sqrt(variance + vae.config.batch_norm_eps) + mean
        decoded = vae.decode(pipeline._unpatchify_latents(maps), return_dict=False)[0]  # noqa: SLF001 - as the pipeline decodes
        picture: Image = pipeline.image_processor.postprocess(decoded, output_type="pil")[0]
        return picture


class DenoisingCallback:
    """A pipeline callback that notes when the last step ended, on the device too, and checks what it left.

    Nothing in it waits for the device to be idle before the last step, but for previews.
    """

    def __init__(self, num_steps: int, device: torch.device, preview: PreviewDecoder | None = None) -> None:
        self._last = num_steps - 1
        self._device = device
        self._preview = preview
        self._events: deque[torch.cuda.Event] = deque()
        self.ended = 0.0
        self.latents = torch.empty(0)
        self.previews_s = 0.0

    def __call__(
        self, pipeline: Any, step: int, _timestep: object, tensors: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """As diffusers calls ``callback_on_step_end``; raises ``NonFiniteOutput`` after the last step."""
        if self._device.type == "cuda":
            self._throttle_host()
        if self._preview is not None:
            self._show(self._preview, pipeline, step, tensors["latents"])
        if step == self._last:
            self.latents = tensors["latents"].cpu()  # waits for the device
            self.ended = time.perf_counter()
            if not self.latents.isfinite().all():
                raise NonFiniteOutput("the model drew no picture: not every value is a finite number")
        return tensors

    def _throttle_host(self) -> None:
        """Wait for the step of some steps ago; the device has the later ones to do meanwhile."""
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        self._events.append(event)
        if len(self._events) > STEPS_AHEAD:
            self._events.popleft().synchronize()

    def _show(self, preview: PreviewDecoder, pipeline: Any, step: int, latents: torch.Tensor) -> None:
        if self._device.type == "cuda" and preview.is_due(step):
            torch.cuda.synchronize(self._device)  # the steps' own time is not the preview's
        began = time.perf_counter()
        preview(pipeline, step, latents)
        self.previews_s += time.perf_counter() - began
