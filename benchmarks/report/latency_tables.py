"""Tables of ``benchmarks.generator.latency`` for the terminal."""

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table


def show_latency(report: Mapping[str, Any]) -> None:
    """Print a JSON report as tables."""
    console = Console(width=130, file=sys.stdout)
    for profile, done in report["performance"].items():
        console.print(f"requested {profile}: {done}", highlight=False)
    if report["steps"]:
        console.print(steps_table(report["steps"]))
    if report["pictures"]:
        console.print(images_table(report["pictures"]))
    for entry in report["left_out"]:
        console.print("left out:", ", ".join(f"{key} {value}" for key, value in entry.items()), highlight=False)


def steps_table(rows: list[dict[str, Any]]) -> Table:
    """Format the times of steps."""
    table = Table(
        "profile", "shape", "computed step", "of the roofline", "reused step", "decode", "fixed", "prepare", "peak",
        title="steps",
    )  # fmt: skip
    for row in rows:
        roofline_s, peak = row["floor_s"], row["peak_memory_gb"]
        table.add_row(
            row["profile"],
            row["shape"],
            median_and_range(row["computed_s"]),
            share(roofline_s, row["computed_s"]["median"]),
            median_and_range(row["reused_s"]),
            median_and_range(row["decode_s"]),
            seconds(row["fixed_s"]),
            seconds(row["prepare_s"]),
            "" if peak is None else f"{peak:.1f} GB",
        )
    return table


def images_table(rows: list[dict[str, Any]]) -> Table:
    """Format the times of whole images."""
    table = Table(
        "profile", "shape", "mode", "computed", "seconds", "of the roofline", "energy", "power", "clock",
        title="images, end to end",
    )  # fmt: skip
    for row in rows:
        usage = row["drawn"]
        power = ("", "", "")
        if usage is not None:
            energy_j = usage["energy_j"] / row["seconds"]["count"]
            power = (f"{energy_j:.0f} J", f"{usage['mean_w']:.0f} W", f"{usage['mean_sm_mhz']:.0f} MHz")
        table.add_row(
            row["profile"],
            row["shape"],
            row["mode"],
            f"{row['num_computed']} of {row['num_steps']}",
            median_and_range(row["seconds"]),
            share(row["floor_s"], row["seconds"]["median"]),
            *power,
        )
    return table


def median_and_range(value: Mapping[str, float]) -> str:
    """Format the median and, for several measurements, the range."""
    median = seconds(value["median"])
    return median if value["count"] == 1 else f"{median} ({seconds(value['min'])} to {seconds(value['max'])})"


def seconds(value: float) -> str:
    """Format a time in seconds or milliseconds."""
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.3g} ms"


def share(roofline_s: float | None, measured_s: float) -> str:
    """Format the achieved share of the roofline; empty if the roofline is unknown."""
    return "" if roofline_s is None else f"{100 * roofline_s / measured_s:.0f} %"
