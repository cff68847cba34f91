"""A picture beside the one without a cache: asked for, or sampled for the metrics."""

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


def picture_in(data: bytes) -> np.ndarray:
    """The pixels of a file."""
    return pixels(Image.open(io.BytesIO(data)))


def samples() -> list[asyncio.Task[None]]:
    """The comparisons that run in the background."""
    return [task for task in asyncio.all_tasks() if task.get_name() == "quality sample"]


async def drawn(http: httpx.AsyncClient, **fields: object) -> httpx.Response:
    """An answer with a picture."""
    answer = await http.post("/generate", json=CACHED | fields)
    assert answer.status_code == 200, answer.text
    return answer


async def test_a_comparison(serve_generator: Serve) -> None:
    """The file has the picture without a cache on the left and the other on the right; the headers say how near."""
    async with serve_generator() as http:
        ours = picture_in((await drawn(http)).content)
        full = picture_in((await drawn(http, cache="none")).content)
        compared = await drawn(http, compare=True)
        known = await metrics(http)
    both = picture_in(compared.content)
    np.testing.assert_array_equal(both[:, :64], full)
    np.testing.assert_array_equal(both[:, 64:], ours)
    assert compared.headers["x-psnr-db"] == f"{psnr(ours, full, peak=255):.2f}"
    assert compared.headers["x-ssim"] == f"{ssim(ours, full, peak=255):.5f}"
    assert 10 < float(compared.headers["x-psnr-db"]) < 80
    assert compared.headers["x-steps-computed"] == "3"
    assert known['flux2_stage_seconds_count{stage="denoise"}'] == 3


async def test_a_comparison_as_json(serve_generator: Serve) -> None:
    """In JSON and in events the picture is there by itself, too; each of several pictures is compared."""
    async with serve_generator() as http:
        alone = await drawn(http)
        body = CACHED | {"compare": True, "num_images": 2}
        answer = await http.post("/generate", json=body, headers={"Accept": "application/json"})
        streamed = await http.post("/generate", json=body, headers={"Accept": "text/event-stream"})
    pictures = answer.json()["images"]
    completed = [json.loads(line[6:]) for line in streamed.text.splitlines() if '"side_by_side"' in line]
    for told in (pictures, completed):
        assert [picture["x-seed"] for picture in told] == ["7", "8"]
        assert np.array_equal(picture_in(base64.b64decode(told[0]["image"])), picture_in(alone.content))
        assert all(picture_in(base64.b64decode(picture["side_by_side"])).shape == (64, 128, 3) for picture in told)
        assert len({picture["x-psnr-db"] for picture in told}) == 2


async def test_nothing_is_compared_unasked(serve_generator: Serve) -> None:
    """Other answers say nothing of it, and draw nothing for it."""
    async with serve_generator() as http:
        answer = await drawn(http)
        steps = await metrics(http)
    assert not {"x-psnr-db", "x-ssim"} & answer.headers.keys()
    assert steps['flux2_steps_total{kind="computed"}'] == 3


async def test_without_a_cache_there_is_nothing_to_draw_again(serve_generator: Serve) -> None:
    """A picture without a cache equals itself, and is drawn once."""
    async with serve_generator() as http:
        answer = await drawn(http, cache="none", compare=True)
        steps = await metrics(http)
    assert (answer.headers["x-psnr-db"], answer.headers["x-ssim"]) == ("inf", "1.00000")
    assert steps['flux2_steps_total{kind="computed"}'] == 8


async def test_samples_of_quality(serve_generator: Serve) -> None:
    """The share of pictures that the setting names is compared in the background; the answers do not wait for it."""
    async with serve_generator(quality_sampling=1.0) as http:
        for seed in range(3):
            answer = await drawn(http, seed=seed)
            assert "x-psnr-db" not in answer.headers
        await asyncio.gather(*samples())
        known = await metrics(http)
        assert known["flux2_queue_depth"] == 0
    assert 10 < known["flux2_quality_psnr_db_sum"] / 3 < 80
    assert 0 < known["flux2_quality_ssim_sum"] / 3 < 1


async def test_a_sample_does_not_outlive_the_service(serve_generator: Serve) -> None:
    """A service that ends gives up the samples that it still wanted to draw."""
    async with serve_generator(quality_sampling=1.0) as http:
        await drawn(http, num_inference_steps=100, cache=2)
        before = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - before < 20
    assert not samples()


def test_equal_pictures_are_infinitely_near() -> None:
    """PSNR is infinite and SSIM 1 for a picture and itself, and both fall as noise grows."""
    rng = np.random.default_rng(0)
    plain = Image.fromarray(rng.integers(0, 256, (32, 48, 3), dtype=np.uint8))
    noisy = [
        Image.fromarray(np.clip(pixels(plain) + rng.normal(0, s, (32, 48, 3)), 0, 255).astype(np.uint8))
        for s in (2, 20)
    ]
    same, near, far = (compare(picture, plain) for picture in (plain, *noisy))
    assert (same.psnr_db, same.ssim) == (math.inf, 1.0)
    assert same.psnr_db > near.psnr_db > far.psnr_db > 0
    assert same.ssim > near.ssim > far.ssim
    assert near.side_by_side.size == (96, 32)
