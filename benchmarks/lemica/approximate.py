"""Compares approximate to exact calibration: ``python -m benchmarks.lemica.approximate GRAPH --prompts FILE``.

Measures an approximate error graph of the same runs as a given exact graph of the demo model, and compares the ranks of
their edges. Then measures whole runs with the schedules planned from both graphs, before and after refinement. Prints a
table and, as the last line, JSON.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from demo_model.services import WEIGHTS
from generator_service.cli.calibration import CalibrationRun, CalibrationSet, read_prompts
from generator_service.lemica import PREDICTORS, ErrorGraph, Schedule, lexicographic_minimax_path, refine
from generator_service.settings import GeneratorSettings


@dataclass(frozen=True)
class Row:
    """Mean errors of whole runs with the schedules that both graphs plan for one budget."""

    budget: int
    exact: float
    approximate: float
    exact_refined: float
    approximate_refined: float
    same_steps: int
    """Number of computed steps that both plans have in common."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lemica.approximate", description=__doc__)
    parser.add_argument("graph", type=Path, help="an exact graph of the demo model")
    parser.add_argument("--prompts", type=Path, required=True, help="the prompts that it was calibrated with")
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--budgets", type=int, nargs="+", default=[26, 20, 15, 10, 8])
    args = parser.parse_args()
    exact = ErrorGraph.load(args.graph)
    assert exact.signature is not None
    predictor = PREDICTORS[exact.signature.predictor or "reuse"]
    samples = CalibrationSet(read_prompts(args.prompts), 1, args.side, args.side, exact.num_steps)
    calibration = CalibrationRun(GeneratorSettings(model=str(WEIGHTS)), samples, predictor).calibration(batch_size=64)
    began = time.perf_counter()
    longest = max(j - i for i, j in exact.errors)
    approximate = calibration.measure(exact.signature, longest, is_exact=False)
    seconds = time.perf_counter() - began
    edges = sorted(exact.errors)
    rank = spearmanr([exact.errors[e] for e in edges], [approximate.errors[e] for e in edges]).statistic

    def cost(schedule: Schedule) -> float:
        return float(torch.tensor(calibration.errors_of_schedule(schedule)).mean())

    rows = []
    for budget in args.budgets:
        plan, other = (lexicographic_minimax_path(graph, budget) for graph in (exact, approximate))
        refined = refine([(plan, exact)], calibration.errors_of_schedule)
        other_refined = refine([(other, approximate)], calibration.errors_of_schedule)
        common = set(plan.computed_steps) & set(other.computed_steps)
        rows.append(Row(budget, cost(plan), cost(other), cost(refined), cost(other_refined), len(common)))
        print(rows[-1], flush=True)
    title = f"mean error of whole runs; rank correlation of {len(edges)} edges {rank:.3f}"
    table = Table("budget", "exact", "approximate", "exact, refined", "approximate, refined", "same steps", title=title)
    for row in rows:
        table.add_row(*(f"{v:.5f}" if isinstance(v, float) else str(v) for v in asdict(row).values()))
    Console(width=120).print(table)
    report = {"predictor": predictor.name, "rank_correlation": rank, "approximate_s": seconds}
    print(json.dumps(report | {"rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
