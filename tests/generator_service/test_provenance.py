"""The provenance in the files of a request, over HTTP."""

import base64
import hashlib
import io
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from flux2_shared.wire import dump_safetensors
from generator_service.engine.imaging import Provenance, read_provenance
from tests.conftest import Serve
from tests.generator_service.test_generate import SMALL, STREAM, events, pixels
from tests.generator_service.test_references import as_text, file_of, sample_image
from tests.generator_service.test_upsampler import BETTER, ChatModel, completion

pytestmark = pytest.mark.anyio

JSON = {"Accept": "application/json"}


def provenance_of(data: bytes, folder: Path) -> Provenance:
    (folder / "image").write_bytes(data)
    return read_provenance(folder / "image")


async def test_a_file_repeats_its_request(serve_generator: Serve, tmp_path: Path) -> None:
    """A file has every parameter that its image depends on, including the computed steps."""
    body: dict[str, Any] = SMALL | {"guidance_scale": 2.5, "cache": 2, "height": 80}
    async with serve_generator() as http:
        response = await http.post("/generate", json=body)
    provenance = provenance_of(response.content, tmp_path)
    assert {name: getattr(provenance, name) for name in body} == body
    assert provenance.computed_steps == [0, 3]
    assert provenance.schedule == response.headers["x-schedule"]
    assert (provenance.model, provenance.revision, provenance.performance) == ("weights", "local", "exact")


async def test_guidance_changes_the_image(serve_generator: Serve) -> None:
    async with serve_generator() as http:
        images = [
            pixels((await http.post("/generate", json=SMALL | {"guidance_scale": scale})).content)
            for scale in (1.0, 8.0)
        ]
    assert not np.array_equal(images[0], images[1])


async def test_an_edit_names_its_references(serve_generator: Serve, tmp_path: Path) -> None:
    """The file has the SHA-256 of each reference image's file in their order, which also changes the image."""
    files = [file_of(sample_image()), file_of(sample_image(96, 96), "JPEG")]
    async with serve_generator() as http:
        responses = [
            await http.post("/generate", json=SMALL | {"images": [as_text(data) for data in ordered]})
            for ordered in (files, files[::-1])
        ]
    hashes = [hashlib.sha256(data).hexdigest() for data in files]
    provenances = [provenance_of(response.content, tmp_path) for response in responses]
    assert [provenance.references_sha256 for provenance in provenances] == [hashes, hashes[::-1]]
    assert not np.array_equal(pixels(responses[0].content), pixels(responses[1].content))


async def test_every_image_uses_the_upsampled_prompt(serve_generator: Serve, tmp_path: Path) -> None:
    """Each of several images is generated from the upsampled prompt, which is in its headers and its file."""
    model = ChatModel(lambda: httpx.Response(200, content=completion(BETTER)))
    body = SMALL | {"upsample_prompt": True, "num_images": 3}
    async with serve_generator(httpx.MockTransport(model), upsampler_url="http://chat/v1") as http:
        images = (await http.post("/generate", json=body, headers=JSON)).json()["images"]
    assert len(images) == 3
    assert len({image["x-revised-prompt"] for image in images}) == 1
    assert {provenance_of(base64.b64decode(image["image"]), tmp_path).prompt for image in images} == {BETTER}
    assert len(model.requests) == 1


async def test_an_embedding_is_named_by_its_hash(serve_generator: Serve, tmp_path: Path) -> None:
    """Without a prompt the file has the SHA-256 of the embedding's float32 values."""
    embedding = torch.randn(1, 32, 384, generator=torch.Generator().manual_seed(0)).bfloat16()
    body = SMALL | {"prompt_embeds": as_text(dump_safetensors(embedding))}
    del body["prompt"]
    async with serve_generator() as http:
        provenance = provenance_of((await http.post("/generate", json=body)).content, tmp_path)
    assert provenance.prompt is None
    assert provenance.prompt_embeds_sha256 == hashlib.sha256(embedding.float().numpy().tobytes()).hexdigest()


async def test_previews_have_provenance(serve_generator: Serve) -> None:
    """Previews are marked as AI-generated, like images."""
    body = SMALL | {"num_inference_steps": 8, "previews": 2}
    async with serve_generator() as http:
        streamed = await http.post("/generate", json=body, headers=STREAM)
    files = [base64.b64decode(data["image"]) for name, data in events(streamed.text) if name == "preview"]
    descriptions = [Image.open(io.BytesIO(data)).getexif()[ExifTags.Base.ImageDescription] for data in files]
    assert set(descriptions) == {"AI generated"}


@pytest.mark.parametrize("image_format", ["jpeg", "webp"])
async def test_compression_changes_the_file_size(serve_generator: Serve, image_format: str) -> None:
    """A lower ``output_compression`` gives a smaller file; the default quality is 95."""
    body = SMALL | {"output_format": image_format}
    async with serve_generator() as http:
        sizes = [
            len((await http.post("/generate", json=body | quality)).content)
            for quality in ({"output_compression": 10}, {"output_compression": 95}, {})
        ]
    assert sizes[0] < sizes[1] == sizes[2]
