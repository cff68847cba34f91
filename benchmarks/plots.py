"""The pictures of a quality run: quality against computed steps, a graph's errors, which steps are computed."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from generator_service.lemica import ErrorGraph, Schedule

if TYPE_CHECKING:
    from benchmarks.quality import Outcome

DPI = 110
COLOURS = colormaps["tab20"]


def plot_quality(outcomes: Sequence["Outcome"], file: Path) -> None:
    """Mean PSNR of every way against the steps it computed; the band of ours is its worst tenth."""
    figure = Figure(figsize=(9.5, 5), layout="constrained")
    axes = figure.subplots()
    best = {o.name: o.psnr for o in sorted(outcomes, key=lambda o: o.psnr) if o.name != "no cache"}
    for number, name in enumerate(sorted(best, key=lambda name: -best[name])):  # the legend is in the lines' order
        of_one = sorted((o for o in outcomes if o.name == name), key=lambda o: o.computed)
        ours = name.startswith("ours")
        axes.plot(
            [o.computed for o in of_one],
            [o.psnr for o in of_one],
            marker="o" if ours else ".",
            linewidth=2.5 if ours else 1,
            linestyle="-" if ours or name.startswith("LeMiCa") else "--",
            color=COLOURS(number % COLOURS.N),
            label=name,
        )
        if ours:
            worst = [o.psnr_worst_tenth for o in of_one]
            axes.fill_between([o.computed for o in of_one], worst, [o.psnr for o in of_one], alpha=0.15)
    axes.set_xlabel("computed steps")
    axes.set_ylabel("PSNR to the full run, dB (mean)")
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right upper")
    figure.savefig(file, dpi=DPI)


def plot_errors(graph: ErrorGraph, file: Path) -> None:
    """The error of every edge: from a step to the right, how far it skips upwards."""
    longest = max(j - i for i, j in graph.errors)
    shown = np.full((longest - 1, graph.num_steps), np.nan)
    for (i, j), error in graph.errors.items():
        if j - i >= 2:
            shown[j - i - 2, i] = max(error, 1e-9)
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(
        shown, origin="lower", aspect="auto", norm=LogNorm(), extent=(-0.5, graph.num_steps - 0.5, 1.5, longest + 0.5)
    )
    axes.set_xlabel("last computed step before the skip")
    axes.set_ylabel("steps to the next")
    figure.colorbar(image, label="error of the final latents")
    figure.savefig(file, dpi=DPI)


def plot_schedules(schedules: Sequence[Schedule], file: Path) -> None:
    """One row for each schedule: dark steps are computed."""
    rows = np.array([[s.is_computed(step) for step in range(s.num_steps)] for s in schedules], dtype=float)
    figure = Figure(figsize=(8, 0.4 + 0.24 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(rows, aspect="auto", cmap="Blues", vmin=0, vmax=1.2, interpolation="nearest")
    axes.set_yticks(range(len(rows)), [f"{s.name}" for s in schedules], fontsize=8)
    axes.set_yticks(np.arange(-0.5, len(rows)), minor=True)
    axes.set_xticks(np.arange(-0.5, rows.shape[1]), minor=True)
    axes.grid(which="minor", color="white")
    axes.tick_params(which="both", length=0)
    axes.set_xlabel("step")
    figure.savefig(file, dpi=DPI)
