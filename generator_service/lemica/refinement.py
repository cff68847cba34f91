"""Makes a planned schedule better by measuring whole runs. No torch here.

A path adds up errors that were measured one skip at a time. In a run with many skips they meet, and the predictor looks
back on steps that lie as the schedule has them, not as they were assumed for the edge. So a planned schedule is a good
start and not the end: its computed steps are moved, one at a time, as long as the run as a whole gets better. This is
ours, not the paper's.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from generator_service.lemica.graph import ErrorGraph
from generator_service.lemica.path import Path, schedule_of
from generator_service.lemica.schedule import Schedule

Measure = Callable[[Schedule], Sequence[float]]
"""The error of a whole run with a schedule, for each sample."""
SMALLEST_ERROR = 1e-12
MOVES = (-1, 1, -2, 2)


@dataclass(frozen=True)
class Candidate:
    """A schedule, the graph it was planned with, and its errors over whole runs."""

    schedule: Schedule
    graph: ErrorGraph
    errors: tuple[float, ...]

    @property
    def score(self) -> float:
        """The geometric mean of the errors: half of it is 6 dB, for a good sample as for a bad one."""
        return math.exp(fmean(math.log(max(error, SMALLEST_ERROR)) for error in self.errors))


def refine(planned: Iterable[tuple[Schedule, ErrorGraph]], measure: Measure, max_rounds: int = 4) -> Schedule:
    """The best of several plans for one number of computed steps, then with its steps moved until no move helps.

    Args:
        planned: schedules and the graphs that they were planned with; at least one.
        measure: what a whole run with a schedule costs each of the samples.
        max_rounds: how often every step is tried at most.

    Returns:
        The schedule that was best, with what was measured as its evidence.
    """
    started = [Candidate(schedule, graph, tuple(measure(schedule))) for schedule, graph in planned]
    best = start = min(started, key=lambda candidate: candidate.score)
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
    """``schedule`` with one more computed step in the middle of each of its skips, planned with ``graph``.

    So the plans for a larger budget can start from what was found for a smaller one.
    """
    edges = path_edges(schedule.computed_steps, schedule.num_steps)
    middles = [(i + j) // 2 for i, j in edges if j - i >= 2]
    return [_schedule_with(graph, tuple(sorted((*schedule.computed_steps, middle)))) for middle in middles]


def with_step_removed(schedule: Schedule, graph: ErrorGraph) -> list[Schedule]:
    """``schedule`` without one of its computed steps, wherever ``graph`` has the longer skip; the first step stays.

    So the plans for a smaller budget can start from what was found for a larger one.
    """
    steps = schedule.computed_steps
    fewer = [(*steps[:index], *steps[index + 1 :]) for index in range(1, len(steps))]
    return [_schedule_with(graph, left) for left in fewer if _has_all(graph, left)]


def _with_step_moved(best: Candidate, index: int, measure: Measure) -> Candidate:
    """The best of ``best`` and itself with the computed step at ``index`` elsewhere."""
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
    """The edges of a schedule's path, the tail included."""
    return list(zip(steps, [*steps[1:], num_steps], strict=True))
