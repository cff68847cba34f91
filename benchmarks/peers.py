"""Speed beside what else there is, in one run: ``python -m benchmarks.peers``.

The same weights, the same embedding, from the embedding to a PIL image: diffusers' pipeline as it is, with its blocks
compiled, with its own caches, with cache-dit's, and ours in each profile. Every cache is set to compute about as many
steps as ``--computed`` says; how many it really computed is counted, and ours is run with just as many. With random
weights this says nothing about pictures; ``benchmarks.quality`` does. Seconds are told on a GPU alone, ratios
everywhere; on a CPU they are of the processor's time, which others on the machine disturb less. Prints a card and,
last, one JSON line.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import Flux2Pipeline
from rich.console import Console
from rich.table import Table

from benchmarks.caches import Peer, eager_mag_cache, even_taylor_seer, fixed_mask
from benchmarks.card import machine_card, show
from benchmarks.drawing import GUIDANCE
from benchmarks.stopwatch import Spread, Stopwatch
from benchmarks.synthetic import Source, add_source_options, pipeline_of, source_of
from generator_service.lemica import schedule_for
from generator_service.pipelines.flux2 import GenerationRequest
from generator_service.settings import ProfileName

PLAIN = "diffusers"
COMPILED = "diffusers, blocks compiled"
NOT_COMPILED = "diffusers, blocks captured, not compiled"
"""Compiled code is for a GPU; on a CPU it is only to be seen to run."""
CELL_S = 8.0
Draw = Callable[[int], int]
"""Draws one picture of so many steps and says how many were computed."""


@dataclass(frozen=True)
class Row:
    """One way to draw."""

    way: str
    num_computed: int
    seconds: Spread
    profile: str = ""
    """Of ours."""


class Race:
    """Times every way on parts of its own, which nobody before it has touched.

    Args:
        source: of the parts.
        args: of the command line.
    """

    def __init__(self, source: Source, args: argparse.Namespace) -> None:
        self._source = source
        self._args = args
        self._until = time.perf_counter() + args.budget_s
        self._clock = time.perf_counter if source.device.type == "cuda" else time.process_time
        self.rows: list[Row] = []
        self.left_out: list[str] = []

    def run(self) -> None:
        """First diffusers, then the caches, then ours at each number of steps that they computed."""
        self._try(PLAIN, partial(self._library, PLAIN, lambda _pipeline: None))
        compiled = COMPILED if self._source.device.type == "cuda" else NOT_COMPILED
        self._try(compiled, partial(self._library, compiled, self._compile))
        steps, computed = self._args.steps, self._args.computed
        mask = schedule_for(computed, steps).computed_steps
        peers = [fixed_mask(mask, steps, has_taylor_seer=has) for has in (False, True)]
        for peer in (*peers, eager_mag_cache(computed, steps), even_taylor_seer(computed, steps)):
            self._try(peer.name, partial(self._cache, peer))
        for profile in self._args.profiles:
            self._try(f"ours, {profile}", partial(self._ours, profile))

    def _try(self, name: str, measure: Callable[[], None]) -> None:
        """One way; what goes wrong in it, or did not fit, is told, and the others go on."""
        if time.perf_counter() > self._until:
            self.left_out.append(f"{name}: no time")
            return
        try:
            measure()
        except Exception as error:  # noqa: BLE001 - a peer may fail in any way
            self.left_out.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")

    def _library(self, name: str, change: Callable[[Flux2Pipeline], None]) -> None:
        with self._source.parts() as parts:
            pipeline, embedding = pipeline_of(parts), self._source.embedding(parts)
            change(pipeline)

            def draw(num_steps: int) -> int:
                self._call(pipeline, embedding, num_steps)
                return num_steps

            self._time(name, draw, warm_up_steps=2)

    def _compile(self, pipeline: Flux2Pipeline) -> None:
        backend = {} if self._source.device.type == "cuda" else {"backend": "eager"}
        pipeline.transformer.compile_repeated_blocks(fullgraph=True, **backend)

    def _cache(self, peer: Peer) -> None:
        with self._source.parts() as parts:
            pipeline, embedding = pipeline_of(parts), self._source.embedding(parts)
            count = peer.install(pipeline, peer.knobs[0])

            def draw(num_steps: int) -> int:
                self._call(pipeline, embedding, num_steps)
                return count()

            self._time(peer.name, draw, warm_up_steps=self._args.steps)  # a cache counts the steps of whole runs

    def _ours(self, profile: ProfileName) -> None:
        with self._source.parts() as parts:
            model, embedding = self._source.model(parts, profile), self._source.embedding(parts)
            if model.performance.profile != profile:
                raise RuntimeError(str(model.performance))
            counts = sorted({self._args.steps, *(row.num_computed for row in self.rows if not row.profile)})
            for num_computed in (2, 1):
                model.prepare(self._request(embedding, num_computed, 2))
            for count in counts:

                def draw(num_steps: int, count: int = count) -> int:
                    model.generate(self._request(embedding, min(count, num_steps), num_steps))
                    return count

                self._time(f"ours, {profile}", draw, warm_up_steps=2, profile=profile)

    def _request(self, embedding: torch.Tensor, num_computed: int, num_steps: int) -> GenerationRequest:
        side, schedule = self._args.side, schedule_for(num_computed, num_steps)
        return GenerationRequest(embedding, side, side, GUIDANCE, 0, schedule)

    def _call(self, pipeline: Flux2Pipeline, embedding: torch.Tensor, num_steps: int) -> None:
        pipeline(
            prompt_embeds=embedding.to(self._source.device),
            width=self._args.side,
            height=self._args.side,
            num_inference_steps=num_steps,
            guidance_scale=GUIDANCE,
            generator=torch.Generator("cpu").manual_seed(0),
        )

    def _time(self, name: str, draw: Draw, *, warm_up_steps: int, profile: str = "") -> None:
        draw(warm_up_steps)
        taken, computed = [], 0
        for _ in Stopwatch(CELL_S, self._args.repeats).rounds():
            began = self._clock()
            computed = draw(self._args.steps)
            taken.append(self._clock() - began)
        self.rows.append(Row(name, computed, Spread.of(taken), profile))
        print(f"{name}: done", flush=True)


def compared(rows: list[Row], *, has_seconds: bool) -> list[dict[str, Any]]:
    """The rows with their ratios: how much faster than plain diffusers, and than ours with as many computed steps."""
    ours = {(row.profile, row.num_computed): row.seconds.median for row in rows if row.profile}
    profiles = sorted({row.profile for row in rows if row.profile})
    plain = next((row.seconds.median for row in rows if row.way == PLAIN), None)
    told = []
    for row in rows:
        entry: dict[str, Any] = {"way": row.way, "num_computed": row.num_computed}
        entry["speedup_over_diffusers"] = plain and plain / row.seconds.median
        if not row.profile:
            matched = {name: ours[name, row.num_computed] for name in profiles if (name, row.num_computed) in ours}
            entry["ours_is_faster_by"] = {name: row.seconds.median / seconds for name, seconds in matched.items()}
        entry["spread"] = row.seconds.max / row.seconds.min
        if has_seconds:
            entry["seconds"] = vars(row.seconds)
        told.append(entry)
    return told


def table_of(told: list[dict[str, Any]], num_steps: int) -> Table:
    """For people."""
    title = f"{num_steps} steps; ratios of times: above 1 is faster"
    table = Table("way", "computed", "seconds", "over diffusers", "ours over it, as many computed", title=title)
    for entry in told:
        ratios = entry.get("ours_is_faster_by", {})
        table.add_row(
            entry["way"],
            str(entry["num_computed"]),
            f"{entry['seconds']['median']:.2f}" if "seconds" in entry else "",
            f"{entry['speedup_over_diffusers']:.2f}" if entry["speedup_over_diffusers"] else "",
            ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()),
        )
    return table


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    add_source_options(parser)
    parser.add_argument("--side", type=int, help="of the picture; the model's own by default")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--computed", type=int, default=8)
    parser.add_argument("--profiles", nargs="+", default=["exact", "fast", "fastest"])
    parser.add_argument("--repeats", type=int, default=3, help="at most")
    parser.add_argument("--budget-s", type=float, default=170.0, help="no way begins later; those left out are told")
    args = parser.parse_args()
    source = source_of(args)
    args.side = args.side or source.default_side
    card = machine_card()
    show(card)
    race = Race(source, args)
    race.run()
    told = compared(race.rows, has_seconds=source.device.type == "cuda")
    console = Console(width=120, file=sys.stdout)
    console.print(table_of(told, args.steps))
    for line in race.left_out:
        console.print("left out:", line, highlight=False)
    about = {"benchmark": "peers", "card": card, "weights": source.name, "dtype": str(source.dtype), "side": args.side}
    print(json.dumps(about | {"num_steps": args.steps, "rows": told, "left_out": race.left_out}))


if __name__ == "__main__":
    main()
