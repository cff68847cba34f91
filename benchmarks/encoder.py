"""How long prompts take in the text encoder: ``python -m benchmarks.encoder``.

On a GPU FLUX.2 [dev]'s text encoder at full size with random weights, on which times do not depend; on a CPU the demo
model, only to see that it runs. From token ids to embeddings in host memory, without the tokenizer, for prompts that
fill their 512 tokens and for prompts of 100, of which the profile ``fast`` computes 128. The profiles come in the order
``exact``, ``fast``, then int8 weights if torchao is there; what does not fit into the time is listed. ``difference`` is
the largest of any token's hidden state from the library's, relative to its norm: the service calls it rounding up to
the limits in ``text_encoder_service.fast_layers``. Prints a card and, last, one JSON line.
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
from benchmarks.card import machine_card, show
from benchmarks.language_model import EncoderSource, Model
from benchmarks.result import Result, add_so_far_option
from benchmarks.stopwatch import Stopwatch, Summary
from demo_model.services import WEIGHTS
from flux2_shared.model.compilation import CompilationFailed, CompilerBackend, describe_failure, num_compilations
from text_encoder_service.encoder import run_library, to_pinned
from text_encoder_service.fast_layers import FastLayers, Forward, difference
from text_encoder_service.settings import Weights
from text_encoder_service.shapes import NUM_LENGTHS, ShapeBuckets

BATCHES = (1, 8, 2, 4)
"""What is worth most first."""
WARM_UP = 3


@dataclass
class Report:
    """What was measured."""

    weights: str = ""
    """Where they come from."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    compile_s: dict[str, float] = field(default_factory=dict)
    """By weights and batch; for two lengths."""
    difference: dict[str, float] = field(default_factory=dict)
    """Of the fast layers from the exact ones with the same weights, by what was done to them."""
    left_out: list[str] = field(default_factory=list)
    compilations_after_warm_up: int = 0


class Run:
    """Measures one model with one kind of weights.

    Args:
        model: which is changed in place.
        weights: as they are already.
        until: ``time.perf_counter()`` when it should be over.
        watch: makes how often to repeat.
        report: where results go.
        on_found: called whenever there are more.
        backend: as ``torch.compile``'s.
    """

    def __init__(
        self,
        model: Model,
        weights: Weights,
        until: float,
        watch: Callable[[], Stopwatch],
        report: Report,
        on_found: Callable[[], None],
        backend: CompilerBackend = "inductor",
    ) -> None:
        self._model = model
        self._weights = weights
        self._until = until
        self._watch = watch
        self._report = report
        self._on_found = on_found
        self._backend = backend
        layers = model.prompt_format.hidden_layers
        self._exact: Forward = partial(run_library, model.language_model, layers)
        with torch.inference_mode():
            self._padding = self._exact(model.tokens(1, model.lengths[1]))[:, :1]

    def exact(self) -> None:
        """The library's forward pass, to which the length of prompts is all one."""
        last_s = 0.0
        for batch in BATCHES:
            began = time.perf_counter()
            if self._fits("exact", batch, last_s):
                self._measure("exact", self._exact, batch, self._model.lengths[0])
                last_s = time.perf_counter() - began

    def fast(self, last_s: float) -> float:
        """Trimmed and compiled, for each size of batch by itself.

        Args:
            last_s: how long one took with other weights. Each is taken to last as long as the one before.

        Returns:
            How long the last one took.
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
            layers.restore()  # the exact way shares them
            last_s = time.perf_counter() - began
        return last_s

    def _fits(self, profile: str, batch: int, expected_s: float) -> bool:
        """Whether there is time for it; if not, that is told."""
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
        spread = Summary.of(list(seconds(lambda: to_pinned(forward(tokens).flatten(2)), self._watch())))
        row = {"profile": profile, "weights": self._weights, "batch": batch, "prompt_tokens": num_tokens}
        row |= {"seconds": asdict(spread), "prompts_per_s": batch / spread.median}
        row |= {"peak_gb": torch.cuda.max_memory_allocated() / 1e9} if is_gpu else {}
        self._report.rows.append(row)
        self._on_found()


def seconds(work: Callable[[], object], watch: Stopwatch) -> Iterator[float]:
    """How long ``work`` takes, again and again. It waits for the device itself."""
    for _ in watch.rounds():
        began = time.perf_counter()
        work()
        yield time.perf_counter() - began


def measure(
    source: EncoderSource, args: argparse.Namespace, on_found: Callable[[Report], None] = lambda _report: None
) -> Report:
    """Both profiles, with each kind of weights; ``on_found`` is called whenever there is more."""
    report = Report(source.name)
    until, last_s = time.perf_counter() + args.budget_s, 0.0
    for weights in args.weights:
        if time.perf_counter() >= until:
            report.left_out.append(f"{weights} weights: no time was left")
            continue
        model = source.load(weights)
        watch = partial(Stopwatch, args.seconds, args.repeats)
        run = Run(model, weights, until, watch, report, partial(on_found, report), args.backend)
        with torch.inference_mode():
            run.exact()
            last_s = run.fast(last_s)
        del run, model
        torch.compiler.reset()  # compiled code holds weights
        gc.collect()
        torch.cuda.empty_cache()
    return report


def table_of(rows: Sequence[dict[str, Any]]) -> Table:
    """For people."""
    table = Table("profile", "weights", "batch", "tokens", "ms", "prompts/s", "peak GB")
    for row in rows:
        ms = {key: f"{1000 * row['seconds'][key]:.1f}" for key in ("median", "min", "max")}
        milliseconds = f"{ms['median']} ({ms['min']} to {ms['max']}; {row['seconds']['count']})"
        memory = f"{row['peak_gb']:.1f}" if "peak_gb" in row else ""
        numbers = (str(row["batch"]), str(row["prompt_tokens"]), milliseconds, f"{row['prompts_per_s']:.1f}", memory)
        table.add_row(row["profile"], row["weights"], *numbers)
    return table


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.encoder", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="the demo model, few repeats: only to see that it runs")
    parser.add_argument("--model", type=Path, help="a checkpoint's folder, instead of random weights")
    add_so_far_option(parser)
    kinds = ["full", "int8"] if find_spec("torchao") else ["full"]
    parser.add_argument("--weights", nargs="+", default=kinds, choices=["full", "int8", "int4"])
    parser.add_argument("--budget-s", type=float, default=50.0, help="for all; what does not fit is listed")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each figure, at most")
    parser.add_argument("--repeats", type=int, default=30, help="of each figure, at most")
    args = parser.parse_args()
    is_gpu = EncoderSource(FULL).settings().torch_device().type == "cuda"
    args.backend = "inductor" if is_gpu else "eager"  # there, graphs are only to be seen to be captured
    if args.smoke:
        args.repeats = 2
    path = args.model or (None if is_gpu and not args.smoke else WEIGHTS)
    card = machine_card()
    show(card)
    result = Result({"benchmark": "encoder", "card": card}, args.so_far)
    source = EncoderSource(path.resolve(), has_weights=True) if path else EncoderSource(FULL)
    report = measure(source, args, lambda report: result.keep(asdict(report)))
    Console(width=110, file=sys.stdout).print(table_of(report.rows))
    for line in report.left_out:
        print(f"left out: {line}")
    result.tell(asdict(report))


if __name__ == "__main__":
    main()
