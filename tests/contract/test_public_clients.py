"""Functions of public clients of the FLUX.2 remote text encoder against this project's encoder, over a socket."""

import io
import threading
import time
from collections.abc import Iterator

import pytest
import requests
import torch
import uvicorn
from diffusers import Flux2Pipeline

from demo_model.services import WEIGHTS
from text_encoder_service.app import create_app
from text_encoder_service.settings import TextEncoderSettings

ONE = "a small red circle above a large blue square on a white background"
TWO = [ONE, "a large green cross on the left on a gray background"]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A text encoder with the demo model, served by uvicorn."""
    app = create_app(TextEncoderSettings(model=str(WEIGHTS)))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}/predict"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    """The result of diffusers' own pipeline with the complete text encoder."""
    pipeline = Flux2Pipeline.from_pretrained(WEIGHTS, transformer=None, vae=None, dtype=torch.float32)
    with torch.inference_mode():
        return {
            prompt: pipeline.encode_prompt(prompt, max_sequence_length=32, text_encoder_out_layers=(1, 2, 3))[0]
            for prompt in TWO
        }


def guide_remote_text_encoder(url: str, prompts: str | list[str]) -> torch.Tensor:
    """The function of the FLUX.2 guide: it sends a token, and loads the response with torch's defaults."""
    response = requests.post(
        url,
        json={"prompt": prompts},
        headers={"Authorization": "Bearer hf_something", "Content-Type": "application/json"},
        timeout=60,
    )
    prompt_embeds: torch.Tensor = torch.load(io.BytesIO(response.content))
    return prompt_embeds.to("cpu")


def lemica_remote_text_encoder(url: str, prompts: str | list[str], device: str = "cpu") -> torch.Tensor:
    """The function of LeMiCa's FLUX.2 script."""
    response = requests.post(url, json={"prompt": prompts}, timeout=600)
    response.raise_for_status()
    prompt_embeds: torch.Tensor = torch.load(io.BytesIO(response.content), map_location=device)
    return prompt_embeds


@pytest.mark.parametrize("client", [guide_remote_text_encoder, lemica_remote_text_encoder])
@pytest.mark.parametrize("prompts", [ONE, TWO], ids=["one", "list"])
def test_public_clients_work_unchanged(
    url: str, expected: dict[str, torch.Tensor], client: object, prompts: str | list[str]
) -> None:
    """The clients get the tensor of the complete text encoder: bit for bit alone, up to rounding in a batch."""
    assert callable(client)
    embedding = client(url, prompts)
    wanted = torch.cat([expected[prompt] for prompt in ([prompts] if isinstance(prompts, str) else prompts)])
    assert (embedding.shape, embedding.dtype) == (wanted.shape, torch.float32)
    if isinstance(prompts, str):
        assert torch.equal(embedding, wanted)
    else:
        torch.testing.assert_close(embedding, wanted, rtol=1e-4, atol=1e-4)
