"""Compares the throughput of many concurrent HTTP clients to a bare pipeline: ``python -m benchmarks.serving.load``.

Both services run with the demo model in separate processes, by default with the OpenMP settings of ``make serve``. The
baseline calls diffusers' pipeline in a loop, with the same schedule, size and steps, in a process with OpenMP's
defaults. The clients and the baseline alternate, because the speed of a machine varies. The result is the median ratio
of the throughput of a turn to the mean of the two baseline runs around it. ``benchmarks.serving.overhead`` compares
several settings and sizes for one client. Clients that get 429 retry after ``Retry-After``. Prints system information
and, as the last line, JSON.
"""

import argparse
import asyncio
import json
import os
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import httpx
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.report.system_info import show, system_info
from benchmarks.serving.bare_pipeline import BarePipeline
from benchmarks.serving.openmp import HELP, openmp_settings, resolved
from demo_model.services import Services, running_services

PROMPTS = [f"a {size} red circle on a {color} background" for size in ("small", "large") for color in ("white", "blue")]
MEMORY_EVERY_S = 1.0


@dataclass
class Load:
    """Measurements of all clients."""

    statuses: Counter[int] = field(default_factory=Counter)
    latencies_s: list[float] = field(default_factory=list)
    """Latency of images, including earlier responses with 429."""
    refusals_s: list[float] = field(default_factory=list)
    estimate_errors: list[float] = field(default_factory=list)
    """|estimated / measured - 1| of each image's denoising and decoding time."""
    device_s: float = 0.0
    """Total time of denoising and decoding."""
    memory_mb: list[float] = field(default_factory=list)
    """Resident memory of the generator, sampled every second."""
    seconds: float = 0.0

    @property
    def images_per_s(self) -> float:
        return len(self.latencies_s) / self.seconds


async def client(http: httpx.AsyncClient, body: dict[str, Any], load: Load, until: float) -> None:
    """Run a client that requests one image after the other."""
    seed = 0
    while time.perf_counter() < until:
        request = body | {"seed": seed, "prompt": PROMPTS[seed % len(PROMPTS)]}
        seed += 1
        began = time.perf_counter()
        while (response := await http.post("/generate", json=request)).status_code == httpx.codes.TOO_MANY_REQUESTS:
            load.statuses[response.status_code] += 1
            load.refusals_s.append(response.elapsed.total_seconds())
            await asyncio.sleep(min(float(response.headers["retry-after"]), max(0.0, until - time.perf_counter())))
            if time.perf_counter() >= until:
                return
        load.statuses[response.status_code] += 1
        if response.status_code == httpx.codes.OK:
            load.latencies_s.append(time.perf_counter() - began)
            elapsed = float(response.headers["x-denoise-ms"]) + float(response.headers["x-decode-ms"])
            load.device_s += elapsed / 1000
            load.estimate_errors.append(abs(float(response.headers["x-estimate-ms"]) / elapsed - 1))


async def run_load(services: Services, body: dict[str, Any], num_clients: int, seconds: float, load: Load) -> float:
    """Run all clients for ``seconds``, wait for their last images, and return the images per second."""
    generator, before = psutil.Process(services.processes[-1].pid), len(load.latencies_s)
    limits = httpx.Limits(max_connections=num_clients)
    async with httpx.AsyncClient(base_url=services.generator_url, timeout=600, limits=limits) as http:
        await http.post("/generate", json=body | {"prompt": PROMPTS[0]})
        began = time.perf_counter()
        clients = [client(http, body, load, began + seconds) for _ in range(num_clients)]
        running = asyncio.gather(*clients)
        while not running.done():
            load.memory_mb.append(generator.memory_info().rss / 1e6)
            await asyncio.wait([running], timeout=MEMORY_EVERY_S)
        await running
    elapsed = time.perf_counter() - began
    load.seconds += elapsed
    return (len(load.latencies_s) - before) / elapsed


def ratios(rates: list[float], bare: list[float]) -> list[float]:
    """Divide each rate by the mean of the two baseline rates around it."""
    return [rate / statistics.fmean(around) for rate, around in zip(rates, pairwise(bare), strict=True)]


def summary(load: Load, rates: list[float], bare: list[float], batch: int) -> dict[str, Any]:
    """Compute the figures of the JSON report."""
    cuts = statistics.quantiles(load.latencies_s, n=100)
    half = len(load.memory_mb) // 2
    return {
        "seconds": round(load.seconds, 1),
        "pictures": len(load.latencies_s),
        "statuses": {str(status): count for status, count in sorted(load.statuses.items())},
        "pictures_per_s": round(load.images_per_s, 3),
        "bare_pictures_per_s": [round(rate, 3) for rate in bare],
        "ratio": round(statistics.median(ratios(rates, bare)), 3),
        "ratios": [round(ratio, 3) for ratio in ratios(rates, bare)],
        "device_idle_share": round(1 - load.device_s / load.seconds, 3)
        if batch == 1
        else None,  # otherwise images share runs
        "latency_s": {f"p{k}": round(cuts[k - 1], 2) for k in (50, 95, 99)},
        "refusal_ms_p99": round(1000 * statistics.quantiles(load.refusals_s, n=100)[98], 1)
        if load.refusals_s
        else None,
        "estimate_error_median": round(statistics.median(load.estimate_errors), 3),
        "estimate_error_p90": round(statistics.quantiles(load.estimate_errors, n=10)[8], 3),
        "memory_mb_half_and_end": [round(load.memory_mb[half]), round(load.memory_mb[-1])],
    }


def alternate(args: argparse.Namespace, body: dict[str, Any], load: Load) -> tuple[list[float], list[float]]:
    """Alternate clients and baseline; return the images per second of each turn of the clients and of the baseline."""
    rates: list[float] = []
    with BarePipeline() as pipeline, running_services(openmp=args.settings) as services:

        def bare_rate() -> float:
            seconds = pipeline.run(body, seconds=args.bare_seconds)
            return len(seconds) / sum(seconds)

        pipeline.run(body, max_images=1)  # warm-up
        bare = [bare_rate()]
        for _ in range(args.turns):
            rates.append(asyncio.run(run_load(services, body, args.clients, args.seconds, load)))
            bare.append(bare_rate())
    return rates, bare


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.load", description=__doc__)
    parser.add_argument("--settings", type=openmp_settings, default="serve", help=HELP)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--turns", type=int, default=6, help="number of turns of the clients")
    parser.add_argument("--seconds", type=float, default=20.0, help="duration of each turn of the clients")
    parser.add_argument("--bare-seconds", type=float, default=10.0, help="duration of each turn of the baseline")
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--cache", default="none")
    parser.add_argument("--batch", type=int, default=1, help="largest number of images that share a run")
    return parser


def main() -> None:
    args = arguments().parse_args()
    cache = int(args.cache) if args.cache.isdigit() else args.cache
    body = {"width": args.side, "height": args.side, "num_inference_steps": args.steps, "cache": cache}
    system = system_info()
    show(system)
    os.environ["GENERATOR_MAX_BATCH"] = str(args.batch)
    load = Load()
    figures = summary(load, *alternate(args, body, load), args.batch)
    title = f"{args.clients} clients, {args.side}x{args.side}, {args.steps} steps, {cache}"
    table = Table("figure", "value", title=title)
    for name, value in figures.items():
        table.add_row(name, str(value))
    Console(width=100).print(table)
    about = {"benchmark": "load", "card": system, "weights": "the demo model", "clients": args.clients}
    print(json.dumps(about | {"batch": args.batch, "openmp": resolved(args.settings)} | body | figures))


if __name__ == "__main__":
    main()
