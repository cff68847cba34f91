"""Everything that is to be measured on a GPU, in one command: ``python -m benchmarks.gpu --out FOLDER``.

Each part is a process of its own with a time limit; what one leaves of it is for those after it. One that fails, or is
stopped, is told, and the others go on. What each found goes to ``FOLDER/NAME.json``, with the reason under ``partial``
if it did not end well; what they print goes to ``FOLDER/log.txt``. On a machine without a GPU the same parts run at a
tiny size, only to see that they run. ``python -m benchmarks.entry`` makes tables of the files once they lie under
``benchmarks/results/``.

A bare copy of the tree is enough: neither git nor an installed ``flux2-services`` is needed, nor a network. What it
imports beside torch, transformers and the usual packages of science is in ``NEEDED``; what a machine lacks of it can
travel as wheels, 14 MB. Where there is a network (here for Python 3.12 on x86-64)::

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
)
"""Without these nothing runs: the models are loaded by the services' own functions, which import what they need."""
WANTED = ("cache_dit", "pynvml", "torchao")
"""Without these some ways, the energy, or a profile are left out."""
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Part:
    """A benchmark, and its options."""

    name: str
    on_gpu: tuple[str, ...]
    smoke: tuple[str, ...]
    limit_s: float
    """After which it is stopped, on a GPU, unless earlier parts left it more."""


PARTS = (
    Part("latency", ("--budget-s", "185"), ("--steps", "8", "--repeats", "1", "--budget-s", "200"), 230),
    Part("peers", ("--budget-s", "120"), ("--steps", "10", "--computed", "4", "--repeats", "1"), 160),
    Part("trace", (), (), 60),
    Part("encoder", ("--budget-s", "35"), ("--budget-s", "100"), 60),
    Part("reuse", (), ("--steps", "20"), 60),
)


def missing(names: tuple[str, ...]) -> list[str]:
    """Those of the modules that are not there."""
    return [name for name in names if find_spec(name) is None]


def run_part(part: Part, options: tuple[str, ...], limit_s: float, out: Path) -> dict[str, Any]:
    """One part; its seconds, and why it ended early if it did.

    What it found until then is its result, and what it printed is added to the log, whatever happens.
    """
    began = time.perf_counter()
    file = out.resolve() / f"{part.name}.json"
    file.unlink(missing_ok=True)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(  # noqa: S603 - our own modules
        [sys.executable, "-m", f"benchmarks.{part.name}", *options, "--so-far", str(file)],
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
    """Have what a part found, and ``more``, in one line; nothing if it found nothing."""
    if file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps(found | more) + "\n", encoding="utf-8")


def run_all(names: list[str], limit_s: float, out: Path, *, is_smoke: bool) -> list[dict[str, Any]]:
    """The parts of these names, one after the other, until the time is over."""
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
    """Run every part; the exit status says whether all of them did."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="a folder for the results")
    parser.add_argument("--only", nargs="+", default=[part.name for part in PARTS], help="names of parts")
    parser.add_argument("--smoke", action="store_true", help="the tiny size, also on a GPU")
    parser.add_argument("--limit-s", type=float, default=570.0, help="for all")
    args = parser.parse_args()
    lacking = missing(NEEDED)
    if lacking:
        sys.exit(f"benchmarks.gpu: not installed: {', '.join(lacking)}; its docstring says how to bring them")
    for name in missing(WANTED):
        print(f"{name} is not installed: what needs it is left out")
    from benchmarks.card import machine_card, show  # noqa: PLC0415 - needs what was looked for

    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "log.txt").unlink(missing_ok=True)
    card = machine_card()
    show(card)
    entries = run_all(args.only, args.limit_s, args.out, is_smoke=args.smoke or "gpu" not in card["machine"])
    for entry in entries:
        print(f"{entry['part']}: {entry.get('failed', 'done')}, {entry['seconds']} s")
    print(json.dumps({"benchmark": "gpu", "card": card, "parts": entries}))
    sys.exit(any("failed" in entry for entry in entries))


def tables(printed: str) -> str:
    """The tables that a part printed, without the JSON and what libraries said."""
    starts = ("┌", "└", "┏", "┡", "│", "┃", "left out", "waits", "asked for", " ")
    return "\n".join(line for line in printed.splitlines() if line.startswith(starts) and len(line) < 200)


if __name__ == "__main__":
    main()
