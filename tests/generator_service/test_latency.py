"""Latency estimates."""

import random

import pytest

from generator_service.engine.latency import LatencyEstimate, LatencyModel, RunPace
from generator_service.lemica import schedule_for


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
    assert estimate.computed_step_s == estimate.reused_step_s
    assert 0.2 <= estimate.computed_step_s <= 0.6
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


def test_one_slow_image_bends_nothing() -> None:
    """After an image that took three times as long, every mode's estimate, and their ratios, are as before."""
    for slow_computed in (10, 26, 50):
        model = LatencyModel()
        observe(model, 4096, 3, 3, 1.8)
        observe(model, 4096, 1, 3, 0.64)
        for computed in (50, 10, 20, 50):
            observe(model, 4096, computed, 50, computed * 0.6 + (50 - computed) * 0.02)
        before = model.estimate(4096)
        observe(model, 4096, slow_computed, 50, 3 * (slow_computed * 0.6 + (50 - slow_computed) * 0.02))
        after = model.estimate(4096)
        assert before is not None
        assert after is not None
        for computed in (10, 15, 20, 26, 50):
            assert after.total_s(computed, 50) == pytest.approx(before.total_s(computed, 50), rel=0.02)


def test_a_slow_first_image_keeps_the_ratios() -> None:
    """Right after the warm-up, too, a slow image changes the pace of all modes alike."""
    model = LatencyModel()
    observe(model, 4096, 3, 3, 1.8)
    observe(model, 4096, 1, 3, 0.64)
    before = model.estimate(4096)
    observe(model, 4096, 10, 50, 3 * (10 * 0.6 + 40 * 0.02))
    after = model.estimate(4096)
    assert before is not None
    assert after is not None
    ratios = [estimate.denoise_s(10, 50) / estimate.denoise_s(50, 50) for estimate in (before, after)]
    assert ratios[1] == pytest.approx(ratios[0], rel=0.1)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_change_of_the_speed_is_followed_after_two_images(factor: float) -> None:
    """Also between images of different modes, the third one's estimate is right again."""
    model = LatencyModel()
    for computed in (50, 10, 20, 26) * 3:
        observe(model, 4096, computed, 50, computed * 0.6 + (50 - computed) * 0.02)
    for computed in (15, 50):
        observe(model, 4096, computed, 50, factor * (computed * 0.6 + (50 - computed) * 0.02))
    estimate = model.estimate(4096)
    assert estimate is not None
    for computed in (10, 50):
        wanted = factor * (computed * 0.6 + (50 - computed) * 0.02)
        assert estimate.denoise_s(computed, 50) == pytest.approx(wanted, rel=0.02)


def test_the_remaining_time_follows_the_runs_own_pace() -> None:
    """If a run is half as fast as estimated, so is its remainder, after a few steps; a retry begins anew."""
    now = 100.0
    pace = RunPace(LatencyEstimate(1.0, 0.0, 2.0), schedule_for("none", 10), lambda: now)
    assert pace.seconds_left(0) == 12.0
    now += 8.0
    assert pace.seconds_left(4) == pytest.approx(8.0 * (8 + 1) / (4 + 1))
    now += 10.0
    assert pace.seconds_left(9) == pytest.approx(2 * 3.0, rel=0.1)
    assert pace.seconds_left(0) == 12.0
    assert RunPace(None, schedule_for("none", 10)).seconds_left(3) is None


def test_batches_are_counted() -> None:
    """The time of a run of several images is learned from such runs; before, it is proportional to their number."""
    model = LatencyModel()
    observe(model, 4096, 50, 50, 30.0)
    alone = model.estimate(4096)
    assert alone is not None
    assert alone.for_batch(4).total_s(50, 50) == pytest.approx(4 * 30.5, rel=0.01)
    for _ in range(3):
        model.observe_batch(4096, 4, num_computed=50, num_steps=50, denoise_s=75.0)
    learned = model.estimate(4096)
    assert learned is not None
    assert learned.for_batch(4).total_s(50, 50) == pytest.approx(75.0 + 4 * 0.5, rel=0.01)
    assert learned.for_batch(2).total_s(50, 50) == pytest.approx(30.0 * 2.5**0.5 + 2 * 0.5, rel=0.01)
    assert learned.total_s(50, 50) == pytest.approx(30.5, rel=0.01)
