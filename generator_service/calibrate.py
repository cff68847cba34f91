"""From a model and prompts to an error graph, and from a graph to schedules: what the command line does."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from generator_service.lemica import (
    Calibration,
    CalibrationMismatch,
    ErrorGraph,
    Predictor,
    Schedule,
    Signature,
    Trajectory,
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
from generator_service.pipelines import flux2, parts, prompt
from generator_service.pipelines.params import Params
from generator_service.settings import GeneratorSettings
from shared.device import resolve_device
from shared.device_memory import run_within_memory
from shared.errors import InvalidRequest, ModelRefused
from shared.model_folder import find_model

TOO_LARGE = "the runs and a batch do not fit into the device's memory together: try a smaller --batch, or --keep cpu"


@dataclass(frozen=True)
class CalibrationSet:
    """What is calibrated on: every prompt with every seed."""

    prompts: tuple[str, ...]
    num_seeds: int
    width: int
    height: int
    num_steps: int
    guidance_scale: float = 4.0

    @property
    def count(self) -> int:
        """How many runs that is."""
        return len(self.prompts) * self.num_seeds


@dataclass(frozen=True)
class Estimate:
    """What a calibration takes."""

    forwards: int
    """Transformer steps of a batch of one."""
    seconds: float
    """At the speed of one timed run; batches are faster."""


def read_prompts(file: Path) -> tuple[str, ...]:
    """The file's lines that are not empty.

    Raises:
        InvalidRequest: there are none.
    """
    prompts = tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    if not prompts:
        raise InvalidRequest(f"{file.name} holds no prompts: write one on each line")
    return prompts


def resolve_storage(name: str) -> torch.device | Path:
    """What keeps the runs: a device with its index, or a folder.

    Raises:
        InvalidRequest: there is no such device here, nor such a folder.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        return resolve_device(name, "--keep")
    except ModelRefused as error:
        raise InvalidRequest(f"{error}, or to a folder") from None


def choose_storage(num_bytes: int, device: torch.device) -> torch.device:
    """What keeps so many bytes of runs: the GPU ``device``, or the CPU if they would take half of its free memory."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return device if 2 * num_bytes <= free else parts.CPU


class CalibrationRun:
    """A model and the runs of it that are calibrated on.

    Args:
        settings: which model, where and in what dtype.
        samples: what to run.
        predictor: whose features are kept.
        storage: ``cpu`` spares the device's memory, a folder the host's too; None: see ``choose_storage``.

    Raises:
        InvalidRequest: ``storage`` is neither a device nor a folder.
    """

    def __init__(
        self, settings: GeneratorSettings, samples: CalibrationSet, predictor: Predictor, storage: str | None = None
    ) -> None:
        self._samples = samples
        self._predictor = predictor
        self._storage = None if storage is None else resolve_storage(storage)
        device, dtype = settings.torch_device(), settings.torch_dtype()
        folder = find_model(settings.model, settings.revision, (*parts.PARTS, *prompt.PARTS))
        self._embeddings = prompt.embed_prompts(folder, samples.prompts, device, dtype)
        self._model = flux2.Flux2Model.load(folder, device, dtype)

    @property
    def signature(self) -> Signature:
        """What the runs are."""
        known = self._model.card.signature(
            num_steps=self._samples.num_steps,
            width=self._samples.width,
            height=self._samples.height,
            guidance_scale=self._samples.guidance_scale,
        )
        return replace(known, predictor=self._predictor.name)

    def estimate(self, max_skip: int, *, is_exact: bool = True) -> Estimate:
        """What calibrating would take, by one run."""
        seconds, _ = self._one_run
        num_steps = self._samples.num_steps
        forwards = self._samples.count * (num_forwards(num_steps, max_skip) if is_exact else num_steps)
        return Estimate(forwards, forwards * seconds / num_steps)

    def calibration(self, batch_size: int) -> Calibration:
        """Run every sample."""
        storage, device = self._storage, self._model.device
        if storage is None and device.type == "cuda":
            _, num_bytes = self._one_run
            storage = choose_storage(num_bytes * self._samples.count, device)
        runs = [self._run(e, seed, storage) for e in self._embeddings for seed in range(self._samples.num_seeds)]
        return self._model.calibration(runs, self._predictor, batch_size)

    @cached_property
    def _one_run(self) -> tuple[float, int]:
        """The seconds and the bytes of one."""
        began = time.perf_counter()
        run = self._run(self._embeddings[0], 0, self._storage)
        return time.perf_counter() - began, run.features.nbytes + run.latents.nbytes

    def _run(self, embedding: torch.Tensor, seed: int, storage: torch.device | Path | None) -> Trajectory:
        size = self._samples
        params = Params(
            embedding, size.width, size.height, size.guidance_scale, seed, schedule_for("none", size.num_steps)
        )
        return run_within_memory(lambda: self._model.record(params, self._predictor.feature, storage), TOO_LARGE)


def calibrate(
    run: CalibrationRun,
    output: Path,
    *,
    max_skip: int,
    batch_size: int,
    is_exact: bool,
    on_progress: Callable[[int, int], None],
) -> ErrorGraph:
    """Measure every edge and save the graph as ``output``; a killed run goes on from the file beside it.

    Raises:
        CalibrationMismatch: that file is of another calibration.
        OutOfMemory: the runs and a batch do not fit into memory together.
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
    """The schedule of every budget that the graph has one for, but that which computes everything."""
    paths = lexicographic_minimax_paths(graph)
    return [schedule_of(graph, path) for budget, path in sorted(paths.items()) if budget < graph.num_steps]


def refine_all(
    run: CalibrationRun, graphs: Sequence[ErrorGraph], budgets: Sequence[int], batch_size: int, max_rounds: int
) -> Iterator[Schedule]:
    """For each budget the best schedule that any of the graphs can plan, refined on whole runs of ``run``.

    Once upwards, each budget starting from the plans and from the one below with a step more; then downwards, from the
    one above with a step less. So a schedule that is better than what was yielded for its budget may follow.

    Raises:
        CalibrationMismatch: a graph was made for something else than the runs.
        NoSuchPath: a budget that a graph has no path for.
        OutOfMemory: the runs and a batch do not fit into memory together.
    """
    for graph in graphs:
        difference = graph.signature.mismatch(run.signature) if graph.signature else "made for unknown runs"
        if difference is not None:
            raise CalibrationMismatch(f"a graph was {difference}")
    planned = {budget: [plan for graph in graphs for plan in plans_of(graph, budget)] for budget in sorted(budgets)}
    measure = errors_within_memory(run, batch_size)
    found: dict[int, Schedule] = {}
    for budget, plans in planned.items():
        if budget - 1 in found:
            below = found[budget - 1]
            plans += [
                (schedule, graph) for graph in graphs_of(below, graphs) for schedule in with_step_added(below, graph)
            ]
        found[budget] = refine(plans, measure, max_rounds)
        yield found[budget]
    for budget in sorted(found.keys() & {above - 1 for above in found}, reverse=True):
        above = found[budget + 1]
        plans = [
            (schedule, graph) for graph in graphs_of(above, graphs) for schedule in with_step_removed(above, graph)
        ]
        if plans and (other := refine(plans, measure, max_rounds)).evidence["error"] < found[budget].evidence["error"]:
            found[budget] = other
            yield other


def errors_within_memory(run: CalibrationRun, batch_size: int) -> Callable[[Schedule], Sequence[float]]:
    """What measures a schedule's error on each sample of ``run``; it may raise ``OutOfMemory``."""
    calibration = run.calibration(batch_size)
    return lambda schedule: run_within_memory(lambda: calibration.errors_of_schedule(schedule), TOO_LARGE)


def graphs_of(schedule: Schedule, graphs: Sequence[ErrorGraph]) -> list[ErrorGraph]:
    """The graphs for the predictor of ``schedule``."""
    return [graph for graph in graphs if graph.signature and graph.signature.predictor == schedule.predictor.name]


def plans_of(graph: ErrorGraph, budget: int) -> Iterator[tuple[Schedule, ErrorGraph]]:
    """What a graph proposes for one budget: for the mean and the worst of its samples, and for the sum of errors."""
    for measured in (graph, graph.planned_for("worst")) if graph.samples else (graph,):
        yield lexicographic_minimax_path(measured, budget), graph
    yield minimum_total_error_path(graph, budget), graph
