"""How alike two pictures are."""

import numpy as np
from numpy.typing import NDArray


def psnr(picture: NDArray[np.float64], reference: NDArray[np.float64], *, peak: float) -> float:
    """Peak signal-to-noise ratio in dB, in float; infinite for equal pictures.

    Args:
        picture: any shape.
        reference: of the same shape.
        peak: the range of values: 255 for 8-bit pictures, 2 for -1..1.
    """
    error = float(np.mean((picture.astype(np.float64) - reference.astype(np.float64)) ** 2))
    return float("inf") if error == 0 else float(10 * np.log10(peak**2 / error))
