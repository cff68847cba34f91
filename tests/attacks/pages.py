"""Attacks of web pages in somebody's browser, and a start that would let everybody in."""

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

from demo_model.services import WEIGHTS
from tests.attacks.attack import Figures, attack
from tests.attacks.images import png
from tests.attacks.services import both, client, metric
from tests.e2e.test_services import free_port

REFUSED = (400, 403, 421)


@attack(37, "web pages")
async def web_pages(figures: Figures) -> None:
    """What a page of another site can make a browser send is refused, and so is a request for another host."""
    async with both() as target:
        port = target.port
        async with client(target) as http:

            async def edit(**headers: str) -> int:
                named = {name.replace("_", "-"): value for name, value in headers.items()}
                files = {"image": ("a.png", png(64))}
                data = {"prompt": "a red circle"}
                return (await http.post("/v1/images/edits", headers=named, data=data, files=files)).status_code

            async def get(path: str, host: str) -> int:
                return (await http.get(path, headers={"Host": host})).status_code

            requests = {
                "cross-site form": edit(Origin="https://evil.example", Sec_Fetch_Site="cross-site"),
                "foreign origin": edit(Origin="http://evil.example"),
                "opaque origin": edit(Origin="null"),
                "evil host": get("/modes", "evil.example"),
                "evil host and port": get("/", f"evil.example:{port}"),
                "rebound form": edit(Host=f"evil.example:{port}"),
            }
            for name, request in requests.items():
                figures.one_of(name, await request, REFUSED)
            own = {"Origin": target.url, "Sec-Fetch-Site": "same-origin"}
            generated = metric(target, "flux2_generations_total")
            figures.at_most("generated", generated, 0)
            same = await http.post("/generate", json={"prompt": "x", "num_inference_steps": 1}, headers=own)
            figures.one_of("own page", same.status_code, (200,))
            figures.one_of("localhost", await get("/modes", f"localhost:{port}"), (200,))


@attack(38, "keys file without keys")
async def keys_file_without_keys(figures: Figures) -> None:
    """A service whose keys file holds no key ends its start with one line, and serves no request."""
    for module, prefix in (("generator_service", "GENERATOR"), ("text_encoder_service", "TEXT_ENCODER")):
        with tempfile.TemporaryDirectory() as folder:
            keys, port = Path(folder, "keys"), free_port()
            keys.write_text("\ufeff# to be filled by the deployment\n\n", encoding="utf-8")
            settings = {f"{prefix}_KEYS_FILE": str(keys), f"{prefix}_PORT": str(port), "FLUX2_MODEL": str(WEIGHTS)}
            process = subprocess.Popen(
                [sys.executable, "-m", module], env=os.environ | settings, cwd=folder, stderr=subprocess.PIPE
            )
            served = await asyncio.to_thread(serves, process, port)
            lines = process.communicate()[1].decode().strip().splitlines()
            figures.one_of(f"{prefix}: status", process.returncode, (1,))
            figures.at_most("lines", len(lines), 1)
            figures.at_most("requests served", served, 0)


def serves(process: subprocess.Popen[bytes], port: int) -> int:
    """The number of requests that a process answers before it ends; one that serves is ended."""
    for _ in range(300):
        if process.poll() is not None:
            return 0
        try:
            httpx.get(f"http://127.0.0.1:{port}/modes", timeout=1)
        except httpx.HTTPError:
            time.sleep(0.1)
        else:
            process.kill()
            return 1
    process.kill()
    return 0
