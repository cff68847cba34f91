"""What happens inside the denoising loop, by torch's profiler: ``python -m benchmarks.trace``.

Two short runs in which computed and reused steps alternate. In the first nothing is waited for: it counts the calls by
which the host waits for the device, or copies from it, between the beginning of step 0 and that of the last step. In
the second the device is waited for before each step, so that every kernel belongs to one: it names the kernels of a
computed and of a reused step. Prints a card and, last, one JSON line. On a CPU there is nothing to wait for, and the
kernels are torch's operations.
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

from benchmarks.card import machine_card, show
from benchmarks.drawing import GUIDANCE
from benchmarks.result import Result, add_so_far_option
from benchmarks.synthetic import add_source_options, source_of
from generator_service.lemica import Reuse, Schedule, Signature
from generator_service.pipelines.flux2 import Flux2Model
from generator_service.pipelines.params import Params

MARK = "flux2 step "
WAITS = frozenset({"cudaStreamSynchronize", "cudaDeviceSynchronize"})
"""The host waits until the device has nothing left to do."""
PACE = "cudaEventSynchronize"
"""The host waits for a step some steps back, while the device has the later ones to do."""
TO_HOST = "Memcpy DtoH"
NUM_TOP = 12


@dataclass(frozen=True)
class Event:
    """Something that the profiler saw; microseconds."""

    name: str
    began: float
    ended: float
    is_on_device: bool


@dataclass(frozen=True)
class Kernels:
    """What one step ran."""

    is_computed: bool
    wall_ms: float
    busy_ms: float
    """In kernels."""
    num_kernels: int
    top: list[tuple[str, int, float]]
    """Name, how often, milliseconds in all; the longest first."""


def alternating(num_steps: int) -> Schedule:
    """Every other step is computed."""
    steps = tuple(range(0, num_steps, 2))
    return Schedule("alternating", num_steps, steps, "benchmark", Signature("any", num_steps), Reuse())


def recorded(model: Flux2Model, request: Params, before_step: Callable[[], None]) -> list[Event]:
    """What the profiler sees of one picture; a mark stands at the beginning of each step.

    Other marks are left out: compiled code sets one around its kernels, which would count them twice.
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


def marks(events: Iterable[Event]) -> list[float]:
    """When each step began, on the host."""
    found = {int(e.name.removeprefix(MARK)): e.began for e in events if e.name.startswith(MARK) and not e.is_on_device}
    return [found[step] for step in sorted(found)]


def waits_by_step(events: list[Event]) -> dict[int, Counter[str]]:
    """Calls that wait for the device or copy from it, by the step in which they began; none after the last began."""
    begun = marks(events)
    found: dict[int, Counter[str]] = defaultdict(Counter)
    for event in events:
        name = TO_HOST if event.name.startswith(TO_HOST) else event.name
        if name in WAITS or name in {PACE, TO_HOST}:
            step = sum(mark <= event.began for mark in begun) - 1
            if 0 <= step < len(begun) - 1:
                found[step][name] += 1
    return dict(found)


def kernels_of(events: list[Event], step: int, *, is_computed: bool, on_device: bool) -> Kernels:
    """What ran between the beginnings of ``step`` and the next: kernels, or operations where there is no device."""
    begun = marks(events)
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
        sum(total.values()) if on_device else 0.0,  # operations on a host contain each other
        len(inside),
        [(name, counts[name], total[name]) for name in top],
    )


def measure_waits(model: Flux2Model, request: Params) -> dict[str, Any]:
    """The run in which nothing is waited for."""
    waits = waits_by_step(recorded(model, request, lambda: None))
    return {
        "num_steps": request.schedule.num_steps,
        "waits": dict(sum(waits.values(), Counter[str]())),
        "waits_by_step": {str(step): dict(counts) for step, counts in sorted(waits.items())},
    }


def measure_steps(model: Flux2Model, request: Params) -> list[dict[str, Any]]:
    """A computed and a reused step of the run in which the device is waited for."""
    is_gpu = model.device.type == "cuda"
    events = recorded(model, request, torch.cuda.synchronize if is_gpu else lambda: None)
    steps = [kernels_of(events, step, is_computed=step % 2 == 0, on_device=is_gpu) for step in (2, 3)]
    return [asdict(step) for step in steps]


def table_of(step: dict[str, Any]) -> Table:
    """The kernels of a step, for people."""
    kind = "computed" if step["is_computed"] else "reused"
    title = f"a {kind} step: {step['wall_ms']:.2f} ms, {step['num_kernels']} kernels, busy {step['busy_ms']:.2f} ms"
    table = Table("kernel", "runs", "ms", title=title)
    for name, count, milliseconds in step["top"]:
        table.add_row(name[:90], str(count), f"{milliseconds:.3f}")
    return table


def main() -> None:
    """Record, and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trace", description=__doc__)
    add_source_options(parser)
    add_so_far_option(parser)
    parser.add_argument("--side", type=int, help="of the picture; the model's own by default")
    parser.add_argument("--profile", default="fast")
    args = parser.parse_args()
    source = source_of(args)
    card = machine_card()
    show(card)
    side = args.side or source.default_side
    with source.model(args.profile) as model:
        embedding = source.embedding()
        runs = [Params(embedding, side, side, GUIDANCE, 0, alternating(count)) for count in (2, 4, 12, 6)]
        model.warm_up(runs[:1])
        model.generate(runs[1])
        about = {"benchmark": "trace", "card": card, "weights": source.name, "side": side}
        result = Result(about | {"performance": str(model.performance)}, args.so_far)
        report = measure_waits(model, runs[2])
        result.keep(report | {"steps": []})
        report["steps"] = measure_steps(model, runs[3])
    console = Console(width=120, file=sys.stdout)
    for step in report["steps"]:
        console.print(table_of(step))
    is_gpu = source.torch_device.type == "cuda"
    console.print("waits inside the loop:", report["waits"] or ("none" if is_gpu else "not on a CPU"), highlight=False)
    result.tell(report)


if __name__ == "__main__":
    main()
