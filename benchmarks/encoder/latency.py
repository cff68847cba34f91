"""Times the text encoder: ``python -m benchmarks.encoder.latency``.

On a GPU it uses FLUX.2 [dev]'s text encoder at full size with random weights, which do not affect the times; on a CPU
the demo model, only as a smoke test. Measures from token ids to embeddings in host memory, without the tokenizer, for
prompts of 512 tokens and of 100, for which the profile ``fast`` computes 128. The order is ``exact``, ``fast``, then
int8 weights if torchao is installed; measurements that exceed the budget are listed. ``difference`` is the largest
relative error of a token's hidden states compared to transformers; ``text_encoder_service.fast_layers`` has its limits.
Prints system information and, as the last line, JSON.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.architectures import FULL
from benchmarks.encoder.language_model import EncoderSource, Model
from benchmarks.report.result import Result, add_so_far_option
from benchmarks.report.stopwatch import Stopwatch, Summary
from benchmarks.report.system_info import show, system_info
from demo_model.services import WEIGHTS
from flux2_shared.model.compilation import CompilationFailed, CompilerBackend, describe_failure, num_compilations
from text_encoder_service.encoder import run_library, to_pinned
from text_encoder_service.fast_layers import FastLayers, Forward, difference
from text_encoder_service.settings import Weights
from text_encoder_service.shapes import NUM_LENGTHS, ShapeBuckets

BATCHES = (1, 8, 2, 4)
"""In the order of importance."""
WARM_UP = 3


@dataclass
class Report:
    """Results of the benchmark."""

    weights: str = ""
    """Source of the weights."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    compile_s: dict[str, float] = field(default_factory=dict)
    """Compile time for two lengths, by weights and batch size."""
    difference: dict[str, float] = field(default_factory=dict)
    """Difference of the fast layers from the exact ones with equal weights, by optimization."""
    left_out: list[str] = field(default_factory=list)
    compilations_after_warm_up: int = 0


class Run:
    """Measures a model with one kind of weights.

    Args:
        model: the model, which is modified in place.
        weights: the kind of its weights.
        until: end of the budget, as ``time.perf_counter()``.
        watch: creates the stopwatch of a measurement.
        report: receives the results.
        on_update: called after each result.
        backend: passed to ``torch.compile``.
    """

    def __init__(
        self,
        model: Model,
        weights: Weights,
        until: float,
        watch: Callable[[], Stopwatch],
        report: Report,
        on_update: Callable[[], None],
        backend: CompilerBackend = "inductor",
    ) -> None:
        self._model = model
        self._weights = weights
        self._until = until
        self._watch = watch
        self._report = report
        self._on_result = on_update
        self._backend = backend
        layers = model.prompt_format.hidden_layers
        self._exact: Forward = partial(run_library, model.language_model, layers)
        with torch.inference_mode():
            self._padding = self._exact(model.tokens(1, model.lengths[1]))[:, :1]

    def exact(self) -> None:
        """Measure transformers' forward pass, whose time does not depend on the length of prompts."""
        last_s = 0.0
        for batch in BATCHES:
            began = time.perf_counter()
            if self._fits("exact", batch, last_s):
                self._measure("exact", self._exact, batch, self._model.lengths[0])
                last_s = time.perf_counter() - began

    def fast(self, last_s: float) -> float:
        """Measure trimmed and compiled layers for each batch size.

        Args:
            last_s: time of a batch size with other weights; each is expected to take as long as the previous one.

        Returns:
            The time of the last batch size.
        """
        for batch in BATCHES:
            began = time.perf_counter()
            if not self._fits("fast", batch, last_s):
                continue
            layers = self._compiled(batch)
            if layers is None:
                return last_s
            before = num_compilations()
            for num_tokens in self._model.lengths:
                self._measure("fast", layers, batch, num_tokens)
            self._report.compilations_after_warm_up += num_compilations() - before
            layers.restore()  # the exact layers share them
            last_s = time.perf_counter() - began
        return last_s

    def _fits(self, profile: str, batch: int, expected_s: float) -> bool:
        """Return whether the budget is sufficient, else record the omission."""
        if time.perf_counter() + expected_s < self._until:
            return True
        self._report.left_out.append(f"{profile}, {self._weights} weights, batch {batch}: no time was left")
        return False

    def _compiled(self, batch: int) -> FastLayers | None:
        length = self._model.prompt_format.max_sequence_length
        shapes = ShapeBuckets((batch,), (length // NUM_LENGTHS, length))
        wanted = self._model.prompt_format.hidden_layers
        layers = FastLayers(self._model.language_model, wanted, shapes, self._padding)
        tokens = self._model.tokens(batch, self._model.lengths[1])
        expected = self._exact(tokens)
        if batch == BATCHES[0]:
            self._report.difference[f"{self._weights}, trimmed"] = float(difference(layers(tokens), expected))
        began = time.perf_counter()
        try:
            layers.compile(self._backend)
        except CompilationFailed as error:
            self._report.left_out.append(describe_failure(f"fast, {self._weights} weights", error))
            return None
        self._report.compile_s[f"{self._weights}, batch {batch}"] = time.perf_counter() - began
        off = float(difference(layers(tokens), expected))
        self._report.difference[f"{self._weights}, trimmed and compiled, batch {batch}"] = off
        return layers

    def _measure(self, profile: str, forward: Forward, batch: int, num_tokens: int) -> None:
        tokens = self._model.tokens(batch, num_tokens)
        is_gpu = self._model.language_model.device.type == "cuda"
        for _ in range(WARM_UP):
            to_pinned(forward(tokens).flatten(2))
        if is_gpu:
            torch.cuda.reset_peak_memory_stats()
        summary = Summary.of(list(seconds(lambda: to_pinned(forward(tokens).flatten(2)), self._watch())))
        row = {"profile": profile, "weights": self._weights, "batch": batch, "prompt_tokens": num_tokens}
        row |= {"seconds": asdict(summary), "prompts_per_s": batch / summary.median}
        row |= {"peak_gb": torch.cuda.max_memory_allocated() / 1e9} if is_gpu else {}
        self._report.rows.append(row)
        self._on_result()


def seconds(work: Callable[[], object], watch: Stopwatch) -> Iterator[float]:
    """Yield the times of ``work``, which must synchronize with the device itself."""
    for _ in watch.rounds():
        began = time.perf_counter()
        work()
        yield time.perf_counter() - began


def measure(
    source: EncoderSource, args: argparse.Namespace, on_update: Callable[[Report], None] = lambda _report: None
) -> Report:
    """Measure both profiles with each kind of weights; ``on_update`` is called after each result."""
    report = Report(source.name)
    until, last_s = time.perf_counter() + args.budget_s, 0.0
    for weights in args.weights:
        if time.perf_counter() >= until:
            report.left_out.append(f"{weights} weights: no time was left")
            continue
        model = source.load(weights)
        watch = partial(Stopwatch, args.seconds, args.repeats)
        run = Run(model, weights, until, watch, report, partial(on_update, report), args.backend)
        with torch.inference_mode():
            run.exact()
            last_s = run.fast(last_s)
        del run, model
        torch.compiler.reset()  # compiled code references the weights
        gc.collect()
        torch.cuda.empty_cache()
    return report


def table_of(rows: Sequence[dict[str, Any]]) -> Table:
    """Format the rows as a table."""
    table = Table("profile", "weights", "batch", "tokens", "ms", "prompts/s", "peak GB")
    for row in rows:
        ms = {key: f"{1000 * row['seconds'][key]:.1f}" for key in ("median", "min", "max")}
        milliseconds = f"{ms['median']} ({ms['min']} to {ms['max']}; {row['seconds']['count']})"
        memory = f"{row['peak_gb']:.1f}" if "peak_gb" in row else ""
        numbers = (str(row["batch"]), str(row["prompt_tokens"]), milliseconds, f"{row['prompts_per_s']:.1f}", memory)
        table.add_row(row["profile"], row["weights"], *numbers)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.encoder.latency", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="smoke test: the demo model with few repeats")
    parser.add_argument("--model", type=Path, help="folder of a checkpoint, instead of random weights")
    add_so_far_option(parser)
    kinds = ["full", "int8"] if find_spec("torchao") else ["full"]
    parser.add_argument("--weights", nargs="+", default=kinds, choices=["full", "int8", "int4"])
    parser.add_argument("--budget-s", type=float, default=50.0, help="for all measurements; omitted ones are listed")
    parser.add_argument("--seconds", type=float, default=1.0, help="maximum for each figure")
    parser.add_argument("--repeats", type=int, default=30, help="maximum for each figure")
    args = parser.parse_args()
    is_gpu = EncoderSource(FULL).settings().torch_device().type == "cuda"
    args.backend = "inductor" if is_gpu else "eager"  # on a CPU, only test that graphs are captured
    if args.smoke:
        args.repeats = 2
    path = args.model or (None if is_gpu and not args.smoke else WEIGHTS)
    system = system_info()
    show(system)
    result = Result({"benchmark": "encoder", "card": system}, args.so_far)
    source = EncoderSource(path.resolve(), has_weights=True) if path else EncoderSource(FULL)
    report = measure(source, args, lambda report: result.save(asdict(report)))
    Console(width=110, file=sys.stdout).print(table_of(report.rows))
    for line in report.left_out:
        print(f"left out: {line}")
    result.finish(asdict(report))


if __name__ == "__main__":
    main()
