"""The line before the device."""

from contextlib import ExitStack

import pytest

from generator_service.line import Line, Queued


def test_everybody_knows_their_place() -> None:
    """Who comes is told how many are before, and how long they take; and again whenever one of those is gone."""
    now = [100.0]
    line = Line(lambda: now[0])
    told: dict[str, list[Queued]] = {"a": [], "b": [], "c": []}
    with line.waiting(5.0, told["a"].append), ExitStack() as b, ExitStack() as c:
        now[0] += 1
        b.enter_context(line.waiting(7.0, told["b"].append))
        c.enter_context(line.waiting(3.0, told["c"].append))
        now[0] += 2
        b.close()
    assert told["a"] == [Queued(0, 0.0)]
    assert told["b"] == [Queued(1, 4.0)]
    assert told["c"] == [Queued(2, 11.0), Queued(1, 2.0)]


def test_the_first_is_gone() -> None:
    """When the first leaves, the next one's time begins."""
    now = [0.0]
    line = Line(lambda: now[0])
    told: list[Queued] = []
    with ExitStack() as first, ExitStack() as second, ExitStack() as third:
        first.enter_context(line.waiting(5.0, lambda _place: None))
        second.enter_context(line.waiting(7.0, lambda _place: None))
        third.enter_context(line.waiting(1.0, told.append))
        now[0] = 6.0
        first.close()
        now[0] = 8.0
        second.close()
    assert told == [Queued(2, 12.0), Queued(1, 7.0), Queued(0, 0.0)]


def test_late_work_takes_no_negative_time() -> None:
    """Work that takes longer than was thought is expected to end any moment; work of unknown length is unknown."""
    now = [0.0]
    line = Line(lambda: now[0])
    told: list[Queued] = []
    with line.waiting(5.0, told.append):
        now[0] = 9.0
        with line.waiting(None, told.append), line.waiting(1.0, told.append):
            pass
    assert told == [Queued(0, 0.0), Queued(1, 0.0), Queued(2, None)]


def test_a_failure_leaves_the_line() -> None:
    """Who ends with an error is gone like everybody else."""
    line = Line()
    told: list[Queued] = []
    with pytest.raises(ValueError, match="lost"), line.waiting(5.0, told.append):
        raise ValueError("lost")
    with line.waiting(5.0, told.append):
        pass
    assert [place.position for place in told] == [0, 0]


def test_several_devices() -> None:
    """Where several are served at a time, so many have their turn, and the others wait a share of the time."""
    line = Line(lambda: 0.0, num_devices=lambda: 2)
    told: list[Queued] = []
    with ExitStack() as stack, ExitStack() as first:
        first.enter_context(line.waiting(6.0, told.append))
        for _ in range(3):
            stack.enter_context(line.waiting(6.0, told.append))
        assert told == [Queued(0, 0.0), Queued(0, 0.0), Queued(1, 6.0), Queued(2, 9.0)]
        first.close()
    assert told[4:7] == [Queued(0, 0.0), Queued(0, 0.0), Queued(1, 6.0)]
