"""Compares the speed to other methods: ``python -m benchmarks.lemica.peers``.

All methods use the same weights and embedding, and are timed from the embedding to a PIL image: diffusers' pipeline
unchanged, with compiled blocks, with its own caches, with cache-dit's caches, and our model under each profile. Each
cache is configured to compute about ``--computed`` steps. The steps that it computes are counted, and our model runs
with the same number. With random weights this says nothing about quality, which ``benchmarks.lemica.quality`` measures.
Reports seconds only on a GPU, and ratios everywhere; on a CPU they are ratios of CPU time, which other programs affect
less. Prints system information and, as the last line, JSON.
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
from benchmarks.generator.engine import GUIDANCE
from benchmarks.generator.synthetic import Source, add_source_options, check_optimizations, pipeline_of, source_of
from benchmarks.lemica.caches import Peer, eager_mag_cache, even_taylor_seer, fixed_mask
from benchmarks.report.result import Result, add_so_far_option
from benchmarks.report.stopwatch import Stopwatch, Summary
from benchmarks.report.system_info import show, system_info
from generator_service.lemica import schedule_for
from generator_service.pipelines.params import Params
from generator_service.settings import ProfileName

PLAIN = "diffusers"
COMPILED = "diffusers, blocks compiled"
NOT_COMPILED = "diffusers, blocks captured, not compiled"
"""On a CPU the compiler backend is ``eager``, only to test that it runs."""
CELL_S = 8.0
Generate = Callable[[int], int]
"""Generates an image with the given number of steps, and returns the number of computed steps."""


@dataclass(frozen=True)
class Row:
    """Result of one method."""

    method: str
    num_computed: int
    seconds: Summary
    profile: str = ""
    """Our profile; empty for other methods."""


class Comparison:
    """Times each method on newly loaded components.

    Args:
        source: loads the components.
        args: options of the command line.
        on_update: called after each method.
    """

    def __init__(
        self,
        source: Source,
        args: argparse.Namespace,
        on_update: Callable[["Comparison"], None] = lambda _comparison: None,
    ) -> None:
        self._source = source
        self._args = args
        self._on_result = on_update
        self._longest_s = 0.0
        self._until = time.perf_counter() + args.budget_s
        self._clock = time.perf_counter if source.torch_device.type == "cuda" else time.process_time
        self.rows: list[Row] = []
        self.left_out: list[str] = []

    def run(self) -> None:
        """Run all methods in the order of importance, because the budget may end before the last ones."""
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
        """Run a method; record its error, or that it may not fit into the budget."""
        began = time.perf_counter()
        if began + self._longest_s > self._until:
            self.left_out.append(f"{name}: no time")
        else:
            try:
                measure()
            except Exception as error:  # noqa: BLE001 - other methods may raise anything
                message = str(error).splitlines()[0] if str(error) else ""
                self.left_out.append(f"{name}: {type(error).__name__}: {message}")
            self._longest_s = max(self._longest_s, time.perf_counter() - began)
        self._on_result(self)

    def _counts(self, peers: list[Peer]) -> set[int]:
        """Return how many steps the caches compute, counted on a tiny model; these caches do not depend on the data."""
        counts = set()
        tiny = replace(self._source, path=TINY, has_weights=False)
        for peer in peers:
            with tiny.components() as components, suppress(Exception):  # the error is recorded when the method is timed
                pipeline, embedding = pipeline_of(components), tiny.embedding()
                count = peer.install(pipeline, peer.values[0])
                for _ in range(2):  # a warm-up and a counted run
                    self._call(pipeline, embedding, self._args.steps, tiny.default_side)
                counts.add(count())
        return counts

    def _library(self, name: str, change: Callable[[Flux2Pipeline], None]) -> None:
        with self._source.components() as components:
            pipeline, embedding = pipeline_of(components), self._source.embedding()
            change(pipeline)

            def generate(num_steps: int) -> int:
                self._call(pipeline, embedding, num_steps)
                return num_steps

            self._time(name, generate, warm_up_steps=2)

    def _compile(self, pipeline: Flux2Pipeline) -> None:
        backend = {} if self._source.torch_device.type == "cuda" else {"backend": "eager"}
        pipeline.transformer.compile_repeated_blocks(fullgraph=True, **backend)

    def _cache(self, peer: Peer) -> None:
        with self._source.components() as components:
            pipeline, embedding = pipeline_of(components), self._source.embedding()
            count = peer.install(pipeline, peer.values[0])

            def generate(num_steps: int) -> int:
                self._call(pipeline, embedding, num_steps)
                return count()

            self._time(peer.name, generate, warm_up_steps=self._args.steps)  # a cache may depend on whole runs

    def _ours(self, profile: ProfileName, counts: set[int]) -> None:
        with self._source.model(profile) as model:
            embedding = self._source.embedding()
            check_optimizations(model)
            for num_computed in (2, 1):
                model.warm_up([self._request(embedding, num_computed, 2)])
            check_optimizations(model)
            for count in sorted(counts):

                def generate(num_steps: int, count: int = count) -> int:
                    model.generate(self._request(embedding, min(count, num_steps), num_steps))
                    return count

                self._time(f"ours, {profile}", generate, warm_up_steps=2, profile=profile)

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

    def _time(self, name: str, generate: Generate, *, warm_up_steps: int, profile: str = "") -> None:
        generate(warm_up_steps)
        seconds, computed = [], 0
        for _ in Stopwatch(CELL_S, self._args.repeats).rounds():
            began = self._clock()
            computed = generate(self._args.steps)
            seconds.append(self._clock() - began)
        self.rows.append(Row(name, computed, Summary.of(seconds), profile))
        self._on_result(self)
        print(f"{name}: done", flush=True)


def compared(rows: list[Row], *, has_seconds: bool) -> list[dict[str, Any]]:
    """Return the rows with ratios to plain diffusers, and to ours with as many computed steps."""
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
    """Format the entries as a table."""
    title = f"{num_steps} steps; ratios of times: above 1 is faster"
    table = Table("method", "computed", "seconds", "over diffusers", "ours over it, as many computed", title=title)
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
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lemica.peers", description=__doc__)
    add_source_options(parser)
    add_so_far_option(parser)
    parser.add_argument("--side", type=int, help="of the image; default: that of the model")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--computed", type=int, default=8)
    parser.add_argument(
        "--profiles", nargs="+", default=["fast", "exact", "fastest"], help="the first runs before the caches"
    )
    parser.add_argument("--repeats", type=int, default=3, help="maximum")
    parser.add_argument("--budget-s", type=float, default=170.0, help="for all methods; omitted ones are listed")
    args = parser.parse_args()
    source = source_of(args)
    args.side = args.side or source.default_side
    system = system_info()
    show(system)
    about = {
        "benchmark": "peers",
        "card": system,
        "weights": source.name,
        "dtype": str(source.torch_dtype),
        "side": args.side,
    }
    result = Result(about | {"num_steps": args.steps}, args.so_far)
    has_seconds = source.torch_device.type == "cuda"

    def report_of(comparison: Comparison) -> dict[str, Any]:
        return {"rows": compared(comparison.rows, has_seconds=has_seconds), "left_out": comparison.left_out}

    comparison = Comparison(source, args, lambda comparison: result.save(report_of(comparison)))
    comparison.run()
    console = Console(width=120, file=sys.stdout)
    console.print(table_of(report_of(comparison)["rows"], args.steps))
    for line in comparison.left_out:
        console.print("left out:", line, highlight=False)
    result.finish(report_of(comparison))


if __name__ == "__main__":
    main()
