"""Speed beside what else there is, in one run: ``python -m benchmarks.peers``.

The same weights, the same embedding, from the embedding to a PIL image: diffusers' pipeline as it is, with its blocks
compiled, with its own caches, with cache-dit's, and ours in each profile. Every cache is set to compute about as many
steps as ``--computed`` says; how many it really computed is counted, and ours is run with just as many. With random
weights this says nothing about pictures; ``benchmarks.quality`` does. Seconds are told on a GPU alone, ratios
everywhere; on a CPU they are of the processor's time, which others on the machine disturb less. Prints a card and,
last, one JSON line.
"""

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from diffusers import Flux2Pipeline
from rich.console import Console
from rich.table import Table

from benchmarks.architectures import TINY
from benchmarks.caches import Peer, eager_mag_cache, even_taylor_seer, fixed_mask
from benchmarks.card import machine_card, show
from benchmarks.drawing import GUIDANCE
from benchmarks.result import Result, add_so_far_option
from benchmarks.stopwatch import Stopwatch, Summary
from benchmarks.synthetic import Source, add_source_options, check_whole, pipeline_of, source_of
from generator_service.lemica import schedule_for
from generator_service.pipelines.params import Params
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

    method: str
    num_computed: int
    seconds: Summary
    profile: str = ""
    """Of ours."""


class Comparison:
    """Times every way on parts of its own, which nobody before it has touched.

    Args:
        source: of the parts.
        args: of the command line.
        on_found: called whenever there are more rows, or more is left out.
    """

    def __init__(
        self,
        source: Source,
        args: argparse.Namespace,
        on_found: Callable[["Comparison"], None] = lambda _comparison: None,
    ) -> None:
        self._source = source
        self._args = args
        self._on_found = on_found
        self._longest_s = 0.0
        self._until = time.perf_counter() + args.budget_s
        self._clock = time.perf_counter if source.torch_device.type == "cuda" else time.process_time
        self.rows: list[Row] = []
        self.left_out: list[str] = []

    def run(self) -> None:
        """Diffusers, ours and the caches in turn, so that what did not fit is the least of it."""
        steps, computed = self._args.steps, self._args.computed
        mask = schedule_for(computed, steps).computed_steps
        peers = [fixed_mask(mask, steps, has_taylor_seer=has) for has in (False, True)]
        peers += [eager_mag_cache(computed, steps), even_taylor_seer(computed, steps)]
        counts = {steps, computed, *self._counts(peers)}
        ours = [(f"ours, {name}", partial(self._ours, name, counts)) for name in self._args.profiles]
        compiled = COMPILED if self._source.torch_device.type == "cuda" else NOT_COMPILED
        methods = [(PLAIN, partial(self._library, PLAIN, lambda _pipeline: None))]
        methods += ours[:1]
        methods += [(peer.name, partial(self._cache, peer)) for peer in peers]
        methods += [(compiled, partial(self._library, compiled, self._compile))]
        for name, measure in methods + ours[1:]:
            self._try(name, measure)

    def _try(self, name: str, measure: Callable[[], None]) -> None:
        """One way; what goes wrong in it, or would not fit if it took as long as the longest, is told."""
        began = time.perf_counter()
        if began + self._longest_s > self._until:
            self.left_out.append(f"{name}: no time")
        else:
            try:
                measure()
            except Exception as error:  # noqa: BLE001 - a peer may fail in any way
                message = str(error).splitlines()[0] if str(error) else ""
                self.left_out.append(f"{name}: {type(error).__name__}: {message}")
            self._longest_s = max(self._longest_s, time.perf_counter() - began)
        self._on_found(self)

    def _counts(self, peers: list[Peer]) -> set[int]:
        """How many steps the peers compute: on a tiny model, since none of them looks at what it predicts."""
        counts = set()
        tiny = replace(self._source, path=TINY, has_weights=False)
        for peer in peers:
            with tiny.components() as parts, suppress(Exception):  # it will fail again where that is told
                pipeline, embedding = pipeline_of(parts), tiny.embedding()
                count = peer.install(pipeline, peer.knobs[0])
                for _ in range(2):  # as the run that warms up, and one that counts
                    self._call(pipeline, embedding, self._args.steps, tiny.default_side)
                counts.add(count())
        return counts

    def _library(self, name: str, change: Callable[[Flux2Pipeline], None]) -> None:
        with self._source.components() as parts:
            pipeline, embedding = pipeline_of(parts), self._source.embedding()
            change(pipeline)

            def draw(num_steps: int) -> int:
                self._call(pipeline, embedding, num_steps)
                return num_steps

            self._time(name, draw, warm_up_steps=2)

    def _compile(self, pipeline: Flux2Pipeline) -> None:
        backend = {} if self._source.torch_device.type == "cuda" else {"backend": "eager"}
        pipeline.transformer.compile_repeated_blocks(fullgraph=True, **backend)

    def _cache(self, peer: Peer) -> None:
        with self._source.components() as parts:
            pipeline, embedding = pipeline_of(parts), self._source.embedding()
            count = peer.install(pipeline, peer.knobs[0])

            def draw(num_steps: int) -> int:
                self._call(pipeline, embedding, num_steps)
                return count()

            self._time(peer.name, draw, warm_up_steps=self._args.steps)  # a cache counts the steps of whole runs

    def _ours(self, profile: ProfileName, counts: set[int]) -> None:
        with self._source.model(profile) as model:
            embedding = self._source.embedding()
            check_whole(model)
            for num_computed in (2, 1):
                model.warm_up([self._request(embedding, num_computed, 2)])
            check_whole(model)
            for count in sorted(counts):

                def draw(num_steps: int, count: int = count) -> int:
                    model.generate(self._request(embedding, min(count, num_steps), num_steps))
                    return count

                self._time(f"ours, {profile}", draw, warm_up_steps=2, profile=profile)

    def _request(self, embedding: torch.Tensor, num_computed: int, num_steps: int) -> Params:
        side, schedule = self._args.side, schedule_for(num_computed, num_steps)
        return Params(embedding, side, side, GUIDANCE, 0, schedule)

    def _call(self, pipeline: Flux2Pipeline, embedding: torch.Tensor, num_steps: int, side: int | None = None) -> None:
        pipeline(
            prompt_embeds=embedding.to(self._source.torch_device),
            width=side or self._args.side,
            height=side or self._args.side,
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
        self.rows.append(Row(name, computed, Summary.of(taken), profile))
        self._on_found(self)
        print(f"{name}: done", flush=True)


def compared(rows: list[Row], *, has_seconds: bool) -> list[dict[str, Any]]:
    """The rows with their ratios: how much faster than plain diffusers, and than ours with as many computed steps."""
    ours = {(row.profile, row.num_computed): row.seconds.median for row in rows if row.profile}
    profiles = sorted({row.profile for row in rows if row.profile})
    plain = next((row.seconds.median for row in rows if row.method == PLAIN), None)
    entries = []
    for row in rows:
        entry: dict[str, Any] = {"way": row.method, "num_computed": row.num_computed}
        entry["speedup_over_diffusers"] = plain and plain / row.seconds.median
        if not row.profile:
            matched = {name: ours[name, row.num_computed] for name in profiles if (name, row.num_computed) in ours}
            entry["ours_is_faster_by"] = {name: row.seconds.median / seconds for name, seconds in matched.items()}
        entry["spread"] = row.seconds.max / row.seconds.min
        if has_seconds:
            entry["seconds"] = vars(row.seconds)
        entries.append(entry)
    return entries


def table_of(entries: list[dict[str, Any]], num_steps: int) -> Table:
    """For people."""
    title = f"{num_steps} steps; ratios of times: above 1 is faster"
    table = Table("way", "computed", "seconds", "over diffusers", "ours over it, as many computed", title=title)
    for entry in entries:
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
    add_so_far_option(parser)
    parser.add_argument("--side", type=int, help="of the picture; the model's own by default")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--computed", type=int, default=8)
    parser.add_argument(
        "--profiles", nargs="+", default=["fast", "exact", "fastest"], help="the first runs before the caches"
    )
    parser.add_argument("--repeats", type=int, default=3, help="at most")
    parser.add_argument("--budget-s", type=float, default=170.0, help="for all; what does not fit is told")
    args = parser.parse_args()
    source = source_of(args)
    args.side = args.side or source.default_side
    card = machine_card()
    show(card)
    about = {
        "benchmark": "peers",
        "card": card,
        "weights": source.name,
        "dtype": str(source.torch_dtype),
        "side": args.side,
    }
    result = Result(about | {"num_steps": args.steps}, args.so_far)
    has_seconds = source.torch_device.type == "cuda"

    def found(comparison: Comparison) -> dict[str, Any]:
        return {"rows": compared(comparison.rows, has_seconds=has_seconds), "left_out": comparison.left_out}

    comparison = Comparison(source, args, lambda comparison: result.keep(found(comparison)))
    comparison.run()
    console = Console(width=120, file=sys.stdout)
    console.print(table_of(found(comparison)["rows"], args.steps))
    for line in comparison.left_out:
        console.print("left out:", line, highlight=False)
    result.tell(found(comparison))


if __name__ == "__main__":
    main()
