"""How alike two pictures are."""

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image
from skimage.metrics import structural_similarity


def psnr(picture: NDArray[np.float64], reference: NDArray[np.float64], *, peak: float) -> float:
    """Peak signal-to-noise ratio in dB, in float; infinite for equal pictures.

    Args:
        picture: any shape.
        reference: of the same shape.
        peak: the range of values: 255 for 8-bit pictures, 2 for -1..1.
    """
    error = float(np.mean((picture.astype(np.float64) - reference.astype(np.float64)) ** 2))
    return float("inf") if error == 0 else float(10 * np.log10(peak**2 / error))


def ssim(picture: NDArray[np.float64], reference: NDArray[np.float64], *, peak: float) -> float:
    """Structural similarity (Wang et al. 2004), 1 for equal pictures; arguments as of ``psnr``, of ``[H, W, C]``."""
    value = structural_similarity(picture, reference, channel_axis=2, data_range=peak)  # type: ignore[no-untyped-call]
    return float(value)


def pixels(picture: Image) -> NDArray[np.float64]:
    """``[H, W, 3]``, from 0 to 255."""
    return np.asarray(picture.convert("RGB"), dtype=np.float64)
