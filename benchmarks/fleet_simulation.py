"""A thousand generators that nobody has: requests, text encoders and generators as a queueing simulation.

Requests come at random (Poisson). A prompt waits for an encoder, which takes what waits, up to a batch; then the
request waits for a generator, first come first served. Everything is drawn from one seed, so a run repeats.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Times:
    """What things take, in seconds."""

    pictures_s: tuple[float, ...]
    """Of each kind of picture."""
    shares: tuple[float, ...]
    """How many of all are of each kind."""
    batch_s: float
    """A batch's own time in the encoder."""
    prompt_s: float
    """And what each prompt adds."""

    @property
    def mean_picture_s(self) -> float:
        """Of all pictures."""
        return float(np.dot(self.pictures_s, self.shares))

    def prompts_per_s(self, max_batch: int) -> float:
        """What one encoder can do."""
        return max_batch / (self.batch_s + max_batch * self.prompt_s)


def arrivals(rate: float, count: int, rng: np.random.Generator) -> np.ndarray:
    """When ``count`` requests come, ``rate`` of them a second."""
    return np.cumsum(rng.exponential(1 / rate, count))


def encoded(came: Sequence[float], num_encoders: int, max_batch: int, times: Times) -> np.ndarray:
    """When each prompt's embedding is there."""
    free = [0.0] * num_encoders
    done = np.empty(len(came))
    first = 0
    while first < len(came):
        start = max(heapq.heappop(free), came[first])
        last = first
        while last < len(came) and last - first < max_batch and came[last] <= start:
            last += 1
        end = start + times.batch_s + (last - first) * times.prompt_s
        done[first:last] = end
        heapq.heappush(free, end)
        first = last
    return done


def drawn_waits(ready: np.ndarray, num_generators: int, durations: np.ndarray) -> np.ndarray:
    """How long each request waits for a generator."""
    free = [0.0] * num_generators
    waits = np.empty(len(ready))
    for index in np.argsort(ready, kind="stable"):
        start = max(heapq.heappop(free), ready[index])
        waits[index] = start - ready[index]
        heapq.heappush(free, start + durations[index])
    return waits


def waits(
    num_generators: int, num_encoders: int, utilisation: float, times: Times, *, max_batch: int = 8, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Of each request, the seconds until its embedding is there, and those it then waits for a generator.

    The first half, while the fleet fills, is left out.
    """
    rng = np.random.default_rng(seed)
    count = 60 * num_generators + 20_000
    came = arrivals(utilisation * num_generators / times.mean_picture_s, count, rng)
    durations = rng.choice(np.array(times.pictures_s), size=count, p=np.array(times.shares))
    ready = encoded(came.tolist(), num_encoders, max_batch, times)
    queued = drawn_waits(ready, num_generators, durations)
    return (ready - came)[count // 2 :], queued[count // 2 :]
