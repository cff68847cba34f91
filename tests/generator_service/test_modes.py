"""``GET /modes``: what a picture takes in each cache mode."""

from typing import Any

import pytest

from tests.conftest import Serve
from tests.control import ModelControl
from tests.generator_service.test_generate import SMALL

pytestmark = pytest.mark.anyio


async def test_every_mode_tells_what_it_takes(serve_generator: Serve) -> None:
    """The computed steps and the expected time are those of the same request to ``/generate``."""
    picture = {"width": 64, "height": 80, "num_inference_steps": 10}
    async with serve_generator() as http:
        told = (await http.get("/modes", params=picture)).json()
        drawn = await http.post("/generate", json={"prompt": "a red circle", "cache": "fast"} | picture)
    modes = {mode["name"]: mode for mode in told["modes"]}
    assert list(modes) == ["none", "slow", "medium", "fast", "ultra"]
    assert [mode["computed"] for mode in modes.values()] == [10, 5, 4, 3, 2]
    assert all(len(mode["computed_steps"]) == mode["computed"] for mode in modes.values())
    assert {mode["total"] for mode in modes.values()} == {10}
    assert modes["fast"]["schedule"] == drawn.headers["x-schedule"]
    assert modes["fast"]["estimate_ms"] == pytest.approx(float(drawn.headers["x-estimate-ms"]), abs=0.5)
    assert all(mode["estimate_ms"] > 0 for mode in modes.values())


async def test_the_defaults_are_those_of_the_service(serve_generator: Serve) -> None:
    """A request that leaves everything open is drawn so; its calibrated schedule is told."""
    async with serve_generator(default_cache=12) as http:
        told = (await http.get("/modes")).json()
        few = (await http.get("/modes", params={"num_inference_steps": 8})).json()
    side = {"width": 128, "height": 128}
    assert told["default"] == side | {"num_inference_steps": 50, "guidance_scale": 4.0, "cache": 12}
    assert [mode["name"] for mode in told["modes"]] == ["none", "slow", "medium", "fast", "ultra", 12]
    assert "source=calibrated" in told["modes"][2]["schedule"]
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
    ],
)
async def test_bad_input_is_refused(serve_generator: Serve, query: dict[str, Any], param: str, detail: str) -> None:
    """422 as of ``/generate``, with the field to blame."""
    async with serve_generator() as http:
        refused = await http.get("/modes", params=query)
    assert refused.status_code == 422
    assert refused.json()["error"]["param"] == param
    assert refused.json()["detail"].startswith(detail)


async def test_a_key_is_wanted(serve_generator: Serve) -> None:
    """As for every other route of the API."""
    async with serve_generator(token="secret") as http:
        assert (await http.get("/modes")).status_code == 401
        assert (await http.get("/modes", headers={"Authorization": "Bearer secret"})).status_code == 200


async def test_nothing_is_drawn_for_it(serve_generator: Serve, model_control: ModelControl) -> None:
    """It takes no place in the queue: it answers also where the queue is full."""
    async with serve_generator(max_waiting=1) as http:
        with model_control.holding():
            jobs = [await http.post("/jobs", json=SMALL) for _ in range(3)]
            assert (await http.get("/modes")).status_code == 200
    assert [job.status_code for job in jobs] == [202, 202, 429]
