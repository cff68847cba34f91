"""Measures the generator's overhead over diffusers' pipeline for one client: ``python -m benchmarks.serving.overhead``.

Both services run with the demo model on the CPU, under each of the given OpenMP settings. A client requests one image
after the other, without a cache, and alternates with the bare pipeline, which runs in a separate process with OpenMP's
defaults. The ratio of the medians is the cost of threads, queue, HTTP and encoding. It is valid on an idle machine, so
the share of CPU time that other programs used is measured too. Prints system information and, as the last line, JSON.
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

from benchmarks.report.result import Result, add_so_far_option
from benchmarks.report.system_info import show, system_info
from benchmarks.serving.bare_pipeline import BarePipeline
from benchmarks.serving.openmp import HELP, openmp_settings, resolved
from demo_model.services import Services, running_services

PROMPT = "a small red circle on a white background"
IDLE_SHARE = 0.05
"""Largest share of CPU time of other programs for which the machine counts as idle."""


class OtherPrograms:
    """Measures the share of CPU time that processes other than ``pids`` use."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._processes = [psutil.Process(pid) for pid in pids]
        self._before = self._seconds()

    def share(self) -> float:
        """Return the share, 0 to 1, since the last call or the construction."""
        now = self._seconds()
        everything, idle, ours = (after - before for after, before in zip(now, self._before, strict=True))
        self._before = now
        return max(0.0, 1 - (idle + ours) / everything) if everything > 0 else 0.0

    def _seconds(self) -> tuple[float, float, float]:
        """Return CPU seconds since boot: total, idle, and used by the processes."""
        times = psutil.cpu_times()
        guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # included in user
        used = (process.cpu_times() for process in self._processes)
        return (
            sum(times) - guests,
            times.idle + getattr(times, "iowait", 0.0),
            sum(own.user + own.system for own in used),
        )


class Comparison:
    """A client of running services, which alternates with the bare pipeline."""

    def __init__(self, services: Services, bare: BarePipeline, args: argparse.Namespace) -> None:
        self._http = httpx.Client(base_url=services.generator_url, timeout=600)
        self._bare = bare
        self._args = args
        self._others = OtherPrograms([os.getpid(), bare.pid, *(process.pid for process in services.processes)])

    def row(self, side: int) -> dict[str, Any]:
        """Measure square images of one size."""
        args = self._args
        body = {"width": side, "height": side, "num_inference_steps": args.steps, "cache": "none", "seed": 0}
        self._bare.run(body, max_images=1)  # warm-up
        self._request(body)
        self._others.share()
        bare, service = [], []
        for _ in range(args.turns):
            bare += self._bare.run(body, max_images=args.images)
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
        self._http.close()

    def _request(self, body: dict[str, Any]) -> float:
        began = time.perf_counter()
        self._http.post("/generate", json=body | {"prompt": PROMPT}).raise_for_status()
        return time.perf_counter() - began


def measure(args: argparse.Namespace, result: Result) -> list[dict[str, Any]]:
    """Measure all settings and sizes."""
    rows: list[dict[str, Any]] = []
    with BarePipeline() as bare:
        for name in args.settings:
            openmp = openmp_settings(name)
            with running_services(openmp=openmp) as services:
                comparison = Comparison(services, bare, args)
                for side in args.sides:
                    rows.append({"settings": name, "openmp": resolved(openmp)} | comparison.row(side))
                    result.save({"rows": rows})
                comparison.close()
    return rows


def settings_name(text: str) -> str:
    """Check the name of OpenMP settings, and return it."""
    openmp_settings(text)
    return text


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.overhead", description=__doc__)
    add_so_far_option(parser)
    parser.add_argument("--settings", type=settings_name, nargs="+", default=["serve", "defaults"], help=HELP)
    parser.add_argument("--sides", type=int, nargs="+", default=[128, 256, 512], help="of square images, in pixels")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--turns", type=int, default=7, help="number of turns at each size")
    parser.add_argument("--images", type=int, default=3, help="images per turn")
    return parser


def main() -> None:
    args = arguments().parse_args()
    os.environ |= {"GENERATOR_DEVICE": "cpu", "TEXT_ENCODER_DEVICE": "cpu"}
    system = system_info()
    show(system)
    about = {"benchmark": "overhead", "card": system, "weights": "the demo model", "steps": args.steps}
    result = Result(about, args.so_far)
    rows = measure(args, result)
    table = Table("settings", "size", "generator over pipeline", "CPU time of other programs")
    for row in rows:
        others = f"{row['others_share']:.0%}" + ("" if row["others_share"] <= IDLE_SHARE else " (not idle)")
        table.add_row(row["settings"], f"{row['side']}x{row['side']}", f"{row['ratio']:.2f}", others)
    Console(width=100).print(table)
    result.finish({"rows": rows})


if __name__ == "__main__":
    main()
