"""``GET /modes``: the expected cost of an image in each cache mode."""

import base64
import io
from typing import Any

import pytest
from PIL import Image

from tests.conftest import Serve
from tests.control import ModelControl
from tests.generator_service.test_generate import SMALL

pytestmark = pytest.mark.anyio


async def test_modes_match_generate(serve_generator: Serve) -> None:
    """Computed steps and expected time are those of the same request to ``/generate``."""
    params = {"width": 64, "height": 80, "num_inference_steps": 10}
    async with serve_generator() as http:
        payload = (await http.get("/modes", params=params)).json()
        generated = await http.post("/generate", json={"prompt": "a red circle", "cache": "fast"} | params)
    modes = {mode["name"]: mode for mode in payload["modes"]}
    assert list(modes) == ["none", "slow", "medium", "fast", "ultra"]
    assert [mode["computed"] for mode in modes.values()] == [10, 5, 4, 3, 2]
    assert all(len(mode["computed_steps"]) == mode["computed"] for mode in modes.values())
    assert {mode["total"] for mode in modes.values()} == {10}
    assert modes["fast"]["schedule"] == generated.headers["x-schedule"]
    assert modes["fast"]["estimate_ms"] == pytest.approx(float(generated.headers["x-estimate-ms"]), abs=0.5)
    assert all(mode["estimate_ms"] > 0 for mode in modes.values())


async def test_the_defaults_are_those_of_the_service(serve_generator: Serve) -> None:
    """Without parameters the modes describe a request with all defaults, including its calibrated schedule."""
    async with serve_generator(default_cache=12) as http:
        payload = (await http.get("/modes")).json()
        few = (await http.get("/modes", params={"num_inference_steps": 8})).json()
    side = {"width": 128, "height": 128}
    assert payload["default"] == side | {"num_inference_steps": 50, "guidance_scale": 4.0, "cache": 12}
    assert [mode["name"] for mode in payload["modes"]] == ["none", "slow", "medium", "fast", "ultra", 12]
    assert "source=calibrated" in payload["modes"][2]["schedule"]
    assert 12 not in [mode["name"] for mode in few["modes"]]  # of 8 steps, 12 cannot be computed


@pytest.mark.parametrize(
    ("query", "param", "detail"),
    [
        ({"width": 100}, "width", "width: must be a multiple of 16 from 64 to 4096, not 100"),
        ({"height": "tall"}, "height", "height: Input should be a valid integer"),
        ({"width": 4096, "height": 4096}, "width", "width: 4096x4096 is more than 4194304 pixels"),
        ({"num_inference_steps": 0}, "num_inference_steps", "num_inference_steps: Input should be greater than"),
        ({"guidance_scale": "nan"}, "guidance_scale", "guidance_scale: Input should be a finite number"),
        ({"depth": 3}, "depth", "depth: Extra inputs are not permitted"),
        ({"images": "64"}, "images", "images.0: String should match pattern"),
        ({"images": "16x16"}, "images[0]", "images[0]: must have sides of at least 64 pixels"),
        ({"images": ["64x64", "9000x9000"]}, "images[1]", "images[1]: 9000x9000 is more than"),
        ({"images": ["64x64"] * 20}, "images", "images: at most 8, not 20"),
    ],
)
async def test_bad_input_is_refused(serve_generator: Serve, query: dict[str, Any], param: str, detail: str) -> None:
    """Invalid parameters are 422 with the field's name, as of ``/generate``."""
    async with serve_generator() as http:
        refused = await http.get("/modes", params=query)
    assert refused.status_code == 422
    assert refused.json()["error"]["param"] == param
    assert refused.json()["detail"].startswith(detail)


async def test_modes_need_a_key(serve_generator: Serve) -> None:
    async with serve_generator(token="secret") as http:
        assert (await http.get("/modes")).status_code == 401
        assert (await http.get("/modes", headers={"Authorization": "Bearer secret"})).status_code == 200


async def test_modes_do_not_use_the_queue(serve_generator: Serve, model_control: ModelControl) -> None:
    """The route occupies no slot, and responds even if the queue is full."""
    async with serve_generator(max_waiting=1) as http:
        with model_control.holding():
            jobs = [await http.post("/jobs", json=SMALL) for _ in range(3)]
            assert (await http.get("/modes")).status_code == 200
    assert [job.status_code for job in jobs] == [202, 202, 429]


async def test_reference_images_are_counted(serve_generator: Serve) -> None:
    """With the sizes of reference images, size, schedules and times are those of the edit that would run."""
    buffer = io.BytesIO()
    Image.new("RGB", (160, 96)).save(buffer, "PNG")
    edit = {"prompt": "a", "num_inference_steps": 50, "cache": "ultra"}
    async with serve_generator() as http:
        alone = (await http.get("/modes", params={"width": 160, "height": 96})).json()
        payload = (await http.get("/modes", params={"images": ["160x96", "128x64"]})).json()
        body = edit | {"images": [base64.b64encode(buffer.getvalue()).decode()]}
        generated = await http.post("/generate", json=body)
        one = (await http.get("/modes", params={"images": "160x96"})).json()
    assert (payload["default"]["width"], payload["default"]["height"]) == (160, 96)
    modes = {mode["name"]: mode for mode in one["modes"]}
    assert modes["ultra"]["schedule"] == generated.headers["x-schedule"]
    assert modes["ultra"]["computed"] == int(generated.headers["x-steps-computed"])
    for with_images, without in zip(payload["modes"], alone["modes"], strict=True):
        assert with_images["estimate_ms"] > 1.8 * without["estimate_ms"]  # 60 + 60 + 32 tokens instead of 60
