"""Schedules: the published lists, and how they are resampled."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from generator_service.lemica import PUBLISHED, Schedule, ScheduleMismatch, Signature, schedule_for


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("slow", [*range(21), 27, 34, 41, 47, 49]),
        ("medium", [*range(15), 21, 28, 35, 42, 49]),
        ("fast", [0, 1, 2, 3, 4, 5, 8, 9, 15, 21, 27, 33, 39, 45, 49]),
        ("ultra", [0, 1, 4, 5, 9, 17, 25, 33, 41, 49]),
    ],
)
def test_the_published_lists_at_50_steps(name: str, steps: list[int]) -> None:
    """At 50 steps a name selects exactly the published list."""
    schedule = schedule_for(name, 50)
    assert list(schedule.computed_steps) == steps
    assert (schedule.source, schedule.name, schedule.num_computed) == ("published", name, len(steps))


@pytest.mark.parametrize("num_steps", [1, 2, 7, 28, 50, 100])
def test_none_computes_everything(num_steps: int) -> None:
    """``none``, and a number equal to the steps, reuse nothing."""
    assert schedule_for("none", num_steps).computed_steps == tuple(range(num_steps))
    assert schedule_for(num_steps, num_steps).source == "all"


@given(name=st.sampled_from(list(PUBLISHED)), num_steps=st.integers(1, 100))
def test_published_lists_are_resampled(name: str, num_steps: int) -> None:
    """For another number of steps the list keeps its share of computed steps and starts at 0, and its name says so."""
    schedule = schedule_for(name, num_steps)
    share = len(PUBLISHED[name]) / 50
    assert schedule.num_computed == max(1, round(share * num_steps))
    assert schedule.computed_steps[0] == 0
    if num_steps not in (1, 50):
        assert schedule.source == "resampled"
        assert name == schedule.name
        assert schedule.signature.num_steps == 50
    if schedule.num_computed > 1:
        assert schedule.computed_steps[-1] == num_steps - 1


@given(st.data())
def test_a_number_computes_exactly_so_many_steps(data: st.DataObject) -> None:
    """Any number from 1 to the number of steps gives a valid schedule of that size."""
    num_steps = data.draw(st.integers(1, 100))
    number = data.draw(st.integers(1, num_steps))
    assert schedule_for(number, num_steps).num_computed == number


def test_a_number_of_a_published_list_selects_it() -> None:
    """15 of 50 steps is ``fast``."""
    assert schedule_for(15, 50) == schedule_for("fast", 50)


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_a_list_keeps_its_shape_at_other_lengths(name: str) -> None:
    """Computed steps keep their relative position in the run: the k-th step is at the position of the published k-th.

    Rounding moves a step by at most half a step of either run, and crowded steps push each other by at most one.
    """
    published = schedule_for(name, 50).computed_steps
    for num_steps in (20, 25, 28, 100):
        steps = schedule_for(name, num_steps).computed_steps
        for k, step in enumerate(steps):
            position = k * (len(published) - 1) / max(1, len(steps) - 1)
            low, high = published[int(position)], published[min(int(position) + 1, len(published) - 1)]
            assert low / 49 - 1.5 / num_steps <= step / (num_steps - 1) <= high / 49 + 1.5 / num_steps, (num_steps, k)


@pytest.mark.parametrize("cache", ["turbo", "", "None", 0, -1, 51])
def test_unknown_schedules_are_refused(cache: str | int) -> None:
    """An unknown name, or a number outside the run, is an error with the valid values."""
    with pytest.raises(ScheduleMismatch, match=r"choose one of|must be 1 to 50"):
        schedule_for(cache, 50)


@pytest.mark.parametrize("steps", [(), (1, 2), (0, 2, 2), (0, 3, 1), (0, 10)])
def test_malformed_lists_are_refused(steps: tuple[int, ...]) -> None:
    """A list must start at 0, increase, and stay inside the run."""
    with pytest.raises(ScheduleMismatch):
        Schedule("bad", 10, steps, "test", Signature("test", 10))
