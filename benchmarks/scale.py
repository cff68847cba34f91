"""How far the Ray Serve application scales: ``python -m benchmarks.scale --out benchmarks/results/scale.json``.

1. Throughput with 1, 2 and 4 generators. Each is simulated: its steps sleep of a fixed length instead of work on a GPU,
   so that four fit on few cores and the engine is measured, not the cores. API, line, streams of steps, text encoder,
   object store and image files are real.
2. What a request costs beside its picture: the client's time without the steps', and the CPU time of the API's process.
3. A simulation of 1 000 generators from FLUX.2's times, and where wires and the API saturate by arithmetic.

Prints a card and, last, one JSON line. Needs the extra ray; without it ``--simulate-only``.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks import plots
from benchmarks.fleet_simulation import Times, waits
from demo_model.services import WEIGHTS, running_services

PORT = 8555
STEPS = 50
READY_S = 180.0
PUBLISHED = Times(pictures_s=(32.70, 10.20, 6.99), shares=(0.1, 0.6, 0.3), batch_s=0.01, prompt_s=0.05)
"""Pictures: LeMiCa's authors, one H100, 1024x1024, modes none, medium and fast. The encoder: an estimate, 17 billion
parameters x 2 x 512 tokens at 350 TFLOP/s; nobody has measured it here."""
EMBEDDING_BYTES = 512 * 15360 * 2
PICTURE_BYTES = 1_500_000
"""A PNG of 1024x1024."""
UTILISATIONS = (0.7, 0.8, 0.9, 0.95, 0.98)
FLEETS = (4, 16, 64, 256, 1000)
LINKS_GBIT = (1, 10, 25, 100)


def set_environment() -> None:
    """For Ray's processes and the services in them; Ray reads it when it is imported."""
    root = str(Path(__file__).parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ |= {
        "FLUX2_MODEL": str(WEIGHTS),
        "HF_HUB_OFFLINE": "1",
        "GENERATOR_MAX_WAITING": "64",
        "LOG_LEVEL": "error",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(paths),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "2",
    }


def deploy(num_generators: int, step_s: float) -> None:
    """The application of ``deploy/ray`` with simulated generators, until it is ready."""
    from ray import serve  # noqa: PLC0415 - optional

    from benchmarks.simulated import SimulatedGenerator  # noqa: PLC0415
    from flux2_ray import ingress  # noqa: PLC0415
    from flux2_ray.encoder import EncoderReplica  # noqa: PLC0415

    nothing = {"num_cpus": 0}
    encoder = serve.deployment(EncoderReplica, name=ingress.ENCODER, ray_actor_options=nothing).bind()
    generator = serve.deployment(
        SimulatedGenerator,
        name=ingress.GENERATOR,
        num_replicas=num_generators,
        max_ongoing_requests=2,
        ray_actor_options=nothing,
    ).bind(encoder, step_s)
    api = serve.deployment(
        serve.ingress(ingress.create_app)(),
        name=ingress.INGRESS,
        max_ongoing_requests=1000,
        ray_actor_options=nothing,
    ).bind(encoder, generator)
    serve.run(api, name="flux2", logging_config={"log_level": "ERROR"})
    until = time.monotonic() + READY_S
    while httpx.get(f"http://127.0.0.1:{PORT}/health/ready", timeout=30).status_code != httpx.codes.OK:
        assert time.monotonic() < until, "the application does not become ready"
        time.sleep(0.5)


def api_cpu_s() -> float:
    """CPU time of the API's process so far."""
    processes = [p for p in psutil.process_iter(["cmdline"]) if "ServeReplica:flux2:api" in " ".join(p.info["cmdline"])]
    times = processes[-1].cpu_times()
    return float(times.user + times.system)


async def ask_for(
    seconds: float, num_clients: int, body: dict[str, Any], accept: str = "*/*"
) -> tuple[Counter[int], list[float], float]:
    """Closed loop: each client asks for one picture after the other; statuses, latencies of pictures, and the time."""
    statuses: Counter[int] = Counter()
    latencies: list[float] = []
    limits = httpx.Limits(max_connections=num_clients)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{PORT}", timeout=600, limits=limits) as http:
        began = time.perf_counter()

        async def client(number: int) -> None:
            count = 0
            while time.perf_counter() < began + seconds:
                count += 1
                asked = time.perf_counter()
                prompt = {"prompt": f"picture {count} of client {number}"}
                answer = await http.post("/generate", json=body | prompt, headers={"Accept": accept})
                statuses[answer.status_code] += 1
                latencies.append(time.perf_counter() - asked)

        await asyncio.gather(*map(client, range(num_clients)))
        return statuses, latencies, time.perf_counter() - began


def measure_throughput(num_generators: int, step_s: float, seconds: float, accept: str = "*/*") -> dict[str, Any]:
    """Pictures a second with so many generators, kept busy."""
    deploy(num_generators, step_s)
    body = {"num_inference_steps": STEPS, "cache": "none"}
    asyncio.run(ask_for(0.1, num_generators, body))  # every replica has answered once
    cpu = api_cpu_s()
    statuses, latencies, taken = asyncio.run(ask_for(seconds, 3 * num_generators, body, accept))
    ideal = num_generators / (STEPS * step_s)
    pictures = statuses[httpx.codes.OK]
    return {
        "generators": num_generators,
        "pictures": pictures,
        "statuses": {str(status): count for status, count in sorted(statuses.items())},
        "pictures_per_s": round(pictures / taken, 3),
        "ideal_pictures_per_s": round(ideal, 3),
        "of_ideal": round(pictures / taken / ideal, 3),
        "latency_s_p50": round(statistics.median(latencies), 2),
        "api_cpu_ms_per_picture": round(1000 * (api_cpu_s() - cpu) / pictures, 1),
    }


def overheads(url: str, body: dict[str, Any], count: int) -> dict[str, float]:
    """Milliseconds that one client's requests take beside their pictures, one at a time, each with a new prompt."""
    found = []
    with httpx.Client(base_url=url, timeout=600) as http:
        for number in range(count + 3):
            began = time.perf_counter()
            answer = http.post("/generate", json=body | {"prompt": f"overhead {number}"}).raise_for_status()
            taken_ms = 1000 * (time.perf_counter() - began)
            found.append(taken_ms - float(answer.headers["x-denoise-ms"]) - float(answer.headers["x-decode-ms"]))
    found = found[3:]  # the first ones also pay for what happens once
    return {"p50": round(statistics.median(found), 1), "p95": round(statistics.quantiles(found, n=20)[18], 1)}


def measure(step_s: float, seconds: float, requests: int) -> dict[str, Any]:
    """The application on this machine."""
    set_environment()
    import ray  # noqa: PLC0415 - optional
    from ray import serve  # noqa: PLC0415

    body = {"num_inference_steps": STEPS, "cache": "none"}
    ray.init(num_cpus=32, include_dashboard=False, log_to_driver=False, logging_level="error")
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    try:
        report: dict[str, Any] = {"throughput": [measure_throughput(count, step_s, seconds) for count in (1, 2, 4)]}
        report["streamed"] = measure_throughput(4, step_s, seconds, "text/event-stream")
        deploy(1, 0.01)
        report["overhead_ms_ray"] = overheads(f"http://127.0.0.1:{PORT}", body, requests)
    finally:
        serve.shutdown()
        ray.shutdown()
    with running_services() as services:
        report["overhead_ms_two_services"] = overheads(services.generator_url, body, requests)
    return report


def simulate(num_generators: int) -> dict[str, Any]:
    """Waiting in a large fleet, and how many encoders it needs."""
    rate = num_generators / PUBLISHED.mean_picture_s
    enough = int(np.ceil(rate / PUBLISHED.prompts_per_s(8)))
    lines = {}
    for count in sorted({size for size in FLEETS if size < num_generators} | {num_generators}):
        encoders = max(1, int(np.ceil(1.3 * count / PUBLISHED.mean_picture_s / PUBLISHED.prompts_per_s(8))))
        found = [(u, waits(count, encoders, u, PUBLISHED)[1]) for u in UTILISATIONS]
        lines[count] = [[u, round(float(w.mean()), 2), round(float(np.quantile(w, 0.99)), 2)] for u, w in found]
    by_encoders = []
    for encoders in range(max(1, enough - 1), enough + 5):
        embedded = waits(num_generators, encoders, 0.95, PUBLISHED)[0]
        by_encoders.append([encoders, *(round(float(np.quantile(embedded, q)), 3) for q in (0.5, 0.99))])
    return {
        "generators": num_generators,
        "mean_picture_s": round(PUBLISHED.mean_picture_s, 2),
        "pictures_per_s": round(rate, 1),
        "prompts_per_s_of_an_encoder": round(PUBLISHED.prompts_per_s(8), 1),
        "line_by_fleet": {str(count): rows for count, rows in lines.items()},
        "line_columns": ["utilisation", "mean wait s", "p99 wait s"],
        "encoders_at_95_percent": by_encoders,
        "encoder_columns": ["encoders", "p50 s until embedded", "p99 s until embedded"],
    }


def api_cost(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """CPU seconds of the API's process: in a second without requests, and for a picture; a line through the rows."""
    rates = [row["pictures_per_s"] for row in rows]
    busy = [row["api_cpu_ms_per_picture"] / 1000 * row["pictures_per_s"] for row in rows]
    picture_s, idle = np.polyfit(rates, busy, 1)
    return float(idle), float(picture_s)


def saturation(rate: float, measured: dict[str, Any]) -> dict[str, Any]:
    """Pictures a second that each wire can carry, and the API's process; the smallest number decides."""
    encoder = {f"{gbit} Gbit/s": round(gbit * 1e9 / 8 / EMBEDDING_BYTES, 1) for gbit in LINKS_GBIT}
    api = {f"{gbit} Gbit/s": round(gbit * 1e9 / 8 / PICTURE_BYTES, 1) for gbit in LINKS_GBIT}
    report: dict[str, Any] = {"needed_pictures_per_s": rate, "encoder_link": encoder, "api_link": api}
    if "throughput" in measured:
        idle, plain_s = api_cost(measured["throughput"])
        streamed = measured["streamed"]
        streamed_s = streamed["api_cpu_ms_per_picture"] / 1000 - idle / streamed["pictures_per_s"]
        report["api_idle_cpu_ms_per_s"] = round(1000 * idle, 1)
        for name, picture_s in (("plain", plain_s), ("streamed", streamed_s)):
            report[f"api_{name}"] = {
                "cpu_ms_per_picture": round(1000 * picture_s, 1),
                "pictures_per_s": round((1 - idle) / picture_s, 1),
                "generators": int((1 - idle) / picture_s * PUBLISHED.mean_picture_s),
            }
    return report


def show(report: dict[str, Any]) -> None:
    """The card."""
    table = Table("figure", "value", title="Ray Serve application")
    rows = [*report["throughput"], report["streamed"]] if "throughput" in report else []
    for name, row in zip(("", "", "", ", streamed"), rows, strict=False):
        table.add_row(
            f"{row['generators']} simulated generators{name}",
            f"{row['pictures_per_s']} pictures/s, {100 * row['of_ideal']:.1f} % of ideal, "
            f"API {row['api_cpu_ms_per_picture']} ms CPU a picture",
        )
    for name in ("overhead_ms_ray", "overhead_ms_two_services"):
        if name in report:
            table.add_row(name.replace("_", " "), str(report[name]))
    simulated = report["simulation"]
    size = simulated["generators"]
    for utilisation, mean, worst in simulated["line_by_fleet"][str(size)]:
        table.add_row(f"{size} simulated, {utilisation:.0%} busy", f"wait {mean} s on average, p99 {worst} s")
    for encoders, middle, worst in simulated["encoders_at_95_percent"]:
        table.add_row(f"{encoders} encoders for them", f"embedded in {middle} s, p99 {worst} s")
    for name, value in report["saturation_pictures_per_s"].items():
        table.add_row(f"saturation: {name.replace('_', ' ')}", str(value))
    Console(width=110).print(table)


def main() -> None:
    """Measure, simulate and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--step-s", type=float, default=0.05, help="what a simulated step takes; there are 50")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each throughput")
    parser.add_argument("--requests", type=int, default=30, help="for the overhead of one")
    parser.add_argument("--generators", type=int, default=1000, help="that are simulated")
    parser.add_argument("--simulate-only", action="store_true")
    parser.add_argument("--out", type=Path, help="also write the result here")
    parser.add_argument("--plots", type=Path, help="a folder for the plots")
    args = parser.parse_args()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    report: dict[str, Any] = {"machine": machine, "step_s": args.step_s, "steps": STEPS}
    if not args.simulate_only:
        report |= measure(args.step_s, args.seconds, args.requests)
    report["simulation"] = simulate(args.generators)
    report["saturation_pictures_per_s"] = saturation(report["simulation"]["pictures_per_s"], report)
    show(report)
    if args.plots is not None:
        plots.plot_scaling(report, args.plots)
    line = json.dumps(report)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
