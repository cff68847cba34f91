"""Refinement of schedules by measuring whole runs."""

import itertools

import pytest

from generator_service.lemica import (
    ErrorGraph,
    Fitted,
    Schedule,
    Signature,
    lexicographic_minimax_path,
    minimum_total_error_path,
    refine,
    with_step_added,
    with_step_removed,
)

NUM_STEPS, MAX_SKIP = 20, 6
ERRORS = {(i, j): float(j - i) for i in range(NUM_STEPS) for j in range(i + 2, NUM_STEPS + 1) if j - i <= MAX_SKIP}
GRAPH = ErrorGraph(NUM_STEPS, ERRORS, Signature("any", NUM_STEPS, predictor="linear"))


class DistanceTo:
    """A measure with two samples whose optimum is ``target``; it records the schedules it measured."""

    def __init__(self, target: tuple[int, ...]) -> None:
        self.target = target
        self.measured: list[tuple[int, ...]] = []

    def __call__(self, schedule: Schedule) -> list[float]:
        """The errors of both samples."""
        self.measured.append(schedule.computed_steps)
        distance = sum(abs(a - b) for a, b in zip(schedule.computed_steps, self.target, strict=True))
        return [1.0 + distance, 4.0 + distance]


@pytest.mark.parametrize("target", [(0, 2, 5, 9, 14), (0, 6, 10, 14, 18), (0, 4, 8, 12, 16)])
def test_refinement_finds_the_best_schedule(target: tuple[int, ...]) -> None:
    """Refinement finds the schedule with the smallest measured error, and reports measurements and start."""
    planned = lexicographic_minimax_path(GRAPH, 5)
    refined = refine([(planned, GRAPH)], DistanceTo(target), max_rounds=20)
    assert refined.computed_steps == target
    assert refined.evidence["error"] == pytest.approx(2.0)
    assert refined.evidence["worst_error"] == 4.0
    assert refined.evidence["planned_steps"] == list(planned.computed_steps)
    assert (refined.predictor.name, refined.signature, refined.source) == ("linear", GRAPH.signature, "calibrated")


def test_skips_never_exceed_the_graphs() -> None:
    """A step never moves if that would need an edge that the graph lacks."""
    measure = DistanceTo((0, 1, 2, 3, 4))  # would end in a tail of 15 predicted steps
    refine([(lexicographic_minimax_path(GRAPH, 5), GRAPH)], measure, max_rounds=20)
    assert len(measure.measured) > 1
    for steps in measure.measured:
        assert all(0 < j - i <= MAX_SKIP for i, j in itertools.pairwise((*steps, NUM_STEPS)))


def test_the_best_plan_is_the_start() -> None:
    """Of several plans, from any graph, the one with the smallest measured error is refined."""
    features = tuple(tuple(1.0 / (1 + abs(i - j)) for j in range(NUM_STEPS)) for i in range(NUM_STEPS))
    fitted = ErrorGraph(NUM_STEPS, ERRORS, Signature("any", NUM_STEPS, predictor="fitted"), gram=features)
    plans = [(lexicographic_minimax_path(GRAPH, 5), GRAPH), (minimum_total_error_path(fitted, 5), fitted)]

    def measure(schedule: Schedule) -> list[float]:
        return [1.0 if isinstance(schedule.predictor, Fitted) else 2.0]

    refined = refine(plans, measure)
    assert isinstance(refined.predictor, Fitted)
    assert refined.predictor.weights.keys() == set(range(NUM_STEPS)) - set(refined.computed_steps)
    assert refined.evidence["planned_error"] == 1.0


def test_a_larger_budget_can_start_from_a_smaller_one() -> None:
    """The additional step goes into the middle of each skip, and nowhere else."""
    planned = Schedule("test", 6, (0, 1, 4), "calibrated", Signature("any", 6))
    graph = ErrorGraph(6, {(1, 4): 0.5, (2, 4): 0.25, (4, 6): 0.125}, Signature("any", 6, predictor="linear"))
    more = with_step_added(planned, graph)
    assert [schedule.computed_steps for schedule in more] == [(0, 1, 2, 4), (0, 1, 4, 5)]
    assert [schedule.max_error for schedule in more] == [0.25, 0.5]
    assert {schedule.predictor.name for schedule in more} == {"linear"}


def test_a_smaller_budget_can_start_from_a_larger_one() -> None:
    """Each computed step but the first is left out once, if the graph has the resulting skip."""
    planned = Schedule("test", 6, (0, 1, 2, 4), "calibrated", Signature("any", 6))
    graph = ErrorGraph(6, {(1, 4): 0.5, (2, 6): 0.25, (4, 6): 0.125}, Signature("any", 6, predictor="linear"))
    fewer = with_step_removed(planned, graph)
    assert [schedule.computed_steps for schedule in fewer] == [(0, 1, 4), (0, 1, 2)]
    assert [schedule.max_error for schedule in fewer] == [0.5, 0.25]


def test_an_error_of_zero_is_valid() -> None:
    """An error of 0 is the best one, not a failure of the logarithm."""
    planned = lexicographic_minimax_path(GRAPH, 5)
    assert refine([(planned, GRAPH)], lambda _schedule: [0.0]).computed_steps == planned.computed_steps
