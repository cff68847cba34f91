"""Decodes reference images. The data is untrusted."""

import hashlib
import io
import re
import warnings

from PIL import Image

from flux2_shared.errors import InvalidRequest
from flux2_shared.heap import trim_heap
from generator_service.api.base64_text import decode_base64
from generator_service.api.image_files import UnsupportedFile, reduce_file
from generator_service.api.srgb import UnsupportedColors, to_srgb
from generator_service.errors import UnsupportedImageType
from generator_service.pipelines.params import Reference, downscaled

MAGIC = {"PNG": rb"\x89PNG\r\n\x1a\n", "JPEG": rb"\xff\xd8\xff", "WEBP": rb"RIFF....WEBP"}
MIN_SIDE = 64
MAX_ASPECT_RATIO = 8
"""Largest aspect ratio that ``Flux2Pipeline`` accepts."""


def parse_reference(text: str, param: str, max_pixels: int) -> Reference:
    """Decode an image from base64 or a data URI; ``param`` names the field in errors.

    Raises:
        InvalidRequest: the text is not a usable image. URLs are never fetched.
        UnsupportedImageType: the file is neither PNG, JPEG nor WebP.
    """
    if re.match(r"\s*\w+://", text):
        raise InvalidRequest(f"{param}: URLs are not fetched; send the file as base64", param=param)
    try:
        data = decode_base64(text)
    except ValueError:
        raise InvalidRequest(f"{param}: must be base64, or a data URI with base64", param=param) from None
    try:
        return read_reference(data, param, max_pixels)
    finally:
        trim_heap()  # else decoded images of full size leave hundreds of megabytes


def read_reference(data: bytes, param: str, max_pixels: int) -> Reference:
    """Decode an image file to 8-bit sRGB at the size that the pipeline uses, after checking its size and structure.

    Raises:
        InvalidRequest: the file is damaged, its colors cannot be converted, it would take too long to decode, or its
            size or aspect ratio is outside the limits.
        UnsupportedImageType: the first bytes are not those of a PNG, JPEG or WebP file.
    """
    kind = next((kind for kind, magic in MAGIC.items() if re.match(magic, data, re.DOTALL)), None)
    if kind is None:
        raise UnsupportedImageType(f"{param}: must be a PNG, JPEG or WebP file", param=param)
    try:
        file = io.BytesIO(reduce_file(kind, data))
        with warnings.catch_warnings(action="ignore"), Image.open(file, formats=[kind]) as opened:
            check_size(opened.size, param, max_pixels)
            return Reference.of(downscaled(to_srgb(opened)), hashlib.sha256(data).hexdigest())
    except InvalidRequest:
        raise
    except (UnsupportedFile, UnsupportedColors) as error:
        raise InvalidRequest(f"{param}: {error}", param=param) from None
    except Exception:  # noqa: BLE001 - PIL may raise anything, and its messages contain memory addresses
        raise InvalidRequest(f"{param}: the {kind} file is damaged", param=param) from None


def check_size(size: tuple[int, int], param: str, max_pixels: int) -> None:
    """Raise ``InvalidRequest`` if the image is too large, too small or too elongated."""
    width, height = size
    if width * height > max_pixels:
        raise InvalidRequest(f"{param}: {width}x{height} is more than {max_pixels} pixels", param=param)
    if min(size) < MIN_SIDE or max(size) > MAX_ASPECT_RATIO * min(size):
        limits = f"sides of at least {MIN_SIDE} pixels and an aspect ratio of at most {MAX_ASPECT_RATIO}"
        raise InvalidRequest(f"{param}: must have {limits}, not {width}x{height}", param=param)
