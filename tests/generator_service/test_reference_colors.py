"""Reference images are used as people see them: upright, opaque, in 8-bit sRGB."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from flux2_shared.errors import InvalidRequest
from generator_service.api.references import read_reference
from tests.icc import cmyk_profile, gray_profile, matrix_profile

MAX_PIXELS = 10_000_000
SIZE = (64, 64)
DISPLAY_P3 = ((0.5151, 0.2412, -0.0011), (0.2919, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841))
"""XYZ (D50) of the primaries of Display P3."""
XYZ_TO_SRGB = np.array(((3.1339, -1.6169, -0.4906), (-0.9788, 1.9161, 0.0335), (0.0719, -0.2290, 1.4052)))
"""From XYZ (D50) to linear sRGB."""


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def read(data: bytes) -> Image.Image:
    return read_reference(data, "images[0]", MAX_PIXELS).image


def color_of(data: bytes) -> tuple[int, ...]:
    """The color of an image that has one."""
    colors = read(data).getcolors()
    assert colors is not None
    assert len(colors) == 1
    color = colors[0][1]
    assert isinstance(color, tuple)
    return color


def png_16_bit(values: np.ndarray, transparent: int | None = None) -> bytes:
    """A 16-bit grayscale PNG."""
    image = Image.fromarray(values.astype(np.uint16))
    return file_of(image) if transparent is None else file_of(image, transparency=transparent)


def with_chunk(png: bytes, name: bytes, content: bytes) -> bytes:
    """Insert a chunk after the header of a PNG file."""
    chunk = struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return png[:33] + chunk + png[33:]


@pytest.mark.parametrize(("value", "gray"), [(0, 0), (128, 0), (129, 1), (300, 1), (32768, 128), (65407, 255)])
def test_16_bit_grayscale_is_scaled(value: int, gray: int) -> None:
    """16-bit values are scaled to 8 bits and rounded; none is clipped to white."""
    assert color_of(png_16_bit(np.full(SIZE, value))) == (gray, gray, gray)


def test_a_16_bit_ramp_keeps_its_order() -> None:
    """All 256 levels of a 16-bit ramp are used."""
    ramp = np.asarray(read(png_16_bit(np.arange(65536).reshape(256, 256))))[..., 0].ravel()
    assert (np.diff(ramp.astype(int)) >= 0).all()
    assert len(set(ramp.tolist())) == 256


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBA webp"])
def test_hidden_colors_do_not_show(mode: str) -> None:
    """Transparent pixels become white whatever color they hide; half transparent ones are blended with white."""
    kind = "WEBP" if mode.endswith("webp") else "PNG"
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    image = Image.new("RGBA", SIZE, (200, 0, 0, 0)).convert(mode.split(maxsplit=1)[0])
    assert color_of(file_of(image, kind, **options)) == (255, 255, 255)
    image.putalpha(128)
    gray = np.array(image.convert("RGB").getpixel((0, 0)))
    blended = np.rint(255 + (gray - 255) * 128 / 255)
    assert np.abs(np.array(color_of(file_of(image, kind, **options))) - blended).max() <= 1


def test_transparency_by_color_is_blended() -> None:
    """Transparency of a palette entry, of a gray value, and of a color is used."""
    black_on_clear = Image.new("RGB", SIZE, (1, 2, 3))
    assert color_of(file_of(black_on_clear, transparency=(1, 2, 3))) == (255, 255, 255)
    assert color_of(file_of(black_on_clear, transparency=(1, 2, 4))) == (1, 2, 3)
    assert color_of(file_of(Image.new("L", SIZE, 7), transparency=7)) == (255, 255, 255)
    assert color_of(file_of(Image.new("1", SIZE, 0), transparency=0)) == (255, 255, 255)
    assert color_of(png_16_bit(np.full(SIZE, 300), transparent=300)) == (255, 255, 255)
    assert color_of(png_16_bit(np.full(SIZE, 301), transparent=300)) == (1, 1, 1)
    palette = black_on_clear.quantize(2)
    index: Any = palette.getpixel((0, 0))
    assert color_of(file_of(palette, transparency=index)) == (255, 255, 255)
    assert color_of(file_of(palette, transparency=bytes([255] * index + [128]))) == (128, 128, 129)


@pytest.mark.parametrize("color", [(200, 100, 50), (30, 180, 90), (128, 128, 128)])
def test_a_wide_gamut_profile_is_converted(color: tuple[int, int, int]) -> None:
    """Colors with a Display P3 profile become the same colors in sRGB."""
    linear = np.array(color) / 255
    srgb = np.clip(XYZ_TO_SRGB @ np.array(DISPLAY_P3).T @ linear**2.2, 0, 1)
    wanted = 255 * np.where(srgb <= 0.0031308, 12.92 * srgb, 1.055 * srgb ** (1 / 2.4) - 0.055)
    data = file_of(Image.new("RGB", SIZE, color), icc_profile=matrix_profile(DISPLAY_P3, 2.2))
    assert np.abs(np.array(color_of(data)) - wanted).max() <= 3


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_a_profile_and_transparency_go_together(kind: str) -> None:
    """The colors are converted first, then blended with white."""
    options = {"icc_profile": matrix_profile(DISPLAY_P3, 2.2)} | ({"lossless": True} if kind == "WEBP" else {})
    opaque = np.array(color_of(file_of(Image.new("RGB", SIZE, (30, 180, 90)), kind, **options)))
    data = file_of(Image.new("RGBA", SIZE, (30, 180, 90, 128)), kind, **options)
    assert np.abs(np.array(color_of(data)) - (255 + (opaque - 255) * 128 / 255)).max() <= 1


def test_a_gray_profile_is_converted() -> None:
    """A grayscale image with gamma 1 becomes lighter: the linear value 64 of 255 is 137 in sRGB."""
    data = file_of(Image.new("L", SIZE, 64), icc_profile=gray_profile(1.0))
    assert color_of(data) == pytest.approx((137, 137, 137), abs=2)


def test_a_cmyk_profile_is_converted() -> None:
    """Black ink has the color that the profile says, and paper is white; without a profile black is black."""
    black, paper = Image.new("CMYK", SIZE, (0, 0, 0, 255)), Image.new("CMYK", SIZE, 0)
    assert color_of(file_of(black, "JPEG")) == pytest.approx((0, 0, 0), abs=2)
    profile = cmyk_profile(lightness_of_black=50)
    assert color_of(file_of(black, "JPEG", icc_profile=profile)) == pytest.approx((119, 119, 119), abs=6)
    assert color_of(file_of(paper, "JPEG", icc_profile=profile)) == pytest.approx((255, 255, 255), abs=2)


def test_srgb_is_used_as_it_is() -> None:
    """Pixels of an image with an sRGB profile, or with the usual gamma, are not rounded again."""
    ramp = Image.fromarray(
        np.stack([np.arange(65536).reshape(256, 256) % size for size in (256, 251, 241)], -1).astype("u1")
    )
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for data in (file_of(ramp), file_of(ramp, icc_profile=profile), with_gamma(ramp, 45455)):
        assert np.array_equal(np.asarray(read(data)), np.asarray(ramp))


def with_gamma(image: Image.Image, gamma: int, *, srgb: bool = False) -> bytes:
    """A PNG file with a ``gAMA`` chunk, in units of 1/100000, and perhaps an ``sRGB`` chunk."""
    data = with_chunk(file_of(image), b"gAMA", struct.pack(">I", gamma))
    return with_chunk(data, b"sRGB", b"\0") if srgb else data


def test_the_gamma_of_a_png_is_applied() -> None:
    """A linear PNG (gamma 1) is converted to sRGB's gamma, unless a chunk declares sRGB."""
    image = Image.new("RGB", SIZE, (64, 128, 255))
    assert color_of(with_gamma(image, 100000)) == pytest.approx((136, 186, 255), abs=1)
    assert color_of(with_gamma(image, 100000, srgb=True)) == (64, 128, 255)
    assert color_of(with_gamma(image, 0)) == (64, 128, 255)


@pytest.mark.parametrize("profile", [b"", b"no profile", matrix_profile(DISPLAY_P3, 2.2)[:200], cmyk_profile(50)])
def test_a_damaged_profile_is_ignored(profile: bytes) -> None:
    """A profile that is damaged, or made for another mode, does not refuse the image."""
    assert color_of(file_of(Image.new("RGB", SIZE, (10, 20, 30)), icc_profile=profile)) == (10, 20, 30)


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"II*\0" + b"\xff" * 40])
def test_damaged_exif_data_is_ignored(exif: bytes) -> None:
    """An image whose EXIF data cannot be read is used as it is."""
    assert color_of(file_of(Image.new("RGB", SIZE, (10, 20, 30)), "PNG", exif=exif)) == (10, 20, 30)


@pytest.mark.parametrize(("primaries", "transfer"), [(9, 16), (9, 18), (1, 8), (12, 13)])
def test_hdr_is_refused(primaries: int, transfer: int) -> None:
    """A PNG that declares HDR or wide-gamut colors without a profile is refused, with what to do."""
    data = with_chunk(file_of(Image.new("RGB", SIZE)), b"cICP", bytes((primaries, transfer, 0, 1)))
    with pytest.raises(InvalidRequest, match=r"^images\[0\]: is an HDR or wide-gamut PNG .*convert it to sRGB"):
        read(data)


def test_srgb_coding_points_are_read() -> None:
    """A PNG that declares BT.709 primaries with sRGB's curve is read, and so is one with a damaged declaration."""
    for content in (bytes((1, 13, 0, 1)), bytes((1, 1, 0, 1)), b"\x09"):
        assert color_of(with_chunk(file_of(Image.new("RGB", SIZE, (1, 2, 3))), b"cICP", content)) == (1, 2, 3)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_animation_is_its_first_frame(kind: str) -> None:
    """Of an animated PNG or WebP, the first frame is used."""
    frames = [Image.new("RGB", SIZE, color) for color in ((255, 0, 0), (0, 0, 255))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = file_of(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert color_of(data) == (255, 0, 0)


def test_texts_of_a_png_do_not_matter() -> None:
    """Compressed texts and unknown chunks before the pixels are skipped."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt("cICP", "cICP" * 100, zip=True)
    data = with_chunk(file_of(Image.new("RGB", SIZE, (1, 2, 3)), pnginfo=info), b"vpAg", bytes(9))
    assert color_of(data) == (1, 2, 3)
