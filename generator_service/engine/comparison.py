"""What a schedule costs one picture: the same seed with every step computed, beside it."""

from dataclasses import dataclass, field

from PIL import Image

from generator_service.engine.similarity import pixels, psnr, ssim


@dataclass(frozen=True)
class Comparison:
    """How near a picture is to the one without a cache."""

    psnr_db: float
    """Infinite if they are equal."""
    ssim: float
    side_by_side: Image.Image = field(repr=False)
    """On the left the picture without a cache."""


def compare(picture: Image.Image, reference: Image.Image) -> Comparison:
    """Measure ``picture`` against ``reference``, which has every step computed."""
    ours, full = pixels(picture), pixels(reference)
    both = Image.new("RGB", (reference.width + picture.width, picture.height))
    both.paste(reference, (0, 0))
    both.paste(picture, (reference.width, 0))
    return Comparison(psnr(ours, full, peak=255), ssim(ours, full, peak=255), both)
