"""Latency estimates."""

import random

import pytest

from generator_service.engine.latency import LatencyEstimate, LatencyModel


def observe(model: LatencyModel, num_tokens: int, num_computed: int, num_steps: int, denoise_s: float) -> None:
    """Record one finished image."""
    model.observe(num_tokens, num_computed=num_computed, num_steps=num_steps, denoise_s=denoise_s, decode_s=0.5)


def test_there_is_no_estimate_before_the_first_image() -> None:
    assert LatencyModel().estimate(4096) is None


def test_one_image_is_enough() -> None:
    """After a run without reused steps the cost of computed steps is known and that of reused steps is a default."""
    model = LatencyModel()
    observe(model, 4096, 4, 4, 2.4)
    estimate = model.estimate(4096)
    assert estimate is not None
    assert estimate.computed_step_s == pytest.approx(0.6, rel=0.01)
    assert estimate.total_s(50, 50) == pytest.approx(30.5, rel=0.01)
    assert 0 <= estimate.reused_step_s < 0.1 * estimate.computed_step_s


def test_costs_of_computed_and_reused_steps_are_learned() -> None:
    """Both costs are learned from images with different schedules, through some noise, within 2 %."""
    model, rng = LatencyModel(), random.Random(0)
    for _ in range(60):
        computed = rng.choice([10, 15, 20, 26, 50])
        took = computed * 0.6 + (50 - computed) * 0.02
        observe(model, 4096, computed, 50, took * rng.uniform(0.99, 1.01))
    estimate = model.estimate(4096)
    assert estimate is not None
    for computed in (10, 15, 20, 26, 50):
        assert estimate.total_s(computed, 50) == pytest.approx(computed * 0.6 + (50 - computed) * 0.02 + 0.5, rel=0.02)


def test_estimates_follow_the_device() -> None:
    """When the device becomes slower, the estimate follows within a few images."""
    model = LatencyModel()
    for seconds in [30.0] * 20 + [60.0] * 10:
        observe(model, 4096, 50, 50, seconds)
    estimate = model.estimate(4096)
    assert estimate is not None
    assert estimate.total_s(50, 50) == pytest.approx(60.5, rel=0.1)


def test_a_cache_never_seems_slower() -> None:
    """If noise makes images with a cache slower, a reused step is estimated to cost as much as a computed one."""
    model = LatencyModel()
    for _ in range(5):
        observe(model, 4096, 50, 50, 10.0)
        observe(model, 4096, 10, 50, 30.0)
    estimate = model.estimate(4096)
    assert estimate is not None
    assert estimate.computed_step_s == estimate.reused_step_s == pytest.approx(0.4, rel=0.3)
    assert estimate.total_s(10, 50) <= estimate.total_s(50, 50)


def test_other_sizes_are_in_proportion_to_the_nearest() -> None:
    """The estimate for a new size is that of the nearest known size, scaled by tokens."""
    model = LatencyModel()
    observe(model, 1024, 10, 10, 1.0)
    observe(model, 4096, 10, 10, 6.0)
    small, large = model.estimate(1500), model.estimate(8192)
    assert small is not None
    assert large is not None
    assert small.computed_step_s == pytest.approx(0.1 * 1500 / 1024, rel=0.01)
    assert large.computed_step_s == pytest.approx(1.2, rel=0.01)


def test_an_estimate_is_the_sum_of_its_stages() -> None:
    """An estimate is the sum of computed steps, reused steps and decoding."""
    assert LatencyEstimate(0.5, 0.25, 0.125).total_s(10, 50) == 10 * 0.5 + 40 * 0.25 + 0.125
