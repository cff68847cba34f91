"""Measures the error of every edge of a run on sample trajectories (LeMiCa, section 3.2).

Edge (i, j) starts from the full run's latents after step i, predicts steps i + 1 .. j - 1, computes the remaining
steps, and compares the final latents. All edges that end in j share noise levels, so they continue as one batch. A
predictor that uses features older than step i gets them from steps spaced by the length of the skip, as they would be
in a schedule.

The approximate mode compares the latents at step j instead of the final ones, on the assumption that the remaining
steps only propagate the difference. It needs no transformer steps beyond the full runs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from generator_service.lemica.cached_transformer import CachedTransformer, project
from generator_service.lemica.calibration.fitting import fit_weights
from generator_service.lemica.calibration.graph import Edge, ErrorGraph
from generator_service.lemica.calibration.trajectory import Trajectory
from generator_service.lemica.errors import CalibrationMismatch
from generator_service.lemica.predictor import CachedFeature, Fitted, Predictor
from generator_service.lemica.schedule import Schedule
from generator_service.lemica.signature import Signature

SAMPLE_ARGUMENTS = ("encoder_hidden_states", "guidance")
"""The transformer's arguments that differ between samples; position ids do not."""
GRAM_COLUMNS = 2**20
"""Columns of the features converted to float64 at a time: all of 50 steps at 1024x1024 would take 10 GB."""
ProgressCallback = Callable[[int, int], None]


def edges_of(num_steps: int, max_skip: int) -> list[tuple[int, list[Edge]]]:
    """List every edge that skips between 1 and ``max_skip`` - 1 steps, grouped by its end."""
    return [(j, [(i, j) for i in range(max(0, j - max_skip), j - 1)]) for j in range(2, num_steps + 1)]


def num_forwards(num_steps: int, max_skip: int) -> int:
    """Count the transformer steps that a calibration takes for one sample, including the full run."""
    return num_steps + sum(len(edges) * (num_steps - j) for j, edges in edges_of(num_steps, max_skip))


class Calibration:
    """Measures edges and schedules on sample trajectories of one transformer.

    Args:
        transformer: the transformer that the trajectories were recorded with.
        trajectories: full runs with the same noise levels and number of tokens.
        predictor: the predictor of skipped steps; a ``Fitted`` one gets weights for each edge from the samples.
        batch_size: the number of latents in one forward pass.

    Raises:
        CalibrationMismatch: the trajectories have different sizes or noise levels.
    """

    def __init__(
        self, transformer: Any, trajectories: Sequence[Trajectory], predictor: Predictor, batch_size: int = 64
    ) -> None:
        first = trajectories[0]
        if any(t.latents.shape != first.latents.shape or t.sigmas != first.sigmas for t in trajectories):
            raise CalibrationMismatch("samples of different sizes or steps cannot be calibrated together")
        self._transformer = transformer
        self._trajectories = trajectories
        self._predictor = predictor
        self._batch_size = batch_size
        self._sigmas = first.sigmas
        self._device = first.references.device
        self.num_steps = first.num_steps
        self.gram = gram_matrix([trajectory.features for trajectory in trajectories])

    @property
    def sigmas(self) -> Tensor:
        """The noise levels, ``[T + 1]``."""
        return torch.tensor(self._sigmas)

    @torch.no_grad()
    def measure(
        self,
        signature: Signature,
        max_skip: int,
        checkpoint: Path | None = None,
        on_progress: ProgressCallback | None = None,
        *,
        is_exact: bool = True,
    ) -> ErrorGraph:
        """Measure all edges that skip fewer than ``max_skip`` steps.

        Args:
            signature: the kind of run that the samples are.
            max_skip: the largest distance between two computed steps.
            checkpoint: a file that is rewritten after each group of edges. If it exists, the calibration resumes from
                it and gives the same graph as an uninterrupted one.
            on_progress: called with the number of finished edges and of all edges.
            is_exact: whether to compute the run to its end after each edge, as in the paper.

        Raises:
            CalibrationMismatch: ``checkpoint`` belongs to another calibration.
        """
        done = resume(checkpoint, signature, len(self._trajectories), is_exact=is_exact)
        groups = edges_of(self.num_steps, max_skip)
        total = sum(len(edges) for _, edges in groups)
        for j, edges in groups:
            if not all(edge in done for edge in edges):
                done |= dict(zip(edges, self._errors_of(j, edges, is_exact=is_exact), strict=True))
                if checkpoint is not None:
                    self._graph(done, signature, is_exact=is_exact).save(checkpoint)
            if on_progress is not None:
                on_progress(sum(edge in done for _, group in groups for edge in group), total)
        return self._graph(done, signature, is_exact=is_exact)

    @torch.no_grad()
    def errors_of_schedule(self, schedule: Schedule) -> list[float]:
        """Run a whole schedule on each sample; return the mean absolute differences of the final latents."""
        errors: list[float] = []
        for samples in _chunks(range(len(self._trajectories)), self._batch_size):
            latents = self._latents_at(0, samples)
            transformer = CachedTransformer(self._transformer, schedule, latents.shape[1], scheduler=self)
            for step in range(self.num_steps):
                latents = self._advance(latents, step, transformer(**self._arguments(latents, step, samples))[0])
            errors += self._differences(latents, self.num_steps, samples)
        return errors

    def _graph(self, samples: Mapping[Edge, tuple[float, ...]], signature: Signature, *, is_exact: bool) -> ErrorGraph:
        means = {edge: fmean(errors) for edge, errors in samples.items()}
        gram = tuple(map(tuple, self.gram.tolist()))
        return ErrorGraph(self.num_steps, means, signature, samples, gram, is_exact)

    def _errors_of(self, j: int, edges: Sequence[Edge], *, is_exact: bool) -> list[tuple[float, ...]]:
        """Measure ``edges``, all of which end in ``j``: for each edge its error on each sample."""
        samples = range(len(self._trajectories))
        starts = [(self._skip(edge, sample), sample) for edge in edges for sample in samples]
        errors: list[float] = []
        for chunk in _chunks(starts, self._batch_size):
            latents = torch.cat([latents for latents, _ in chunk])
            owners = [sample for _, sample in chunk]
            errors += self._finish(latents, j, owners) if is_exact else self._differences(latents, j, owners)
        return [tuple(errors[k : k + len(samples)]) for k in range(0, len(errors), len(samples))]

    def _skip(self, edge: Edge, sample: int) -> Tensor:
        """Compute step i, predict the steps up to j, and return the latents ``[1, tokens, C]`` before step j."""
        i, j = edge
        trajectory = self._trajectories[sample]
        steps = past_steps(edge, self._predictor.num_past)
        past = [CachedFeature(self._sigmas[s], trajectory.features[s : s + 1].to(self._device)) for s in steps]
        latents = self._latents_at(i + 1, [sample])
        for step in range(i + 1, j):
            predictor = self._predictor
            if isinstance(predictor, Fitted):
                predictor = replace(predictor, weights={step: fit_weights(self.gram, steps, step)})
            feature = predictor.predict(past, step, self._sigmas[step])
            if predictor.feature == "residual":
                feature = project(self._transformer, feature, self._arguments(latents, step, [sample]))
            latents = self._advance(latents, step, feature)
        return latents

    def _finish(self, latents: Tensor, step: int, samples: Sequence[int]) -> list[float]:
        """Compute all steps from ``step`` on and return the error of each row."""
        for later in range(step, self.num_steps):
            arguments = self._arguments(latents, later, samples)
            velocity = self._transformer(**arguments, return_dict=False)[0]
            latents = self._advance(latents, later, velocity)
        return self._differences(latents, self.num_steps, samples)

    def _differences(self, latents: Tensor, step: int, samples: Sequence[int]) -> list[float]:
        """Compare the latents before ``step`` with those of the full run: the mean absolute difference of each row."""
        full = self._latents_at(step, samples)
        differences: list[float] = (latents - full).float().abs().mean(dim=(1, 2)).tolist()
        return differences

    def _latents_at(self, step: int, samples: Sequence[int]) -> Tensor:
        return torch.stack([self._trajectories[s].latents[step] for s in samples]).to(self._device)

    def _advance(self, latents: Tensor, step: int, velocity: Tensor) -> Tensor:
        """Take an Euler step along the velocity of the noisy tokens, in float32."""
        length = self._sigmas[step + 1] - self._sigmas[step]
        return (latents.float() + length * velocity[:, : latents.shape[1]]).to(latents.dtype)

    def _arguments(self, latents: Tensor, step: int, samples: Sequence[int]) -> dict[str, Any]:
        """Build the transformer's arguments for a batch of latents, one row for each of ``samples``."""
        chosen = [self._trajectories[s] for s in samples]
        arguments = {k: v for k, v in chosen[0].arguments.items() if k != "return_dict"}
        for name in SAMPLE_ARGUMENTS:
            if arguments[name] is not None:
                arguments[name] = torch.cat([t.arguments[name] for t in chosen])
        references = torch.stack([t.references for t in chosen])
        # As in the pipeline: the timestep is rounded to bfloat16 before the division.
        timestep = torch.full([len(samples)], 1000 * self._sigmas[step], device=self._device).to(latents.dtype) / 1000
        return {**arguments, "hidden_states": torch.cat([latents, references], dim=1), "timestep": timestep}


def resume(
    checkpoint: Path | None, signature: Signature, num_samples: int, *, is_exact: bool
) -> dict[Edge, tuple[float, ...]]:
    """The errors that an interrupted calibration has measured; raises ``CalibrationMismatch`` if it was another one."""
    if checkpoint is None or not checkpoint.exists():
        return {}
    graph = ErrorGraph.load(checkpoint)
    is_same = graph.signature == signature and graph.is_exact == is_exact
    if not is_same or any(len(errors) != num_samples for errors in graph.samples.values()):
        raise CalibrationMismatch(f"{checkpoint.name} belongs to another calibration: remove it or choose another file")
    return dict(graph.samples)


def past_steps(edge: Edge, num_past: int) -> tuple[int, ...]:
    """Return the computed steps that an edge predicts from, oldest first: i, and earlier ones spaced by j - i."""
    i, j = edge
    steps = {max(0, i - k * (j - i)) for k in range(num_past)}
    return tuple(sorted(steps))


def gram_matrix(features: Sequence[Tensor]) -> Tensor:
    """Inner products between the features of all pairs of steps, summed over the samples: float64 ``[T, T]``."""
    total = torch.zeros(len(features[0]), len(features[0]), dtype=torch.float64)
    for feature in features:
        for columns in torch.split(feature.flatten(1), GRAM_COLUMNS, dim=1):
            wide = columns.double()
            total += (wide @ wide.T).cpu()
    return total


def _chunks(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[k : k + size] for k in range(0, len(items), size)]
