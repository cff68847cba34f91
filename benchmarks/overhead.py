"""What the generator adds to diffusers' pipeline, for one client: ``python -m benchmarks.overhead``.

Both services run with the demo model on the CPU, as ``make serve`` starts them and, once more each, with the other
OpenMP settings that are named. A client asks for one image after the other, without a cache. It takes turns with the
bare pipeline, which runs in a process of its own with OpenMP's defaults. The ratio of the two medians says what the
threads, the queue, HTTP and the image's file cost. It holds for a machine that has nothing else to do: the share of the
CPUs' time that other programs took meanwhile is measured too. Prints a card and, last, one JSON line.
"""

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from typing import Any

import httpx
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.bare_pipeline import BarePipeline
from benchmarks.card import machine_card, show
from benchmarks.openmp import HELP, openmp_settings, resolved
from benchmarks.result import Result, add_so_far_option
from demo_model.services import Services, running_services

PROMPT = "a small red circle on a white background"
IDLE_SHARE = 0.05
"""What other programs may take of the CPUs' time while the machine counts as idle."""


class OtherPrograms:
    """The share of the CPUs' time that other processes than ``pids`` take."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._processes = [psutil.Process(pid) for pid in pids]
        self._before = self._seconds()

    def share(self) -> float:
        """Since this was last asked, or since the construction; from 0 to 1."""
        now = self._seconds()
        everything, idle, ours = (after - before for after, before in zip(now, self._before, strict=True))
        self._before = now
        return max(0.0, 1 - (idle + ours) / everything) if everything > 0 else 0.0

    def _seconds(self) -> tuple[float, float, float]:
        """Of all processors until now: altogether, idle, and used by the processes."""
        times = psutil.cpu_times()
        guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # counted as user, too
        used = (process.cpu_times() for process in self._processes)
        return (
            sum(times) - guests,
            times.idle + getattr(times, "iowait", 0.0),
            sum(own.user + own.system for own in used),
        )


class Comparison:
    """One client of running services, in turns with the bare pipeline."""

    def __init__(self, services: Services, bare: BarePipeline, args: argparse.Namespace) -> None:
        self._http = httpx.Client(base_url=services.generator_url, timeout=600)
        self._bare = bare
        self._args = args
        self._others = OtherPrograms([os.getpid(), bare.pid, *(process.pid for process in services.processes)])

    def row(self, side: int) -> dict[str, Any]:
        """The figures of square images of one size."""
        args = self._args
        body = {"width": side, "height": side, "num_inference_steps": args.steps, "cache": "none", "seed": 0}
        self._bare.run(body, most=1)  # the first image of a size also pays for what happens once
        self._request(body)
        self._others.share()
        bare, service = [], []
        for _ in range(args.turns):
            bare += self._bare.run(body, most=args.images)
            service += [self._request(body) for _ in range(args.images)]
        bare_s, service_s = statistics.median(bare), statistics.median(service)
        return {
            "side": side,
            "ratio": round(service_s / bare_s, 3),
            "service_s": round(service_s, 4),
            "bare_s": round(bare_s, 4),
            "images": len(service),
            "others_share": round(self._others.share(), 3),
        }

    def close(self) -> None:
        """Close the client's connection."""
        self._http.close()

    def _request(self, body: dict[str, Any]) -> float:
        began = time.perf_counter()
        self._http.post("/generate", json=body | {"prompt": PROMPT}).raise_for_status()
        return time.perf_counter() - began


def measure(args: argparse.Namespace, result: Result) -> list[dict[str, Any]]:
    """A row for every setting and size."""
    rows: list[dict[str, Any]] = []
    with BarePipeline() as bare:
        for name in args.settings:
            openmp = openmp_settings(name)
            with running_services(openmp=openmp) as services:
                comparison = Comparison(services, bare, args)
                for side in args.sides:
                    rows.append({"settings": name, "openmp": resolved(openmp)} | comparison.row(side))
                    result.keep({"rows": rows})
                comparison.close()
    return rows


def settings_name(text: str) -> str:
    """``text``, if it names settings."""
    openmp_settings(text)
    return text


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    add_so_far_option(parser)
    parser.add_argument("--settings", type=settings_name, nargs="+", default=["serve", "defaults"], help=HELP)
    parser.add_argument("--sides", type=int, nargs="+", default=[128, 256, 512], help="of square images, in pixels")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--turns", type=int, default=7, help="of the client and of the pipeline, at each size")
    parser.add_argument("--images", type=int, default=3, help="in each turn")
    return parser


def main() -> None:
    """Measure and print."""
    args = arguments().parse_args()
    os.environ |= {"GENERATOR_DEVICE": "cpu", "TEXT_ENCODER_DEVICE": "cpu"}
    card = machine_card()
    show(card)
    about = {"benchmark": "overhead", "card": card, "weights": "the demo model", "steps": args.steps}
    result = Result(about, args.so_far)
    rows = measure(args, result)
    table = Table("settings", "size", "generator over pipeline", "taken by other programs")
    for row in rows:
        others = f"{row['others_share']:.0%}" + ("" if row["others_share"] <= IDLE_SHARE else " (not idle)")
        table.add_row(row["settings"], f"{row['side']}x{row['side']}", f"{row['ratio']:.2f}", others)
    Console(width=100).print(table)
    result.tell({"rows": rows})


if __name__ == "__main__":
    main()
