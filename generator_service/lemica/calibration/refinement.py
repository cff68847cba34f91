"""Improves a planned schedule by measuring whole runs. Does not import torch.

The errors of a path were measured one skip at a time. In a run with many skips they interact, and the predictor uses
features of the schedule's computed steps instead of those that were assumed for the edge. A planned schedule is
therefore only a starting point: its computed steps are moved one at a time while the error of the whole run decreases.
This refinement is not part of the paper.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from generator_service.lemica.calibration.graph import ErrorGraph
from generator_service.lemica.calibration.path import Path, schedule_of
from generator_service.lemica.schedule import Schedule

Measure = Callable[[Schedule], Sequence[float]]
"""Returns the error of a whole run with a schedule on each sample."""
SMALLEST_ERROR = 1e-12
MOVES = (-1, 1, -2, 2)


@dataclass(frozen=True)
class Candidate:
    """A schedule, the graph it was planned with, and its error on each sample."""

    schedule: Schedule
    graph: ErrorGraph
    errors: tuple[float, ...]

    @property
    def score(self) -> float:
        """The geometric mean of the errors: halving any sample's error counts the same (6 dB)."""
        return math.exp(fmean(math.log(max(error, SMALLEST_ERROR)) for error in self.errors))


def refine(planned: Iterable[tuple[Schedule, ErrorGraph]], measure: Measure, max_rounds: int = 4) -> Schedule:
    """Choose the best of several plans for one budget, then move its steps until no move improves it.

    Args:
        planned: schedules and the graphs that they were planned with; at least one.
        measure: measures a schedule on whole runs.
        max_rounds: the most passes over the computed steps.

    Returns:
        The best schedule, with its measurements as evidence.
    """
    plans = [Candidate(schedule, graph, tuple(measure(schedule))) for schedule, graph in planned]
    best = start = min(plans, key=lambda candidate: candidate.score)
    for _ in range(max_rounds):
        before = best
        for index in range(1, best.schedule.num_computed):
            best = _with_step_moved(best, index, measure)
        if best is before:
            break
    evidence = {
        "samples": len(best.errors),
        "error": best.score,
        "worst_error": max(best.errors),
        "planned_error": start.score,
        "planned_steps": list(start.schedule.computed_steps),
    }
    return replace(best.schedule, evidence=evidence)


def with_step_added(schedule: Schedule, graph: ErrorGraph) -> list[Schedule]:
    """Return variants of ``schedule`` with one more computed step, in the middle of each of its skips.

    They let the refinement of a larger budget start from the result of a smaller one.
    """
    edges = path_edges(schedule.computed_steps, schedule.num_steps)
    middles = [(i + j) // 2 for i, j in edges if j - i >= 2]
    return [_schedule_with(graph, tuple(sorted((*schedule.computed_steps, middle)))) for middle in middles]


def with_step_removed(schedule: Schedule, graph: ErrorGraph) -> list[Schedule]:
    """Return variants of ``schedule`` with one computed step less, as far as ``graph`` has an edge for the longer skip.

    Step 0 is kept. They let the refinement of a smaller budget start from the result of a larger one.
    """
    steps = schedule.computed_steps
    variants = [(*steps[:index], *steps[index + 1 :]) for index in range(1, len(steps))]
    return [_schedule_with(graph, variant) for variant in variants if _has_all(graph, variant)]


def _with_step_moved(best: Candidate, index: int, measure: Measure) -> Candidate:
    """Return the first improvement by moving the computed step at ``index``, or ``best`` itself."""
    for steps in _moves(best, index):
        schedule = _schedule_with(best.graph, steps)
        moved = Candidate(schedule, best.graph, tuple(measure(schedule)))
        if moved.score < best.score:
            return moved
    return best


def _moves(best: Candidate, index: int) -> Iterator[tuple[int, ...]]:
    steps = best.schedule.computed_steps
    after = steps[index + 1] if index + 1 < len(steps) else best.schedule.num_steps
    for move in MOVES:
        if steps[index - 1] < steps[index] + move < after:
            moved = (*steps[:index], steps[index] + move, *steps[index + 1 :])
            if _has_all(best.graph, moved):
                yield moved


def _has_all(graph: ErrorGraph, steps: tuple[int, ...]) -> bool:
    return all(graph.error(edge) is not None for edge in path_edges(steps, graph.num_steps))


def _schedule_with(graph: ErrorGraph, steps: tuple[int, ...]) -> Schedule:
    errors = [graph.error(edge) or 0.0 for edge in path_edges(steps, graph.num_steps)]
    return schedule_of(graph, Path(tuple(sorted(errors, reverse=True)), steps))


def path_edges(steps: Sequence[int], num_steps: int) -> list[tuple[int, int]]:
    """List the edges of a schedule's path, including the one to the end of the run."""
    return list(zip(steps, [*steps[1:], num_steps], strict=True))
