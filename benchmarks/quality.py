"""How much each way of skipping steps changes the pictures: ``python -m benchmarks.quality``.

One run, the demo model, the same embeddings and seeds for all: the schedules that come with the product (``ours``),
LeMiCa's paths through error graphs of every predictor, the published lists, even spacing, fewer plain steps, and the
caches of diffusers and cache-dit as they are installed. A peer gets the knob with the fewest computed steps that are
not fewer than ours. The reference is the picture of the full run of the same seed. Prints a card and, last, one JSON
line.
"""

import argparse
import itertools
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from diffusers import Flux2Pipeline
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.caches import Peer, db_cache, fresh, mag_cache, mag_ratios, refusals, step_masks, taylor_seer
from benchmarks.plots import plot_errors, plot_quality, plot_schedules
from demo_model.checker import mistakes, read_image
from demo_model.scenes import Scene, scenes
from demo_model.services import WEIGHTS
from flux2_shared.model.folder import ModelFolder, read_prompt_format
from generator_service.engine.quality import psnr, ssim
from generator_service.lemica import (
    SHIPPED,
    CachedTransformer,
    ErrorGraph,
    Reuse,
    Schedule,
    Signature,
    lexicographic_minimax_path,
    load_schedules,
    minimum_total_error_path,
    schedule_for,
)
from text_encoder_service.encoder import MistralEncoder

GUIDANCE = 4.0
PIXELS_PER_TOKEN = 16


@dataclass(frozen=True)
class Case:
    """A held-out prompt."""

    scene: Scene
    embedding: torch.Tensor
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What one way of skipping did to all cases; PSNR and SSIM are of float pictures, range 1."""

    name: str
    budget: int
    computed: float
    psnr: float
    psnr_worst_tenth: float
    psnr_worst: float
    ssim: float
    right: float
    seconds: float


Draw = Callable[[Case], tuple[torch.Tensor, int]]
"""The picture ``[3, H, W]`` in 0..1, and how many steps were computed."""


class Studio:
    """The demo model and the cases it is judged on."""

    def __init__(self, num_prompts: int, num_steps: int, side: int) -> None:
        folder = ModelFolder(WEIGHTS.name, "local", WEIGHTS)
        encoder = MistralEncoder(folder, read_prompt_format(folder), torch.device("cpu"), torch.float32)
        chosen = [s for n in (1, 2) for s in scenes(random.Random(10 + n), num_prompts // 2, n, held_out=True)]
        embeddings = encoder.encode([scene.prompt for scene in chosen])
        self.cases = [Case(s, e.tensor, 1000 + k) for k, (s, e) in enumerate(zip(chosen, embeddings, strict=True))]
        self.pipeline = Flux2Pipeline.from_pretrained(WEIGHTS, text_encoder=None, tokenizer=None, dtype=torch.float32)
        self.pipeline.set_progress_bar_config(disable=True)
        self.num_steps = num_steps
        self.side = side
        self.references = [self.call(self.pipeline, case) for case in track(self.cases, "references", transient=True)]

    def call(self, pipeline: Flux2Pipeline, case: Case, num_steps: int | None = None) -> torch.Tensor:
        """One picture by diffusers' pipeline."""
        picture: torch.Tensor = pipeline(
            prompt_embeds=case.embedding,
            width=self.side,
            height=self.side,
            num_inference_steps=num_steps or self.num_steps,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(case.seed),
            output_type="pt",
        ).images[0]
        return picture

    def plain(self, num_steps: int) -> Draw:
        """A run of fewer steps, all computed."""
        return lambda case: (self.call(self.pipeline, case, num_steps), num_steps)

    def scheduled(self, schedule: Schedule) -> Draw:
        """LeMiCa, on diffusers' own pipeline."""
        parts = self.pipeline.components

        def draw(case: Case) -> tuple[torch.Tensor, int]:
            transformer = CachedTransformer(parts["transformer"], schedule, scheduler=parts["scheduler"])
            pipeline = Flux2Pipeline(**{**parts, "transformer": transformer})
            pipeline.set_progress_bar_config(disable=True)
            return self.call(pipeline, case), schedule.num_computed

        return draw

    def cached(self, peer: Peer, knob: float) -> Draw:
        """Another cache."""
        pipeline = fresh(self.pipeline)
        count = peer.install(pipeline, knob)
        return lambda case: (self.call(pipeline, case), count())

    def judge(self, name: str, budget: int, draw: Draw) -> Outcome:
        """Draw every case and compare."""
        began = time.perf_counter()
        drawn = [draw(case) for case in self.cases]
        seconds = (time.perf_counter() - began) / len(drawn)
        ratios, similarities, right = [], [], 0
        for case, reference, (picture, _) in zip(self.cases, self.references, drawn, strict=True):
            ours, full = (np.asarray(p.permute(1, 2, 0), dtype=np.float64) for p in (picture, reference))
            ratios.append(min(psnr(ours, full, peak=1), 120.0))
            similarities.append(ssim(ours, full, peak=1))
            right += not mistakes(case.scene, read_image((picture * 255).round()))
        ordered = sorted(ratios)
        return Outcome(
            name=name,
            budget=budget,
            computed=statistics.fmean(count for _, count in drawn),
            psnr=statistics.fmean(ratios),
            psnr_worst_tenth=statistics.fmean(ordered[: max(1, len(ordered) // 10)]),
            psnr_worst=ordered[0],
            ssim=statistics.fmean(similarities),
            right=right / len(drawn),
            seconds=seconds,
        )

    def knob_for(self, peer: Peer, counts: dict[float, float], budget: int) -> float:
        """The knob with the fewest computed steps that are not fewer than ``budget``; the nearest if all are."""
        if not counts:
            probes = self.cases[:: max(1, len(self.cases) // 6)]
            for knob in track(peer.knobs, peer.name, transient=True):
                draw = self.cached(peer, knob)
                counts[knob] = statistics.fmean(draw(case)[1] for case in probes)
        enough = [knob for knob, count in counts.items() if count >= budget]
        return min(enough or counts, key=lambda knob: abs(counts[knob] - budget))


def uniform(budget: int, num_steps: int) -> Schedule:
    """Evenly spaced steps, the last one computed."""
    steps = tuple(round(k * (num_steps - 1) / (budget - 1)) for k in range(budget))
    return Schedule(f"{budget} even", num_steps, steps, "uniform", Signature("any", num_steps), Reuse())


def own_outcomes(
    studio: Studio, ours: dict[int, Schedule], graphs: dict[str, ErrorGraph], budgets: list[int]
) -> Iterator[Outcome]:
    """Every way that needs no other cache, at every budget."""
    num_steps = studio.num_steps
    yield studio.judge("no cache", num_steps, studio.plain(num_steps))
    for budget in budgets:
        if budget in ours:
            yield studio.judge("ours", budget, studio.scheduled(ours[budget]))
        yield studio.judge("fewer plain steps", budget, studio.plain(budget))
        yield studio.judge("even spacing, reuse", budget, studio.scheduled(uniform(budget, num_steps)))
        yield studio.judge("published lists", budget, studio.scheduled(schedule_for(budget, num_steps)))
        for name, graph in graphs.items():
            yield studio.judge(f"LeMiCa, {name}", budget, studio.scheduled(lexicographic_minimax_path(graph, budget)))
        for name, graph in list(graphs.items())[:1]:
            total = minimum_total_error_path(graph, budget)
            yield studio.judge(f"smallest sum, {name}", budget, studio.scheduled(total))


def peer_outcomes(studio: Studio, budgets: list[int]) -> Iterator[Outcome]:
    """The caches of others, at every budget."""
    num_steps = studio.num_steps
    ratios = mag_ratios(studio.pipeline, lambda pipeline: studio.call(pipeline, studio.cases[0]), num_steps)
    peers = [mag_cache(ratios, num_steps), taylor_seer(num_steps)]
    peers += [
        make
        for has in (False, True)
        for make in (db_cache(has_taylor_seer=has), step_masks(num_steps, has_taylor_seer=has))
    ]
    for peer in peers:
        counts: dict[float, float] = {}
        for budget in budgets:
            yield studio.judge(peer.name, budget, studio.cached(peer, studio.knob_for(peer, counts, budget)))


def schedules_for(file_or_folder: Path, num_steps: int, side: int) -> dict[int, Schedule]:
    """Calibrated schedules of square pictures and runs of ``num_steps``, by how many steps they compute."""
    num_tokens = (side // PIXELS_PER_TOKEN) ** 2
    files = sorted(file_or_folder.glob("*.json")) if file_or_folder.is_dir() else [file_or_folder]
    found = [schedule for file in files for schedule in load_schedules(file)]
    fitting = (s for s in found if s.num_steps == num_steps and s.signature.image_tokens == num_tokens)
    return {schedule.num_computed: schedule for schedule in fitting}


def margins(found: list[Outcome]) -> dict[str, dict[str, float]]:
    """At each budget, by how many dB ours is ahead of the best other cache: on average, and in the worst tenth."""
    margins_by_budget: dict[str, dict[str, float]] = {}
    for ours in (o for o in found if o.name == "ours"):
        peers = [o for o in found if o.budget == ours.budget and o.name.endswith(")")]
        if peers:
            mean = ours.psnr - max(o.psnr for o in peers)
            worst_tenth = ours.psnr_worst_tenth - max(o.psnr_worst_tenth for o in peers)
            margins_by_budget[str(ours.budget)] = {"mean": round(mean, 1), "worst tenth": round(worst_tenth, 1)}
    return margins_by_budget


def card(found: list[Outcome]) -> Table:
    """All outcomes, budget by budget, best first."""
    table = Table("budget", "way", "computed", "PSNR", "worst tenth", "worst", "SSIM", "right", "s")
    for budget in sorted({outcome.budget for outcome in found}, reverse=True):
        for o in sorted((o for o in found if o.budget == budget), key=lambda o: -o.psnr):
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
    """What tells a graph from the others."""
    predictor = str(graph.signature.predictor if graph.signature else "reuse")
    return predictor if graph.is_exact else f"{predictor}, approximate graph"


def main() -> None:
    """Measure, print, and save what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("graphs", type=Path, nargs="*", help="error graphs of the demo model, one for each predictor")
    parser.add_argument("--schedules", type=Path, default=SHIPPED, help="ours: a file or folder of schedules")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument(
        "--budgets", type=int, nargs="+", default=[26, 20, 15, 10, 8], help="those below --steps are taken"
    )
    parser.add_argument("--no-peers", action="store_true", help="leave out diffusers' and cache-dit's caches")
    parser.add_argument("--plots", type=Path, help="a folder for the plots")
    args = parser.parse_args()
    loaded = [ErrorGraph.load(file) for file in args.graphs]
    graphs = {label(graph): graph for graph in loaded}
    ours = schedules_for(args.schedules, args.steps, args.side)
    studio = Studio(args.prompts, args.steps, args.side)
    found: list[Outcome] = []
    budgets = [budget for budget in args.budgets if budget < args.steps]
    methods = [own_outcomes(studio, ours, graphs, budgets)]
    methods += [] if args.no_peers else [peer_outcomes(studio, budgets)]
    for outcome in itertools.chain.from_iterable(methods):
        found.append(outcome)
        print(f"{outcome.budget:>3} {outcome.name:<40} {outcome.computed:5.1f} {outcome.psnr:6.1f} dB", flush=True)
    Console(width=120).print(card(found))
    if args.plots:
        args.plots.mkdir(parents=True, exist_ok=True)
        plot_quality(found, args.plots / "quality.png")
        plot_schedules([ours[b] for b in sorted(ours, reverse=True)], args.plots / "schedules.png")
        for name, graph in graphs.items():
            plot_errors(graph, args.plots / f"errors-{name}.png")
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    report: dict[str, object] = {"prompts": args.prompts, "side": args.side, "steps": args.steps, "machine": machine}
    if not args.no_peers:
        report |= {name: version(name) for name in ("diffusers", "cache-dit")}
        report["do not run"] = refusals(studio.pipeline, lambda pipeline: studio.call(pipeline, studio.cases[0]))
    print(json.dumps(report | {"margins": margins(found), "outcomes": [asdict(outcome) for outcome in found]}))


if __name__ == "__main__":
    main()
