"""Small image files that are slow or large to decode, and the parts to build them from."""

import io
import struct
import zlib
from collections.abc import Sequence
from typing import Any

from PIL import Image

BASELINE, PROGRESSIVE, ARITHMETIC, LOSSLESS = 0xC0, 0xC2, 0xC9, 0xC3
ONE_CODE = bytes([1, *[0] * 15])
"""The lengths of a Huffman table with one code, ``0``."""


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def segment(marker: int, content: bytes = b"") -> bytes:
    """A segment of a JPEG file."""
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def chunk(name: bytes, content: bytes = b"") -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def riff_chunk(name: bytes, content: bytes = b"") -> bytes:
    """A chunk of a WebP file."""
    return name + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)


def with_segments(jpeg: bytes, *segments: bytes) -> bytes:
    """Insert segments at the start of a JPEG file."""
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


def with_chunks(png: bytes, *chunks: bytes) -> bytes:
    """Insert chunks after the header of a PNG file."""
    return png[:33] + b"".join(chunks) + png[33:]


def with_riff_chunks(webp: bytes, *chunks: bytes) -> bytes:
    """Append chunks to a WebP file."""
    body = webp[8:] + b"".join(chunks)
    return webp[:4] + struct.pack("<I", len(body)) + body


def scan_bomb(side: int, num_scans: int, frame: int = PROGRESSIVE, components: int = 1, between: bytes = b"") -> bytes:
    """A JPEG whose scans have no data, so that each stands for all pixels. ``between`` precedes each scan."""
    layers = [bytes([number, 0x11, 0]) for number in range(1, components + 1)]
    parts = [
        b"\xff\xd8",
        segment(0xDB, bytes([0, *[1] * 64])),
        segment(frame, struct.pack(">BHHB", 8, side, side, components) + b"".join(layers)),
        segment(0xC4, b"\0" + ONE_CODE + b"\0"),
    ]
    selectors = b"".join(bytes([number, 0]) for number in range(1, components + 1))
    for index in range(num_scans):
        approximation = 0x01 if index == 0 else 0x10
        parts += [between, segment(0xDA, bytes([components]) + selectors + bytes([0, 0, approximation])), b"\0"]
    return b"".join([*parts, b"\xff\xd9"])


def exif_with(entries: Sequence[tuple[int, int, int, int]]) -> bytes:
    """EXIF data in the order of Intel, from tags, types, counts and values."""
    table = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + table + bytes(4)


def float_profile_tag(num_steps: int) -> bytes:
    """A ``D2B0`` tag of an ICC profile, of that many matrices, which share their bytes."""
    identity = struct.pack(">12f", *(float(k in (0, 4, 8)) for k in range(12)))
    matrix = b"matf" + bytes(4) + struct.pack(">HH", 3, 3) + identity
    head = b"mpet" + bytes(4) + struct.pack(">HHI", 3, 3, num_steps)
    start = len(head) + 8 * num_steps
    return head + struct.pack(">II", start, len(matrix)) * num_steps + matrix
