"""Optimal paths through an error graph. Does not import torch.

Among all paths with a given number of computed steps, LeMiCa takes the one whose errors, sorted in descending order,
are lexicographically smallest (section 3.3). Adding the same error to two paths preserves this order, so dynamic
programming over (computed steps so far, last computed step) is exact.
"""

import bisect
from collections.abc import Callable
from dataclasses import dataclass, replace

from generator_service.lemica.calibration.fitting import with_fitted_predictor
from generator_service.lemica.calibration.graph import ErrorGraph
from generator_service.lemica.errors import NoSuchPath
from generator_service.lemica.predictor import PREDICTORS, Fitted
from generator_service.lemica.schedule import Schedule
from generator_service.lemica.signature import Signature

Cost = tuple[float, ...]
Add = Callable[[Cost, float], Cost]


@dataclass(frozen=True)
class Path:
    """A path through an error graph. Paths are ordered by cost; ties go to the path with the earlier steps."""

    cost: Cost
    """What paths are compared by: the edges' errors in descending order, or their sum."""
    steps: tuple[int, ...]
    """The computed steps."""

    def __lt__(self, other: "Path") -> bool:
        return (self.cost, self.steps) < (other.cost, other.steps)


def lexicographic_minimax_path(graph: ErrorGraph, budget: int) -> Schedule:
    """Find the path with exactly ``budget`` computed steps that minimizes the largest error, then the next largest, ...

    Raises:
        NoSuchPath: no path has that many computed steps.
    """
    return schedule_of(graph, _chosen(lexicographic_minimax_paths(graph), budget))


def minimum_total_error_path(graph: ErrorGraph, budget: int) -> Schedule:
    """Find the path with exactly ``budget`` computed steps whose errors have the smallest sum, for comparison.

    Raises:
        NoSuchPath: no path has that many computed steps.
    """
    return schedule_of(graph, _chosen(_best_paths(graph, lambda cost, error: (sum(cost) + error,)), budget))


def cheapest_within(graph: ErrorGraph, max_error: float) -> Schedule:
    """Find the path with the fewest computed steps and no error above ``max_error``.

    Raises:
        NoSuchPath: ``max_error`` is negative or not a number.
    """
    paths = lexicographic_minimax_paths(graph)
    for budget in sorted(paths):
        if paths[budget].cost[0] <= max_error:
            return schedule_of(graph, paths[budget])
    raise NoSuchPath(f"max_error: no schedule stays within {max_error}; it must be 0 or more")


def lexicographic_minimax_paths(graph: ErrorGraph) -> dict[int, Path]:
    """Find the lexicographic minimax path of every feasible budget; ``cost[0]`` is its largest error."""
    return _best_paths(graph, _insert_descending)


def schedule_of(graph: ErrorGraph, path: Path) -> Schedule:
    """Make the schedule that computes the steps of ``path``, with the predictor of the graph."""
    signature = graph.signature or Signature("unknown", graph.num_steps)
    schedule = Schedule(f"{len(path.steps)} computed", graph.num_steps, path.steps, "calibrated", signature)
    schedule = replace(schedule, max_error=max(path.cost))
    if signature.predictor is None:
        return schedule
    if signature.predictor == Fitted.name:
        return with_fitted_predictor(schedule, graph)
    return replace(schedule, predictor=PREDICTORS[signature.predictor])


def _insert_descending(cost: Cost, error: float) -> Cost:
    index = bisect.bisect_left(cost, -error, key=lambda value: -value)
    return (*cost[:index], error, *cost[index:])


def _best_paths(graph: ErrorGraph, add: Add) -> dict[int, Path]:
    """Find the best path of every feasible budget; ``add`` must preserve the order of costs."""
    end = graph.num_steps
    incoming = {j: _edges_into(graph, j) for j in range(1, end + 1)}
    best: dict[int, Path] = {}
    ending_at = {0: Path((), (0,))}
    for budget in range(1, end + 1):
        extended: dict[int, Path] = {}
        for j, edges in incoming.items():
            candidates = [
                Path(add(ending_at[i].cost, error), (*ending_at[i].steps, j)) for i, error in edges if i in ending_at
            ]
            if candidates:
                extended[j] = min(candidates)
        finished = extended.pop(end, None)
        if finished is not None:
            best[budget] = Path(finished.cost, finished.steps[:-1])
        ending_at = extended
    return best


def _edges_into(graph: ErrorGraph, j: int) -> list[tuple[int, float]]:
    errors = ((i, graph.error((i, j))) for i in range(j))
    return [(i, error) for i, error in errors if error is not None]


def _chosen(paths: dict[int, Path], budget: int) -> Path:
    if budget not in paths:
        raise NoSuchPath(
            f"budget: this graph has schedules of {min(paths)} to {max(paths)} computed steps, not {budget}"
        )
    return paths[budget]
