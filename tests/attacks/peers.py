"""Attacks from the other side of a wire: the text encoder, and the resolver of its name."""

import asyncio
import base64
import io
import pickle
import shutil
import socket
import tempfile
import time
import warnings
import zipfile
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import load_file, save, save_file

from demo_model.services import WEIGHTS
from tests.attacks.attack import CannotRun, Figures, attack
from tests.attacks.relay import relaying, respond
from tests.attacks.services import TINY, client, generate, generator, service, watching

SHAPE = (1, 32, 384)
EMBEDS = base64.b64encode(save({"prompt_embeds": torch.zeros(SHAPE)})).decode()


class Reduced:
    """Pickled as a call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> Any:
        return self._call


def archive(pickled: bytes) -> bytes:
    """A file of ``torch.save`` whose ``data.pkl`` is another."""
    original, changed = io.BytesIO(), io.BytesIO()
    torch.save(torch.zeros(SHAPE), original)
    with zipfile.ZipFile(original) as old, zipfile.ZipFile(changed, "w", zipfile.ZIP_STORED) as new:
        for member in old.infolist():
            new.writestr(member.filename, pickled if member.filename.endswith("data.pkl") else old.read(member))
    return changed.getvalue()


def payloads() -> dict[str, bytes]:
    """Answers that are no embedding, by name."""
    nested = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):  # that they are a prototype
        torch.save(torch.nested.nested_tensor([torch.zeros(2, 384), torch.zeros(3, 384)]), nested)
    return {
        "bytearray": archive(pickle.dumps(Reduced(bytearray, 2**31 - 1), 2)),
        "Tensor(shape)": archive(pickle.dumps(Reduced(torch.Tensor, *SHAPE), 2)),
        "nested": nested.getvalue(),
        "lists": archive(pickle.dumps([[] for _ in range(1500)], 2)),
        "29 MB of lists": archive(pickle.dumps([[] for _ in range(29 * 2**20 // 2)], 2)),
    }


@attack(31, "tensor reader")
async def tensor_reader(figures: Figures) -> None:
    """Whatever the encoder answers is not unpickled: 502 within 100 ms more than for as many zeros, without memory."""
    current = b""

    async def answer(request_head: bytes, body: bytes) -> bytes:
        return respond(current) if b"/predict" in request_head.split(b"\r\n")[0] else respond(b"{}", "application/json")

    async with relaying(answer=answer) as relay, generator(TEXT_ENCODER_URL=relay.url) as target:
        async with client(target) as http:
            for name, payload in payloads().items():
                current = bytes(len(payload))
                _, usual_s = await generate(http, f"prompt of zeros instead of {name}")
                current = payload
                async with watching(target) as watch:
                    status, seconds = await generate(http, f"prompt {name}")
                figures.one_of(f"{name}: status", status, (502,))
                figures.at_most("growth", watch.growth, 50, " MiB")
                figures.at_most("after", seconds, usual_s + 0.1, " s")
                await asyncio.sleep(0.1)


@attack(32, "cookies, redirects, proxies of the environment")
async def cookies(figures: Figures) -> None:
    """Cookies of an encoder are not kept, redirects not followed, environment proxies not used: it works afterwards."""
    filler = [f"Set-Cookie: c{k}={'x' * 4000}; Path=/" for k in range(8)]

    async def refuse(request_head: bytes, body: bytes) -> bytes:
        return b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"

    async def set_cookies(request_head: bytes, body: bytes) -> bytes:
        return respond(b"{}", "application/json", *(f"{line[:14]}{len(relay.heads)}{line[14:]}" for line in filler))

    async with (
        relaying(answer=refuse) as elsewhere,
        relaying(answer=set_cookies) as relay,
        service("text_encoder_service") as encoder,
        generator(TEXT_ENCODER_URL=relay.url, HTTP_PROXY=elsewhere.url, http_proxy=elsewhere.url) as target,
    ):
        async with client(target) as http:
            for k in range(12):
                await http.get("/health/ready")
                if k < 3:
                    await generate(http, f"prompt {k}")
            redirect = f"HTTP/1.1 302 Found\r\nLocation: {elsewhere.url}/predict\r\nContent-Length: 0\r\n\r\n"

            async def redirecting(request_head: bytes, body: bytes) -> bytes:
                return redirect.encode()

            relay.turn(answer=redirecting)
            await generate(http, "redirected")
            relay.turn(target=encoder.port)
            await asyncio.sleep(12)  # a breaker may be open
            status, _ = await generate(http, "a red circle")
    figures.one_of("a good encoder afterwards", status, (200,))
    figures.at_most("requests with cookies", sum(b"\r\ncookie:" in each.lower() for each in relay.heads), 0)
    figures.at_most("connections elsewhere", elsewhere.num_connections, 0)


def other_weights(folder: Path) -> Path:
    """A copy of the demo model with another name and another text encoder."""
    copy = folder / "another-model"
    shutil.copytree(WEIGHTS, copy)
    file = copy / "text_encoder" / "model.safetensors"
    save_file({name: -tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    return copy


@attack(33, "embeddings of another model")
async def other_revision(figures: Figures) -> None:
    """While an encoder of another model answers, prompts are 503; once the right one is back the image is right."""
    with tempfile.TemporaryDirectory() as folder:
        other = str(other_weights(Path(folder)))
        async with (
            service("text_encoder_service") as right,
            service("text_encoder_service", FLUX2_MODEL=other) as wrong,
            relaying(target=right.port) as relay,
        ):
            async with generator(TEXT_ENCODER_URL=relay.url) as fresh, client(fresh) as http:
                expected = await http.post("/generate", json=TINY | {"prompt": "a red circle"})
            async with generator(TEXT_ENCODER_URL=relay.url) as target, client(target) as http:
                relay.turn(target=wrong.port)
                status, _ = await generate(http, "a red circle")
                relay.turn(target=right.port)
                await asyncio.sleep(12)
                image = await http.post("/generate", json=TINY | {"prompt": "a red circle"})
    figures.one_of("while the other answers", status, (503,))
    figures.one_of("image afterwards is right", image.content == expected.content, (True,))


@attack(34, "silent encoder")
async def silent_encoder(figures: Figures) -> None:
    """While nine new prompts wait for an encoder that is silent, a cached prompt takes at most 0.2 s longer."""
    async with service("text_encoder_service") as encoder, relaying(target=encoder.port) as relay:
        async with generator(TEXT_ENCODER_URL=relay.url) as target:
            async with client(target) as http:
                await generate(http, "a red circle")
                _, own_s = await generate(http, "a red circle")
                relay.turn()
                waiting = [asyncio.create_task(generate(http, f"new prompt {k}")) for k in range(9)]
                await asyncio.sleep(1)
                status, seconds = await generate(http, "a red circle")
                for each in waiting:
                    each.cancel()
    figures.one_of("cached prompt", status, (200,))
    figures.at_most("after", seconds, own_s + 0.2, " s")


@attack(35, "silent resolver")
async def silent_resolver(figures: Figures) -> None:
    """While names are not resolved, a request that needs no encoder is not delayed."""
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as resolver:
        try:
            resolver.bind(("127.0.0.53", 53))
        except OSError as error:
            raise CannotRun(f"port 53 cannot be bound: {error.strerror}") from error
        await without_names(figures)


async def without_names(figures: Figures) -> None:
    """Run the attack with a resolver that never answers."""
    script = 'echo nameserver 127.0.0.53 > resolv && mount --bind resolv /etc/resolv.conf && exec "$@"'
    wrapper = ("unshare", "-rm", "sh", "-c", script, "sh")
    async with generator(wrapper=wrapper, TEXT_ENCODER_URL="http://encoder.example:8006") as target:
        async with client(target) as http, client(target, "127.0.0.9") as other:
            small = {name: value for name, value in TINY.items() if name != "prompt"} | {"prompt_embeds": EMBEDS}
            await other.post("/generate", json=small)
            began = time.monotonic()
            await other.post("/generate", json=small)
            own_s = time.monotonic() - began
            waiting: list[asyncio.Task[Any]] = [asyncio.create_task(generate(http, f"prompt {k}")) for k in range(6)]
            waiting += [asyncio.create_task(http.get("/health/ready")) for _ in range(20)]
            await asyncio.sleep(1)
            began = time.monotonic()
            response: httpx.Response = await other.post("/generate", json=small)
            seconds = time.monotonic() - began
            for each in waiting:
                each.cancel()
    figures.one_of("status", response.status_code, (200,))
    figures.at_most("after", seconds, own_s + 0.2, " s")
