"""Many clients at once, over HTTP, against a bare loop over the pipeline: ``python -m benchmarks.load``.

Both services run with the demo model as processes of their own. The bare loop is over diffusers' pipeline with the same
schedule, size and steps. It and the clients take turns, since machines are not equally fast all the time; the median
ratio of pictures a second, those of a turn over those of the two loops around it, says what the service costs.
Clients that are refused with 429 come back when they were told. Prints a card and, last, one JSON line.
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
import torch
from diffusers import Flux2Pipeline
from rich.console import Console
from rich.table import Table

from benchmarks.card import machine_card, show
from demo_model.services import WEIGHTS, Services, running_services
from generator_service.lemica import CachedTransformer, schedule_for

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


class BareLoop:
    """The same pictures as the clients', one after the other, without any service."""

    def __init__(self, body: dict[str, Any]) -> None:
        loaded = Flux2Pipeline.from_pretrained(WEIGHTS, text_encoder=None, tokenizer=None, dtype=torch.float32)
        self._parts = loaded.components
        self._embeds = torch.zeros(1, 32, self._parts["transformer"].config.joint_attention_dim)
        self._schedule = schedule_for(body["cache"], body["num_inference_steps"])
        self._size = {"width": body["width"], "height": body["height"]}
        self._draw()  # the first one also pays for what happens once

    def pictures_per_s(self, seconds: float) -> float:
        """How many it draws a second."""
        count, began = 0, time.perf_counter()
        while (taken := time.perf_counter() - began) < seconds:
            self._draw()
            count += 1
        return count / taken

    def _draw(self) -> None:
        parts = self._parts
        transformer = CachedTransformer(parts["transformer"], self._schedule, scheduler=parts["scheduler"])
        pipeline = Flux2Pipeline(**{**parts, "transformer": transformer})
        pipeline.set_progress_bar_config(disable=True)
        pipeline(prompt_embeds=self._embeds, num_inference_steps=self._schedule.num_steps, **self._size)


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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--turns", type=int, default=6, help="of the clients")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each of their turns")
    parser.add_argument("--bare-seconds", type=float, default=10.0, help="of each turn of the bare loop")
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--cache", default="none")
    parser.add_argument("--batch", type=int, default=1, help="how many pictures may share a run")
    args = parser.parse_args()
    cache = int(args.cache) if args.cache.isdigit() else args.cache
    body: dict[str, Any] = {
        "width": args.side,
        "height": args.side,
        "num_inference_steps": args.steps,
        "cache": cache,
    }
    card = machine_card()
    show(card)
    os.environ["GENERATOR_MAX_BATCH"] = str(args.batch)
    load, loop = Load(), BareLoop(body)
    with running_services() as services:  # idle while the loop has its turn
        rates, bare = [], [loop.pictures_per_s(args.bare_seconds)]
        for _ in range(args.turns):
            rates.append(asyncio.run(run_load(services, body, args.clients, args.seconds, load)))
            bare.append(loop.pictures_per_s(args.bare_seconds))
    told = summary(load, rates, bare, args.batch)
    table = Table(
        "figure", "value", title=f"{args.clients} clients, {args.side}x{args.side}, {args.steps} steps, {cache}"
    )
    for name, value in told.items():
        table.add_row(name, str(value))
    Console(width=100).print(table)
    about = {"benchmark": "load", "card": card, "weights": "the demo model", "clients": args.clients}
    print(json.dumps(about | {"batch": args.batch} | body | told))


if __name__ == "__main__":
    main()
