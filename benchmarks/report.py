"""Writes ``docs/performance.md`` and its plots from the results that are committed: ``python -m benchmarks.report``.

Nothing is measured here, and no figure comes from anywhere but the JSON files below ``benchmarks/results/``, beside the
counted floors and what others published, which is marked as such.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

from benchmarks.memory_tables import memory_section, paragraph
from benchmarks.report_tables import SECTIONS, markdown
from benchmarks.roofline import BF16_FLOP_PER_S, FLUX2_DEV, step_work

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
IMAGES = ROOT / "docs" / "images" / "performance"
TITLES = {
    "memory": "Memory",
    "latency": "An image, from the request to its PNG file",
    "peers": "Comparison with other methods",
    "trace": "Inside the denoising loop",
    "encoder": "The text encoder",
    "precision": "Fewer bits",
    "reuse": "A reused step",
    "load": "Both services under load",
    "overhead": "The service beside diffusers' pipeline",
}
"""In the order of the page."""
WIDTH = 120
FLOOR_SIDES = ((512, 0), (1024, 0), (1024, 1), (2048, 0), (1024, 4))
PUBLISHED = (
    ("LeMiCa's authors, one H100, 1024x1024, 50 steps", "32.70 s", "13.41 s", "10.20 s", "6.99 s"),
    ("SGLang, one H100, 1024x1024, 50 steps", "24.6 s", "", "", ""),
)

INTRODUCTION = """# Performance

Written by `python -m benchmarks.report` from the files in `benchmarks/results` alone. The profiles are described in
[Configure](configure.md#profiles-of-the-generator).
"""
HOW_TO = """
To measure another machine: `python -m benchmarks.gpu --out benchmarks/results/NAME`, ten minutes at most, then
`python -m benchmarks.report`. Full size means FLUX.2 [dev]'s architecture with random weights. Figures are medians of
warm runs, with smallest, largest and count in parentheses where there are several.
"""
NO_GPU = """
**There is no result of a GPU yet**, so this page has no times of FLUX.2 [dev] of ours.
"""


@dataclass(frozen=True)
class Result:
    """One committed result."""

    name: str
    """Of its file, below the results."""
    report: Mapping[str, Any]

    @property
    def is_of_gpu(self) -> bool:
        """Whether it was measured on one."""
        return "gpu" in self.report["card"]["machine"]

    @property
    def kind(self) -> str:
        """Which benchmark told it."""
        return str(self.report["benchmark"])


def read_results(folder: Path) -> list[Result]:
    """The results below ``folder`` that have a card, in the order of the page; others are told elsewhere."""
    found = []
    for file in sorted(folder.rglob("*.json")):
        report = json.loads(file.read_text(encoding="utf-8"))
        if report.get("benchmark") in TITLES and "card" in report:
            found.append(Result(file.relative_to(folder).as_posix(), report))
    return sorted(found, key=lambda result: list(TITLES).index(result.kind))


def render(results: Sequence[Result]) -> str:
    """The page."""
    measured = [result for result in results if result.kind != "memory"]
    of_gpu = [result for result in measured if result.is_of_gpu]
    of_cpu = [result for result in measured if not result.is_of_gpu]
    parts = [INTRODUCTION, HOW_TO, floors()]
    parts += [memory(result) for result in results if result.kind == "memory"]
    parts += [published(), "\n## On a GPU\n"]
    parts += [section(result) for result in of_gpu] or [NO_GPU]
    parts += [
        "\n## On a CPU\n",
        "\nSeconds here say nothing about FLUX.2 [dev] on a GPU; ratios and counts may still hold.\n",
    ]
    parts += [section(result) for result in of_cpu]
    return "".join(parts)


def section(result: Result) -> str:
    """One result: its card, then what it says."""
    report = result.report
    heading = f"\n### {TITLES[result.kind]}: {machine_of(report['card'])}\n\n"
    plot = f"\n![{TITLES[result.kind]}](images/performance/{plot_name(result)})\n" if has_plot(result) else ""
    return heading + about(result) + plot + "".join(SECTIONS[result.kind](report))


def about(result: Result) -> str:
    """Where, with what and when it was measured."""
    card = result.report["card"]
    versions = ", ".join(f"{name} {version}" for name, version in card["versions"].items())
    commit = card["commit"]["commit"] + (" with changes" if card["commit"].get("is_dirty") else "")
    machine = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in card["machine"].items())
    weights = f"Weights: {result.report['weights']}. Machine: " if "weights" in result.report else ""
    early = (
        f"It ended early ({result.report['partial']}): not everything was measured. "
        if "partial" in result.report
        else ""
    )
    line = (
        f"{early}Measured {card['date']}, commit {commit}. {weights}{machine}. Versions: {versions}."
        f" [The result](../benchmarks/results/{result.name})."
    )
    return fill(line, WIDTH, break_long_words=False, break_on_hyphens=False) + "\n"


def machine_of(card: Mapping[str, Any]) -> str:
    """The machine in a few words."""
    machine = card["machine"]
    return str(machine.get("gpu", "a CPU"))


def floors() -> str:
    """What a step must compute."""
    rows = []
    for side, num_references in FLOOR_SIDES:
        num_tokens = (side // 16) ** 2 + num_references * 4096
        work = step_work(FLUX2_DEV, num_tokens)
        shape = f"{side}x{side}" + (f" + {num_references} of 1024x1024" if num_references else "")
        bf16_s, fp8_s = work.roofline_s("fast"), work.roofline_s("fastest")
        rows.append(
            (
                shape,
                f"{num_tokens:,}".replace(",", " "),
                f"{(work.linear + work.rest) / 1e15:.4f}",
                f"{work.attention / 1e15:.4f}",
                f"{bf16_s:.3f} s",
                f"{fp8_s:.3f} s",
                f"{50 * bf16_s:.1f} / {50 * fp8_s:.1f} s",
            )
        )
    header = ("image + references", "image tokens", "linear PFLOP", "attention PFLOP", "bf16", "fp8", "50 steps")
    text = f"""
## The floor

Counted, not measured: the matrix products of one step of FLUX.2 [dev]'s transformer with 512 text tokens, over
{BF16_FLOP_PER_S / 1e12:.0f} TFLOP/s, which a large bf16 product reaches on one H200, or twice that for the blocks'
linear layers in fp8. Nothing that computes all of it can be faster there.

"""
    return text + markdown(header, rows)


def memory(result: Result) -> str:
    """What was counted on tensors without memory, with which libraries."""
    card = result.report["card"]
    versions = ", ".join(f"{name} {version}" for name, version in card["versions"].items())
    origin = f"Counted {card['date']} with {versions}. [The result](../benchmarks/results/{result.name})."
    return "\n## Memory\n" + "".join(memory_section(result.report)) + paragraph(origin)


def published() -> str:
    """What others published."""
    header = ("published, not measured by us", "none", "slow", "medium", "fast")
    text = """
## Published figures

The times of LeMiCa's authors include the text encoder, have no warm-up, and
[fit fewer computed steps](../README.md#latency) than published.

"""
    return text + markdown(header, PUBLISHED)


def has_plot(result: Result) -> bool:
    """Whether a plot belongs to it."""
    return result.is_of_gpu and result.kind == "latency" and bool(result.report["pictures"])


def plot_name(result: Result) -> str:
    """Its file."""
    return result.name.removesuffix(".json").replace("/", "-") + ".png"


def write(results_folder: Path, page: Path, images: Path) -> None:
    """The page and the plots."""
    results = read_results(results_folder)
    page.write_text(render(results), encoding="utf-8")
    for result in results:
        if has_plot(result):
            from benchmarks.plots import plot_latency  # noqa: PLC0415 - matplotlib is only needed for it

            images.mkdir(parents=True, exist_ok=True)
            plot_latency(result.report["pictures"], images / plot_name(result))


def main() -> None:
    """Write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.parse_args()
    write(RESULTS, PAGE, IMAGES)


if __name__ == "__main__":
    main()
