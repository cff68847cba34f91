"""Full runs of samples, recorded for calibration."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from generator_service.lemica.cached_transformer import compute, count_noisy_tokens
from generator_service.lemica.predictor import FeatureKind


@dataclass(frozen=True)
class Trajectory:
    """A full run of one sample."""

    sigmas: Sequence[float]
    """``T + 1`` noise levels, ending with 0."""
    latents: Tensor
    """The noisy tokens before each step and after the last, ``[T + 1, tokens, C]``."""
    features: Tensor
    """The feature that is cached at each step, ``[T, tokens, width]``."""
    references: Tensor
    """Tokens of reference images, ``[tokens, C]``; they are constant over the run."""
    arguments: Mapping[str, Any]
    """The transformer's other arguments, for a batch of one."""

    @property
    def num_steps(self) -> int:
        return len(self.features)


class TrajectoryRecorder:
    """Replaces the transformer during one full run and records its trajectory.

    Args:
        transformer: as for ``CachedTransformer``.
        feature: which feature of each step to record.
        storage: where to store the trajectory. The run's own device is fastest, the CPU saves device memory, and a
            folder saves host memory too. Files in the folder are unlinked at once; their space is freed when the
            process exits.
    """

    def __init__(self, transformer: Any, feature: FeatureKind, storage: torch.device | Path) -> None:
        self._transformer = transformer
        self._feature = feature
        self._folder = storage if isinstance(storage, Path) else None
        self._device = torch.device("cpu") if isinstance(storage, Path) else storage
        self._latents: list[Tensor] = []
        self._features: list[Tensor] = []
        self._references = torch.empty(0)
        self._arguments: dict[str, Any] = {}

    @property
    def config(self) -> Any:
        return self._transformer.config

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._transformer.dtype
        return dtype

    def __call__(self, *, hidden_states: Tensor, timestep: Tensor, **rest: Any) -> tuple[Tensor]:
        """Run the transformer and record the step."""
        noisy = count_noisy_tokens(rest["img_ids"])
        arguments = {**rest, "hidden_states": hidden_states, "timestep": timestep}
        output, feature = compute(self._transformer, noisy, arguments, self._feature)
        self._latents.append(hidden_states[0, :noisy].to(self._device))
        self._features.append(feature[0].to(self._device))
        self._references, self._arguments = hidden_states[0, noisy:], rest
        return (output,)

    def trajectory(self, final_latents: Tensor, sigmas: Tensor) -> Trajectory:
        """Return the recorded run with noise levels ``sigmas`` and final latents ``[1, tokens, C]``."""
        latents = self._stack([*self._latents, final_latents[0].to(self._device)])
        return Trajectory(sigmas.tolist(), latents, self._stack(self._features), self._references, self._arguments)

    def _stack(self, tensors: Sequence[Tensor]) -> Tensor:
        if self._folder is None:
            return torch.stack(list(tensors))
        size = len(tensors) * tensors[0].numel()
        with tempfile.NamedTemporaryFile(dir=self._folder) as file:  # the mapping outlives the file's name
            mapped = torch.from_file(file.name, shared=True, size=size, dtype=tensors[0].dtype)
        mapped = mapped.view(len(tensors), *tensors[0].shape)
        return torch.stack(list(tensors), out=mapped)
