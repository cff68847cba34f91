"""A transformer for one generation, which runs at the computed steps and reuses its residual at the others.

At a computed step the whole transformer runs, untouched, and two hooks note what its stack of blocks did to the noisy
image tokens: ``R = h_out - h_in``, with ``h_in`` the output of ``x_embedder`` and ``h_out`` the input of ``norm_out``.
A reused step is ``proj_out(norm_out(x_embedder(latents) + R, temb))``: no block runs, the timestep embedding is fresh
(LeMiCa, arXiv 2511.00090, and its authors' FLUX.2 script).

Only five names of diffusers' transformer are relied upon (``PARTS``); its ``forward`` and its blocks are not copied.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from generator_service.lemica.schedule import Schedule, ScheduleMismatch

PARTS = ("time_guidance_embed", "x_embedder", "norm_out", "proj_out")
StepListener = Callable[[int, bool], None]


class TransformerMismatch(RuntimeError):
    """The transformer is not built as reuse needs it: the library has changed, or this is another model."""


@dataclass
class Run:
    """The state of one generation: how far it is, and what the last computed step left."""

    step: int = 0
    residual: Tensor | None = None
    captured: dict[str, Tensor] = field(default_factory=dict)


class CachedTransformer:
    """Stands in for the transformer in ``Flux2Pipeline`` during one generation.

    Make a fresh one for every generation: all state lives here, none on the transformer or on a class.

    Args:
        transformer: diffusers' ``Flux2Transformer2DModel``, or anything with its ``PARTS``, ``config`` and ``dtype``.
        schedule: which steps are computed.
        num_image_tokens: the noisy tokens, which come first in ``hidden_states``; the rest are reference images.
        on_step: called with the step's number and whether it was computed, before the step runs.
    """

    def __init__(
        self, transformer: Any, schedule: Schedule, num_image_tokens: int, on_step: StepListener | None = None
    ) -> None:  # fmt: skip
        self._transformer = transformer
        self._schedule = schedule
        self._num_image_tokens = num_image_tokens
        self._on_step = on_step
        self._run = Run()

    @property
    def config(self) -> Any:
        """The transformer's configuration."""
        return self._transformer.config

    @property
    def dtype(self) -> torch.dtype:
        """The transformer's dtype."""
        dtype: torch.dtype = self._transformer.dtype
        return dtype

    def __call__(
        self, *, hidden_states: Tensor, timestep: Tensor, guidance: Tensor | None, **rest: Any
    ) -> tuple[Tensor]:
        """One denoising step.

        Args:
            hidden_states: ``[B, noisy + reference tokens, C]``.
            timestep: sigma, ``[B]``.
            guidance: guidance scale, ``[B]``, or None.
            rest: what else the transformer takes; a computed step passes it on as it is.

        Returns:
            The velocity in a tuple: ``[B, all tokens, C]`` at a computed step, ``[B, noisy tokens, C]`` at another.
        """
        step = self._run.step
        if step >= self._schedule.num_steps:
            raise ScheduleMismatch(f"the schedule is for {self._schedule.num_steps} steps, the run is longer")
        is_computed = self._schedule.is_computed(step)
        if self._on_step is not None:
            self._on_step(step, is_computed)
        if is_computed:
            output = self._compute(hidden_states, timestep, guidance, rest)
        else:
            output = self._reuse(hidden_states, timestep, guidance)
        self._run.step += 1
        return (output,)

    def _compute(
        self, hidden_states: Tensor, timestep: Tensor, guidance: Tensor | None, rest: dict[str, Any]
    ) -> Tensor:
        """Run the transformer and keep its residual on the noisy tokens, ``[B, noisy tokens, inner]``."""
        captured = self._run.captured
        captured.clear()
        hooks = [
            self._transformer.x_embedder.register_forward_hook(
                lambda _module, _args, output: captured.__setitem__("h_in", output)
            ),
            self._transformer.norm_out.register_forward_pre_hook(
                lambda _module, args: captured.__setitem__("h_out", args[0])
            ),
        ]
        try:
            rest = {**rest, "return_dict": False}
            output: Tensor = self._transformer(
                hidden_states=hidden_states, timestep=timestep, guidance=guidance, **rest
            )[0]
        finally:
            for hook in hooks:
                hook.remove()
        noisy = slice(self._num_image_tokens)
        self._run.residual = captured["h_out"][:, noisy] - captured["h_in"][:, noisy]
        captured.clear()
        return output

    def _reuse(self, hidden_states: Tensor, timestep: Tensor, guidance: Tensor | None) -> Tensor:
        """The cheap step: embed the noisy tokens, add the last residual, project."""
        residual = self._run.residual
        assert residual is not None  # a schedule starts with a computed step
        model = self._transformer
        dtype = hidden_states.dtype
        scaled_guidance = None if guidance is None else guidance.to(dtype) * 1000
        temb = model.time_guidance_embed(timestep.to(dtype) * 1000, scaled_guidance)
        h_in = model.x_embedder(hidden_states[:, : self._num_image_tokens])
        velocity: Tensor = model.proj_out(model.norm_out(h_in + residual, temb))
        return velocity


@torch.no_grad()
def check_transformer(transformer: Any, example: dict[str, Any]) -> None:
    """Fail loudly, at start, if reuse would not mean on this transformer what it must.

    A computed step followed by a reused one at the same input must give the same velocity up to rounding: the residual
    then is exact.

    Args:
        transformer: the transformer to check.
        example: keyword arguments of one small forward pass of it, with no reference tokens.

    Raises:
        TransformerMismatch: a part is missing, or the two velocities differ.
    """
    missing = [name for name in PARTS if not hasattr(transformer, name)]
    if missing:
        raise TransformerMismatch(f"the transformer has no {', '.join(missing)}: this diffusers cannot be used")
    schedule = Schedule("check", 2, (0,), "check", "check")
    cached = CachedTransformer(transformer, schedule, example["hidden_states"].shape[1])
    try:
        (computed,), (reused,) = cached(**example), cached(**example)
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise TransformerMismatch("a reused step does not run on this transformer") from error
    tolerance = 8 * torch.finfo(computed.dtype).eps * max(1.0, computed.abs().max().item())
    difference = (computed - reused).abs().max().item()
    if not difference <= tolerance * 8:
        raise TransformerMismatch(f"a reused step differs from the computed one by {difference:.3g} at the same input")
