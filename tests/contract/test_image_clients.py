"""The official clients of OpenAI and Hugging Face against a real server, with only the address changed."""

import base64
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image

pytestmark = pytest.mark.anyio

PROMPT = "a large red circle in the center on a white background"
QUICK: dict[str, Any] = {"num_inference_steps": 4, "seed": 7, "cache": "none"}


@pytest.fixture
def client(generator_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{generator_url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture
def inference(generator_url: str) -> Iterator[InferenceClient]:
    with InferenceClient(model=generator_url, token="any") as client:
        yield client


def file_of(width: int = 80, height: int = 64) -> bytes:
    """An image as a PNG file."""
    buffer = io.BytesIO()
    ramp = np.add.outer(np.arange(height), np.arange(width)).astype(np.uint8)
    Image.fromarray(ramp).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def decode(b64: str | None) -> Image.Image:
    """The image in a response."""
    assert b64 is not None
    return Image.open(io.BytesIO(base64.b64decode(b64)))


def test_openai_generations(client: openai.OpenAI) -> None:
    """``images.generate``: n, size, format and this project's extra fields; the seeds are returned."""
    response = client.images.generate(
        model="flux2", prompt=PROMPT, n=2, size="64x80", output_format="webp", output_compression=50, extra_body=QUICK
    )
    assert response.data is not None
    assert [decode(d.b64_json).format for d in response.data] == ["WEBP", "WEBP"]
    assert {decode(d.b64_json).size for d in response.data} == {(64, 80)}
    assert [d.seed for d in response.data] == [7, 8]  # type: ignore[attr-defined]
    assert (response.size, response.output_format) == ("64x80", "webp")
    assert response.usage is not None
    assert (response.usage.output_tokens, response.usage.input_tokens) == (2 * 20, 32)
    assert response.usage.total_tokens == 72


def test_openai_fields_of_other_models_are_ignored(client: openai.OpenAI) -> None:
    """Fields of other models that are only preferences are ignored."""
    response = client.images.generate(
        prompt=PROMPT, size="auto", quality="high", background="auto", moderation="low", user="me", extra_body=QUICK
    )
    assert response.data is not None
    assert decode(response.data[0].b64_json).size == (128, 128)


@pytest.mark.parametrize("partial_images", [0, 1, 3])
def test_openai_streams(client: openai.OpenAI, partial_images: int) -> None:
    """``stream=True`` gives the requested partial images, of which a slow reader may skip some, then the image."""
    stream = client.images.generate(
        prompt=PROMPT, stream=True, partial_images=partial_images, size="64x64",
        extra_body=QUICK | {"num_inference_steps": 8},
    )  # fmt: skip
    events = list(stream)
    numbers = [e.partial_image_index for e in events if e.type == "image_generation.partial_image"]
    kinds = [event.type for event in events]
    assert kinds == ["image_generation.partial_image"] * len(numbers) + ["image_generation.completed"]
    assert all(decode(event.b64_json).size == (64, 64) for event in events)
    assert bool(numbers) == bool(partial_images)
    assert set(numbers) <= set(range(partial_images))
    assert numbers == sorted(numbers)
    assert events[-1].usage.output_tokens == 16  # type: ignore[union-attr]


@pytest.mark.parametrize("images", [file_of(), [("a.png", file_of()), ("b.png", file_of(96, 96))]])
def test_openai_edits(client: openai.OpenAI, images: Any) -> None:
    """``images.edit`` accepts raw bytes or several files; the first one gives the size."""
    response = client.images.edit(image=images, prompt=PROMPT, n=1, extra_body=QUICK)
    assert response.data is not None
    assert decode(response.data[0].b64_json).size == (80, 64)
    assert response.usage is not None
    assert response.usage.input_tokens_details.image_tokens == (20 if isinstance(images, bytes) else 20 + 36)


def test_openai_edits_stream(client: openai.OpenAI) -> None:
    """Edits stream with their own event names."""
    events = list(client.images.edit(image=file_of(), prompt=PROMPT, stream=True, partial_images=1, extra_body=QUICK))
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]


async def test_openai_async(generator_url: str) -> None:
    """The asynchronous client works like the synchronous one."""
    async with openai.AsyncOpenAI(base_url=f"{generator_url}/v1", api_key="any", max_retries=0) as client:
        response = await client.images.generate(prompt=PROMPT, size="64x64", extra_body=QUICK)
        assert response.data is not None
        assert decode(response.data[0].b64_json).size == (64, 64)


def test_openai_models(client: openai.OpenAI) -> None:
    """``models.list`` and ``models.retrieve`` return the model."""
    (model,) = client.models.list().data
    assert model.id == "weights"
    assert client.models.retrieve("flux2").id == "flux2"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"size": "100x100"}, "size"),
        ({"size": "huge"}, "size"),
        ({"n": 9}, "n"),
        ({"partial_images": 4}, "partial_images"),
        ({"prompt": " "}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"extra_body": {"colour": 1}}, "colour"),
        ({"extra_body": {"cache": "x"}}, "cache"),
    ],
)
def test_openai_errors(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    """Invalid values raise the client's own error with our code and the field."""
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        client.images.generate(**{"prompt": PROMPT} | fields)
    assert (caught.value.code, caught.value.param) == ("invalid_request", param)
    assert param in caught.value.message


@pytest.mark.parametrize("fields", [{"n": "two"}, {"seed": "-1"}, {"guidance_scale": "much"}, {"colour": "red"}])
def test_openai_edits_name_the_field(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    """The fields of a multipart body are validated like JSON's."""
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        client.images.edit(image=file_of(), prompt=PROMPT, extra_body=fields)
    assert caught.value.param == next(iter(fields))


def test_hugging_face_text_to_image(inference: InferenceClient) -> None:
    """``text_to_image`` with size, steps, guidance, seed and this project's extra fields gives the image."""
    options: dict[str, Any] = {"width": 64, "height": 80, "num_inference_steps": 4, "seed": 7, "guidance_scale": 4}
    image = inference.text_to_image(PROMPT, **options, extra_body={"cache": "none"})
    again = inference.text_to_image(PROMPT, **options, extra_body={"cache": "none"})
    assert image.size == (64, 80)
    assert np.array_equal(np.asarray(image), np.asarray(again))


def test_hugging_face_image_to_image(inference: InferenceClient) -> None:
    """``image_to_image`` edits an image."""
    image = inference.image_to_image(file_of(), prompt=PROMPT, num_inference_steps=4)
    assert image.size == (80, 64)


def test_hugging_face_errors(inference: InferenceClient) -> None:
    """Invalid values raise the client's own error."""
    with pytest.raises(HfHubHTTPError, match="negative_prompt: not supported by this model"):
        inference.text_to_image(PROMPT, negative_prompt="ugly")
    with pytest.raises(HfHubHTTPError, match="width: must be a multiple of 16"):
        inference.text_to_image(PROMPT, width=65)
    with pytest.raises(HfHubHTTPError, match="inputs: Value error, must not be blank"):
        inference.text_to_image(" ")


@pytest.mark.parametrize("options", [{"num_inference_steps": 4}, {"guidance_scale": 3.0}])
def test_hugging_face_edits_need_a_prompt(inference: InferenceClient, options: dict[str, Any]) -> None:
    """``image_to_image`` without a prompt is refused; the image's base64 is never used as a prompt."""
    with pytest.raises(HfHubHTTPError, match=r"prompt: parameters\.prompt is needed to edit the image in inputs"):
        inference.image_to_image(file_of(), **options)
    with pytest.raises(
        HfHubHTTPError, match=r"content-type: is missing; send JSON .* with images as base64 beside a prompt"
    ):
        inference.image_to_image(file_of())
