"""Queueing simulation of requests, text encoders and up to thousands of generators.

Requests are a Poisson process. A prompt waits for an encoder, which takes all waiting prompts up to a batch; then the
request waits for a generator, first come first served. Runs are deterministic for a seed.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Times:
    """Service times, in seconds."""

    images_s: tuple[float, ...]
    """Time of each kind of image."""
    shares: tuple[float, ...]
    """Share of each kind."""
    batch_s: float
    """Fixed time of a batch in the encoder."""
    prompt_s: float
    """Additional time per prompt."""

    @property
    def mean_image_s(self) -> float:
        """Mean time of all images."""
        return float(np.dot(self.images_s, self.shares))

    def prompts_per_s(self, max_batch: int) -> float:
        """Return the throughput of one encoder."""
        return max_batch / (self.batch_s + max_batch * self.prompt_s)


def arrivals(rate: float, count: int, rng: np.random.Generator) -> np.ndarray:
    """Sample the arrival times of ``count`` requests, ``rate`` per second."""
    return np.cumsum(rng.exponential(1 / rate, count))


def embedding_times(arrived: Sequence[float], num_encoders: int, max_batch: int, times: Times) -> np.ndarray:
    """Return the time at which each prompt is embedded."""
    free = [0.0] * num_encoders
    done = np.empty(len(arrived))
    first = 0
    while first < len(arrived):
        start = max(heapq.heappop(free), arrived[first])
        last = first
        while last < len(arrived) and last - first < max_batch and arrived[last] <= start:
            last += 1
        end = start + times.batch_s + (last - first) * times.prompt_s
        done[first:last] = end
        heapq.heappush(free, end)
        first = last
    return done


def generator_waits(ready: np.ndarray, num_generators: int, durations: np.ndarray) -> np.ndarray:
    """Return the time that each request waits for a generator."""
    free = [0.0] * num_generators
    waits = np.empty(len(ready))
    for index in np.argsort(ready, kind="stable"):
        start = max(heapq.heappop(free), ready[index])
        waits[index] = start - ready[index]
        heapq.heappush(free, start + durations[index])
    return waits


def waits(
    num_generators: int, num_encoders: int, utilization: float, times: Times, *, max_batch: int = 8, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Simulate requests; return the time until each is embedded, and the time it then waits for a generator.

    The first half of the requests is omitted, because the fleet is not in a steady state.
    """
    rng = np.random.default_rng(seed)
    count = 60 * num_generators + 20_000
    arrived = arrivals(utilization * num_generators / times.mean_image_s, count, rng)
    durations = rng.choice(np.array(times.images_s), size=count, p=np.array(times.shares))
    ready = embedding_times(arrived.tolist(), num_encoders, max_batch, times)
    queued = generator_waits(ready, num_generators, durations)
    return (ready - arrived)[count // 2 :], queued[count // 2 :]
