"""Reference images, and several images in one request."""

import asyncio
import base64
import email
import email.policy
import io
import threading
import weakref
from collections.abc import Callable
from email.message import EmailMessage
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import pytest
import torch
from diffusers import Flux2Pipeline
from PIL import Image, ImageFile

from demo_model.services import WEIGHTS
from flux2_shared.errors import InvalidRequest
from flux2_shared.wire import dump_safetensors
from generator_service.api import resolve, srgb
from generator_service.api.base64_text import decode_base64
from generator_service.api.references import parse_reference, read_reference
from generator_service.errors import UnsupportedImageType
from generator_service.lemica import schedule_for
from generator_service.pipelines.flux2 import Flux2Model
from generator_service.pipelines.params import LARGEST_AREA, Params, Reference, ReferenceSize
from tests.conftest import Serve, local_model

pytestmark = pytest.mark.anyio

SMALL = {"prompt": "a red circle", "width": 64, "height": 64, "num_inference_steps": 4, "seed": 7, "cache": "none"}
MAX_PIXELS = 10_000_000


def sample_image(width: int = 80, height: int = 64) -> Image.Image:
    """An image with distinct colors."""
    ramp = np.add.outer(np.arange(height), 2 * np.arange(width)) % 256
    return Image.fromarray(np.stack([ramp, ramp.T.reshape(height, width), 255 - ramp], axis=-1).astype(np.uint8))


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def as_text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,", "data:application/octet-stream;base64,"])
def test_formats_are_detected_by_their_first_bytes(kind: str, prefix: str) -> None:
    """PNG, JPEG and WebP are read, whatever media type a data URI states."""
    reference = parse_reference(prefix + as_text(file_of(sample_image(), kind)), "images[0]", MAX_PIXELS)
    assert (reference.image.size, reference.image.mode) == ((80, 64), "RGB")


def in_lines(text: str, separator: str) -> str:
    """The text in MIME's lines of 76 characters."""
    return separator.join(text[start : start + 76] for start in range(0, len(text), 76))


SPELLINGS: dict[str, Callable[[str], str]] = {
    "lines": lambda text: in_lines(text, "\n") + "\n",
    "MIME's lines": lambda text: in_lines(text, "\r\n"),
    "spaces": lambda text: f" \t{text} \n",
    "URL-safe": lambda text: text.replace("+", "-").replace("/", "_"),
    "without padding": lambda text: text.rstrip("="),
    "parameters": lambda text: f"data:image/png;name=x y.png;charset=utf-8;base64,{text}",
    "no type": lambda text: f"data:;base64,{text}",
    "upper case": lambda text: f"DATA:IMAGE/PNG;NAME=X.PNG;BASE64,{text}",
    "spaces in the header": lambda text: f"  data:image/png; name=x.png; base64 ,{text}",
    "lines after the header": lambda text: "data:image/png;base64,\r\n" + in_lines(text, "\r\n"),
    "percent-encoded": lambda text: "data:image/png;base64," + quote(text, safe=""),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("length", range(100, 104))
def test_spellings_of_base64(spelling: str, length: int) -> None:
    """Line breaks, the URL-safe alphabet, missing padding, and data URIs with parameters are read."""
    data = bytes(range(251, 256)) * 20 + b"\xff" * (length - 100)
    text = base64.b64encode(data).decode()
    assert {"+", "/"} <= set(text)
    assert decode_base64(SPELLINGS[spelling](text)) == data


@pytest.mark.parametrize(
    "text",
    [
        "QQ=Q",
        "Q",
        "QUJ!",
        "=",
        "data:image/png,QUJD",
        "data:base64,QUJD",
        "data:;base64;x=y,QUJD",
        "QUJD\u00a0",
        "\ud800",
    ],
)
def test_other_text_is_no_base64(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        decode_base64(text)


@pytest.mark.parametrize("path", ["/generate", "/jobs"])
@pytest.mark.parametrize("spelling", ["MIME's lines", "parameters", "URL-safe"])
async def test_every_field_reads_every_spelling(serve_generator: Serve, path: str, spelling: str) -> None:
    """``images``, ``prompt_embeds`` and the ``inputs`` of Hugging Face's API are read alike, as jobs too."""
    image = SPELLINGS[spelling](as_text(file_of(sample_image())))
    embedding = SPELLINGS[spelling](as_text(dump_safetensors(torch.ones(1, 32, 384))))
    steps = {"num_inference_steps": 1, "cache": "none"}
    bodies = [
        {"prompt": "a red circle", "images": [image]} | steps,
        {"prompt_embeds": embedding, "width": 64, "height": 64} | steps,
        {"inputs": image, "parameters": {"prompt": "a red circle"} | steps},
    ]
    async with serve_generator() as http:
        statuses = [(await http.post(path, json=body)).status_code for body in bodies]
    assert statuses == [202 if path == "/jobs" else 200] * 3


@pytest.mark.parametrize(("mode", "options"), [("RGBA", {}), ("L", {}), ("P", {}), ("1", {}), ("LA", {})])
def test_every_mode_becomes_rgb(mode: str, options: dict[str, Any]) -> None:
    """Transparency, grayscale and palettes are converted to RGB."""
    reference = read_reference(file_of(sample_image().convert(mode), **options), "images[0]", MAX_PIXELS)
    assert reference.image.mode == "RGB"


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    reference = read_reference(file_of(sample_image(), "JPEG", exif=exif), "images[0]", MAX_PIXELS)
    assert reference.image.size == (64, 80)


@pytest.mark.parametrize(
    "data", [b"", b"GIF89a" + bytes(100), b"<svg/>", b"BM" + bytes(100), b"RIFF....WAVE", b"%PDF-1.7"]
)
def test_other_formats_are_415(data: bytes) -> None:
    """A file whose first bytes are not those of PNG, JPEG or WebP is refused with 415."""
    with pytest.raises(UnsupportedImageType, match=r"images\[0\]: must be a PNG, JPEG or WebP file"):
        read_reference(data, "images[0]", MAX_PIXELS)


@pytest.mark.parametrize(
    "text",
    [
        "http://localhost/a.png",
        "https://example.com/a.png",
        "file:///etc/passwd",
        "\n https://example.com/a.png",
        "ftp://host/a.png",
        "not base64!",
        "\u00f7",
        "data:image/png,plain",
    ],
)
def test_urls_are_never_fetched(text: str) -> None:
    """A reference image is base64 or a data URI with base64; a URL is refused, never fetched."""
    with pytest.raises(InvalidRequest, match=r"images\[3\]: "):
        parse_reference(text, "images[3]", MAX_PIXELS)


def test_a_damaged_file_is_refused_without_the_librarys_message() -> None:
    """A truncated file is refused, without the library's message, which may contain memory addresses."""
    whole = file_of(sample_image(), "PNG")
    for length in range(8, len(whole) - 12, 37):
        with pytest.raises(InvalidRequest, match=r"^images\[0\]: the PNG file is damaged$"):
            read_reference(whole[:length], "images[0]", MAX_PIXELS)


def test_a_bomb_is_refused_by_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file with very many pixels is refused by its size, without decoding them."""
    bomb = file_of(Image.new("1", (9000, 9000)))
    decoded: list[object] = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", decoded.append)
    with pytest.raises(InvalidRequest, match="9000x9000 is more than 10000000 pixels"):
        read_reference(bomb, "images[0]", MAX_PIXELS)
    assert decoded == []


@pytest.mark.parametrize(
    ("size", "prepared"), [((80, 64), (80, 64)), ((100, 70), (96, 64)), ((2048, 1024), (1440, 720))]
)
def test_the_number_of_tokens_is_predicted(size: tuple[int, int], prepared: tuple[int, int]) -> None:
    """The size at which the pipeline will encode a reference image is known without encoding it."""
    reference = read_reference(file_of(Image.new("RGB", size)), "images[0]", MAX_PIXELS)
    assert reference.size.prepared(16) == prepared
    assert reference.size.num_tokens(16) == prepared[0] * prepared[1] // 256


async def test_an_edit_equals_the_pipelines(serve_generator: Serve, demo: Flux2Model) -> None:
    """Reference images over HTTP give the pixels of ``Flux2Pipeline`` with the same images, and its size."""
    images = [sample_image(), sample_image(96, 96)]
    embeds = torch.randn(1, 32, demo.info.embedding_width)
    text = as_text(dump_safetensors(embeds))
    body = {"prompt_embeds": text, "num_inference_steps": 3, "seed": 7, "cache": "none"}
    async with serve_generator() as http:
        response = await http.post("/generate", json=body | {"images": [as_text(file_of(image)) for image in images]})
        without = await http.post("/generate", json=body | {"width": 80, "height": 64})
    assert response.status_code == 200, response.text
    pipeline = Flux2Pipeline.from_pretrained(WEIGHTS, text_encoder=None, tokenizer=None, dtype=demo.dtype)
    wanted = pipeline(
        prompt_embeds=embeds,
        image=images,
        num_inference_steps=3,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(7),
    ).images[0]
    assert np.array_equal(pixels(response.content), np.asarray(wanted))
    assert not np.array_equal(pixels(response.content), pixels(without.content))


@pytest.mark.parametrize("size", [(1200, 1000), (1448, 1448), (2897, 363), (2048, 1024), (1030, 1021)])
def test_a_large_reference_equals_the_pipelines(size: tuple[int, int], demo: Flux2Model) -> None:
    """A large image is scaled down while it is decoded, to the pixels that ``Flux2Pipeline`` makes of the whole one."""
    image = sample_image(*size)
    reference = read_reference(file_of(image), "images[0]", MAX_PIXELS)
    assert reference.size.width * reference.size.height <= LARGEST_AREA
    assert ReferenceSize(*size).prepared(16) == reference.size.prepared(16)
    processor = demo.components.new_pipeline(demo.reference_cache).image_processor
    assert processor._resize_if_exceeds_area(reference.image, LARGEST_AREA).tobytes() == reference.pixels
    assert processor._resize_to_target_area(image, LARGEST_AREA).tobytes() == reference.pixels


async def test_an_edit_of_a_large_image_equals_the_pipelines(serve_generator: Serve, demo: Flux2Model) -> None:
    """A reference image of more than a megapixel gives the pixels of ``Flux2Pipeline`` with the whole image."""
    image, embeds = sample_image(2900, 400), torch.randn(1, 32, demo.info.embedding_width)
    body = {"prompt_embeds": as_text(dump_safetensors(embeds)), "num_inference_steps": 1, "cache": "none", "seed": 7}
    async with serve_generator() as http:
        response = await http.post(
            "/generate", json=body | {"images": [as_text(file_of(image))], "width": 64, "height": 64}
        )
    assert response.status_code == 200, response.text
    pipeline = Flux2Pipeline.from_pretrained(WEIGHTS, text_encoder=None, tokenizer=None, dtype=demo.dtype)
    wanted = pipeline(
        prompt_embeds=embeds,
        image=[image],
        width=64,
        height=64,
        num_inference_steps=1,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(7),
    ).images[0]
    assert np.array_equal(pixels(response.content), np.asarray(wanted))


async def test_few_full_size_images_exist(serve_generator: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many edits arrive at once, at most two images exist at full size, each until the next is decoded."""
    decoded: list[weakref.ref[Image.Image]] = []
    counts: list[int] = []
    real = srgb.to_srgb

    def counted(opened: Image.Image) -> Image.Image:
        image = real(opened)
        decoded.append(weakref.ref(opened))
        counts.append(sum(each() is not None for each in decoded))
        return image

    monkeypatch.setattr("generator_service.api.references.to_srgb", counted)
    files = [as_text(file_of(sample_image(80 + 16 * k, 64))) for k in range(4)]
    async with serve_generator() as http:
        bodies = [SMALL | {"images": files, "num_inference_steps": 1, "seed": seed} for seed in range(6)]
        responses = await asyncio.gather(*(http.post("/generate", json=body) for body in bodies))
    assert {response.status_code for response in responses} == {200}
    assert len(counts) == 24
    assert max(counts) <= 2


@pytest.mark.parametrize("path", ["/generate", "/v1/images/edits"])
async def test_images_do_not_delay_other_requests(
    serve_generator: Serve, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """While six requests have their images decoded, a request without images is served."""
    may_decode = threading.Event()
    real = parse_reference

    def slow(*args: Any) -> Reference:
        assert may_decode.wait(60)
        return real(*args)

    monkeypatch.setattr(resolve, "parse_reference", slow)
    file = file_of(sample_image())
    fields = {"num_inference_steps": "1", "cache": "none"}

    async def edit(http: httpx.AsyncClient) -> int:
        if path == "/generate":
            body = SMALL | {"images": [as_text(file)]}
            return (await http.post(path, json=body)).status_code
        return (await http.post(path, data={"prompt": "x"} | fields, files={"image": file})).status_code

    async with serve_generator() as http:
        edits = [asyncio.create_task(edit(http)) for _ in range(6)]
        plain = await http.post("/generate", json=SMALL)
        assert not any(task.done() for task in edits)
        may_decode.set()
        assert await asyncio.gather(*edits) == [200] * 6
    assert plain.status_code == 200


def test_a_reference_is_encoded_once(demo: Flux2Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same reference image in a later request is not encoded again, and the image stays the same."""
    calls: list[int] = []
    vae = demo.components.vae
    encode = vae.encode

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return encode(*args, **kwargs)

    monkeypatch.setattr(vae, "encode", counted)
    embeds = torch.zeros(1, 32, demo.info.embedding_width)
    request = Params(embeds, 64, 64, 4.0, 1, schedule_for("none", 2), (Reference.of(sample_image(112, 64)),))
    first, second = demo.generate(request).latents, demo.generate(request).latents
    assert len(calls) == 1
    assert torch.equal(first, second)


def test_references_of_other_shapes_are_encoded_separately(demo: Flux2Model) -> None:
    """Two images of equal bytes and different shapes are encoded separately."""
    embeds = torch.zeros(1, 32, demo.info.embedding_width)
    wide, tall = Image.new("RGB", (128, 64)), Image.new("RGB", (64, 128))
    wanted = [Params(embeds, 64, 64, 4.0, 1, schedule_for("none", 2), (Reference.of(image),)) for image in (wide, tall)]
    first, second = (demo.generate(request).latents for request in wanted)
    assert not torch.equal(first, second)
    other_model = local_model(WEIGHTS)
    assert torch.equal(other_model.generate(wanted[1]).latents, second)
    assert torch.equal(other_model.generate(wanted[0]).latents, first)


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"images": ["x"]}, 422, "images[0]"),
        ({"images": [as_text(b"GIF89a")]}, 415, "images[0]"),
        ({"images": [as_text(file_of(sample_image(64, 65)))] * 9}, 422, "images"),
        ({"images": [as_text(file_of(sample_image(64, 32)))]}, 422, "images[0]"),
        ({"images": [7]}, 422, "images"),
        ({"num_images": 5}, 422, "num_images"),
        ({"num_images": 0}, 422, "num_images"),
        ({"num_images": 2, "seed": 2**63 - 1}, 422, "seed"),
    ],
)
async def test_bad_references_name_the_field(
    serve_generator: Serve, change: dict[str, Any], status: int, param: str
) -> None:
    """An invalid reference image or number of images is refused with the field's name."""
    async with serve_generator() as http:
        response = await http.post("/generate", json=SMALL | change)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)


async def test_too_many_tokens_are_refused(serve_generator: Serve) -> None:
    """A request with too many tokens is refused with its number and the limit."""
    async with serve_generator(max_image_tokens=40) as http:
        response = await http.post("/generate", json=SMALL | {"images": [as_text(file_of(sample_image(128, 64)))]})
    assert response.status_code == 422
    assert "48 image tokens (16 of the image itself) are more than 40" in response.json()["detail"]


async def test_several_images_have_their_own_seeds(serve_generator: Serve) -> None:
    """``num_images`` uses the seeds seed, seed + 1, ...; each image equals its single result."""
    async with serve_generator() as http:
        multipart = await http.post("/generate", json=SMALL | {"num_images": 3})
        as_json = await http.post("/generate", json=SMALL | {"num_images": 3}, headers={"Accept": "application/json"})
        alone = [await http.post("/generate", json=SMALL | {"seed": 7 + k}) for k in range(3)]
    head = f"Content-Type: {multipart.headers['content-type']}\r\n\r\n".encode()
    message = email.message_from_bytes(head + multipart.content, policy=email.policy.HTTP)
    assert isinstance(message, EmailMessage)
    bodies = list(message.iter_parts())
    assert [part["x-seed"] for part in bodies] == ["7", "8", "9"]
    assert {part.get_content_type() for part in bodies} == {"image/png"}
    images = as_json.json()["images"]
    assert [image["x-seed"] for image in images] == ["7", "8", "9"]
    for part, image, single in zip(bodies, images, alone, strict=True):
        file = part.get_payload(decode=True)
        assert isinstance(file, bytes)
        assert np.array_equal(pixels(file), pixels(single.content))
        assert np.array_equal(pixels(base64.b64decode(image["image"])), pixels(single.content))


async def test_one_image_as_json(serve_generator: Serve) -> None:
    """With ``Accept: application/json`` a single image is returned as JSON, too."""
    async with serve_generator() as http:
        response = await http.post("/generate", json=SMALL, headers={"Accept": "application/json"})
    (image,) = response.json()["images"]
    assert pixels(base64.b64decode(image["image"])).shape == (64, 64, 3)
    assert image["x-steps-computed"] == "4"
