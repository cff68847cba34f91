"""Converts an opened image file to what people see: upright, opaque, 8-bit sRGB."""

import io
import re
import struct
from contextlib import suppress

import numpy as np
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

BACKGROUND = (255, 255, 255)
"""White, as browsers show transparent images, and as the page shows thumbnails."""
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
SRGB_PRIMARIES, SRGB_TRANSFERS = 1, (1, 6, 13, 14, 15)
"""Color primaries and transfer functions of ITU-T H.273 that are read as sRGB, as browsers do."""
SRGB_GAMMA = 1 / 2.2
MAX_PROFILE_BYTES = 4 * 2**20
"""A larger profile is ignored; those of printing presses have up to 3 MB."""
FLOATING_POINT_TAGS = re.compile(rb"D2B[0-3]")
"""Alternatives to ``A2B0`` and the like, which browsers do not read. They may have any number of steps: Little CMS took
4 s for 10 000 in a profile of 80 KB."""
GAMMA_TOLERANCE = 0.05
"""A PNG gamma that is closer to sRGB's than this share is not converted."""


class UnsupportedColors(ValueError):
    """The image has colors that cannot be converted; the message says what to do."""


def to_srgb(image: Image.Image) -> Image.Image:
    """Convert a PNG, JPEG or WebP file that Pillow has opened. An animation becomes its first frame.

    The EXIF orientation is applied, 16-bit grayscale is scaled to 8 bits, transparent pixels are blended with
    ``BACKGROUND``, and colors are converted with the embedded ICC profile, or with the gamma of a PNG file. A profile
    that is damaged or does not match the image is ignored, as browsers do.

    Raises:
        UnsupportedColors: the image is HDR, or has other primaries without a profile.
    """
    check_coding_points(image)
    profile, gamma = image.info.get("icc_profile"), png_gamma(image)
    upright = to_8_bits(with_exif_orientation(image))
    alpha = as_mode(upright, "RGBA").getchannel("A") if upright.has_transparency_data else None
    opaque = without_alpha(upright)
    colors = apply_profile(opaque, profile) if profile else apply_gamma(opaque, gamma)
    if alpha is None:
        return colors
    background = Image.new("RGB", colors.size, BACKGROUND)
    background.paste(colors, mask=alpha)
    return background


def with_exif_orientation(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; damaged EXIF data has none."""
    image.load()  # errors of the pixels are not caught below
    with suppress(Exception):  # Pillow raises many kinds of errors for damaged EXIF data
        ImageOps.exif_transpose(image, in_place=True)
    return image


def to_8_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grayscale to 8 bits, where Pillow's ``convert`` would clip at 255."""
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.uint32)
    scaled = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is not None:
        scaled.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return scaled


def without_alpha(image: Image.Image) -> Image.Image:
    """Return the colors of all pixels, hidden ones too, as ``L``, ``RGB`` or ``CMYK``."""
    if image.mode in ("L", "RGB", "CMYK") and not image.has_transparency_data:
        return image
    if image.mode in ("1", "L", "LA"):
        return image.convert("LA").getchannel("L")
    return as_mode(image, "RGBA").convert("RGB")


def as_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image, or return it as it is, where Pillow's ``convert`` would copy 64 MB for 16 megapixels."""
    return image if image.mode == mode else image.convert(mode)


def apply_profile(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert ``L``, ``RGB`` or ``CMYK`` to sRGB with an ICC profile of at most ``MAX_PROFILE_BYTES``."""
    if len(profile) > MAX_PROFILE_BYTES:
        return as_mode(image, "RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(FLOATING_POINT_TAGS.sub(b"none", profile)))
        if ImageCms.getProfileDescription(source).startswith("sRGB"):
            return as_mode(image, "RGB")  # the pixels are used as they are, without rounding
        converted = ImageCms.profileToProfile(image, source, SRGB, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):  # damaged, or made for another mode
        return as_mode(image, "RGB")
    assert converted is not None  # it would be None for a conversion in place
    return converted


def apply_gamma(image: Image.Image, gamma: float | None) -> Image.Image:
    """Convert to RGB, from the gamma of a PNG file to that of sRGB."""
    rgb = as_mode(image, "RGB")
    if gamma is None or abs(gamma / SRGB_GAMMA - 1) < GAMMA_TOLERANCE:
        return rgb
    curve = [round(255 * (value / 255) ** (SRGB_GAMMA / gamma)) for value in range(256)]
    return rgb.point(curve * 3)


def png_gamma(image: Image.Image) -> float | None:
    """Return the gamma of a PNG file, which a declaration of sRGB overrides."""
    gamma = image.info.get("gamma")
    return None if "srgb" in image.info or not gamma else float(gamma)


def check_coding_points(image: Image.Image) -> None:
    """Refuse a PNG file whose ``cICP`` chunk, which Pillow ignores, declares HDR or other primaries than sRGB's."""
    if not isinstance(image, PngImagePlugin.PngImageFile):
        return
    points = find_chunk(image, b"cICP")
    if points is None or len(points) != 4:
        return
    primaries, transfer = points[:2]
    if primaries != SRGB_PRIMARIES or transfer not in SRGB_TRANSFERS:
        raise UnsupportedColors("is an HDR or wide-gamut PNG (cICP chunk); convert it to sRGB, or embed an ICC profile")


def find_chunk(image: PngImagePlugin.PngImageFile, name: bytes) -> bytes | None:
    """Return the content of a chunk before the pixels of a PNG file, or None."""
    file = image.fp
    assert file is not None  # open until the pixels are loaded
    position = file.tell()
    try:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, chunk = struct.unpack(">I4s", head)
            if chunk == name:
                return file.read(length)
            if chunk == b"IDAT":
                return None
            file.seek(length + 4, io.SEEK_CUR)
        return None
    finally:
        file.seek(position)
