"""Other ways to draw, at equal computed steps."""

from benchmarks.peers import Row, compared
from benchmarks.stopwatch import Spread, Stopwatch


def row(way: str, num_computed: int, seconds: float, profile: str = "") -> Row:
    """A way that was timed once."""
    return Row(way, num_computed, Spread.of([seconds]), profile)


def test_ours_is_compared_at_equal_computed_steps() -> None:
    """A cache is compared with our run of as many computed steps; where there is none there is no ratio."""
    rows = [
        row("diffusers", 20, 10.0),
        row("a cache", 8, 6.0),
        row("another", 9, 7.0),
        row("ours, fast", 8, 4.0, "fast"),
        row("ours, fast", 20, 8.0, "fast"),
    ]
    told = {entry["way"]: entry for entry in compared(rows, has_seconds=False)[:3]}
    assert told["a cache"]["ours_is_faster_by"] == {"fast": 1.5}
    assert told["another"]["ours_is_faster_by"] == {}
    assert told["diffusers"]["ours_is_faster_by"] == {"fast": 1.25}
    assert told["a cache"]["speedup_over_diffusers"] == 10 / 6


def test_seconds_are_told_where_they_mean_something() -> None:
    """On a CPU the rows have ratios alone; on a GPU seconds, too."""
    rows = [row("diffusers", 20, 10.0)]
    assert "seconds" not in compared(rows, has_seconds=False)[0]
    assert compared(rows, has_seconds=True)[0]["seconds"]["median"] == 10.0


def test_without_diffusers_there_is_no_ratio_to_it() -> None:
    """If the plain way failed, the others are still told."""
    assert compared([row("a cache", 8, 6.0)], has_seconds=False)[0]["speedup_over_diffusers"] is None


def test_a_stopwatch_measures_at_least_once() -> None:
    """However little time there is, one round is made; however much, not more than asked for."""
    assert list(Stopwatch(0.0, 5).rounds()) == [0]
    assert list(Stopwatch(60.0, 3).rounds()) == [0, 1, 2]
