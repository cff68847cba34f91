"""Repeating a measurement for a while, and what many of them say."""

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Summary:
    """The median of some measurements, with the smallest and the largest."""

    median: float
    min: float
    max: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Summary":
        """Of at least one."""
        return cls(statistics.median(values), min(values), max(values), len(values))


class Stopwatch:
    """Says how often to measure: until a time has gone or a number is reached, at least once."""

    def __init__(self, seconds: float, most: int) -> None:
        self._seconds = seconds
        self._most = most

    def rounds(self) -> Iterator[int]:
        """Numbers of rounds, from 0."""
        began = time.perf_counter()
        for number in range(self._most):
            if number > 0 and time.perf_counter() - began >= self._seconds:
                return
            yield number
