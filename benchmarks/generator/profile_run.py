"""Measures one profile of the generator: steps, and whole images within a budget."""

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.generator.engine import EngineBench, Shape, Timing
from benchmarks.generator.roofline import step_work
from benchmarks.generator.synthetic import IncompleteOptimizations, check_optimizations
from benchmarks.report.stopwatch import Stopwatch, Summary
from benchmarks.report.system_info import PowerMeter, PowerUsage
from flux2_shared.errors import Flux2Error
from generator_service.lemica import Schedule, schedule_for
from generator_service.settings import ProfileName

CELL_S = 8.0
"""A measurement is repeated for this time, in seconds."""
NUM_LONG_STEPS = 4
"""Number of additional computed steps in the longer run."""
NUM_REUSED_STEPS = 49


@dataclass(frozen=True)
class Steps:
    """Times of steps of one shape under one profile. The field names are those of the JSON report."""

    profile: str
    shape: str
    num_image_tokens: int
    """Includes tokens of reference images."""
    prepare_s: float
    """Time of compilation and the first runs."""
    computed_s: Summary
    reused_s: Summary
    fixed_s: float
    """Remaining time: noise, reference images, switching threads, PNG file."""
    decode_s: Summary
    floor_s: float | None
    """Roofline of a computed step on one H200."""
    peak_memory_gb: float | None

    def estimate_s(self, schedule: Schedule) -> float:
        """Estimate the time of a whole image."""
        num_reused = schedule.num_steps - schedule.num_computed
        steps_s = schedule.num_computed * self.computed_s.median + num_reused * self.reused_s.median
        return steps_s + self.fixed_s + self.decode_s.median


@dataclass(frozen=True)
class ImageTiming:
    """Times of whole images of one shape in one mode. The field names are those of the JSON report."""

    profile: str
    shape: str
    mode: str
    num_computed: int
    num_steps: int
    seconds: Summary
    floor_s: float | None
    """Roofline of its computed steps."""
    decode_s: float
    drawn: PowerUsage | None
    """Power usage of all runs together."""


@dataclass
class Report:
    """All measurements, and the omitted ones."""

    performance: dict[str, str] = field(default_factory=dict)
    """Applied optimizations by profile."""
    steps: list[Steps] = field(default_factory=list)
    pictures: list[ImageTiming] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)


class ProfileRun:
    """Measures all shapes of one profile.

    Args:
        bench: runs the model.
        config: configuration of the transformer.
        args: options of the command line.
        report: receives the results.
        until: end of the budget, as ``time.perf_counter()``.
    """

    def __init__(self, bench: EngineBench, config: Any, args: argparse.Namespace, report: Report, until: float) -> None:
        self._bench = bench
        self._config = config
        self._args = args
        self._report = report
        self._until = until
        self._profile = ""
        self._is_gpu = bench.engine.model.device.type == "cuda"

    def measure(self, profile: ProfileName, shapes: Sequence[Shape]) -> Iterator[None]:
        """Measure steps and images of the first shape, then the steps of all others, then their images.

        Args:
            profile: the requested profile.
            shapes: shapes of the images.

        Yields:
            After each measurement or omission.
        """
        self._profile = profile
        costs: dict[Shape, Steps] = {}
        for shape in shapes:
            cost = self._steps_in_time(shape)
            yield
            if cost is None:
                continue
            costs[shape] = cost
            if shape == shapes[0]:
                yield from self._images(shape, cost)
        for shape in list(costs)[1:]:
            yield from self._images(shape, costs[shape])

    def _steps_in_time(self, shape: Shape) -> Steps | None:
        """Measure steps; return None if they exceed the budget or fail."""
        expected_s = self._expected_s(shape)
        if time.perf_counter() + expected_s > self._until:
            self._leave_out(shape, f"no time: it would have taken about {expected_s:.0f} s")
            return None
        try:
            return self._steps(shape)
        except (Flux2Error, IncompleteOptimizations) as error:  # out of memory, or compilation failed
            self._leave_out(shape, str(error))
            return None

    def _expected_s(self, shape: Shape) -> float:
        """Estimate the time of measuring a shape's steps from the last measurement, maybe of another profile."""
        if not self._report.steps:
            return 0.0
        last = self._report.steps[-1]
        num_steps = 2 + 2 * (1 + NUM_LONG_STEPS)
        return last.prepare_s + num_steps * last.computed_s.median * self._num_tokens(shape) / last.num_image_tokens

    def _steps(self, shape: Shape) -> Steps:
        if self._is_gpu:
            torch.cuda.reset_peak_memory_stats()
        check_optimizations(self._bench.engine.model)
        prepare_s = self._bench.warm_up(shape)
        check_optimizations(self._bench.engine.model)
        short = schedule_for("none", 1)
        long = schedule_for("none", 1 + NUM_LONG_STEPS)
        reused = schedule_for(1, 1 + NUM_REUSED_STEPS)
        watch = Stopwatch(CELL_S, self._args.repeats)
        runs = [
            [self._bench.generate(shape, schedule, seed) for schedule in (short, long, reused)]
            for seed in watch.rounds()
        ]
        steps = Steps(
            self._profile,
            str(shape),
            self._num_tokens(shape),
            prepare_s,
            Summary.of([(b.denoise_s - a.denoise_s) / NUM_LONG_STEPS for a, b, _ in runs]),
            Summary.of([(c.denoise_s - a.denoise_s) / NUM_REUSED_STEPS for a, _, c in runs]),
            self._fixed_s([(a, b) for a, b, _ in runs]),
            Summary.of([timing.decode_s for run in runs for timing in run]),
            self._roofline_s(shape),
            torch.cuda.max_memory_allocated() / 1e9 if self._is_gpu else None,
        )
        print(steps, flush=True)
        self._report.steps.append(steps)
        return steps

    def _fixed_s(self, runs: Sequence[tuple[Timing, Timing]]) -> float:
        """Compute the time outside of steps and decoding from pairs of a run of one step and a longer one."""
        return statistics.median(
            max(0.0, a.total_s - a.decode_s - (b.denoise_s - a.denoise_s) / NUM_LONG_STEPS) for a, b in runs
        )

    def _images(self, shape: Shape, cost: Steps) -> Iterator[None]:
        for mode in self._args.modes:
            schedule = schedule_for(int(mode) if mode.isdigit() else mode, self._args.steps)
            estimate_s = cost.estimate_s(schedule)
            if time.perf_counter() + estimate_s > self._until:
                self._leave_out(shape, "no time", mode=mode, estimated_from_steps_s=estimate_s)
            else:
                self._report.pictures.append(self._image(shape, mode, schedule))
                print(self._report.pictures[-1], flush=True)
            yield

    def _image(self, shape: Shape, mode: str, schedule: Schedule) -> ImageTiming:
        watch = Stopwatch(CELL_S, self._args.repeats)
        with PowerMeter() as meter:
            runs = [self._bench.generate(shape, schedule, 100 + seed) for seed in watch.rounds()]
        roofline_s = self._roofline_s(shape)
        return ImageTiming(
            self._profile,
            str(shape),
            mode,
            schedule.num_computed,
            schedule.num_steps,
            Summary.of([timing.total_s for timing in runs]),
            None if roofline_s is None else roofline_s * schedule.num_computed,
            statistics.median(timing.decode_s for timing in runs),
            meter.usage,
        )

    def _roofline_s(self, shape: Shape) -> float | None:
        """Return the roofline of a step; None on a CPU."""
        if not self._is_gpu:
            return None
        return step_work(self._config, self._num_tokens(shape)).roofline_s(self._profile)

    def _num_tokens(self, shape: Shape) -> int:
        return shape.num_image_tokens(self._bench.engine.info.pixels_per_token)

    def _leave_out(self, shape: Shape, reason: str, **more: Any) -> None:
        self._report.left_out.append({"profile": self._profile, "shape": str(shape), "reason": reason, **more})
