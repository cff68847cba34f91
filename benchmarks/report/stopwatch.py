"""Repeats measurements and summarizes them."""

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Summary:
    """Median, minimum, maximum and count of measurements."""

    median: float
    min: float
    max: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Summary":
        """Summarize at least one measurement."""
        return cls(statistics.median(values), min(values), max(values), len(values))


class Stopwatch:
    """Repeats for a time or a number of rounds, whichever ends first, but at least once."""

    def __init__(self, seconds: float, max_rounds: int) -> None:
        self._seconds = seconds
        self._max_rounds = max_rounds

    def rounds(self) -> Iterator[int]:
        """Yield the index of each round, from 0."""
        began = time.perf_counter()
        for number in range(self._max_rounds):
            if number > 0 and time.perf_counter() - began >= self._seconds:
                return
            yield number
