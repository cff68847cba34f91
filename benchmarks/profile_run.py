"""What one profile of the generator takes: its steps, and whole pictures as long as there is time."""

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.card import Draw, PowerMeter
from benchmarks.drawing import Bench, Shape, Timing
from benchmarks.roofline import step_work
from benchmarks.stopwatch import Stopwatch, Summary
from benchmarks.synthetic import NotWhole, check_whole
from flux2_shared.errors import Flux2Error
from generator_service.lemica import Schedule, schedule_for
from generator_service.settings import ProfileName

CELL_S = 8.0
"""A picture is drawn again until this much time has gone."""
NUM_LONG_STEPS = 4
"""By how many computed steps the longer run is longer."""
NUM_REUSED_STEPS = 49


@dataclass(frozen=True)
class Steps:
    """What steps of one shape cost under one profile."""

    profile: str
    shape: str
    num_image_tokens: int
    """Those of reference images included."""
    prepare_s: float
    """What compiling and the first runs took."""
    computed_s: Summary
    reused_s: Summary
    fixed_s: float
    """What is neither a step nor decoding: noise, references, between threads, the PNG file."""
    decode_s: Summary
    floor_s: float | None
    """Of a computed step, on one H200."""
    peak_memory_gb: float | None

    def estimate_s(self, schedule: Schedule) -> float:
        """What a whole picture would take."""
        num_reused = schedule.num_steps - schedule.num_computed
        steps_s = schedule.num_computed * self.computed_s.median + num_reused * self.reused_s.median
        return steps_s + self.fixed_s + self.decode_s.median


@dataclass(frozen=True)
class Picture:
    """What whole pictures of one shape took in one mode."""

    profile: str
    shape: str
    mode: str
    num_computed: int
    num_steps: int
    seconds: Summary
    floor_s: float | None
    """Of its computed steps."""
    decode_s: float
    drawn: Draw | None
    """What the GPU drew, in all the runs together."""


@dataclass
class Report:
    """Everything that was measured, and what was not."""

    performance: dict[str, str] = field(default_factory=dict)
    """By profile: what was really done."""
    steps: list[Steps] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)


class ProfileRun:
    """Measures one profile: all its shapes, one after the other.

    Args:
        bench: around a model of its own.
        config: the transformer's.
        args: of the command line.
        report: where results go.
        until: when to stop, of ``time.perf_counter``.
    """

    def __init__(self, bench: Bench, config: Any, args: argparse.Namespace, report: Report, until: float) -> None:
        self._bench = bench
        self._config = config
        self._args = args
        self._report = report
        self._until = until
        self._profile = ""
        self._is_gpu = bench.engine.model.device.type == "cuda"

    def measured(self, profile: ProfileName, shapes: Sequence[Shape]) -> Iterator[None]:
        """The first shape's steps and pictures, then the steps of all others, then their pictures.

        Args:
            profile: the model's, or what it should be.
            shapes: of the pictures.

        Yields:
            Whenever something was measured or left out.
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
                yield from self._pictures(shape, cost)
        for shape in list(costs)[1:]:
            yield from self._pictures(shape, costs[shape])

    def _steps_in_time(self, shape: Shape) -> Steps | None:
        """What steps cost, unless there is no time or no way to measure it."""
        expected_s = self._expected_s(shape)
        if time.perf_counter() + expected_s > self._until:
            self._leave_out(shape, f"no time: it would have taken some {expected_s:.0f} s")
            return None
        try:
            return self._steps(shape)
        except (Flux2Error, NotWhole) as error:  # of memory, or of compiling
            self._leave_out(shape, str(error))
            return None

    def _expected_s(self, shape: Shape) -> float:
        """How long measuring a shape's steps would take, by those measured last, maybe with another profile."""
        if not self._report.steps:
            return 0.0
        last = self._report.steps[-1]
        num_steps = 2 + 2 * (1 + NUM_LONG_STEPS)
        return last.prepare_s + num_steps * last.computed_s.median * self._num_tokens(shape) / last.num_image_tokens

    def _steps(self, shape: Shape) -> Steps:
        if self._is_gpu:
            torch.cuda.reset_peak_memory_stats()
        check_whole(self._bench.engine.model)
        prepare_s = self._bench.warm_up(shape)
        check_whole(self._bench.engine.model)
        short = schedule_for("none", 1)
        long = schedule_for("none", 1 + NUM_LONG_STEPS)
        reused = schedule_for(1, 1 + NUM_REUSED_STEPS)
        watch = Stopwatch(CELL_S, self._args.repeats)
        runs = [
            [self._bench.draw(shape, schedule, seed) for schedule in (short, long, reused)] for seed in watch.rounds()
        ]
        found = Steps(
            self._profile,
            str(shape),
            self._num_tokens(shape),
            prepare_s,
            Summary.of([(b.denoise_s - a.denoise_s) / NUM_LONG_STEPS for a, b, _ in runs]),
            Summary.of([(c.denoise_s - a.denoise_s) / NUM_REUSED_STEPS for a, _, c in runs]),
            self._fixed_s([(a, b) for a, b, _ in runs]),
            Summary.of([taken.decode_s for run in runs for taken in run]),
            self._roofline_s(shape),
            torch.cuda.max_memory_allocated() / 1e9 if self._is_gpu else None,
        )
        print(found, flush=True)
        self._report.steps.append(found)
        return found

    def _fixed_s(self, runs: Sequence[tuple[Timing, Timing]]) -> float:
        """Of a run of one step and one that is longer: what neither a step nor decoding takes."""
        return statistics.median(
            max(0.0, a.total_s - a.decode_s - (b.denoise_s - a.denoise_s) / NUM_LONG_STEPS) for a, b in runs
        )

    def _pictures(self, shape: Shape, cost: Steps) -> Iterator[None]:
        for mode in self._args.modes:
            schedule = schedule_for(int(mode) if mode.isdigit() else mode, self._args.steps)
            estimate_s = cost.estimate_s(schedule)
            if time.perf_counter() + estimate_s > self._until:
                self._leave_out(shape, "no time", mode=mode, estimated_from_steps_s=estimate_s)
            else:
                self._report.pictures.append(self._picture(shape, mode, schedule))
                print(self._report.pictures[-1], flush=True)
            yield

    def _picture(self, shape: Shape, mode: str, schedule: Schedule) -> Picture:
        watch = Stopwatch(CELL_S, self._args.repeats)
        with PowerMeter() as meter:
            runs = [self._bench.draw(shape, schedule, 100 + seed) for seed in watch.rounds()]
        floor_s = self._roofline_s(shape)
        return Picture(
            self._profile,
            str(shape),
            mode,
            schedule.num_computed,
            schedule.num_steps,
            Summary.of([taken.total_s for taken in runs]),
            None if floor_s is None else floor_s * schedule.num_computed,
            statistics.median(taken.decode_s for taken in runs),
            meter.drawn,
        )

    def _roofline_s(self, shape: Shape) -> float | None:
        """Of one step; a CPU has another."""
        if not self._is_gpu:
            return None
        return step_work(self._config, self._num_tokens(shape)).roofline_s(self._profile)

    def _num_tokens(self, shape: Shape) -> int:
        return shape.num_image_tokens(self._bench.engine.info.pixels_per_token)

    def _leave_out(self, shape: Shape, reason: str, **more: Any) -> None:
        self._report.left_out.append({"profile": self._profile, "shape": str(shape), "reason": reason, **more})
