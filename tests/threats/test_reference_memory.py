"""Memory of a real generator while large reference images wait."""

import base64
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import psutil
from PIL import Image

from tests.e2e.test_services import PATIENCE_S, free_port
from tests.image_bombs import file_of
from tests.threats.test_processes import EMBEDS, TINY, process

NUM_EDITS = 12
NUM_ADMITTED = 9
"""One running and eight waiting, by default."""


class RssPeak:
    """The largest resident size of a process within the block, above that at its start, in MiB."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._has_ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._before = self._process.memory_info().rss
        self.growth = 0.0

    def __enter__(self) -> "RssPeak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._has_ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._has_ended.wait(0.01):
            self.growth = max(self.growth, (self._process.memory_info().rss - self._before) / 2**20)


def test_large_references_wait_in_little_memory() -> None:
    """Twelve edits at once, each of eight images of 16 megapixels, take less than 600 MB until they are generated."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    small = file_of(Image.fromarray(noise))
    large = file_of(Image.fromarray(noise).resize((4096, 4096), Image.Resampling.BICUBIC), "JPEG")
    files = [base64.b64encode(large).decode()] * 8
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        encoder = {"TEXT_ENCODER_URL": f"http://127.0.0.1:{silent.getsockname()[1]}", "TEXT_ENCODER_TIMEOUT_S": "300"}
        with process("generator_service", free_port(), **encoder) as (service, url):

            def edit(number: int) -> int | None:
                body = json.dumps(TINY | {"prompt": f"prompt {number}", "images": files})
                headers = {"content-type": "application/json"}
                try:
                    return httpx.post(f"{url}/generate", content=body, headers=headers, timeout=300).status_code
                except httpx.TransportError:
                    return None  # it waited for the encoder, until the end

            first = TINY | {"prompt_embeds": EMBEDS, "images": [base64.b64encode(small).decode()]}
            httpx.post(f"{url}/generate", json=first, timeout=PATIENCE_S).raise_for_status()
            silent.settimeout(PATIENCE_S)
            with ThreadPoolExecutor(NUM_EDITS) as clients:
                with RssPeak(service.pid) as peak:
                    edits = [clients.submit(edit, number) for number in range(NUM_EDITS)]
                    waiting = [silent.accept() for _ in range(NUM_ADMITTED)]  # each when its images were decoded
                service.kill()
    statuses = [each.result() for each in edits]
    for connection, _ in waiting:
        connection.close()
    print(f"resident size: {peak.growth:+.0f} MiB")
    assert statuses.count(None) == NUM_ADMITTED
    assert statuses.count(429) == NUM_EDITS - NUM_ADMITTED
    assert peak.growth < 600
