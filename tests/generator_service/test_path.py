"""The optimal path, compared with brute force."""

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from generator_service.lemica import (
    ErrorGraph,
    NoSuchPath,
    cheapest_within,
    lexicographic_minimax_path,
    lexicographic_minimax_paths,
    minimum_total_error_path,
)

# Few distinct errors make ties common.
ERRORS = st.one_of(st.sampled_from([0.0, 1.0, 2.0, 3.0]), st.floats(0, 10, allow_nan=False))


@st.composite
def graphs(pick: st.DrawFn) -> ErrorGraph:
    """A small graph with some absent edges and some edges of nonzero cost without skips."""
    num_steps = pick(st.integers(1, 8))
    edges = [(i, j) for i in range(num_steps) for j in range(i + 1, num_steps + 1)]
    chosen = pick(st.lists(st.sampled_from(edges), unique=True))
    return ErrorGraph(num_steps, {edge: pick(ERRORS) for edge in chosen})


def all_paths(graph: ErrorGraph, budget: int) -> list[tuple[list[float], tuple[int, ...]]]:
    """Every path with ``budget`` computed steps: its errors in descending order, and its steps."""
    candidates = []
    for rest in itertools.combinations(range(1, graph.num_steps), budget - 1):
        steps = (0, *rest)
        errors = [graph.error(edge) for edge in itertools.pairwise((*steps, graph.num_steps))]
        if None not in errors:
            candidates.append((sorted((e for e in errors if e is not None), reverse=True), steps))
    return candidates


@settings(max_examples=1000, deadline=None)
@given(graphs())
def test_the_path_is_the_best_of_all(graph: ErrorGraph) -> None:
    """For every budget the path equals brute force, ties go to earlier steps, and impossible budgets are refused."""
    for budget in range(1, graph.num_steps + 1):
        paths = all_paths(graph, budget)
        if paths:
            schedule = lexicographic_minimax_path(graph, budget)
            assert (schedule.computed_steps, schedule.max_error) == (min(paths)[1], min(paths)[0][0])
            assert (schedule.num_computed, schedule.source) == (budget, "calibrated")
        else:
            with pytest.raises(NoSuchPath, match="budget"):
                lexicographic_minimax_path(graph, budget)


@settings(max_examples=300, deadline=None)
@given(graphs())
def test_the_total_error_is_the_smallest(graph: ErrorGraph) -> None:
    """The path of the alternative method has the smallest sum of errors."""
    for budget in range(1, graph.num_steps + 1):
        paths = all_paths(graph, budget)
        if paths:
            steps = minimum_total_error_path(graph, budget).computed_steps
            total = next(sum(errors) for errors, candidate in paths if candidate == steps)
            assert total == pytest.approx(min(sum(errors) for errors, _ in paths))


@settings(max_examples=300, deadline=None)
@given(graphs(), ERRORS)
def test_the_cheapest_within_a_bound(graph: ErrorGraph, bound: float) -> None:
    """No path with fewer computed steps keeps every error within the bound; if there is none, it is an error."""
    budgets = range(1, graph.num_steps + 1)
    sufficient = [n for n in budgets if any(errors[0] <= bound for errors, _ in all_paths(graph, n))]
    if not sufficient:
        with pytest.raises(NoSuchPath):
            cheapest_within(graph, bound)
        return
    schedule = cheapest_within(graph, bound)
    assert schedule.max_error is not None
    assert schedule.max_error <= bound
    assert schedule.num_computed == sufficient[0]


def test_ties_go_to_the_earlier_steps() -> None:
    """Of paths with equal errors the one with earlier computed steps is chosen, so that plans are reproducible.

    Here (0, 3, 4) and (0, 1, 5) cost the same, and the search meets the later one first.
    """
    graph = ErrorGraph(6, dict.fromkeys([(0, 3), (4, 6), (1, 5), (5, 6)], 1.0))
    assert lexicographic_minimax_path(graph, 3).computed_steps == (0, 1, 5)


def test_a_bound_that_nothing_meets() -> None:
    """A negative or undefined bound is refused."""
    for bound in (-1.0, float("nan")):
        with pytest.raises(NoSuchPath, match="max_error"):
            cheapest_within(ErrorGraph(3, {}), bound)


def test_an_impossible_budget_names_the_range() -> None:
    """With skips of at most two, 10 steps need 5 to 10 computed ones."""
    graph = ErrorGraph(10, {(i, i + 2): 1.0 for i in range(9)})
    with pytest.raises(NoSuchPath, match="5 to 10 computed steps, not 4"):
        lexicographic_minimax_path(graph, 4)


def test_all_budgets_of_a_long_run_are_quick() -> None:
    """All budgets of 50 steps with skips of up to 10 take one or two seconds of CPU time."""
    edges = [(i, j) for i in range(50) for j in range(i + 2, min(i + 11, 51))]
    graph = ErrorGraph(50, {(i, j): ((i * 31 + j * 17) % 97) / 97 * (j - i) for i, j in edges})
    began = time.process_time()
    paths = lexicographic_minimax_paths(graph)
    assert time.process_time() - began < 10  # 0.2 s were measured; enumerating the paths would never end
    assert min(paths) == 5
    assert max(paths) == 50
