"""The best schedule through an error graph, exactly. No torch here.

Among all paths with a given number of computed steps, LeMiCa takes the one whose errors, sorted from the largest, are
lexicographically smallest (section 3.3). That order is kept when the same error is added to both sides, so dynamic
programming over (computed steps so far, last computed step) is exact.
"""

import bisect
from collections.abc import Callable
from dataclasses import dataclass, replace

from generator_service.lemica.errors import NoSuchPath
from generator_service.lemica.fitting import with_fitted_predictor
from generator_service.lemica.graph import ErrorGraph
from generator_service.lemica.predictor import PREDICTORS, Fitted
from generator_service.lemica.schedule import Schedule
from generator_service.lemica.signature import Signature

Cost = tuple[float, ...]
Add = Callable[[Cost, float], Cost]


@dataclass(frozen=True)
class Path:
    """Computed steps, and the errors of the edges between them in the order that compares them.

    Paths compare by cost, then by their steps: ties go to the earlier ones.
    """

    cost: Cost
    steps: tuple[int, ...]

    def __lt__(self, other: "Path") -> bool:
        return (self.cost, self.steps) < (other.cost, other.steps)


def lexicographic_minimax_path(graph: ErrorGraph, budget: int) -> Schedule:
    """The path of exactly ``budget`` computed steps whose largest error is smallest, then the next largest, and so on.

    Raises:
        NoSuchPath: no path has that many computed steps.
    """
    return schedule_of(graph, _chosen(lexicographic_minimax_paths(graph), budget))


def minimum_total_error_path(graph: ErrorGraph, budget: int) -> Schedule:
    """The path of exactly ``budget`` computed steps whose errors have the smallest sum: for comparison.

    Raises:
        NoSuchPath: no path has that many computed steps.
    """
    return schedule_of(graph, _chosen(_best_paths(graph, lambda cost, error: (sum(cost) + error,)), budget))


def cheapest_within(graph: ErrorGraph, max_error: float) -> Schedule:
    """The path with the fewest computed steps, none of whose errors exceeds ``max_error``.

    Raises:
        NoSuchPath: ``max_error`` is negative or not a number.
    """
    paths = lexicographic_minimax_paths(graph)
    for budget in sorted(paths):
        if paths[budget].cost[0] <= max_error:
            return schedule_of(graph, paths[budget])
    raise NoSuchPath(f"max_error: no schedule stays within {max_error}: give 0 or more")


def lexicographic_minimax_paths(graph: ErrorGraph) -> dict[int, Path]:
    """The lexicographic minimax path of every budget that has one; its ``cost`` starts with its largest error."""
    return _best_paths(graph, _insert_descending)


def schedule_of(graph: ErrorGraph, path: Path) -> Schedule:
    """The schedule that computes the steps of ``path``, with the predictor that the graph was measured with."""
    signature = graph.signature or Signature("unknown", graph.num_steps)
    schedule = Schedule(f"{len(path.steps)} computed", graph.num_steps, path.steps, "calibrated", signature)
    schedule = replace(schedule, max_error=max(path.cost))
    if signature.predictor is None:
        return schedule
    if signature.predictor == Fitted.name:
        return with_fitted_predictor(schedule, graph)
    return replace(schedule, predictor=PREDICTORS[signature.predictor])


def _insert_descending(cost: Cost, error: float) -> Cost:
    place = bisect.bisect_left(cost, -error, key=lambda value: -value)
    return (*cost[:place], error, *cost[place:])


def _best_paths(graph: ErrorGraph, add: Add) -> dict[int, Path]:
    """The best path of every budget; ``add`` must keep the order of costs."""
    end = graph.num_steps
    incoming = {j: _edges_into(graph, j) for j in range(1, end + 1)}
    found: dict[int, Path] = {}
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
            found[budget] = Path(finished.cost, finished.steps[:-1])
        ending_at = extended
    return found


def _edges_into(graph: ErrorGraph, j: int) -> list[tuple[int, float]]:
    errors = ((i, graph.error((i, j))) for i in range(j))
    return [(i, error) for i, error in errors if error is not None]


def _chosen(paths: dict[int, Path], budget: int) -> Path:
    if budget not in paths:
        raise NoSuchPath(
            f"budget: this graph has schedules of {min(paths)} to {max(paths)} computed steps, not {budget}"
        )
    return paths[budget]
