"""Image files that would be slow to decode are refused by their structure, and others lose what is not needed."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from flux2_shared.errors import InvalidRequest
from generator_service.api.image_files import MAX_PARTS, MAX_SCANS, UnsupportedFile, reduce_file
from generator_service.api.references import read_reference
from generator_service.api.srgb import MAX_PROFILE_BYTES, apply_profile
from tests.icc import matrix_profile
from tests.image_bombs import (
    ARITHMETIC,
    BASELINE,
    LOSSLESS,
    chunk,
    exif_with,
    file_of,
    float_profile_tag,
    riff_chunk,
    scan_bomb,
    segment,
    with_chunks,
    with_riff_chunks,
    with_segments,
)

MAX_PIXELS = 16 * 2**20
SMALL = Image.fromarray((np.indices((64, 96)).sum(axis=0)[..., None] * [1, 2, 3] % 256).astype(np.uint8))
JPEG, PNG, WEBP = (file_of(SMALL, kind) for kind in ("JPEG", "PNG", "WEBP"))
MODES = {"PNG": ("RGB", "L", "P", "RGBA"), "JPEG": ("RGB", "L", "CMYK"), "WEBP": ("RGB", "L", "P", "RGBA")}
COMPRESSED = zlib.compress(bytes(1_000_000))
ROTATED = (0x0112, 3, 1, 6)
"""An EXIF entry: the image is shown rotated by 90 degrees."""
MANY_TAGS = exif_with([ROTATED, *((tag, 7, 60_000, 8) for tag in range(1000, 6000))])
TOO_MANY_PARTS = MAX_PARTS + 1

REFUSED = {
    "800 scans": (scan_bomb(4096, 800), "too many scans"),
    "33 scans of 16 megapixels": (scan_bomb(4096, 33), "too many scans"),
    "11 scans of three components": (scan_bomb(4096, 11, components=3), "too many scans"),
    "sequential scans": (scan_bomb(4096, 33, BASELINE), "too many scans"),
    "scans of a small image": (scan_bomb(64, MAX_SCANS + 1), "too many scans"),
    "scans after restart markers": (scan_bomb(4096, 33, between=b"\xff\xd0\xff\xff"), "too many scans"),
    "scans after comments": (scan_bomb(4096, 33, between=segment(0xFE, b"\xff\xd9")), "too many scans"),
    "scans after unknown markers": (scan_bomb(4096, 33, between=b"\xff\x05\0\x02"), "too many scans"),
    "arithmetic coding": (scan_bomb(4096, 20, ARITHMETIC), "arithmetic"),
    "progressive arithmetic coding": (scan_bomb(4096, 20, 0xCA), "arithmetic"),
    "lossless": (scan_bomb(64, 1, LOSSLESS), "lossless"),
    "comments": (with_segments(JPEG, segment(0xFE) * TOO_MANY_PARTS), "segments or chunks"),
    "application data": (with_segments(JPEG, segment(0xE1, b"Exif\0\0") * TOO_MANY_PARTS), "segments or chunks"),
    "tables": (with_segments(JPEG, segment(0xDB, bytes([0, *[1] * 64]) * 1000) * 20), "coding tables"),
    "chunks of a PNG": (with_chunks(PNG, chunk(b"teXt") * TOO_MANY_PARTS), "segments or chunks"),
    "empty data chunks": (with_chunks(PNG, chunk(b"IDAT") * TOO_MANY_PARTS), "segments or chunks"),
    "chunks of a WebP": (with_riff_chunks(WEBP, riff_chunk(b"none") * TOO_MANY_PARTS), "segments or chunks"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bomb_is_refused_before_it_is_opened(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that would be slow to decode is refused with its reason, before Pillow reads it."""
    opened: list[object] = []
    monkeypatch.setattr(Image, "open", lambda *_args, **_options: opened.append(name))
    data, reason = REFUSED[name]
    with pytest.raises(InvalidRequest, match=rf"^images\[0\]: .*{reason}"):
        read_reference(data, "images[0]", MAX_PIXELS)
    assert opened == []


LEFT_OUT = {
    "texts": with_chunks(PNG, *(chunk(b"zTXt", b"key%d\0\0" % k + COMPRESSED) for k in range(50))),
    "profiles": with_chunks(PNG, *(chunk(b"iCCP", b"name\0\0" + COMPRESSED) for _ in range(100))),
    "frames": file_of(SMALL, "PNG", save_all=True, append_images=[SMALL.rotate(k) for k in range(1, 100)]),
    "long EXIF data of a PNG": with_chunks(PNG, chunk(b"eXIf", MANY_TAGS[6:] + bytes(200_000))),
    "application data": with_segments(JPEG, *[segment(0xE1, b"Exif\0\0" + bytes(60_000))] * 100),
    "other application data": with_segments(JPEG, *[segment(0xED, b"Photoshop 3.0\0" + bytes(60_000))] * 100),
    "data after the image": JPEG + scan_bomb(4096, 800)[2:],
    "an image in a segment": with_segments(JPEG, segment(0xE5, scan_bomb(64, 600))),
    "a second image": file_of(SMALL, "MPO", save_all=True, append_images=[SMALL] * 20),
    "frames of a WebP": file_of(
        SMALL, "WEBP", save_all=True, lossless=True, append_images=[SMALL.rotate(k) for k in range(1, 100)]
    ),
    "long EXIF data of a WebP": file_of(SMALL, "WEBP", exif=MANY_TAGS + bytes(200_000)),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_the_rest_is_left_out(name: str) -> None:
    """Texts, repeated profiles, later frames, long EXIF data and what follows the image never reach the decoder."""
    data = LEFT_OUT[name]
    reduced = reduce_file("PNG" if data[:4] == PNG[:4] else "WEBP" if data[:4] == WEBP[:4] else "JPEG", data)
    assert len(reduced) < 70_000 + len(JPEG)
    pixels = read_reference(data, "images[0]", MAX_PIXELS).pixels
    with Image.open(io.BytesIO(data)) as whole:
        assert pixels == whole.convert("RGB").tobytes()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"progressive": True, "quality": 90},
        {"exif": exif_with([ROTATED])},
        {"icc_profile": matrix_profile(((0.6, 0.3, 0.0), (0.2, 0.6, 0.1), (0.1, 0.1, 0.7)), 1.8)},
        {"restart_marker_blocks": 1},
    ],
    ids=["plain", "progressive", "rotated", "profile", "restart markers"],
)
@pytest.mark.parametrize(
    ("kind", "mode"),
    [(kind, mode) for kind, modes in MODES.items() for mode in modes],
)
def test_the_image_stays_the_same(
    kind: str, options: dict[str, Any], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pixels, transparency, orientation and colors are those of the whole file."""
    data = file_of(SMALL.convert(mode), kind, **options)
    reduced = read_reference(data, "images[0]", MAX_PIXELS)
    monkeypatch.setattr("generator_service.api.references.reduce_file", lambda _kind, whole: whole)
    whole = read_reference(data, "images[0]", MAX_PIXELS)
    assert reduced == whole


def test_a_usual_progressive_file_of_the_largest_size_is_read() -> None:
    """A progressive color JPEG of 16 megapixels, and one in CMYK, have few enough scans."""
    for mode in ("RGB", "CMYK"):
        data = file_of(Image.new(mode, (4096, 4096)), "JPEG", progressive=True)
        assert reduce_file("JPEG", data).count(b"\xff\xda") >= 10


def test_scans_up_to_the_limit_are_read() -> None:
    """The limit is of scans times pixels: 32 at 16 megapixels, 500 at one."""
    for side, num_scans in ((4096, 32), (1024, 500)):
        reduce_file("JPEG", scan_bomb(side, num_scans))
        with pytest.raises(UnsupportedFile):
            reduce_file("JPEG", scan_bomb(side, num_scans + 1))


def test_no_marker_is_hidden() -> None:
    """A segment with an impossible length, after which a decoder would continue elsewhere, is damage."""
    hidden = segment(0xE2, b"ICC_PROFILE\0" + b"\xff\xda" * 1000)
    for length in (0, 1):
        data = with_segments(JPEG, b"\xff\xe0" + struct.pack(">H", length), hidden)
        with pytest.raises(ValueError, match="shorter than its length"):
            reduce_file("JPEG", data)
        with pytest.raises(InvalidRequest, match="the JPEG file is damaged"):
            read_reference(data, "images[0]", MAX_PIXELS)


@pytest.mark.parametrize("length", [0, 1, 3, 11, 20, 40, 100, -30])
@pytest.mark.parametrize("data", [JPEG, PNG, WEBP], ids=["JPEG", "PNG", "WEBP"])
def test_truncated_files_are_damaged(data: bytes, length: int) -> None:
    """A truncated file is refused as damaged or as another type, never with another error."""
    with pytest.raises(Exception, match=r"^images\[0\]: (the \w+ file is damaged|must be a PNG, JPEG or WebP file)$"):
        read_reference(data[:length], "images[0]", MAX_PIXELS)


def test_steps_of_a_profile_that_browsers_ignore_are_not_read() -> None:
    """The floating-point tags of an ICC profile, which may have any number of steps, do not change the image."""
    columns = {b"rXYZ": (0.44, 0.22, 0.01), b"gXYZ": (0.39, 0.72, 0.10), b"bXYZ": (0.14, 0.06, 0.71)}
    plain = matrix_profile(tuple(columns.values()), 1.8)
    changed = apply_profile(SMALL, with_tag(plain, float_profile_tag(3)))
    assert changed.tobytes() == apply_profile(SMALL, plain).tobytes()


def with_tag(plain: bytes, tag: bytes) -> bytes:
    """Replace the description of a profile of version 4 by a ``D2B0`` tag."""
    position = plain.index(b"desc")
    head = bytearray(
        plain[:position] + b"D2B0" + struct.pack(">II", len(plain), len(tag)) + plain[position + 12 :] + tag
    )
    head[:4], head[8] = struct.pack(">I", len(head)), 4
    return bytes(head)


def test_a_large_profile_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """An ICC profile that is larger than those of printing presses is ignored, and not parsed."""
    parsed: list[object] = []
    monkeypatch.setattr(ImageCms, "ImageCmsProfile", parsed.append)
    assert apply_profile(SMALL, bytes(MAX_PROFILE_BYTES + 1)).tobytes() == SMALL.tobytes()
    assert parsed == []
