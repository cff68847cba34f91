"""Measures how the Ray Serve application scales: ``python -m benchmarks.serving.scale --out FILE``.

1. Throughput with 1, 2 and 4 simulated generators, whose steps sleep instead of computing, so that four fit on a few
   cores. API, queue, streams of events, text encoder, object store and image files are real.
2. Overhead of a request: the client's time without denoising and decoding, and the CPU time of the API's process.
3. A simulation of 1,000 generators with published times of FLUX.2, and the computed saturation of network and API.

Prints a table and, as the last line, JSON. Needs the extra ``ray``, except with ``--simulate-only``.
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

from benchmarks.report import plots
from benchmarks.serving.fleet_simulation import Times, waits
from demo_model.services import WEIGHTS, running_services

PORT = 8555
STEPS = 50
READY_S = 180.0
PUBLISHED = Times(images_s=(32.70, 10.20, 6.99), shares=(0.1, 0.6, 0.3), batch_s=0.01, prompt_s=0.05)
"""Images: times of LeMiCa's authors on one H100, 1024x1024, modes none, medium and fast. Encoder: an estimate, not
measured, of 17 billion parameters x 2 x 512 tokens at 350 TFLOP/s."""
EMBEDDING_BYTES = 512 * 15360 * 2
IMAGE_BYTES = 1_500_000
"""Size of a PNG file of 1024x1024."""
UTILIZATIONS = (0.7, 0.8, 0.9, 0.95, 0.98)
FLEETS = (4, 16, 64, 256, 1000)
LINKS_GBIT = (1, 10, 25, 100)


def set_environment() -> None:
    """Set environment variables for Ray, which reads them on import, and for the services."""
    root = str(Path(__file__).parents[2])
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
    """Deploy the application with simulated generators, and wait until it is ready."""
    from ray import serve  # noqa: PLC0415 - optional

    from benchmarks.serving.simulated import SimulatedGenerator  # noqa: PLC0415
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
        assert time.monotonic() < until, "the application did not become ready"
        time.sleep(0.5)


def api_cpu_s() -> float:
    """Return the CPU time of the API's process since its start."""
    processes = [p for p in psutil.process_iter(["cmdline"]) if "ServeReplica:flux2:api" in " ".join(p.info["cmdline"])]
    times = processes[-1].cpu_times()
    return float(times.user + times.system)


async def run_clients(
    seconds: float, num_clients: int, body: dict[str, Any], accept: str = "*/*"
) -> tuple[Counter[int], list[float], float]:
    """Run clients that request one image after the other; return statuses, latencies of images, and elapsed seconds."""
    statuses: Counter[int] = Counter()
    latencies: list[float] = []
    limits = httpx.Limits(max_connections=num_clients)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{PORT}", timeout=600, limits=limits) as http:
        began = time.perf_counter()

        async def client(number: int) -> None:
            count = 0
            while time.perf_counter() < began + seconds:
                count += 1
                began_at = time.perf_counter()
                prompt = {"prompt": f"image {count} of client {number}"}
                response = await http.post("/generate", json=body | prompt, headers={"Accept": accept})
                statuses[response.status_code] += 1
                latencies.append(time.perf_counter() - began_at)

        await asyncio.gather(*map(client, range(num_clients)))
        return statuses, latencies, time.perf_counter() - began


def measure_throughput(num_generators: int, step_s: float, seconds: float, accept: str = "*/*") -> dict[str, Any]:
    """Measure the throughput of busy generators."""
    deploy(num_generators, step_s)
    body = {"num_inference_steps": STEPS, "cache": "none"}
    asyncio.run(run_clients(0.1, num_generators, body))  # warms up every replica
    cpu = api_cpu_s()
    statuses, latencies, elapsed = asyncio.run(run_clients(seconds, 3 * num_generators, body, accept))
    ideal = num_generators / (STEPS * step_s)
    num_images = statuses[httpx.codes.OK]
    return {
        "generators": num_generators,
        "pictures": num_images,
        "statuses": {str(status): count for status, count in sorted(statuses.items())},
        "pictures_per_s": round(num_images / elapsed, 3),
        "ideal_pictures_per_s": round(ideal, 3),
        "of_ideal": round(num_images / elapsed / ideal, 3),
        "latency_s_p50": round(statistics.median(latencies), 2),
        "api_cpu_ms_per_picture": round(1000 * (api_cpu_s() - cpu) / num_images, 1),
    }


def overheads(url: str, body: dict[str, Any], count: int) -> dict[str, float]:
    """Measure the milliseconds of sequential requests with new prompts, without denoising and decoding."""
    overheads_ms = []
    with httpx.Client(base_url=url, timeout=600) as http:
        for number in range(count + 3):
            began = time.perf_counter()
            response = http.post("/generate", json=body | {"prompt": f"overhead {number}"}).raise_for_status()
            elapsed_ms = 1000 * (time.perf_counter() - began)
            overheads_ms.append(
                elapsed_ms - float(response.headers["x-denoise-ms"]) - float(response.headers["x-decode-ms"])
            )
    measured = overheads_ms[3:]  # without warm-up
    return {"p50": round(statistics.median(measured), 1), "p95": round(statistics.quantiles(measured, n=20)[18], 1)}


def measure(step_s: float, seconds: float, requests: int) -> dict[str, Any]:
    """Measure the application on this machine."""
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
    """Simulate the waiting times of a large fleet, and the number of encoders that it needs."""
    rate = num_generators / PUBLISHED.mean_image_s
    enough = int(np.ceil(rate / PUBLISHED.prompts_per_s(8)))
    waits_by_fleet = {}
    for count in sorted({size for size in FLEETS if size < num_generators} | {num_generators}):
        encoders = max(1, int(np.ceil(1.3 * count / PUBLISHED.mean_image_s / PUBLISHED.prompts_per_s(8))))
        simulated = [(u, waits(count, encoders, u, PUBLISHED)[1]) for u in UTILIZATIONS]
        waits_by_fleet[count] = [
            [u, round(float(w.mean()), 2), round(float(np.quantile(w, 0.99)), 2)] for u, w in simulated
        ]
    by_encoders = []
    for encoders in range(max(1, enough - 1), enough + 5):
        embedded = waits(num_generators, encoders, 0.95, PUBLISHED)[0]
        by_encoders.append([encoders, *(round(float(np.quantile(embedded, q)), 3) for q in (0.5, 0.99))])
    return {
        "generators": num_generators,
        "mean_picture_s": round(PUBLISHED.mean_image_s, 2),
        "pictures_per_s": round(rate, 1),
        "prompts_per_s_of_an_encoder": round(PUBLISHED.prompts_per_s(8), 1),
        "line_by_fleet": {str(count): rows for count, rows in waits_by_fleet.items()},
        "line_columns": ["utilisation", "mean wait s", "p99 wait s"],
        "encoders_at_95_percent": by_encoders,
        "encoder_columns": ["encoders", "p50 s until embedded", "p99 s until embedded"],
    }


def api_cost(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Fit the CPU time of the API's process; return CPU seconds per second when idle, and per image."""
    rates = [row["pictures_per_s"] for row in rows]
    busy = [row["api_cpu_ms_per_picture"] / 1000 * row["pictures_per_s"] for row in rows]
    image_s, idle = np.polyfit(rates, busy, 1)
    return float(idle), float(image_s)


def saturation(rate: float, measured: dict[str, Any]) -> dict[str, Any]:
    """Compute the images per second at which network links and the API's process saturate."""
    encoder = {f"{gbit} Gbit/s": round(gbit * 1e9 / 8 / EMBEDDING_BYTES, 1) for gbit in LINKS_GBIT}
    api = {f"{gbit} Gbit/s": round(gbit * 1e9 / 8 / IMAGE_BYTES, 1) for gbit in LINKS_GBIT}
    report: dict[str, Any] = {"needed_pictures_per_s": rate, "encoder_link": encoder, "api_link": api}
    if "throughput" in measured:
        idle, plain_s = api_cost(measured["throughput"])
        streamed = measured["streamed"]
        streamed_s = streamed["api_cpu_ms_per_picture"] / 1000 - idle / streamed["pictures_per_s"]
        report["api_idle_cpu_ms_per_s"] = round(1000 * idle, 1)
        for name, image_s in (("plain", plain_s), ("streamed", streamed_s)):
            report[f"api_{name}"] = {
                "cpu_ms_per_picture": round(1000 * image_s, 1),
                "pictures_per_s": round((1 - idle) / image_s, 1),
                "generators": int((1 - idle) / image_s * PUBLISHED.mean_image_s),
            }
    return report


def show(report: dict[str, Any]) -> None:
    """Print the report as a table."""
    table = Table("figure", "value", title="Ray Serve application")
    rows = [*report["throughput"], report["streamed"]] if "throughput" in report else []
    for name, row in zip(("", "", "", ", streamed"), rows, strict=False):
        table.add_row(
            f"{row['generators']} simulated generators{name}",
            f"{row['pictures_per_s']} images/s, {100 * row['of_ideal']:.1f} % of ideal, "
            f"API {row['api_cpu_ms_per_picture']} ms CPU per image",
        )
    for name in ("overhead_ms_ray", "overhead_ms_two_services"):
        if name in report:
            table.add_row(name.replace("_", " "), str(report[name]))
    simulated = report["simulation"]
    size = simulated["generators"]
    for utilization, mean, worst in simulated["line_by_fleet"][str(size)]:
        table.add_row(f"{size} simulated, {utilization:.0%} busy", f"wait {mean} s on average, p99 {worst} s")
    for encoders, middle, worst in simulated["encoders_at_95_percent"]:
        table.add_row(f"{encoders} encoders for them", f"embedded in {middle} s, p99 {worst} s")
    for name, value in report["saturation_pictures_per_s"].items():
        table.add_row(f"saturation: {name.replace('_', ' ')}", str(value))
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.scale", description=__doc__)
    parser.add_argument("--step-s", type=float, default=0.05, help="duration of a simulated step; there are 50")
    parser.add_argument("--seconds", type=float, default=30.0, help="duration of each throughput measurement")
    parser.add_argument("--requests", type=int, default=30, help="number of requests for the overhead")
    parser.add_argument("--generators", type=int, default=1000, help="number of simulated generators")
    parser.add_argument("--simulate-only", action="store_true")
    parser.add_argument("--out", type=Path, help="also write the result to this file")
    parser.add_argument("--plots", type=Path, help="folder for plots")
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
