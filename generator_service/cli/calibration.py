"""Calibrates a model: measures error graphs from prompts, and plans schedules from graphs."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from flux2_shared.device.memory import run_within_memory
from flux2_shared.device.resolve import resolve_device
from flux2_shared.errors import InvalidRequest, ModelRefused
from flux2_shared.model.folder import find_model
from flux2_shared.model.subfolders import ALL_SUBFOLDERS
from generator_service.lemica import (
    Calibration,
    CalibrationMismatch,
    ErrorGraph,
    FeatureKind,
    Predictor,
    Schedule,
    Signature,
    Trajectory,
    TrajectoryRecorder,
    lexicographic_minimax_path,
    lexicographic_minimax_paths,
    minimum_total_error_path,
    num_forwards,
    refine,
    schedule_for,
    schedule_of,
    with_step_added,
    with_step_removed,
)
from generator_service.pipelines import flux2, prompt
from generator_service.pipelines.callbacks import DenoisingCallback
from generator_service.pipelines.params import Params, pipeline_arguments
from generator_service.settings import GeneratorSettings

TOO_LARGE = (
    "the trajectories and a batch do not fit into the device's memory together; use a smaller --batch or --keep cpu"
)


@dataclass(frozen=True)
class CalibrationSet:
    """The samples of a calibration: every prompt with every seed, at one size and number of steps."""

    prompts: tuple[str, ...]
    num_seeds: int
    width: int
    height: int
    num_steps: int
    guidance_scale: float = 4.0

    @property
    def count(self) -> int:
        return len(self.prompts) * self.num_seeds


@dataclass(frozen=True)
class Estimate:
    """The expected cost of a calibration."""

    forwards: int
    """Forward passes of the transformer with a batch of one."""
    seconds: float
    """At the speed of one timed run; larger batches are faster."""


def read_prompts(file: Path) -> tuple[str, ...]:
    """Read one prompt per line, skipping empty lines.

    Raises:
        InvalidRequest: the file has no prompts, or is not UTF-8.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise InvalidRequest(f"{file.name} is not UTF-8 text") from None
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise InvalidRequest(f"{file.name} contains no prompts; write one prompt per line")
    return prompts


def resolve_storage(name: str) -> torch.device | Path:
    """Parse ``--keep``: an existing folder, or a device.

    Raises:
        InvalidRequest: the folder does not exist, and the device is not available.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        return resolve_device(name, "--keep")
    except ModelRefused as error:
        raise InvalidRequest(f"{error}, or to a folder") from None


def choose_storage(num_bytes: int, device: torch.device) -> torch.device:
    """Return the GPU ``device`` if the trajectories take at most half of its free memory, else the CPU."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return device if 2 * num_bytes <= free else torch.device("cpu")


class CalibrationRun:
    """Loads a model and records full runs of the samples for a calibration.

    Args:
        settings: model, device and dtype.
        samples: the runs to record.
        predictor: determines which feature is recorded.
        storage: where trajectories are stored: ``cpu`` saves device memory, a folder saves host memory too. None: see
            ``choose_storage``.

    Raises:
        InvalidRequest: ``storage`` is neither an available device nor an existing folder.
    """

    def __init__(
        self, settings: GeneratorSettings, samples: CalibrationSet, predictor: Predictor, storage: str | None = None
    ) -> None:
        self._samples = samples
        self._predictor = predictor
        self._storage = None if storage is None else resolve_storage(storage)
        device, dtype = settings.torch_device(), settings.torch_dtype()
        folder = find_model(settings.model, settings.revision, ALL_SUBFOLDERS)
        embeddings = prompt.embed_prompts(folder, samples.prompts, device, dtype)
        self._embeddings = [embedding.tensor for embedding in embeddings]
        self._model = flux2.Flux2Model.load(folder, device, dtype)

    @property
    def signature(self) -> Signature:
        """The signature of the recorded runs."""
        signature = self._model.info.signature(
            num_steps=self._samples.num_steps,
            width=self._samples.width,
            height=self._samples.height,
            guidance_scale=self._samples.guidance_scale,
        )
        return replace(signature, predictor=self._predictor.name)

    def estimate(self, max_skip: int, *, is_exact: bool = True) -> Estimate:
        """Estimate the cost of a calibration by timing one run."""
        seconds, _ = self._one_run
        num_steps = self._samples.num_steps
        forwards = self._samples.count * (num_forwards(num_steps, max_skip) if is_exact else num_steps)
        return Estimate(forwards, forwards * seconds / num_steps)

    def calibration(self, batch_size: int) -> Calibration:
        """Record a run of every sample."""
        storage, device = self._storage, self._model.device
        if storage is None and device.type == "cuda":
            _, num_bytes = self._one_run
            storage = choose_storage(num_bytes * self._samples.count, device)
        runs = [self._run(e, seed, storage) for e in self._embeddings for seed in range(self._samples.num_seeds)]
        return Calibration(self._model.components.transformer, runs, self._predictor, batch_size)

    @cached_property
    def _one_run(self) -> tuple[float, int]:
        """Seconds and bytes of one recorded run."""
        began = time.perf_counter()
        run = self._run(self._embeddings[0], 0, self._storage)
        return time.perf_counter() - began, run.features.nbytes + run.latents.nbytes

    def _run(self, embedding: torch.Tensor, seed: int, storage: torch.device | Path | None) -> Trajectory:
        size = self._samples
        params = Params(
            embedding, size.width, size.height, size.guidance_scale, seed, schedule_for("none", size.num_steps)
        )
        return run_within_memory(lambda: record(self._model, params, self._predictor.feature, storage), TOO_LARGE)


def record(
    model: flux2.Flux2Model,
    params: Params,
    feature: FeatureKind = "residual",
    storage: torch.device | Path | None = None,
) -> Trajectory:
    """Record the full run of an image, whatever its schedule.

    Args:
        model: generates the image.
        params: parameters of the image.
        feature: feature to record at each step.
        storage: device or folder for the features; None for the model's device.
    """
    pipeline = model.components.new_pipeline(model.reference_cache)
    pipeline.transformer = recorder = TrajectoryRecorder(model.components.transformer, feature, storage or model.device)
    callback = DenoisingCallback(params.schedule.num_steps, model.device)
    arguments = pipeline_arguments([params], model.device, model.dtype)
    pipeline(**arguments, callback_on_step_end=callback, output_type="latent")
    return recorder.trajectory(callback.latents, pipeline.scheduler.sigmas)


def calibrate(
    run: CalibrationRun,
    output: Path,
    *,
    max_skip: int,
    batch_size: int,
    is_exact: bool,
    on_progress: Callable[[int, int], None],
) -> ErrorGraph:
    """Measure every edge and save the graph as ``output``. An interrupted calibration resumes from a file beside it.

    Raises:
        CalibrationMismatch: the file beside ``output`` belongs to another calibration.
        OutOfMemory: the runs and a batch do not fit into the device's memory together.
    """
    checkpoint = output.with_name(f"{output.name}.unfinished")
    calibration = run.calibration(batch_size)
    graph = run_within_memory(
        lambda: calibration.measure(run.signature, max_skip, checkpoint, on_progress, is_exact=is_exact),
        TOO_LARGE,
    )
    graph.save(output)
    checkpoint.unlink(missing_ok=True)
    return graph


def plan_all(graph: ErrorGraph) -> list[Schedule]:
    """Plan a schedule for every feasible budget below the full number of steps."""
    paths = lexicographic_minimax_paths(graph)
    return [schedule_of(graph, path) for budget, path in sorted(paths.items()) if budget < graph.num_steps]


def refine_all(
    run: CalibrationRun, graphs: Sequence[ErrorGraph], budgets: Sequence[int], batch_size: int, max_rounds: int
) -> Iterator[Schedule]:
    """For each budget, refine the best plan of all graphs on whole runs.

    A first pass goes upwards: each budget starts from the graphs' plans and from the next smaller budget's schedule
    with a step added. A second pass goes downwards, from the next larger budget's schedule with a step removed. It may
    yield a better schedule for a budget that was yielded before.

    Raises:
        CalibrationMismatch: a graph was made for another kind of run.
        NoSuchPath: a graph has no path for one of the budgets.
        OutOfMemory: the runs and a batch do not fit into the device's memory together.
    """
    for graph in graphs:
        mismatch = graph.signature.mismatch(run.signature) if graph.signature else "made for unknown runs"
        if mismatch is not None:
            raise CalibrationMismatch(f"a graph was {mismatch}")
    planned = {budget: [plan for graph in graphs for plan in plans_of(graph, budget)] for budget in sorted(budgets)}
    measure = errors_within_memory(run, batch_size)
    best: dict[int, Schedule] = {}
    for budget, plans in planned.items():
        if budget - 1 in best:
            below = best[budget - 1]
            plans += [
                (schedule, graph) for graph in graphs_of(below, graphs) for schedule in with_step_added(below, graph)
            ]
        best[budget] = refine(plans, measure, max_rounds)
        yield best[budget]
    for budget in sorted(best.keys() & {above - 1 for above in best}, reverse=True):
        above = best[budget + 1]
        plans = [
            (schedule, graph) for graph in graphs_of(above, graphs) for schedule in with_step_removed(above, graph)
        ]
        if plans and (other := refine(plans, measure, max_rounds)).evidence["error"] < best[budget].evidence["error"]:
            best[budget] = other
            yield other


def errors_within_memory(run: CalibrationRun, batch_size: int) -> Callable[[Schedule], Sequence[float]]:
    """Record the samples; return a function that measures a schedule on them. Both may raise ``OutOfMemory``."""
    calibration = run.calibration(batch_size)
    return lambda schedule: run_within_memory(lambda: calibration.errors_of_schedule(schedule), TOO_LARGE)


def graphs_of(schedule: Schedule, graphs: Sequence[ErrorGraph]) -> list[ErrorGraph]:
    """Select the graphs that were measured with the predictor of ``schedule``."""
    return [graph for graph in graphs if graph.signature and graph.signature.predictor == schedule.predictor.name]


def plans_of(graph: ErrorGraph, budget: int) -> Iterator[tuple[Schedule, ErrorGraph]]:
    """Plan one budget in several ways: by the mean and the worst error of the samples, and by the sum of errors."""
    for measured in (graph, graph.planned_for("worst")) if graph.samples else (graph,):
        yield lexicographic_minimax_path(measured, budget), graph
    yield minimum_total_error_path(graph, budget), graph
