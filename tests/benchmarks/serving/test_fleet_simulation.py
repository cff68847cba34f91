"""The queueing simulation of ``benchmarks.serving.scale``, compared with known results."""

import numpy as np
import pytest

from benchmarks.serving.fleet_simulation import Times, arrivals, embedding_times, generator_waits

TIMES = Times(images_s=(10.0,), shares=(1.0,), batch_s=1.0, prompt_s=0.5)


def test_an_encoder_takes_what_waits() -> None:
    """The first prompt goes alone; what came meanwhile shares the next batch, up to its size."""
    assert embedding_times([0.0, 0.1, 0.2, 0.3, 9.0], 1, 2, TIMES).tolist() == [1.5, 3.5, 3.5, 5.0, 10.5]


def test_two_encoders_take_turns() -> None:
    """Where another encoder is free nobody waits for the first."""
    assert embedding_times([0.0, 0.1, 0.2], 2, 8, TIMES) == pytest.approx([1.5, 1.6, 3.0])


def test_one_generator_is_an_md1_queue() -> None:
    """With random arrivals and equal images the mean wait is rho / (2 (1 - rho)) images (Pollaczek-Khinchine)."""
    rng = np.random.default_rng(1)
    came = arrivals(0.08, 400_000, rng)  # rho = 0.8
    waits = generator_waits(came, 1, np.full(len(came), 10.0))
    assert waits.mean() == pytest.approx(10.0 * 0.8 / (2 * 0.2), rel=0.05)
