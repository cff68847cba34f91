"""Images compared with those generated without a cache: on request, or sampled for the metrics."""

import asyncio
import base64
import io
import json
import math
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from generator_service.engine.quality import compare, pixels, psnr, ssim
from tests.conftest import Serve
from tests.generator_service.test_generate import metrics

pytestmark = pytest.mark.anyio

BODY: dict[str, Any] = {"prompt": "a red circle", "width": 64, "height": 64, "num_inference_steps": 8, "seed": 7}
CACHED = BODY | {"cache": 3}


def pixels_of(data: bytes) -> np.ndarray:
    return pixels(Image.open(io.BytesIO(data)))


def samples() -> list[asyncio.Task[None]]:
    """The comparisons that run in the background."""
    return [task for task in asyncio.all_tasks() if task.get_name() == "quality sample"]


async def generate_ok(http: httpx.AsyncClient, **fields: object) -> httpx.Response:
    """The response to a successful request."""
    response = await http.post("/generate", json=CACHED | fields)
    assert response.status_code == 200, response.text
    return response


async def test_a_comparison(serve_generator: Serve) -> None:
    """The file has the image without a cache on the left and the other on the right; the headers have PSNR and SSIM."""
    async with serve_generator() as http:
        ours = pixels_of((await generate_ok(http)).content)
        full = pixels_of((await generate_ok(http, cache="none")).content)
        compared = await generate_ok(http, compare=True)
        metric = await metrics(http)
    both = pixels_of(compared.content)
    np.testing.assert_array_equal(both[:, :64], full)
    np.testing.assert_array_equal(both[:, 64:], ours)
    assert compared.headers["x-psnr-db"] == f"{psnr(ours, full, peak=255):.2f}"
    assert compared.headers["x-ssim"] == f"{ssim(ours, full, peak=255):.5f}"
    assert 10 < float(compared.headers["x-psnr-db"]) < 80
    assert compared.headers["x-steps-computed"] == "3"
    assert metric['flux2_stage_seconds_count{stage="denoise"}'] == 3


async def test_a_comparison_as_json(serve_generator: Serve) -> None:
    """JSON and events also contain the image alone; each of several images is compared."""
    async with serve_generator() as http:
        alone = await generate_ok(http)
        body = CACHED | {"compare": True, "num_images": 2}
        response = await http.post("/generate", json=body, headers={"Accept": "application/json"})
        streamed = await http.post("/generate", json=body, headers={"Accept": "text/event-stream"})
    images = response.json()["images"]
    completed = [json.loads(line[6:]) for line in streamed.text.splitlines() if '"side_by_side"' in line]
    for group in (images, completed):
        assert [image["x-seed"] for image in group] == ["7", "8"]
        assert np.array_equal(pixels_of(base64.b64decode(group[0]["image"])), pixels_of(alone.content))
        assert all(pixels_of(base64.b64decode(image["side_by_side"])).shape == (64, 128, 3) for image in group)
        assert len({image["x-psnr-db"] for image in group}) == 2


async def test_images_are_compared_only_on_request(serve_generator: Serve) -> None:
    """Other responses have no comparison, and no second image is generated for them."""
    async with serve_generator() as http:
        response = await generate_ok(http)
        steps = await metrics(http)
    assert not {"x-psnr-db", "x-ssim"} & response.headers.keys()
    assert steps['flux2_steps_total{kind="computed"}'] == 3


async def test_an_image_without_a_cache_is_generated_once(serve_generator: Serve) -> None:
    """An image without a cache is its own reference, and is generated once."""
    async with serve_generator() as http:
        response = await generate_ok(http, cache="none", compare=True)
        steps = await metrics(http)
    assert (response.headers["x-psnr-db"], response.headers["x-ssim"]) == ("inf", "1.00000")
    assert steps['flux2_steps_total{kind="computed"}'] == 8


async def test_quality_is_sampled(serve_generator: Serve) -> None:
    """The configured share of images is compared in the background, without delaying the responses."""
    async with serve_generator(quality_sampling=1.0) as http:
        for seed in range(3):
            response = await generate_ok(http, seed=seed)
            assert "x-psnr-db" not in response.headers
        await asyncio.gather(*samples())
        metric = await metrics(http)
        assert metric["flux2_queue_depth"] == 0
    assert 10 < metric["flux2_quality_psnr_db_sum"] / 3 < 80
    assert 0 < metric["flux2_quality_ssim_sum"] / 3 < 1


async def test_a_sample_does_not_outlive_the_service(serve_generator: Serve) -> None:
    """A service that ends cancels the comparisons that are still queued."""
    async with serve_generator(quality_sampling=1.0) as http:
        await generate_ok(http, num_inference_steps=100, cache=2)
        before = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - before < 20
    assert not samples()


def test_psnr_and_ssim() -> None:
    """For equal images PSNR is infinite and SSIM 1, and both fall as noise grows."""
    rng = np.random.default_rng(0)
    plain = Image.fromarray(rng.integers(0, 256, (32, 48, 3), dtype=np.uint8))
    noisy = [
        Image.fromarray(np.clip(pixels(plain) + rng.normal(0, s, (32, 48, 3)), 0, 255).astype(np.uint8))
        for s in (2, 20)
    ]
    same, near, far = (compare(image, plain) for image in (plain, *noisy))
    assert (same.psnr_db, same.ssim) == (math.inf, 1.0)
    assert same.psnr_db > near.psnr_db > far.psnr_db > 0
    assert same.ssim > near.ssim > far.ssim
    assert near.side_by_side.size == (96, 32)
