"""Reference images of an edit, parsed defensively: a client may send anything."""

import base64
import hashlib
import io
import re
import warnings

from PIL import Image, ImageOps

from flux2_shared.errors import InvalidRequest
from generator_service.errors import UnsupportedImageType
from generator_service.pipelines.params import Reference

MAGIC = {"PNG": rb"\x89PNG\r\n\x1a\n", "JPEG": rb"\xff\xd8\xff", "WEBP": rb"RIFF....WEBP"}
DATA_URI = re.compile(r"data:[\w.+/-]*;base64,", re.IGNORECASE)
MIN_SIDE = 64
MAX_ASPECT_RATIO = 8
"""The most that ``Flux2Pipeline`` accepts."""


def parse_reference(text: str, param: str, max_pixels: int) -> Reference:
    """Read an image from base64 or a data URI; ``param`` names the field in errors.

    Raises:
        InvalidRequest: it is not an image that can be used; URLs are never fetched.
        UnsupportedImageType: it is neither PNG, JPEG nor WebP.
    """
    if re.match(r"\w+://", text):
        raise InvalidRequest(f"{param}: URLs are not fetched: send the file as base64", param=param)
    try:
        data = base64.b64decode(DATA_URI.sub("", text, count=1), validate=True)
    except ValueError:  # binascii.Error, or letters beyond ASCII
        raise InvalidRequest(f"{param}: must be base64, or a data URI with base64", param=param) from None
    return read_reference(data, param, max_pixels)


def read_reference(data: bytes, param: str, max_pixels: int) -> Reference:
    """Read an image file; its size is checked before it is decoded.

    Raises:
        InvalidRequest: it is damaged, or larger, smaller or longer than can be used.
        UnsupportedImageType: it is neither PNG, JPEG nor WebP, by its first bytes.
    """
    kind = next((kind for kind, magic in MAGIC.items() if re.match(magic, data, re.DOTALL)), None)
    if kind is None:
        raise UnsupportedImageType(f"{param}: must be a PNG, JPEG or WebP file", param=param)
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=[kind]) as opened:
            check_size(opened.size, param, max_pixels)
            image = ImageOps.exif_transpose(opened).convert("RGB")
    except InvalidRequest:
        raise
    except Exception:  # noqa: BLE001 - a damaged or hostile file can raise anything in PIL, with addresses in its text
        raise InvalidRequest(f"{param}: this {kind} file is damaged", param=param) from None
    return Reference(image, hashlib.sha256(data).hexdigest())


def check_size(size: tuple[int, int], param: str, max_pixels: int) -> None:
    """Refuse an image whose size alone rules it out."""
    width, height = size
    if width * height > max_pixels:
        raise InvalidRequest(f"{param}: {width}x{height} is more than {max_pixels} pixels", param=param)
    if min(size) < MIN_SIDE or max(size) > MAX_ASPECT_RATIO * min(size):
        limits = f"each side {MIN_SIDE} pixels or more, one at most {MAX_ASPECT_RATIO} times the other"
        raise InvalidRequest(f"{param}: must have {limits}, not {width}x{height}", param=param)
