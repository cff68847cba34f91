"""The text encoder's metrics."""

import pytest

from tests.conftest import Serve

pytestmark = pytest.mark.anyio


async def test_the_encoder_exports_only_what_it_measures(serve_encoder: Serve) -> None:
    """Metrics of images are the generator's: the encoder does not export them as zeros."""
    async with serve_encoder() as http:
        metrics = (await http.get("/metrics")).text
    assert "flux2_requests_total" in metrics
    for name in ("flux2_quality_psnr_db", "flux2_quality_ssim", "flux2_picture_seconds", "flux2_steps_total"):
        assert name not in metrics
