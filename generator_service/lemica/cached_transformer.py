"""A wrapper that runs the transformer at computed steps and reuses its residual at the others.

At a computed step the unmodified transformer runs, and two hooks record the residual of its blocks on the noisy image
tokens: ``R = h_out - h_in``, with ``h_in`` the output of ``x_embedder`` and ``h_out`` the input of ``norm_out``. A
reused step is ``proj_out(norm_out(x_embedder(latents) + R, temb))``: no block runs, and the timestep embedding is
computed for the current step (LeMiCa, arXiv 2511.00090, and its authors' FLUX.2 script). The schedule's predictor
estimates ``R`` from the residuals of earlier steps.

This depends on four submodules of diffusers' transformer (``REQUIRED_MODULES``) and copies neither its ``forward`` nor
its blocks.
"""

from collections import deque
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from generator_service.lemica.errors import ScheduleMismatch
from generator_service.lemica.predictor import CachedFeature, FeatureKind
from generator_service.lemica.schedule import Schedule

REQUIRED_MODULES = ("time_guidance_embed", "x_embedder", "norm_out", "proj_out")
StepCallback = Callable[[int, bool], None]


@dataclass(frozen=True)
class TimeEmbeddings:
    """Memoized timestep embeddings of reused steps; runs of the same length need the same ones."""

    guidance_scale: float
    """The run's guidance scale, which is part of the embedding."""
    cache: MutableMapping[tuple[float, float, int], Tensor]
    """Embeddings by sigma, guidance scale and rows; valid for one transformer without adapters."""

    def get(self, sigma: float, rows: int, compute: Callable[[], Tensor]) -> Tensor:
        """Return the embedding ``[rows, inner]``; call ``compute`` if it is not cached."""
        key = (sigma, self.guidance_scale, rows)
        embedding = self.cache.get(key)
        if embedding is None:
            embedding = self.cache[key] = compute()
        return embedding


@dataclass
class Run:
    """The state of one generation."""

    past: deque[CachedFeature]
    """Features of the last computed steps, oldest first."""
    step: int = 0
    sigmas: list[float] = field(default_factory=list)


class CachedTransformer:
    """Replaces the transformer in ``Flux2Pipeline`` during one generation.

    Create a new instance for every generation: all state is kept here, none on the transformer or on a class.

    Args:
        transformer: diffusers' ``Flux2Transformer2DModel``, or any object with its ``REQUIRED_MODULES``, ``config`` and
            ``dtype``.
        schedule: which steps are computed, and how the others are predicted.
        num_image_tokens: the number of noisy tokens, which come first in ``hidden_states``; tokens of reference images
            follow. None: counted from ``img_ids``, where FLUX.2 gives noisy tokens time 0.
        on_step: called before each step with its number and whether it is computed.
        scheduler: the run's scheduler, whose ``sigmas`` are exact. None: read sigma from the timesteps, which are
            coarse in bfloat16.
        embeddings: timestep embeddings shared between runs. None: they are computed at each reused step.
    """

    def __init__(
        self,
        transformer: Any,
        schedule: Schedule,
        num_image_tokens: int | None = None,
        on_step: StepCallback | None = None,
        scheduler: Any = None,
        embeddings: TimeEmbeddings | None = None,
    ) -> None:
        self._embeddings = embeddings
        self._transformer = transformer
        self._schedule = schedule
        self._computed_steps = frozenset(schedule.computed_steps)
        self._num_image_tokens = num_image_tokens
        self._on_step = on_step
        self._scheduler = scheduler
        self._run = Run(deque(maxlen=schedule.predictor.num_past))
        self.config: Any = transformer.config
        self.dtype: torch.dtype = transformer.dtype  # once: diffusers looks through all modules each time

    def __call__(self, *, hidden_states: Tensor, timestep: Tensor, **rest: Any) -> tuple[Tensor]:
        """Run one denoising step.

        Args:
            hidden_states: ``[B, noisy + reference tokens, C]``.
            timestep: sigma, ``[B]``.
            rest: the transformer's other arguments; a computed step passes them on unchanged.

        Returns:
            The velocity in a tuple: ``[B, all tokens, C]`` at a computed step, else ``[B, noisy tokens, C]``.

        Raises:
            ScheduleMismatch: the run is longer than the schedule.
        """
        step = self._run.step
        if step >= self._schedule.num_steps:
            raise ScheduleMismatch(f"the schedule is for {self._schedule.num_steps} steps, the run is longer")
        is_computed = step in self._computed_steps
        if self._on_step is not None:
            self._on_step(step, is_computed)
        if self._num_image_tokens is None:
            self._num_image_tokens = count_noisy_tokens(rest["img_ids"])
        arguments = {**rest, "hidden_states": hidden_states, "timestep": timestep}
        if self._scheduler is None:
            sigma = float(timestep[0])
        else:
            self._run.sigmas = self._run.sigmas or self._scheduler.sigmas.tolist()  # once: it waits for the device
            sigma = self._run.sigmas[step]
        if is_computed:
            feature_kind = self._schedule.predictor.feature
            output, feature = compute(self._transformer, self._num_image_tokens, arguments, feature_kind)
            self._run.past.append(CachedFeature(sigma, feature))
        else:
            output = self._predict(arguments, sigma)
        self._run.step += 1
        return (output,)

    def _predict(self, arguments: dict[str, Any], sigma: float) -> Tensor:
        assert self._num_image_tokens is not None
        predictor = self._schedule.predictor
        feature = predictor.predict(self._run.past, self._run.step, sigma)
        if predictor.feature == "velocity":
            return feature
        return project(self._transformer, feature, arguments, self._time_embedding(sigma, arguments))

    def _time_embedding(self, sigma: float, arguments: dict[str, Any]) -> Tensor:
        def embed() -> Tensor:
            return time_embedding(self._transformer, arguments)

        rows = arguments["hidden_states"].shape[0]
        return embed() if self._embeddings is None else self._embeddings.get(sigma, rows, embed)


def count_noisy_tokens(image_ids: Tensor) -> int:
    """Count the tokens that do not belong to reference images, from position ids ``[..., tokens, 4]``."""
    ids = image_ids.reshape(-1, *image_ids.shape[-2:])[0]
    return int((ids[:, 0] == 0).sum())


def compute(
    transformer: Any, num_image_tokens: int, arguments: dict[str, Any], feature: FeatureKind
) -> tuple[Tensor, Tensor]:
    """Run the transformer and take the feature that predictors use.

    Args:
        transformer: as for ``CachedTransformer``.
        num_image_tokens: the number of noisy tokens.
        arguments: the transformer's keyword arguments.
        feature: which one to take.

    Returns:
        The velocity ``[B, all tokens, C]``, and of the noisy tokens either the residual of the blocks
        ``[B, noisy tokens, inner]`` or the velocity.
    """
    captured: dict[str, Tensor] = {}
    hooks = [
        transformer.x_embedder.register_forward_hook(
            lambda _module, _args, output: captured.__setitem__("h_in", output)
        ),
        transformer.norm_out.register_forward_pre_hook(lambda _module, args: captured.__setitem__("h_out", args[0])),
    ]
    try:
        output: Tensor = transformer(**{**arguments, "return_dict": False})[0]
    finally:
        for hook in hooks:
            hook.remove()
    noisy = slice(num_image_tokens)
    if feature == "velocity":
        return output, output[:, noisy]
    return output, captured["h_out"][:, noisy] - captured["h_in"][:, noisy]


def time_embedding(transformer: Any, arguments: dict[str, Any]) -> Tensor:
    """Embed the timestep and the guidance scale as the transformer does: ``[B, inner]``."""
    timestep, guidance = arguments["timestep"], arguments["guidance"]
    dtype = arguments["hidden_states"].dtype
    scaled_guidance = None if guidance is None else guidance.to(dtype) * 1000
    embedded: Tensor = transformer.time_guidance_embed(timestep.to(dtype) * 1000, scaled_guidance)
    return embedded


def project(transformer: Any, residual: Tensor, arguments: dict[str, Any], temb: Tensor | None = None) -> Tensor:
    """Compute the velocity of a reused step without running any block.

    Args:
        transformer: as for ``CachedTransformer``.
        residual: the blocks' estimated residual, ``[B, noisy tokens, inner]``.
        arguments: the transformer's keyword arguments.
        temb: the ``time_embedding`` of ``arguments``; None: it is computed here.

    Returns:
        The velocity ``[B, noisy tokens, C]``.
    """
    embedded = time_embedding(transformer, arguments) if temb is None else temb
    h_in = transformer.x_embedder(arguments["hidden_states"][:, : residual.shape[1]])
    velocity: Tensor = transformer.proj_out(transformer.norm_out(h_in + residual, embedded))
    return velocity
