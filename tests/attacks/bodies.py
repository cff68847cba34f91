"""Attacks with bodies: without a key, never finished, full of what is wrong."""

import asyncio
import json
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path

from tests.attacks.attack import Figures, attack
from tests.attacks.images import png
from tests.attacks.services import MIB, Service, both, client, generator, metric, service, watching
from tests.attacks.traffic import JSON, connected, head, post, send

KEY = "a-key-that-nobody-guesses"
LARGE = 47 * MIB
NUM_UNFINISHED, SENT_BYTES = 200, 12 * MIB
CLOSED_S = 60.0
JSON_ROUTES = ("/generate", "/jobs", "/", "/v1/images/generations")


def list_body(prompt: str, item: bytes, num_bytes: int) -> bytes:
    """A JSON body with a long list."""
    return b'{"prompt":%s,"images":[%s0]}' % (prompt.encode(), (item + b",") * (num_bytes // (len(item) + 1)))


@attack(22, "body before key")
async def body_before_key(figures: Figures) -> None:
    """48 MB without a key are refused within 100 ms, others are not delayed, and nothing of it is kept."""
    body = list_body('"x"', b"[]", LARGE)
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder, "keys")
        keys.write_text(KEY)
        async with generator(GENERATOR_KEYS_FILE=str(keys)) as target:
            await post(target, "/generate", b"{}", JSON)
            async with watching(target) as watch:
                status, seconds = await post(target, "/generate", body, JSON)
                await asyncio.sleep(0.5)
    figures.one_of("status", status, (401,))
    figures.at_most("after", seconds, 0.1, " s")
    figures.at_most("live p99", watch.live(0.99), 0.05, " s")
    figures.at_most("growth", watch.growth, 50, " MiB")


@attack(22, "unfinished bodies")
async def unfinished_bodies(figures: Figures) -> None:
    """200 bodies of 12 MB that never end are bounded together, are closed in time, and delay nobody."""
    async with generator() as target:
        async with watching(target) as watch, AsyncExitStack() as stack:
            opened = [await stack.enter_async_context(connected(target, k)) for k in range(NUM_UNFINISHED)]
            for each in opened:
                each.writer.write(head("POST", "/generate", JSON | {"Content-Length": str(LARGE)}))
            sending = [asyncio.create_task(send(each.writer, bytes(SENT_BYTES))) for each in opened]
            began = asyncio.get_running_loop().time()
            closed = await asyncio.gather(*(each.is_closed(began + CLOSED_S) for each in opened))
            for task in sending:
                task.cancel()
        async with client(target) as http:
            alive = (await http.get("/health/live")).status_code
    figures.at_most("growth", watch.growth, 1000, " MiB")
    figures.at_most(f"not closed within {CLOSED_S:.0f} s", closed.count(False), 0)
    figures.at_most("live p99", watch.live(0.99), 0.25, " s")
    figures.one_of("live afterwards", alive, (200,))


@attack(23, "lists of wrong items")
async def wrong_items(figures: Figures) -> None:
    """4 MB of wrong items or unknown fields are 4xx within 200 ms on every JSON route, and others are not delayed."""
    unknown = json.dumps({f"a{k}": k for k in range(4 * MIB // 18)}).encode()
    kinds = {
        "wrong items": list_body('"x"', b"1", 4 * MIB),
        "nested lists": list_body('"x"', b"[]", 4 * MIB),
        "unknown fields": unknown,
        "deep": b'{"prompt":' + b"[" * 4 * MIB,
    }
    async with both() as target:
        for route in JSON_ROUTES:
            for kind, body in kinds.items():
                await refuse_quickly(figures, target, f"{route} {kind}", body)
                if figures.has_failed:
                    return  # the others would take minutes
    figures.lines.insert(0, f"{len(JSON_ROUTES) * len(kinds)} bodies of 4 MB")
    async with service("text_encoder_service") as encoder:
        many = b'{"prompt":[%s1]}' % (b"1," * (MIB // 2 - 20))
        await refuse_quickly(figures, encoder, "/predict wrong items", many)


async def refuse_quickly(figures: Figures, target: Service, name: str, body: bytes) -> None:
    """Note what exceeds its bound, with the request's name."""
    route = name.split(maxsplit=1)[0]
    await post(target, route, b'{"prompt":1}', JSON)
    async with watching(target) as watch:
        status, seconds = await post(target, route, body, JSON)
        await asyncio.sleep(0.2)
    if not 400 <= status < 500:
        figures.one_of(f"{name}: status", status, ("4xx",))
    if seconds > 0.2 or route == "/predict":
        figures.at_most(f"{name}: refused after", seconds, 0.2, " s")
    if watch.live(0.99) > 0.1 or route == "/predict":
        figures.at_most(f"{name}: live p99", watch.live(0.99), 0.1, " s")
    if watch.growth > 100 or route == "/predict":
        figures.at_most(f"{name}: growth", watch.growth, 100, " MiB")


@attack(30, "full temporary folder")
async def full_temporary_folder(figures: Figures) -> None:
    """While uploads fill the temporary folder, an edit is served or 503 with its reason, and prompts work."""
    mount = 'mount -t tmpfs -o size=4m none "$PWD" && export TMPDIR="$PWD" && exec "$@"'
    parts = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    form = {"Content-Type": "multipart/form-data; boundary=b"}
    async with both(wrapper=("unshare", "-rm", "sh", "-c", mount, "sh")) as target:
        async with AsyncExitStack() as stack, client(target) as http:
            for k in range(3):
                holder = await stack.enter_async_context(connected(target, k))
                holder.writer.write(head("POST", "/v1/images/edits", form | {"Content-Length": str(9 * MIB)}))
                await asyncio.wait_for(send(holder.writer, parts + bytes(3 * MIB)), 10)
                await asyncio.sleep(0.5)
            image = png(64) + bytes(2 * MIB)
            edit = await http.post("/v1/images/edits", data={"prompt": "x"}, files={"image": ("a.png", image)})
            small = await http.post("/generate", json={"prompt": "a red circle", "num_inference_steps": 1})
        failures = metric(target, "flux2_requests_total", 'code="internal_error"')
    figures.one_of("an edit meanwhile", edit.status_code, (200, 422, 503))
    figures.one_of("a prompt meanwhile", small.status_code, (200,))
    figures.at_most("internal errors", failures, 0)
