"""The benchmark of a reused step, and its invariants."""

from benchmarks.architectures import TINY
from benchmarks.generator.synthetic import Source
from benchmarks.lemica.reuse import compilations_after_warm_up, measure_reuse
from generator_service.lemica import schedule_for

SOURCE = Source(TINY, device="cpu")


def test_computed_and_reused_steps_are_timed() -> None:
    """Every step but the first and the last is timed by its type, and without a cache the image is diffusers'."""
    report = measure_reuse(SOURCE, 64, schedule_for("slow", 10), num_runs=2)
    assert report["computed_s"]["count"] + report["reused_s"]["count"] == 2 * (10 - 2)
    assert report["reused_over_computed"] > 0
    assert report["exact_equals_diffusers"] is True


def test_nothing_is_compiled_while_generating() -> None:
    """Compiled for one size and with dynamic shapes, ``fast`` compiles nothing for other lengths, modes and sizes."""
    assert compilations_after_warm_up(SOURCE, 64) == 0
