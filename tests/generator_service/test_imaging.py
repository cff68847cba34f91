"""Encoded images, and the provenance in them."""

import io
import json
import random
import struct
import zlib
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, PngImagePlugin

from generator_service.engine import imaging
from generator_service.engine.imaging import (
    MAX_JPEG_PROMPT_BYTES,
    ImageFormat,
    NoProvenance,
    Provenance,
    encode_image,
    read_provenance,
)

IMAGE = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
PROVENANCE = Provenance(
    prompt="ein rotes „Haus“ — 家 🎨",
    width=4,
    height=4,
    num_inference_steps=50,
    guidance_scale=4.0,
    seed=2**63 - 1,
    cache={"max_error": 0.1},
    schedule="night; source=calibrated",
    computed_steps=[0, 7, 49],
    model="demo",
    revision="local",
)
FORMATS: tuple[ImageFormat, ...] = ("png", "jpeg", "webp")
NUM_MUTATIONS = 600


def test_a_png_has_provenance() -> None:
    """Text chunks hold every parameter, the program, and that the image is AI-generated; no pixel is changed."""
    image = Image.open(io.BytesIO(encode_image(IMAGE, "png", PROVENANCE)))
    assert image.info["Comment"] == "AI generated"
    assert image.info["Software"].startswith("flux2-services ")
    assert json.loads(image.info["flux2"]) == asdict(PROVENANCE)
    assert np.array_equal(np.asarray(image), np.asarray(IMAGE))


def test_a_png_of_a_noisy_image_is_small() -> None:
    """It is smaller than the file that zlib's fastest level writes, and no pixel is changed."""
    rng = np.random.default_rng(0)
    smooth = np.add.outer(np.arange(256), np.arange(256))[..., None] / 2
    image = Image.fromarray((smooth + rng.normal(0, 3, (256, 256, 3))).clip(0, 255).astype(np.uint8))
    fastest = io.BytesIO()
    image.save(fastest, "PNG", compress_level=1)
    data = encode_image(image, "png", PROVENANCE)
    assert len(data) < 0.95 * len(fastest.getvalue())
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(image))


def test_an_uninstalled_copy_writes_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """From a bare copy of the source, which has no version, a file names only the program."""

    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(imaging, "version", version)
    image = Image.open(io.BytesIO(encode_image(IMAGE, "png", PROVENANCE)))
    assert image.info["Software"] == "flux2-services"


@pytest.mark.parametrize("image_format", ["jpeg", "webp"])
def test_exif_has_provenance(image_format: ImageFormat) -> None:
    """JPEG and WebP have the same provenance in EXIF, where image viewers show it."""
    image = Image.open(io.BytesIO(encode_image(IMAGE, image_format, PROVENANCE)))
    exif = image.getexif()
    assert image.format == image_format.upper()
    assert exif[ExifTags.Base.Software].startswith("flux2-services ")
    assert json.loads(exif[ExifTags.Base.ImageDescription]) == {"note": "AI generated", "flux2": asdict(PROVENANCE)}


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("record", [PROVENANCE, replace(PROVENANCE, prompt=None, prompt_embeds_sha256="00ff")])
def test_provenance_can_be_read_back(tmp_path: Path, image_format: ImageFormat, record: Provenance) -> None:
    """Provenance survives every format, with and without a prompt."""
    (tmp_path / "x").write_bytes(encode_image(IMAGE, image_format, record))
    assert read_provenance(tmp_path / "x") == record


@pytest.mark.parametrize("image_format", FORMATS)
def test_the_longest_prompt_fits(tmp_path: Path, image_format: ImageFormat) -> None:
    """The longest prompt that JPEG allows fits beside the longest list of steps."""
    record = replace(PROVENANCE, prompt="x" * (MAX_JPEG_PROMPT_BYTES - 2), computed_steps=list(range(100)))
    (tmp_path / "x").write_bytes(encode_image(IMAGE, image_format, record))
    assert read_provenance(tmp_path / "x") == record


def foreign_png(**chunks: str) -> bytes:
    """A PNG image with other text chunks."""
    buffer, info = io.BytesIO(), PngImagePlugin.PngInfo()
    for name, text in chunks.items():
        info.add_text(name, text)
    IMAGE.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def foreign_exif(image_format: str, description: str) -> bytes:
    """An image with another EXIF description."""
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[ExifTags.Base.ImageDescription] = description
    IMAGE.save(buffer, image_format, exif=exif)
    return buffer.getvalue()


def saved_as(image_format: str) -> bytes:
    """An image in any format of PIL's, without provenance."""
    buffer = io.BytesIO()
    IMAGE.save(buffer, image_format)
    return buffer.getvalue()


def huge_png(side: int) -> bytes:
    """A few hundred bytes with provenance whose header claims ``side`` x ``side`` pixels; they cannot be decoded."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)),
        (b"tEXt", b"flux2\0" + json.dumps(asdict(PROVENANCE)).encode()),
        (b"IDAT", b"no pixels"),
    ]
    framed = (struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"A text file, not an image.\n" * 10, id="text"),
        *(
            pytest.param(saved_as(name), id=f"{name} without provenance")
            for name in ("PNG", "JPEG", "WEBP", "GIF", "TIFF")
        ),
        *(pytest.param(encode_image(IMAGE, name, PROVENANCE)[:60], id=f"{name} cut off") for name in FORMATS),
        pytest.param(foreign_png(flux2="{"), id="not JSON"),
        pytest.param(foreign_png(flux2="[]"), id="a list"),
        pytest.param(foreign_png(flux2='{"prompt": "a"}'), id="missing fields"),
        pytest.param(foreign_png(flux2=json.dumps(asdict(PROVENANCE) | {"more": 1})), id="unknown fields"),
        pytest.param(foreign_png(flux2="[" * 200_000), id="deep JSON"),
        pytest.param(foreign_exif("JPEG", "a holiday"), id="a JPEG's description"),
        pytest.param(foreign_exif("WEBP", '{"flux2": 7}'), id="a WebP's description"),
        pytest.param(foreign_exif("TIFF", json.dumps({"flux2": asdict(PROVENANCE)})), id="another format"),
        pytest.param(huge_png(20_000), id="decompression bomb"),
    ],
)
def test_other_files_have_no_provenance(tmp_path: Path, data: bytes) -> None:
    """A file that this service did not write is an error that names it."""
    (tmp_path / "x.png").write_bytes(data)
    with pytest.raises(NoProvenance, match=r"x\.png"):
        read_provenance(tmp_path / "x.png")


def test_missing_files_and_folders_have_no_provenance(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.png", tmp_path):
        with pytest.raises(NoProvenance, match=path.name):
            read_provenance(path)


def test_provenance_is_read_without_decoding(tmp_path: Path) -> None:
    """The provenance of a large image is read without decoding its pixels, and without a warning."""
    (tmp_path / "x.png").write_bytes(huge_png(10_000))
    assert read_provenance(tmp_path / "x.png") == PROVENANCE


@pytest.mark.parametrize("image_format", FORMATS)
def test_damaged_files_are_read_or_refused(tmp_path: Path, image_format: ImageFormat) -> None:
    """A damaged file has provenance or is refused, without any other error or warning."""
    rng = random.Random(0)
    data = encode_image(IMAGE, image_format, PROVENANCE)
    refused = 0
    for _ in range(NUM_MUTATIONS):
        damaged = bytearray(data)
        at = rng.randrange(len(damaged))
        damaged[at : at + rng.randrange(1, 60)] = rng.randbytes(rng.randrange(4))
        (tmp_path / "x").write_bytes(damaged)
        try:
            read_provenance(tmp_path / "x")
        except NoProvenance:
            refused += 1
    assert refused > NUM_MUTATIONS / 10
