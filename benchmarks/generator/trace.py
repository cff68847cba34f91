"""Profiles the denoising loop with torch's profiler: ``python -m benchmarks.generator.trace``.

Makes two short runs with alternating computed and reused steps. The first counts the calls by which the host waits for
the device, or copies from it, between the start of step 0 and the start of the last step. The second synchronizes
before each step, so that each kernel belongs to one step, and lists the kernels of a computed and of a reused step.
Prints system information and, as the last line, JSON. On a CPU there are no waits, and the kernels are torch's
operations.
"""

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.generator.engine import GUIDANCE
from benchmarks.generator.synthetic import add_source_options, source_of
from benchmarks.report.result import Result, add_so_far_option
from benchmarks.report.system_info import show, system_info
from generator_service.lemica import Reuse, Schedule, Signature
from generator_service.pipelines.flux2 import Flux2Model
from generator_service.pipelines.params import Params

MARK = "flux2 step "
WAITS = frozenset({"cudaStreamSynchronize", "cudaDeviceSynchronize"})
"""Calls that wait until the device is idle."""
THROTTLE = "cudaEventSynchronize"
"""Waits for an earlier step while later ones are queued on the device, to throttle the host."""
TO_HOST = "Memcpy DtoH"
NUM_TOP = 12


@dataclass(frozen=True)
class Event:
    """An event of the profiler; times in microseconds."""

    name: str
    began: float
    ended: float
    is_on_device: bool


@dataclass(frozen=True)
class Kernels:
    """Kernels of one step."""

    is_computed: bool
    wall_ms: float
    busy_ms: float
    """Total time of kernels."""
    num_kernels: int
    top: list[tuple[str, int, float]]
    """Name, count and total milliseconds, longest first."""


def alternating(num_steps: int) -> Schedule:
    """Return a schedule that computes every other step."""
    steps = tuple(range(0, num_steps, 2))
    return Schedule("alternating", num_steps, steps, "benchmark", Signature("any", num_steps), Reuse())


def record_events(model: Flux2Model, request: Params, before_step: Callable[[], None]) -> list[Event]:
    """Profile the generation of an image; a mark is recorded at the start of each step.

    Other annotations are omitted, because compiled code annotates its kernels, which would be counted twice.
    """

    def on_step(step: int, _is_computed: bool) -> None:
        before_step()
        with record_function(f"{MARK}{step}"):
            pass

    activities = [ProfilerActivity.CPU]
    if model.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        model.generate(request, on_step)
    return [
        Event(e.name, e.time_range.start, e.time_range.end, "CUDA" in str(e.device_type))
        for e in profiler.events()
        if e.name.startswith(MARK) or not e.is_user_annotation
    ]


def step_starts(events: Iterable[Event]) -> list[float]:
    """Return the start of each step on the host."""
    starts = {int(e.name.removeprefix(MARK)): e.began for e in events if e.name.startswith(MARK) and not e.is_on_device}
    return [starts[step] for step in sorted(starts)]


def waits_by_step(events: list[Event]) -> dict[int, Counter[str]]:
    """Count the calls that wait for the device or copy from it, by step, except for the last step."""
    begun = step_starts(events)
    waits: dict[int, Counter[str]] = defaultdict(Counter)
    for event in events:
        name = TO_HOST if event.name.startswith(TO_HOST) else event.name
        if name in WAITS or name in {THROTTLE, TO_HOST}:
            step = sum(mark <= event.began for mark in begun) - 1
            if 0 <= step < len(begun) - 1:
                waits[step][name] += 1
    return dict(waits)


def kernels_of(events: list[Event], step: int, *, is_computed: bool, on_device: bool) -> Kernels:
    """Return the kernels, or on a CPU the operations, between the starts of ``step`` and the next one."""
    begun = step_starts(events)
    inside = [
        e
        for e in events
        if e.is_on_device == on_device and begun[step] <= e.began < begun[step + 1] and not e.name.startswith(MARK)
    ]
    total: dict[str, float] = defaultdict(float)
    for event in inside:
        total[event.name] += (event.ended - event.began) / 1000
    counts = Counter(event.name for event in inside)
    top = sorted(total, key=lambda name: -total[name])[:NUM_TOP]
    return Kernels(
        is_computed,
        (begun[step + 1] - begun[step]) / 1000,
        sum(total.values()) if on_device else 0.0,  # operations on the host are nested
        len(inside),
        [(name, counts[name], total[name]) for name in top],
    )


def measure_waits(model: Flux2Model, request: Params) -> dict[str, Any]:
    """Count the waits of a run without synchronization."""
    waits = waits_by_step(record_events(model, request, lambda: None))
    return {
        "num_steps": request.schedule.num_steps,
        "waits": dict(sum(waits.values(), Counter[str]())),
        "waits_by_step": {str(step): dict(counts) for step, counts in sorted(waits.items())},
    }


def measure_steps(model: Flux2Model, request: Params) -> list[dict[str, Any]]:
    """Return the kernels of a computed and a reused step, in a run with synchronization."""
    is_gpu = model.device.type == "cuda"
    events = record_events(model, request, torch.cuda.synchronize if is_gpu else lambda: None)
    steps = [kernels_of(events, step, is_computed=step % 2 == 0, on_device=is_gpu) for step in (2, 3)]
    return [asdict(step) for step in steps]


def table_of(step: dict[str, Any]) -> Table:
    """Format the kernels of a step as a table."""
    kind = "computed" if step["is_computed"] else "reused"
    title = f"a {kind} step: {step['wall_ms']:.2f} ms, {step['num_kernels']} kernels, busy {step['busy_ms']:.2f} ms"
    table = Table("kernel", "runs", "ms", title=title)
    for name, count, milliseconds in step["top"]:
        table.add_row(name[:90], str(count), f"{milliseconds:.3f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generator.trace", description=__doc__)
    add_source_options(parser)
    add_so_far_option(parser)
    parser.add_argument("--side", type=int, help="of the image; default: that of the model")
    parser.add_argument("--profile", default="fast")
    args = parser.parse_args()
    source = source_of(args)
    system = system_info()
    show(system)
    side = args.side or source.default_side
    with source.model(args.profile) as model:
        embedding = source.embedding()
        runs = [Params(embedding, side, side, GUIDANCE, 0, alternating(count)) for count in (2, 4, 12, 6)]
        model.warm_up(runs[:1])
        model.generate(runs[1])
        about = {"benchmark": "trace", "card": system, "weights": source.name, "side": side}
        result = Result(about | {"performance": str(model.performance)}, args.so_far)
        report = measure_waits(model, runs[2])
        result.save(report | {"steps": []})
        report["steps"] = measure_steps(model, runs[3])
    console = Console(width=120, file=sys.stdout)
    for step in report["steps"]:
        console.print(table_of(step))
    is_gpu = source.torch_device.type == "cuda"
    console.print("waits inside the loop:", report["waits"] or ("none" if is_gpu else "not on a CPU"), highlight=False)
    result.finish(report)


if __name__ == "__main__":
    main()
