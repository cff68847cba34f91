"""Reduces image files to what their pixels, orientation and colors need, and refuses those that are slow to decode.

Pillow works on every part of a file, and on some again for each earlier one; and a part of ten bytes may stand for
millions of pixels. So parts are counted before anything is decoded, and comments, texts, thumbnails and the later
frames of animations are left out.
"""

import re
import struct
from collections.abc import Iterator

MAX_PARTS = 16_384
"""Most segments of a JPEG, or chunks of a PNG or WebP file. A PNG of 48 MB in chunks of 4 KB has 12 000."""
MAX_EXIF_BYTES = 2**16
"""Longer EXIF data is ignored; a JPEG file cannot have more in one segment."""
MAX_SCANS = 500
MAX_SCANNED_PIXELS = 2**29
"""Most pixels of a JPEG times the color components of all its scans. A scan may have ten bytes, whatever the size of
the image ("Two Issues with the JPEG Standard"), so libjpeg-turbo's fuzzers stop at 500 scans of a megapixel. That many
take about a second. At 16 megapixels they are 32 components; common encoders write 14 for color and 24 for CMYK."""
MAX_TABLE_BYTES = 2**20
"""Most bytes of quantization and Huffman tables in a JPEG file; each scan may need 3 KB."""

JPEG_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")
"""Any marker except restart markers, which are a part of a scan's data. The other bytes 0xFF there precede a zero."""
JPEG_START, JPEG_END, JPEG_SCAN, JPEG_EXIF = b"\xff\xd8", 0xD9, 0xDA, 0xE1
JPEG_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
JPEG_FRAMES_DECODED = {0xC0, 0xC1, 0xC2}
"""Baseline, extended and progressive."""
JPEG_TABLES = {0xC4, 0xDB}
JPEG_KEPT = JPEG_FRAMES | JPEG_TABLES | {JPEG_SCAN, JPEG_END, 0xDD, 0xE0, 0xE2, 0xEE}
"""Also restart intervals, and what tells the colors: JFIF, ICC profiles, Adobe's transform."""
PNG_KEPT = {b"IHDR", b"PLTE", b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"cICP", b"eXIf", b"IEND"}
WEBP_KEPT = {b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF", b"ICCP", b"EXIF"}


class UnsupportedFile(ValueError):
    """The file may be valid, but would take too long to decode; the message says why."""


def reduce_file(kind: str, data: bytes) -> bytes:
    """Return a file with the same pixels, orientation and colors, and little else.

    Damage is left to the decoder. The time is that of copying, plus about a microsecond for each part.

    Raises:
        UnsupportedFile: decoding would take too long.
        ValueError, IndexError, struct.error: the file is damaged.
    """
    return {"PNG": reduce_png, "JPEG": reduce_jpeg, "WEBP": reduce_webp}[kind](data)


def reduce_jpeg(data: bytes) -> bytes:
    """Keep the frame, tables, scans and color information of the first image, and its first EXIF segment."""
    parts, kept_exif = [memoryview(JPEG_START)], False
    num_pixels = num_scans = num_components = table_bytes = 0
    for marker, segment, scan in jpeg_segments(data):
        is_exif = marker == JPEG_EXIF and bytes(segment[4:10]) == b"Exif\0\0"
        if marker in JPEG_KEPT or (is_exif and not kept_exif):
            parts += [segment, scan]
        kept_exif = kept_exif or is_exif
        if marker in JPEG_FRAMES - JPEG_FRAMES_DECODED:
            raise UnsupportedFile("is a lossless, hierarchical or arithmetic JPEG; use baseline or progressive")
        if marker in JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", segment, 5)
            num_pixels = max(num_pixels, width * height)
        if marker == JPEG_SCAN:
            num_scans, num_components = num_scans + 1, num_components + segment[4]
        if marker in JPEG_TABLES:
            table_bytes += len(segment)
    if num_scans > MAX_SCANS or num_components * num_pixels > MAX_SCANNED_PIXELS:
        raise UnsupportedFile(
            f"has too many scans for its size ({num_scans}); save it again, with fewer or as baseline"
        )
    if table_bytes > MAX_TABLE_BYTES:
        raise UnsupportedFile(f"has more than {MAX_TABLE_BYTES} bytes of coding tables")
    return b"".join(parts)


def jpeg_segments(data: bytes) -> Iterator[tuple[int, memoryview, memoryview]]:
    """Yield each marker with its segment, and with the scan's data after it, up to the end of the first image.

    A decoder of the segments and data sees no other markers: data ends at the next marker, and a segment has the length
    that it states.
    """
    view, nothing = memoryview(data), memoryview(b"")
    marker = JPEG_MARKER.search(data, len(JPEG_START))
    for _ in range(MAX_PARTS):
        if marker is None:
            return
        code, start = marker[1][0], marker.start()
        if code == JPEG_END:
            yield code, view[start : start + 2], nothing
            return
        (length,) = struct.unpack_from(">H", data, start + 2)
        if length < 2:
            raise ValueError("a segment is shorter than its length")
        end = start + 2 + length
        marker = JPEG_MARKER.search(data, end)
        after = view[end : marker.start() if marker else len(data)]
        yield code, view[start:end], after if code == JPEG_SCAN else nothing
    raise too_many_parts()


def reduce_png(data: bytes) -> bytes:
    """Keep the pixels, and the first chunk of each kind that tells their colors or orientation."""
    view, seen, start = memoryview(data), set[bytes](), 8
    parts = [view[:start]]
    for _ in range(MAX_PARTS):
        if start + 8 > len(data):
            return b"".join(parts)
        length, name = struct.unpack_from(">I4s", data, start)
        end = start + 12 + length
        is_long = name == b"eXIf" and length > MAX_EXIF_BYTES
        if name == b"IDAT" or (name in PNG_KEPT - seen and not is_long):
            parts.append(view[start:end])
        if name == b"IEND":
            return b"".join(parts)
        seen.add(name)
        start = end
    raise too_many_parts()


def reduce_webp(data: bytes) -> bytes:
    """Keep the image or the first frame of an animation, the color profile and the EXIF data."""
    view, seen = memoryview(data), set[bytes]()
    parts: list[memoryview] = []
    start, file_end = 12, min(len(data), 8 + struct.unpack_from("<I", data, 4)[0])
    for _ in range(MAX_PARTS):
        if start + 8 > file_end:
            body = b"".join(parts)
            return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body
        name, length = struct.unpack_from("<4sI", data, start)
        end = start + 8 + length + length % 2
        is_long = name == b"EXIF" and length > MAX_EXIF_BYTES
        if name in WEBP_KEPT - seen and not is_long:
            parts.append(view[start : min(end, file_end)])
        seen.add(name)
        start = end
    raise too_many_parts()


def too_many_parts() -> UnsupportedFile:
    return UnsupportedFile(f"has more than {MAX_PARTS} segments or chunks; save it again without metadata")
