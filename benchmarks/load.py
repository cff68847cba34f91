"""Many clients at once, over HTTP, against a bare loop over the pipeline: ``python -m benchmarks.load``.

Both services run with the demo model as processes of their own, with OpenMP's settings as ``make serve`` has them
unless others are named. The bare loop is over diffusers' pipeline with the same schedule, size and steps, in a process
with OpenMP's defaults. It and the clients take turns, since machines are not equally fast all the time; the median
ratio of pictures a second, those of a turn over those of the two loops around it, says what the service costs.
``benchmarks.overhead`` compares several settings and sizes, for one client. Clients that are refused with 429 come back
when they were told. Prints a card and, last, one JSON line.
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

from benchmarks.bare_pipeline import BarePipeline
from benchmarks.card import machine_card, show
from benchmarks.openmp import HELP, openmp_settings, resolved
from demo_model.services import Services, running_services

PROMPTS = [f"a {size} red circle on a {color} background" for size in ("small", "large") for color in ("white", "blue")]
MEMORY_EVERY_S = 1.0


@dataclass
class Load:
    """What the clients saw."""

    statuses: Counter[int] = field(default_factory=Counter)
    latencies_s: list[float] = field(default_factory=list)
    """Of pictures, refusals before them included."""
    refusals_s: list[float] = field(default_factory=list)
    estimate_errors: list[float] = field(default_factory=list)
    """|expected / taken - 1| of each picture's denoising and decoding."""
    device_s: float = 0.0
    """Of all pictures: denoising and decoding."""
    memory_mb: list[float] = field(default_factory=list)
    """Resident size of the generator, each second."""
    seconds: float = 0.0

    @property
    def pictures_per_s(self) -> float:
        """Throughput."""
        return len(self.latencies_s) / self.seconds


async def client(http: httpx.AsyncClient, body: dict[str, Any], load: Load, until: float) -> None:
    """One client: a picture after the other."""
    seed = 0
    while time.perf_counter() < until:
        asked = body | {"seed": seed, "prompt": PROMPTS[seed % len(PROMPTS)]}
        seed += 1
        began = time.perf_counter()
        while (answer := await http.post("/generate", json=asked)).status_code == httpx.codes.TOO_MANY_REQUESTS:
            load.statuses[answer.status_code] += 1
            load.refusals_s.append(answer.elapsed.total_seconds())
            await asyncio.sleep(min(float(answer.headers["retry-after"]), max(0.0, until - time.perf_counter())))
            if time.perf_counter() >= until:
                return
        load.statuses[answer.status_code] += 1
        if answer.status_code == httpx.codes.OK:
            load.latencies_s.append(time.perf_counter() - began)
            taken = float(answer.headers["x-denoise-ms"]) + float(answer.headers["x-decode-ms"])
            load.device_s += taken / 1000
            load.estimate_errors.append(abs(float(answer.headers["x-estimate-ms"]) / taken - 1))


async def run_load(services: Services, body: dict[str, Any], num_clients: int, seconds: float, load: Load) -> float:
    """All clients, for so long; then what still runs is waited for. Returns the pictures a second."""
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
    taken = time.perf_counter() - began
    load.seconds += taken
    return (len(load.latencies_s) - before) / taken


def ratios(rates: list[float], bare: list[float]) -> list[float]:
    """Each rate over the mean of the two bare loops around it."""
    return [rate / statistics.fmean(around) for rate, around in zip(rates, pairwise(bare), strict=True)]


def summary(load: Load, rates: list[float], bare: list[float], batch: int) -> dict[str, Any]:
    """The figures."""
    cuts = statistics.quantiles(load.latencies_s, n=100)
    half = len(load.memory_mb) // 2
    return {
        "seconds": round(load.seconds, 1),
        "pictures": len(load.latencies_s),
        "statuses": {str(status): count for status, count in sorted(load.statuses.items())},
        "pictures_per_s": round(load.pictures_per_s, 3),
        "bare_pictures_per_s": [round(rate, 3) for rate in bare],
        "ratio": round(statistics.median(ratios(rates, bare)), 3),
        "ratios": [round(ratio, 3) for ratio in ratios(rates, bare)],
        "device_idle_share": round(1 - load.device_s / load.seconds, 3) if batch == 1 else None,  # else runs are shared
        "latency_s": {f"p{k}": round(cuts[k - 1], 2) for k in (50, 95, 99)},
        "refusal_ms_p99": round(1000 * statistics.quantiles(load.refusals_s, n=100)[98], 1)
        if load.refusals_s
        else None,
        "estimate_error_median": round(statistics.median(load.estimate_errors), 3),
        "estimate_error_p90": round(statistics.quantiles(load.estimate_errors, n=10)[8], 3),
        "memory_mb_half_and_end": [round(load.memory_mb[half]), round(load.memory_mb[-1])],
    }


def take_turns(args: argparse.Namespace, body: dict[str, Any], load: Load) -> tuple[list[float], list[float]]:
    """Images a second of each turn of the clients, and of the bare loop before, between and after them."""
    rates: list[float] = []
    with BarePipeline() as pipeline, running_services(openmp=args.settings) as services:

        def bare_rate() -> float:
            seconds = pipeline.run(body, seconds=args.bare_seconds)
            return len(seconds) / sum(seconds)

        pipeline.run(body, most=1)  # the first one also pays for what happens once
        bare = [bare_rate()]
        for _ in range(args.turns):
            rates.append(asyncio.run(run_load(services, body, args.clients, args.seconds, load)))
            bare.append(bare_rate())
    return rates, bare


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__)
    parser.add_argument("--settings", type=openmp_settings, default="serve", help=HELP)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--turns", type=int, default=6, help="of the clients")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each of their turns")
    parser.add_argument("--bare-seconds", type=float, default=10.0, help="of each turn of the bare loop")
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--cache", default="none")
    parser.add_argument("--batch", type=int, default=1, help="how many pictures may share a run")
    return parser


def main() -> None:
    """Measure and print."""
    args = arguments().parse_args()
    cache = int(args.cache) if args.cache.isdigit() else args.cache
    body = {"width": args.side, "height": args.side, "num_inference_steps": args.steps, "cache": cache}
    card = machine_card()
    show(card)
    os.environ["GENERATOR_MAX_BATCH"] = str(args.batch)
    load = Load()
    told = summary(load, *take_turns(args, body, load), args.batch)
    title = f"{args.clients} clients, {args.side}x{args.side}, {args.steps} steps, {cache}"
    table = Table("figure", "value", title=title)
    for name, value in told.items():
        table.add_row(name, str(value))
    Console(width=100).print(table)
    about = {"benchmark": "load", "card": card, "weights": "the demo model", "clients": args.clients}
    print(json.dumps(about | {"batch": args.batch, "openmp": resolved(args.settings)} | body | told))


if __name__ == "__main__":
    main()
