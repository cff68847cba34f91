"""Compares the quality of methods that skip steps: ``python -m benchmarks.lemica.quality``.

All methods run the demo model with the same embeddings and seeds: the built-in schedules (``ours``), LeMiCa's paths
through error graphs of each predictor, the published lists, even spacing, fewer steps without a cache, and the caches
of diffusers and cache-dit. Other caches use the parameter with the fewest computed steps that is not below the budget.
The reference is the image of the full run with the same seed. Prints a table and, as the last line, JSON.
"""

import argparse
import itertools
import json
import platform
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.lemica.caches import (
    db_cache,
    mag_cache,
    mag_ratios,
    step_masks,
    taylor_seer,
    unsupported_caches,
)
from benchmarks.lemica.evaluator import Evaluator, Outcome
from benchmarks.report.plots import plot_errors, plot_quality, plot_schedules
from generator_service.lemica import (
    SHIPPED,
    ErrorGraph,
    Reuse,
    Schedule,
    Signature,
    lexicographic_minimax_path,
    load_schedules,
    minimum_total_error_path,
    schedule_for,
)

PIXELS_PER_TOKEN = 16


def uniform(budget: int, num_steps: int) -> Schedule:
    """Return a schedule of evenly spaced steps, including the last one."""
    steps = tuple(round(k * (num_steps - 1) / (budget - 1)) for k in range(budget))
    return Schedule(f"{budget} even", num_steps, steps, "uniform", Signature("any", num_steps), Reuse())


def own_outcomes(
    evaluator: Evaluator, ours: dict[int, Schedule], graphs: dict[str, ErrorGraph], budgets: list[int]
) -> Iterator[Outcome]:
    """Evaluate all methods that need no other cache, at each budget."""
    num_steps = evaluator.num_steps
    yield evaluator.evaluate("no cache", num_steps, evaluator.plain(num_steps))
    for budget in budgets:
        if budget in ours:
            yield evaluator.evaluate("ours", budget, evaluator.scheduled(ours[budget]))
        yield evaluator.evaluate("fewer plain steps", budget, evaluator.plain(budget))
        yield evaluator.evaluate("even spacing, reuse", budget, evaluator.scheduled(uniform(budget, num_steps)))
        yield evaluator.evaluate("published lists", budget, evaluator.scheduled(schedule_for(budget, num_steps)))
        for name, graph in graphs.items():
            yield evaluator.evaluate(
                f"LeMiCa, {name}", budget, evaluator.scheduled(lexicographic_minimax_path(graph, budget))
            )
        for name, graph in list(graphs.items())[:1]:
            total = minimum_total_error_path(graph, budget)
            yield evaluator.evaluate(f"smallest sum, {name}", budget, evaluator.scheduled(total))


def peer_outcomes(evaluator: Evaluator, budgets: list[int]) -> Iterator[Outcome]:
    """Evaluate other caches at each budget."""
    num_steps = evaluator.num_steps
    ratios = mag_ratios(evaluator.pipeline, lambda pipeline: evaluator.call(pipeline, evaluator.cases[0]), num_steps)
    peers = [mag_cache(ratios, num_steps), taylor_seer(num_steps)]
    peers += [
        make
        for has in (False, True)
        for make in (db_cache(has_taylor_seer=has), step_masks(num_steps, has_taylor_seer=has))
    ]
    for peer in peers:
        counts: dict[float, float] = {}
        for budget in budgets:
            yield evaluator.evaluate(
                peer.name, budget, evaluator.cached(peer, evaluator.value_for(peer, counts, budget))
            )


def schedules_for(file_or_folder: Path, num_steps: int, side: int) -> dict[int, Schedule]:
    """Load the calibrated schedules for square images and ``num_steps``, by their number of computed steps."""
    num_tokens = (side // PIXELS_PER_TOKEN) ** 2
    files = sorted(file_or_folder.glob("*.json")) if file_or_folder.is_dir() else [file_or_folder]
    schedules = [schedule for file in files for schedule in load_schedules(file)]
    matching = (s for s in schedules if s.num_steps == num_steps and s.signature.image_tokens == num_tokens)
    return {schedule.num_computed: schedule for schedule in matching}


def margins(outcomes: list[Outcome]) -> dict[str, dict[str, float]]:
    """Return by how many dB ours exceeds the best other cache at each budget: on average and in the worst tenth."""
    margins_by_budget: dict[str, dict[str, float]] = {}
    for ours in (o for o in outcomes if o.name == "ours"):
        peers = [o for o in outcomes if o.budget == ours.budget and o.name.endswith(")")]
        if peers:
            mean = ours.psnr - max(o.psnr for o in peers)
            worst_tenth = ours.psnr_worst_tenth - max(o.psnr_worst_tenth for o in peers)
            margins_by_budget[str(ours.budget)] = {"mean": round(mean, 1), "worst tenth": round(worst_tenth, 1)}
    return margins_by_budget


def table_of(outcomes: list[Outcome]) -> Table:
    """Format the outcomes by budget, best first."""
    table = Table("budget", "method", "computed", "PSNR", "worst tenth", "worst", "SSIM", "right", "s")
    for budget in sorted({outcome.budget for outcome in outcomes}, reverse=True):
        for o in sorted((o for o in outcomes if o.budget == budget), key=lambda o: -o.psnr):
            ratios = (f"{value:.1f}" for value in (o.psnr, o.psnr_worst_tenth, o.psnr_worst))
            row = (
                str(budget),
                o.name,
                f"{o.computed:.1f}",
                *ratios,
                f"{o.ssim:.4f}",
                f"{o.right:.1%}",
                f"{o.seconds:.2f}",
            )
            table.add_row(*row)
        table.add_section()
    return table


def label(graph: ErrorGraph) -> str:
    """Return a label that distinguishes a graph from the others."""
    predictor = str(graph.signature.predictor if graph.signature else "reuse")
    return predictor if graph.is_exact else f"{predictor}, approximate graph"


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lemica.quality", description=__doc__)
    parser.add_argument("graphs", type=Path, nargs="*", help="error graphs of the demo model, one for each predictor")
    parser.add_argument("--schedules", type=Path, default=SHIPPED, help="file or folder of our schedules")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument(
        "--budgets",
        type=int,
        nargs="+",
        default=[26, 20, 15, 10, 8],
        help="numbers of computed steps; those of --steps or more are ignored",
    )
    parser.add_argument("--no-peers", action="store_true", help="omit the caches of diffusers and cache-dit")
    parser.add_argument("--plots", type=Path, help="folder for plots")
    return parser


def main() -> None:
    args = arguments().parse_args()
    loaded = [ErrorGraph.load(file) for file in args.graphs]
    graphs = {label(graph): graph for graph in loaded}
    ours = schedules_for(args.schedules, args.steps, args.side)
    evaluator = Evaluator(args.prompts, args.steps, args.side)
    outcomes: list[Outcome] = []
    budgets = [budget for budget in args.budgets if budget < args.steps]
    methods = [own_outcomes(evaluator, ours, graphs, budgets)]
    methods += [] if args.no_peers else [peer_outcomes(evaluator, budgets)]
    for outcome in itertools.chain.from_iterable(methods):
        outcomes.append(outcome)
        print(f"{outcome.budget:>3} {outcome.name:<40} {outcome.computed:5.1f} {outcome.psnr:6.1f} dB", flush=True)
    Console(width=120).print(table_of(outcomes))
    if args.plots:
        args.plots.mkdir(parents=True, exist_ok=True)
        plot_quality(outcomes, args.plots / "quality.png")
        plot_schedules([ours[b] for b in sorted(ours, reverse=True)], args.plots / "schedules.png")
        for name, graph in graphs.items():
            plot_errors(graph, args.plots / f"errors-{name}.png")
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    report: dict[str, object] = {"prompts": args.prompts, "side": args.side, "steps": args.steps, "machine": machine}
    if not args.no_peers:
        report |= {name: version(name) for name in ("diffusers", "cache-dit")}
        report["do not run"] = unsupported_caches(
            evaluator.pipeline, lambda pipeline: evaluator.call(pipeline, evaluator.cases[0])
        )
    print(json.dumps(report | {"margins": margins(outcomes), "outcomes": [asdict(outcome) for outcome in outcomes]}))


if __name__ == "__main__":
    main()
