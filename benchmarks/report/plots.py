"""Plots of benchmark results, error graphs and schedules."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from generator_service.lemica import ErrorGraph, Schedule

if TYPE_CHECKING:
    from benchmarks.lemica.evaluator import Outcome

DPI = 110
COLORS = colormaps["tab20"]


def plot_quality(outcomes: Sequence["Outcome"], file: Path) -> None:
    """Plot the mean PSNR of each method against its computed steps, with a band down to our worst tenth."""
    figure = Figure(figsize=(9.5, 5), layout="constrained")
    axes = figure.subplots()
    best = {o.name: o.psnr for o in sorted(outcomes, key=lambda o: o.psnr) if o.name != "no cache"}
    for number, name in enumerate(
        sorted(best, key=lambda name: -best[name])
    ):  # so that the legend has the order of the lines
        of_one = sorted((o for o in outcomes if o.name == name), key=lambda o: o.computed)
        ours = name.startswith("ours")
        axes.plot(
            [o.computed for o in of_one],
            [o.psnr for o in of_one],
            marker="o" if ours else ".",
            linewidth=2.5 if ours else 1,
            linestyle="-" if ours or name.startswith("LeMiCa") else "--",
            color=COLORS(number % COLORS.N),
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
    """Plot the error of each edge, by its first step (x) and its length (y)."""
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
    """Plot schedules as rows, with computed steps dark."""
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


def plot_scaling(report: dict[str, Any], folder: Path) -> None:
    """Plot the results of ``benchmarks.serving.scale``: measured throughput and simulated waiting times."""
    folder.mkdir(parents=True, exist_ok=True)
    if "throughput" in report:
        plot_throughput(report["throughput"], folder / "throughput.png")
    plot_waiting(report["simulation"], folder / "waiting.png")


def plot_throughput(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Plot images per second against the number of generators, with the ideal throughput."""
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.subplots()
    counts = [row["generators"] for row in rows]
    axes.plot(counts, [row["ideal_pictures_per_s"] for row in rows], linestyle="--", color="grey", label="steps alone")
    axes.plot(counts, [row["pictures_per_s"] for row in rows], marker="o", linewidth=2.5, label="measured")
    axes.set_xticks(counts)
    axes.set_xlabel("simulated generators")
    axes.set_ylabel("images per second")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=DPI)


def plot_waiting(simulation: dict[str, Any], file: Path) -> None:
    """Plot the waiting time for generators by utilization (left), and the effect of more encoders (right)."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    waits, encoders = figure.subplots(1, 2)
    for count, rows in simulation["line_by_fleet"].items():
        waits.plot([100 * row[0] for row in rows], [max(row[1], 1e-3) for row in rows], marker="o", label=count)
    waits.set_yscale("log")
    waits.set_xlabel("generators busy, %")
    waits.set_ylabel("mean wait for one, s")
    waits.legend(title="generators", fontsize=8)
    numbers = [row[0] for row in simulation["encoders_at_95_percent"]]
    for column, label in ((1, "median"), (2, "99th percentile")):
        seconds = [row[column] for row in simulation["encoders_at_95_percent"]]
        encoders.plot(numbers, seconds, marker="o", label=label)
    encoders.set_yscale("log")
    encoders.set_xlabel(f"text encoders for {simulation['generators']} generators")
    encoders.set_ylabel("s until embedded")
    encoders.legend(fontsize=8)
    for axes in (waits, encoders):
        axes.grid(alpha=0.3, which="both")
    figure.savefig(file, dpi=DPI)


def plot_latency(images: Sequence[dict[str, Any]], file: Path) -> None:
    """Plot seconds against computed steps for each profile at the first shape, with the roofline."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    first = images[0]["shape"]
    for number, profile in enumerate(sorted({row["profile"] for row in images})):
        of_one = [row for row in images if row["profile"] == profile and row["shape"] == first]
        rows = sorted(of_one, key=lambda row: row["num_computed"])
        counts, color = [row["num_computed"] for row in rows], COLORS(2 * number)
        axes.plot(counts, [row["seconds"]["median"] for row in rows], marker="o", color=color, label=profile)
        if rows and rows[0]["floor_s"] is not None:
            axes.plot(
                counts, [row["floor_s"] for row in rows], linestyle=":", color=color, label=f"{profile}, roofline"
            )
    axes.set_xlabel("computed steps")
    axes.set_ylabel(f"s, end to end, {first}")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=DPI)
