"""A prompt that is longer than the text encoder's maximum is reported wherever its image is."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from huggingface_hub import InferenceClient
from typer.testing import CliRunner

from demo_model.services import WEIGHTS
from generator_service.cli.app import app
from generator_service.engine.imaging import read_provenance
from tests.conftest import Serve

pytestmark = pytest.mark.anyio

LONG, SHORT = "red " * 100, "a red circle"
FIELDS = {"width": 64, "height": 64, "num_inference_steps": 2, "cache": "none"}
HEADER = "x-prompt-truncated"
WARNING = "the prompt is longer than the text encoder's maximum; its end was ignored"


def events(text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The events of a stream."""
    for block in filter(None, text.replace("\r\n", "\n").split("\n\n")):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line and line[0] != ":")
        if fields:
            yield fields.get("event", ""), json.loads(fields["data"])


async def test_the_native_api_reports_it(serve_generator: Serve, tmp_path: Path) -> None:
    """Header, JSON, events, job and file say so, for the first image and when the embedding comes from the cache."""
    async with serve_generator() as http:
        for _ in range(2):
            response = await http.post("/generate", json=FIELDS | {"prompt": LONG})
            assert response.headers[HEADER] == "true"
            (tmp_path / "image.png").write_bytes(response.content)
            assert read_provenance(tmp_path / "image.png").prompt_truncated
        as_json = await http.post("/generate", json=FIELDS | {"prompt": LONG}, headers={"Accept": "application/json"})
        assert as_json.json()["images"][0][HEADER] == "true"
        stream = await http.post("/generate", json=FIELDS | {"prompt": LONG}, headers={"Accept": "text/event-stream"})
        assert [data[HEADER] for name, data in events(stream.text) if name == "completed"] == ["true"]
        job = await http.post("/jobs", json=FIELDS | {"prompt": LONG})
        await http.get(f"{job.headers['location']}/events")
        assert (await http.get(f"{job.headers['location']}/result")).headers[HEADER] == "true"


async def test_a_short_prompt_is_not_reported(serve_generator: Serve, tmp_path: Path) -> None:
    """A prompt that fits has no header, and its file says that it was used whole."""
    async with serve_generator() as http:
        response = await http.post("/generate", json=FIELDS | {"prompt": SHORT})
    assert HEADER not in response.headers
    (tmp_path / "image.png").write_bytes(response.content)
    assert not read_provenance(tmp_path / "image.png").prompt_truncated


def test_the_openai_client_reads_it(generator_url: str) -> None:
    """Each image of OpenAI's API has ``prompt_truncated``, in JSON and in the last event of a stream."""
    with openai.OpenAI(base_url=f"{generator_url}/v1", api_key="none", max_retries=0) as client:
        options: Any = {"size": "64x64", "extra_body": {"num_inference_steps": 2, "cache": "none"}}
        image = client.images.generate(prompt=LONG, **options).data
        assert image is not None
        assert image[0].model_extra == {"seed": image[0].model_extra["seed"], "prompt_truncated": True}
        *_, completed = client.images.generate(prompt=LONG, stream=True, **options)
        assert completed.model_extra is not None
        assert completed.model_extra["prompt_truncated"] is True
        short = client.images.generate(prompt=SHORT, **options).data
        assert short is not None
        assert "prompt_truncated" not in (short[0].model_extra or {})


def test_hugging_faces_api_reports_it(generator_url: str, tmp_path: Path) -> None:
    """The response has the header, and the file of ``InferenceClient`` says so."""
    body = {"inputs": LONG, "parameters": FIELDS}
    assert httpx.post(generator_url, json=body, timeout=60).headers[HEADER] == "true"
    with InferenceClient(model=generator_url) as client:
        image = client.text_to_image(LONG, width=64, height=64, num_inference_steps=2)
    assert json.loads(image.info["flux2"])["prompt_truncated"] is True


@pytest.mark.parametrize(("prompt", "is_reported"), [(LONG, True), (SHORT, False)])
@pytest.mark.parametrize("is_local", [False, True])
def test_the_command_line_reports_it(
    generator_url: str, tmp_path: Path, prompt: str, is_reported: bool, is_local: bool
) -> None:
    """``flux2 generate`` prints a warning, with a service and with ``--local``."""
    file = tmp_path / "image.png"
    where = ["--local"] if is_local else ["--url", generator_url]
    options = ["--size", "64x64", "--steps", "2", "--cache", "none", "-o", str(file), *where]
    result = CliRunner().invoke(app, ["generate", prompt, *options], env={"FLUX2_MODEL": str(WEIGHTS)})
    assert result.exit_code == 0, result.output
    assert (WARNING in result.stderr.replace("\n", " ")) == is_reported
    assert read_provenance(file).prompt_truncated == is_reported
