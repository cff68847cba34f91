"""Work on other threads, which would compete with the device thread for the CPU."""

import base64
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch.utils._python_dispatch import TorchDispatchMode

from flux2_shared.thread_pool import ThreadPool
from tests.conftest import Serve

pytestmark = pytest.mark.anyio

SMALL: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 4}
PROMPTS = [f"a red circle, number {number}" for number in range(4)]
READS_NOTHING = {"aten::set_", "aten::empty"}


class Computations(TorchDispatchMode):
    """Records the torch operations of the thread that enters it which compute or copy elements."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self._names = names

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation; one whose result is a view of its argument does not count."""
        schema = func._schema
        is_view = any(result.alias_info and not result.alias_info.is_write for result in schema.returns)
        if not is_view and schema.name not in READS_NOTHING:
            self._names.append(schema.name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The computing operations of worker threads; with ``Computations`` entered, those of the event loop too."""
    names: list[str] = []
    run = ThreadPool.run

    async def watched(threads: ThreadPool, function: Callable[..., Any], *args: Any) -> Any:
        def watched_function() -> Any:
            with Computations(names):
                return function(*args)

        return await run(threads, watched_function)

    monkeypatch.setattr(ThreadPool, "run", watched)
    return names


def test_computations_are_detected() -> None:
    """Operations that compute or copy are detected, and no others."""
    names: list[str] = []
    tensor = torch.ones(2, 2)
    with Computations(names):
        tensor.view(-1).detach()
        torch.cat([tensor, tensor]).float()
        tensor.clone()
        torch.isfinite(tensor).all()
    assert {"aten::cat", "aten::clone", "aten::all"} <= set(names)
    assert not {"aten::view", "aten::detach"} & set(names)


@pytest.mark.parametrize("media_type", ["application/octet-stream", "application/vnd.safetensors"])
@pytest.mark.parametrize("prompt", [PROMPTS[0], PROMPTS])
async def test_the_encoder_computes_only_on_its_device_thread(
    serve_encoder: Serve, computed: list[str], media_type: str, prompt: str | list[str]
) -> None:
    """From the model's embeddings to the body of the response, no other thread computes with torch."""
    async with serve_encoder() as http:
        computed.clear()  # the model was loaded
        with Computations(computed):
            response = await http.post("/predict", json={"prompt": prompt}, headers={"Accept": media_type})
    assert response.headers["content-type"] == media_type
    assert computed == []


@pytest.mark.parametrize("gives_embeds", [True, False])
async def test_the_generator_computes_only_on_its_device_thread(
    serve_generator: Serve, computed: list[str], gives_embeds: bool
) -> None:
    """Reading an embedding, recording its digest and writing the file need no torch."""
    embeds = base64.b64encode(save({"prompt_embeds": torch.zeros(1, 32, 384)})).decode()
    body = SMALL | ({"prompt_embeds": embeds} if gives_embeds else {"prompt": PROMPTS[0]})
    async with serve_generator() as http:
        computed.clear()
        with Computations(computed):
            response = await http.post("/generate", json=body | {"compare": True, "cache": 2})
    assert response.headers["content-type"] == "image/png"
    assert computed == []
