"""Compares the time of reused and computed steps: ``python -m benchmarks.lemica.reuse``.

By default it runs the demo model at 512x512. Each step is timed from its start to the start of the next one, including
the scheduler, over several runs of the schedule ``--mode``, with a synchronization before each step. Also checks
whether the profile ``exact`` equals diffusers' pipeline bit for bit, and how many graphs the profile ``fast`` compiles
after the warm-up. Prints system information and, as the last line, JSON.
"""

import argparse
import sys
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.generator.engine import GUIDANCE
from benchmarks.generator.synthetic import Source, add_source_options, check_optimizations, pipeline_of, source_of
from benchmarks.report.result import Result, add_so_far_option
from benchmarks.report.stopwatch import Summary
from benchmarks.report.system_info import show, system_info
from demo_model.services import WEIGHTS
from flux2_shared.model.compilation import num_compilations
from generator_service.lemica import Schedule, schedule_for
from generator_service.pipelines.flux2 import Flux2Model
from generator_service.pipelines.params import Params

AFTER_WARM_UP = (("none", 4), (2, 4), ("medium", 9), ("fast", 12))
"""Modes and numbers of steps of runs that must not compile anything."""


def step_seconds(model: Flux2Model, request: Params) -> dict[bool, list[float]]:
    """Return the seconds of each step except the first and the last, by whether it was computed."""
    began: list[float] = []

    def on_step(_step: int, _is_computed: bool) -> None:
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        began.append(time.perf_counter())

    model.generate(request, on_step)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for step in range(1, request.schedule.num_steps - 1):
        seconds[request.schedule.is_computed(step)].append(began[step + 1] - began[step])
    return seconds


def measure_reuse(source: Source, side: int, schedule: Schedule, num_runs: int) -> dict[str, Any]:
    """Measure both kinds of steps under ``exact``, after a warm-up run."""
    with source.model("exact") as model:
        embedding = source.embedding()
        request = Params(embedding, side, side, GUIDANCE, 0, schedule)
        step_seconds(model, request)
        runs = [step_seconds(model, request) for _ in range(num_runs)]
        computed, reused = (Summary.of([s for run in runs for s in run[kind]]) for kind in (True, False))
        is_equal = equals_diffusers(model, Params(embedding, side, side, GUIDANCE, 7, few_steps()))
    return {
        "mode": schedule.name,
        "computed_s": vars(computed),
        "reused_s": vars(reused),
        "reused_over_computed": reused.median / computed.median,
        "exact_equals_diffusers": is_equal,
    }


def few_steps() -> Schedule:
    return schedule_for("none", 4)


def equals_diffusers(model: Flux2Model, request: Params) -> bool:
    """Return whether the model's final latents equal those of diffusers' pipeline bit for bit."""
    expected = pipeline_of(model.components)(
        prompt_embeds=request.embeddings.to(model.device),
        width=request.width,
        height=request.height,
        num_inference_steps=request.schedule.num_steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        output_type="latent",
    ).images.cpu()
    return torch.equal(model.generate(request).latents, expected)


def compilations_after_warm_up(source: Source, side: int) -> int:
    """Count the graphs that ``fast`` compiles after a static and a dynamic warm-up.

    Raises:
        IncompleteOptimizations: the compilation failed.
    """
    with source.model("fast") as model:
        embedding = source.embedding()
        once = Params(embedding, side, side, GUIDANCE, 0, schedule_for("none", 1))
        model.warm_up([once])
        model.warm_up([once], "dynamic")
        check_optimizations(model)
        before = num_compilations()
        for mode, num_steps in AFTER_WARM_UP:
            for width in (side, side // 2):
                schedule = schedule_for(mode, num_steps)
                model.generate(Params(embedding, width, side, GUIDANCE, 0, schedule))
        return num_compilations() - before


def table_of(report: dict[str, Any]) -> Table:
    """Format the report as a table."""
    table = Table("figure", "value")
    for kind in ("computed", "reused"):
        value = report[f"{kind}_s"]
        range_ms = f"{1000 * value['min']:.3f} to {1000 * value['max']:.3f}"
        table.add_row(f"a {kind} step", f"{1000 * value['median']:.3f} ms ({range_ms}; {value['count']} steps)")
    table.add_row("reused over computed", f"{100 * report['reused_over_computed']:.2f} %")
    table.add_row("exact equals diffusers", str(report["exact_equals_diffusers"]))
    table.add_row("graphs compiled after warm-up", str(report["compilations_after_warm_up"]))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lemica.reuse", description=__doc__)
    add_source_options(parser)
    add_so_far_option(parser)
    parser.set_defaults(model=WEIGHTS)
    parser.add_argument("--side", type=int, help="of the image; default: 512, or 64 with --smoke")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--steps", type=int, default=50, help="number of steps")
    parser.add_argument("--mode", default="ultra", help="a published schedule")
    args = parser.parse_args()
    source = source_of(args)
    side = args.side or (64 if args.smoke else 512)
    system = system_info()
    show(system)
    result = Result({"benchmark": "reuse", "card": system, "weights": source.name, "side": side}, args.so_far)
    report = measure_reuse(source, side, schedule_for(args.mode, args.steps), 2 if args.smoke else args.runs)
    result.save(report)
    report["compilations_after_warm_up"] = compilations_after_warm_up(source, side)
    Console(width=110, file=sys.stdout).print(table_of(report))
    result.finish(report)


if __name__ == "__main__":
    main()
