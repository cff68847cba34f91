"""Runs all GPU benchmarks: ``python -m benchmarks.gpu --out FOLDER``.

Each benchmark is a process with a time limit; unused time is available to the following ones. If one fails or is
stopped, the others continue. Results are written to ``FOLDER/NAME.json``, with the reason under ``partial`` if the
benchmark did not succeed; output is written to ``FOLDER/log.txt``. Without a GPU, the same benchmarks run at a tiny
size as a smoke test. ``python -m benchmarks.report`` creates the documentation from the files under
``benchmarks/results/``.

A copy of the source tree is sufficient: neither git, an installed ``flux2-services``, nor a network is needed. Apart
from torch, transformers and common scientific packages, it needs the packages in ``NEEDED``. Missing ones can be
copied as wheels (14 MB). On a machine with a network, for Python 3.12 on x86-64::

    pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
        -c constraints.txt -d wheels annotated-types cache-dit cachetools diffusers fastapi importlib-metadata \
        lazy-importer opentelemetry-api pydantic pydantic-core pydantic-settings python-dotenv python-multipart \
        sse-starlette stamina starlette tenacity torchao typing-inspection

and on the machine::

    pip install --no-index --no-deps --target site wheels/*.whl
    PYTHONPATH=site python -m benchmarks.gpu --out FOLDER

Where they are missing too, add accelerate, filelock, httpx, httpcore, lazy-loader, nvidia-ml-py, peft, pillow,
prometheus-client, psutil, rich, scikit-image, scipy and what these need.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

NEEDED = (
    "PIL",
    "accelerate",
    "cachetools",
    "diffusers",
    "fastapi",
    "filelock",
    "httpx",
    "peft",
    "prometheus_client",
    "pydantic",
    "pydantic_settings",
    "python_multipart",
    "rich",
    "safetensors",
    "skimage",
    "sse_starlette",
    "stamina",
    "uvicorn",
)
"""Required modules, because the models are loaded by the services' own functions."""
WANTED = ("cache_dit", "pynvml", "torchao")
"""Optional modules. Without them some methods, the power measurement, or a profile are omitted."""
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Part:
    """A benchmark and its options."""

    name: str
    """The name of its result."""
    module: str
    """Its module in ``benchmarks``."""
    on_gpu: tuple[str, ...]
    smoke: tuple[str, ...]
    limit_s: float
    """Time limit on a GPU, extended by unused time of earlier benchmarks."""


PARTS = (
    Part(
        "latency",
        "generator.latency",
        ("--budget-s", "185"),
        ("--steps", "8", "--repeats", "1", "--budget-s", "200"),
        230,
    ),
    Part("peers", "lemica.peers", ("--budget-s", "120"), ("--steps", "10", "--computed", "4", "--repeats", "1"), 160),
    Part("trace", "generator.trace", (), (), 60),
    Part("encoder", "encoder.latency", ("--budget-s", "35"), ("--budget-s", "100"), 60),
    Part("reuse", "lemica.reuse", (), ("--steps", "20"), 60),
)


def missing(names: tuple[str, ...]) -> list[str]:
    """Return the modules that are not installed."""
    return [name for name in names if find_spec(name) is None]


def run_part(part: Part, options: tuple[str, ...], limit_s: float, out: Path) -> dict[str, Any]:
    """Run a benchmark; return its seconds and, if it failed, the reason.

    Its results until then are kept, and its output is appended to the log.
    """
    began = time.perf_counter()
    file = out.resolve() / f"{part.name}.json"
    file.unlink(missing_ok=True)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(  # noqa: S603 - modules of this package
        [sys.executable, "-m", f"benchmarks.{part.module}", *options, "--so-far", str(file)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that its compilers can be stopped with it
    )
    try:
        printed, _ = process.communicate(timeout=limit_s)
        failure = f"exit status {process.returncode}" if process.returncode else ""
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        printed, _ = process.communicate()
        failure = f"stopped after {limit_s:.0f} s"
    with (out / "log.txt").open("a", encoding="utf-8") as log:
        log.write(f"==== {part.name} {' '.join(options)}\n{printed}\n")
    print(tables(printed))
    entry: dict[str, Any] = {"part": part.name, "seconds": round(time.perf_counter() - began, 1)}
    if failure:
        lines = printed.strip().splitlines() or [""]
        entry["failed"] = f"{failure}: {lines[-1][:200]}"
    write_line(file, {"partial": failure} if failure else {})
    return entry


def write_line(file: Path, more: dict[str, Any]) -> None:
    """Add ``more`` to the results in ``file``, if it exists, and write them as one line."""
    if file.exists():
        results = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps(results | more) + "\n", encoding="utf-8")


def run_all(names: list[str], limit_s: float, out: Path, *, is_smoke: bool) -> list[dict[str, Any]]:
    """Run the named benchmarks one after the other, within the time limit."""
    until = time.perf_counter() + limit_s
    entries = []
    parts = [part for part in PARTS if part.name in names]
    for number, part in enumerate(parts):
        left_s = until - time.perf_counter()
        if left_s < 1:
            entries.append({"part": part.name, "seconds": 0.0, "failed": "no time was left"})
            continue
        options = ("--smoke", *part.smoke) if is_smoke else part.on_gpu
        for_others_s = 0.0 if is_smoke else sum(other.limit_s for other in parts[number + 1 :])
        entries.append(run_part(part, options, max(1.0, left_s - for_others_s), out))
        print(f"{part.name}: {entries[-1].get('failed', 'done')}, {entries[-1]['seconds']} s", flush=True)
    return entries


def main() -> None:
    """Run the benchmarks; the exit status is 0 if all succeeded."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--only", nargs="+", default=[part.name for part in PARTS], help="names of benchmarks")
    parser.add_argument("--smoke", action="store_true", help="run at a tiny size, even on a GPU")
    parser.add_argument("--limit-s", type=float, default=570.0, help="time limit in total")
    args = parser.parse_args()
    required = missing(NEEDED)
    if required:
        sys.exit(f"benchmarks.gpu: not installed: {', '.join(required)}; see the module's docstring")
    for name in missing(WANTED):
        print(f"{name} is not installed; measurements that need it are omitted")
    from benchmarks.report.system_info import show, system_info  # noqa: PLC0415 - imports what is checked above

    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "log.txt").unlink(missing_ok=True)
    system = system_info()
    show(system)
    entries = run_all(args.only, args.limit_s, args.out, is_smoke=args.smoke or "gpu" not in system["machine"])
    for entry in entries:
        print(f"{entry['part']}: {entry.get('failed', 'done')}, {entry['seconds']} s")
    print(json.dumps({"benchmark": "gpu", "card": system, "parts": entries}))
    sys.exit(any("failed" in entry for entry in entries))


def tables(printed: str) -> str:
    """Select the tables from the output of a benchmark, without JSON and messages of libraries."""
    starts = ("┌", "└", "┏", "┡", "│", "┃", "left out", "waits", "requested", " ")
    return "\n".join(line for line in printed.splitlines() if line.startswith(starts) and len(line) < 200)


if __name__ == "__main__":
    main()
