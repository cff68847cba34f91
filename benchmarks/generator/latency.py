"""Times images from the request to the PNG file: ``python -m benchmarks.generator.latency``.

Runs FLUX.2 [dev]'s transformer and VAE at full size with random weights, or a checkpoint (``--model``), through the
service's engine with a ready embedding. For each profile and shape, it measures a computed and a reused step as the
difference between runs of different lengths, then whole images in each mode within the budget (``--budget-s``). Omitted
measurements are listed; omitted images with an estimate from their steps. Prints system information and, as the last
line, JSON.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict

import torch

from benchmarks.generator.engine import Shape, open_bench
from benchmarks.generator.profile_run import ProfileRun, Report
from benchmarks.generator.synthetic import Source, add_source_options, source_of
from benchmarks.report.latency_tables import show_latency
from benchmarks.report.result import Result, add_so_far_option
from benchmarks.report.system_info import show, system_info

MODES = ("none", "medium", "fast", "ultra", "slow")
"""Their schedules compute 50, 20, 15, 10 and 26 of 50 steps."""
SHAPES = (Shape(1024), Shape(512), Shape(1024, 1), Shape(2048), Shape(1024, 4))
"""In the order of importance."""
SMOKE_SHAPES = (Shape(128), Shape(64, 1))


def measure(
    source: Source, args: argparse.Namespace, on_update: Callable[[Report], None] = lambda _report: None
) -> Report:
    """Measure all profiles, which share the budget equally; ``on_update`` is called after each result."""
    report = Report()
    until = time.perf_counter() + args.budget_s
    for number, profile in enumerate(args.profiles):
        share_s = (until - time.perf_counter()) / (len(args.profiles) - number)
        with source.model(profile) as model, open_bench(model, source.embedding()) as bench:
            config = model.components.transformer.config
            run = ProfileRun(bench, config, args, report, time.perf_counter() + share_s)
            for _ in run.measure(profile, shapes_of(args)):
                report.performance[profile] = str(model.performance)  # compilation may have failed
                on_update(report)
    return report


def shapes_of(args: argparse.Namespace) -> list[Shape]:
    """Return the shapes of the command line, or the default ones."""
    if args.sides or args.references:
        return [Shape(side, count) for side in args.sides or [1024] for count in args.references or [0]]
    return list(SMOKE_SHAPES if args.smoke or not torch.cuda.is_available() else SHAPES)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generator.latency", description=__doc__)
    add_source_options(parser)
    add_so_far_option(parser)
    parser.add_argument("--sides", type=int, nargs="+", help="of square images, in pixels")
    parser.add_argument("--references", type=int, nargs="+", help="numbers of reference images")
    parser.add_argument(
        "--modes", nargs="+", default=list(MODES), help="names of schedules, or numbers of computed steps"
    )
    parser.add_argument("--profiles", nargs="+", default=["exact", "fast", "fastest"])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=5, help="maximum")
    parser.add_argument("--budget-s", type=float, default=200.0, help="for all measurements; omitted ones are listed")
    return parser


def main() -> None:
    args = arguments().parse_args()
    source = source_of(args)
    system = system_info()
    show(system)
    about = {"benchmark": "latency", "card": system, "weights": source.name, "dtype": str(source.torch_dtype)}
    result = Result(about, args.so_far)
    report = asdict(measure(source, args, lambda report: result.save(asdict(report))))
    show_latency(report)
    result.finish(report)


if __name__ == "__main__":
    main()
