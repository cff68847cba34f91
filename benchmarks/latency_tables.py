"""The tables of ``benchmarks.latency``, for people at a terminal."""

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table


def show_latency(report: Mapping[str, Any]) -> None:
    """Print what was measured, from its JSON."""
    console = Console(width=130, file=sys.stdout)
    for profile, done in report["performance"].items():
        console.print(f"asked for {profile}: {done}", highlight=False)
    if report["steps"]:
        console.print(steps_table(report["steps"]))
    if report["pictures"]:
        console.print(pictures_table(report["pictures"]))
    for entry in report["left_out"]:
        console.print("left out:", ", ".join(f"{key} {value}" for key, value in entry.items()), highlight=False)


def steps_table(rows: list[dict[str, Any]]) -> Table:
    """What steps cost."""
    table = Table(
        "profile", "shape", "computed step", "of the floor", "reused step", "decode", "fixed", "prepare", "peak",
        title="steps",
    )  # fmt: skip
    for row in rows:
        floor_s, peak = row["floor_s"], row["peak_memory_gb"]
        table.add_row(
            row["profile"],
            row["shape"],
            spread(row["computed_s"]),
            share(floor_s, row["computed_s"]["median"]),
            spread(row["reused_s"]),
            spread(row["decode_s"]),
            seconds(row["fixed_s"]),
            seconds(row["prepare_s"]),
            "" if peak is None else f"{peak:.1f} GB",
        )
    return table


def pictures_table(rows: list[dict[str, Any]]) -> Table:
    """What whole pictures took."""
    table = Table(
        "profile", "shape", "mode", "computed", "seconds", "of the floor", "energy", "power", "clock",
        title="pictures, end to end",
    )  # fmt: skip
    for row in rows:
        drawn = row["drawn"]
        power = ("", "", "")
        if drawn is not None:
            energy_j = drawn["energy_j"] / row["seconds"]["count"]
            power = (f"{energy_j:.0f} J", f"{drawn['mean_w']:.0f} W", f"{drawn['mean_sm_mhz']:.0f} MHz")
        table.add_row(
            row["profile"],
            row["shape"],
            row["mode"],
            f"{row['num_computed']} of {row['num_steps']}",
            spread(row["seconds"]),
            share(row["floor_s"], row["seconds"]["median"]),
            *power,
        )
    return table


def spread(value: Mapping[str, float]) -> str:
    """Median, and the range if there were several."""
    median = seconds(value["median"])
    return median if value["count"] == 1 else f"{median} ({seconds(value['min'])} to {seconds(value['max'])})"


def seconds(value: float) -> str:
    """Seconds, or milliseconds where these are few."""
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.3g} ms"


def share(floor_s: float | None, taken_s: float) -> str:
    """How much of the floor's speed was reached; nothing where no floor is known."""
    return "" if floor_s is None else f"{100 * floor_s / taken_s:.0f} %"
