"""How long a picture takes, from a request to the bytes of its PNG file: ``python -m benchmarks.latency``.

FLUX.2 [dev]'s transformer and VAE at full size with random weights, or a checkpoint (``--model``), through the engine
of the service, with an embedding that is ready. For every profile and shape it measures what a computed and a reused
step cost, as the difference of runs of different length; then whole pictures in every mode, as many as fit into the
time (``--budget-s``). Whole pictures that did not fit are listed with what they would take by the cost of their steps,
and called estimated; shapes that did not fit are listed, too. Prints a card and, last, one JSON line.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict

import torch

from benchmarks.card import machine_card, show
from benchmarks.drawing import Shape, opened_bench
from benchmarks.latency_tables import show_latency
from benchmarks.profile_run import ProfileRun, Report
from benchmarks.result import Result, add_so_far_option
from benchmarks.synthetic import Source, add_source_options, source_of

MODES = ("none", "medium", "fast", "ultra", "slow")
"""50, 20, 15, 10 and 26 computed steps of 50."""
SHAPES = (Shape(1024), Shape(512), Shape(1024, 1), Shape(2048), Shape(1024, 4))
"""What is worth most first."""
SMOKE_SHAPES = (Shape(128), Shape(64, 1))


def measure(
    source: Source, args: argparse.Namespace, on_found: Callable[[Report], None] = lambda _report: None
) -> Report:
    """All profiles, each with its share of the time that is left; ``on_found`` is called whenever there is more."""
    report = Report()
    until = time.perf_counter() + args.budget_s
    for number, profile in enumerate(args.profiles):
        share_s = (until - time.perf_counter()) / (len(args.profiles) - number)
        with source.model(profile) as model, opened_bench(model, source.embedding()) as bench:
            config = model.components.transformer.config
            run = ProfileRun(bench, config, args, report, time.perf_counter() + share_s)
            for _ in run.measured(profile, shapes_of(args)):
                report.performance[profile] = str(model.performance)  # compiling may have failed
                on_found(report)
    return report


def shapes_of(args: argparse.Namespace) -> list[Shape]:
    """The shapes that were asked for; the default ones if none were."""
    if args.sides or args.references:
        return [Shape(side, count) for side in args.sides or [1024] for count in args.references or [0]]
    return list(SMOKE_SHAPES if args.smoke or not torch.cuda.is_available() else SHAPES)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency", description=__doc__)
    add_source_options(parser)
    add_so_far_option(parser)
    parser.add_argument("--sides", type=int, nargs="+", help="of square pictures, in pixels")
    parser.add_argument("--references", type=int, nargs="+", help="numbers of reference images")
    parser.add_argument("--modes", nargs="+", default=list(MODES), help="names of schedules, or numbers of steps")
    parser.add_argument("--profiles", nargs="+", default=["exact", "fast", "fastest"])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=5, help="at most")
    parser.add_argument("--budget-s", type=float, default=200.0, help="for all; what does not fit is listed")
    return parser


def main() -> None:
    """Measure, and print."""
    args = arguments().parse_args()
    source = source_of(args)
    card = machine_card()
    show(card)
    about = {"benchmark": "latency", "card": card, "weights": source.name, "dtype": str(source.torch_dtype)}
    result = Result(about, args.so_far)
    report = asdict(measure(source, args, lambda report: result.keep(asdict(report))))
    show_latency(report)
    result.tell(report)


if __name__ == "__main__":
    main()
