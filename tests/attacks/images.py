"""Attacks with reference images."""

import asyncio
import base64
import contextlib
import io
import re
import signal
import subprocess
import time
from typing import Any

from PIL import Image

from tests.attacks.attack import Figures, attack
from tests.attacks.services import TINY, both, client, generate, watching

DRAIN_S = 3
NUM_SCANS = 800
LONG: dict[str, Any] = {"width": 512, "height": 512, "num_inference_steps": 100, "cache": "none"}
EDITS_S = 25.0


def jpeg(scans: int, side: int = 4096) -> bytes:
    """A progressive JPEG of one color, whose last scan is there ``scans`` times."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), (9, 90, 200)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = [match.start() for match in re.finditer(rb"\xff\xda", data)][-1]
    return data[:-2] + data[last:-2] * (scans - 1) + b"\xff\xd9"


def png(side: int = 4096) -> bytes:
    """A PNG of one color."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), (9, 90, 200)).save(file, "PNG")
    return file.getvalue()


def edit(*images: bytes) -> dict[str, Any]:
    """The body of a request with reference images."""
    return TINY | {"prompt": "a red circle", "images": [base64.b64encode(image).decode() for image in images]}


@attack(24, "scan bombs")
async def scan_bombs(figures: Figures) -> None:
    """A JPEG of 800 scans is 422 within 50 ms; six at once delay others by less than 1 s, and SIGTERM is obeyed."""
    bomb = edit(jpeg(NUM_SCANS))
    async with both(GENERATOR_DRAIN_S=str(DRAIN_S)) as target:
        async with client(target, timeout_s=100) as http, client(target, "127.0.0.9") as other:
            await generate(other, "a red circle")
            began = time.monotonic()
            status = (await http.post("/generate", json=bomb)).status_code
            seconds = time.monotonic() - began
            bombs = [asyncio.create_task(http.post("/generate", json=bomb)) for _ in range(6)]
            await asyncio.sleep(0.2)
            _, other_s = await generate(other, "a red circle")
            for each in bombs:
                each.cancel()
            await asyncio.gather(*bombs, return_exceptions=True)
            target.process.send_signal(signal.SIGTERM)
            ended_s = await asyncio.to_thread(seconds_until_exit, target.process)
    figures.one_of("status", status, (422,))
    figures.at_most("after", seconds, 0.05, " s")
    figures.at_most("another request meanwhile", other_s, 1.0, " s")
    figures.at_most("ended after SIGTERM", ended_s, DRAIN_S + 2, " s")


def seconds_until_exit(process: subprocess.Popen[bytes]) -> float:
    """How long a process takes to end; at most 60."""
    began = time.monotonic()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(60)
    return time.monotonic() - began


@attack(25, "work before the permit")
async def work_before_permit(figures: Figures) -> None:
    """With a full queue an edit of eight images of 16 megapixels is 429 within 200 ms, and nothing is decoded."""
    body = edit(*[png()] * 8)
    async with both(GENERATOR_MAX_WAITING="1") as target, client(target) as http:
        for k in range(2):
            assert (await http.post("/jobs", json=LONG | {"prompt": f"a red circle {k}"})).status_code == 202
        async with watching(target) as watch:
            began = time.monotonic()
            status = (await http.post("/generate", json=body)).status_code
            seconds = time.monotonic() - began
    figures.one_of("status", status, (429,))
    figures.at_most("after", seconds, 0.2, " s")
    figures.at_most("growth", watch.growth, 50, " MiB")


@attack(26, "decoded references")
async def decoded_references(figures: Figures) -> None:
    """Twelve edits of eight images of 16 megapixels at once grow the memory by less than 600 MB."""
    body = edit(*[png()] * 8)
    async with both(GENERATOR_MAX_WAITING="16") as target:
        async with client(target) as first, client(target, "127.0.0.9", EDITS_S) as http:
            running = (await first.post("/jobs", json=LONG | {"prompt": "a red circle"})).json()["id"]
            await asyncio.sleep(3)  # its own memory is taken
            async with watching(target) as watch:
                edits = [asyncio.create_task(http.post("/jobs", json=body)) for _ in range(12)]
                await asyncio.wait(edits, timeout=EDITS_S)
                statuses = [each.result().status_code for each in edits if each.done() and not each.exception()]
            for each in edits:
                each.cancel()
            await asyncio.gather(*edits, return_exceptions=True)
            await first.delete(f"/jobs/{running}")
    figures.at_least("accepted or refused", len(statuses), 12)
    figures.at_most("growth", watch.growth, 600, " MiB")
    figures.at_most("live p99", watch.live(0.99), 0.25, " s")
