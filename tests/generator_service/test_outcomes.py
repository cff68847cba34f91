"""How requests, streams and jobs ended is counted and logged, so that an operator can be alerted."""

import asyncio
import logging

import httpx
import pytest
import stamina
import torch

from flux2_shared.errors import OutOfMemory
from flux2_shared.wire import dump_torch
from generator_service.pipelines.flux2 import Flux2Model
from tests.conftest import Serve
from tests.control import Clock, ModelControl
from tests.generator_service.test_generate import SMALL, metrics

pytestmark = pytest.mark.anyio

STREAM = {"Accept": "text/event-stream"}


def requests(route: str, status: int, code: str) -> str:
    """The counter of requests that ended so."""
    return f'flux2_requests_total{{code="{code}",route="{route}",status="{status}"}}'


def generations(status: str, code: str) -> str:
    """The counter of generations that ended so."""
    return f'flux2_generations_total{{code="{code}",status="{status}"}}'


def run_out_of_memory(*_: object, **__: object) -> None:
    raise OutOfMemory("the image does not fit into memory")


async def test_a_stream_counts_by_its_end(
    serve_generator: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A stream whose status was 200 is counted and logged with the code of its error."""
    caplog.set_level(logging.INFO, "flux2")
    async with serve_generator() as http:
        await http.post("/generate", json=SMALL, headers=STREAM)
        with monkeypatch.context() as broken:
            broken.setattr(Flux2Model, "generate", run_out_of_memory)
            await http.post("/generate", json=SMALL, headers=STREAM)
            await http.post("/v1/images/generations", json={"prompt": "a", "size": "64x64", "stream": True})
        counted = await metrics(http)
    assert counted[requests("/generate", 200, "ok")] == 1
    assert counted[requests("/generate", 200, "oom")] == 1
    assert counted[requests("/v1/images/generations", 200, "oom")] == 1
    assert counted[generations("completed", "ok")] == 1
    assert counted[generations("failed", "oom")] == 2
    assert "POST /generate 200 oom" in caplog.text
    assert "generation failed (oom)" in caplog.text


async def test_a_stream_takes_as_long_as_it_lasts(
    serve_generator: Serve, clock: Clock, model_control: ModelControl, caplog: pytest.LogCaptureFixture
) -> None:
    """The time of a stream is counted and logged until its last event, not until its headers."""
    caplog.set_level(logging.INFO, "flux2")
    async with serve_generator() as http:
        model_control.on_step = lambda: clock.advance(100.0)
        await http.post("/generate", json=SMALL | {"num_inference_steps": 2}, headers=STREAM)
        counted = await metrics(http)
    assert counted['flux2_request_seconds_bucket{le="160.0",route="/generate"}'] == 0
    assert counted['flux2_request_seconds_bucket{le="300.0",route="/generate"}'] == 1
    assert counted["flux2_generation_seconds_sum"] >= 200
    (line,) = [record for record in caplog.messages if record.startswith("POST /generate 200 ok")]
    assert int(line.split()[-2]) >= 200_000


async def test_a_job_counts_by_its_end(serve_generator: Serve, model_control: ModelControl) -> None:
    """A job counts when it ends: completed, failed or cancelled; its 202 says nothing about that."""
    async with serve_generator() as http:
        done = (await http.post("/jobs", json=SMALL)).headers["location"]
        await http.get(f"{done}/events")
        with model_control.holding():
            job = (await http.post("/jobs", json=SMALL)).headers["location"]
            await model_control.is_held()
            await http.delete(job)
        counted = await metrics(http)
    assert counted[requests("/jobs", 202, "ok")] == 2
    assert counted[generations("completed", "ok")] == 1
    assert counted[generations("cancelled", "job_cancelled")] == 1
    assert counted["flux2_jobs"] == 2
    assert counted["flux2_job_bytes"] > 100


async def test_a_client_that_leaves_is_not_a_success(serve_generator: Serve, model_control: ModelControl) -> None:
    """A request, and a stream, whose client left before the end count as disconnected."""
    async with serve_generator() as http:
        for headers in ({}, STREAM):
            with model_control.holding():
                request = asyncio.create_task(http.post("/generate", json=SMALL, headers=headers))
                await model_control.is_held()
                request.cancel()
                await asyncio.wait([request])
        for _ in range(100):
            counted = await metrics(http)
            names = [name for name in counted if name.startswith("flux2_requests_total") and "disconnected" in name]
            ended = sum(counted[name] for name in names)
            if ended == 2:
                break
            await asyncio.sleep(0.05)
    assert ended == 2
    assert requests("/generate", 200, "ok") not in counted


@pytest.mark.parametrize(
    ("body", "headers", "status", "code"),
    [
        (SMALL | {"width": 65}, {}, 422, "invalid_request"),
        (SMALL, {"authorization": "Bearer wrong"}, 401, "unauthorized"),
        (SMALL | {"images": ["R0lGODdh"]}, {}, 415, "unsupported_image_type"),
    ],
)
async def test_refusals_count_by_their_code(
    serve_generator: Serve, body: dict[str, object], headers: dict[str, str], status: int, code: str
) -> None:
    """A refused request counts with the code of its error."""
    async with serve_generator(token="right" if headers else None) as http:
        await http.post("/generate", json=body, headers=headers)
        await http.get("/nowhere")
        counted = await metrics(http)
    assert counted[requests("/generate", status, code)] == 1
    assert counted[requests("unknown", 404, "not_found")] == 1


async def test_what_runs_is_exported(serve_generator: Serve, serve_encoder: Serve) -> None:
    """Version, model, revision, profile and schedules, and the process, are metrics of each service."""
    async with serve_generator() as generator, serve_encoder() as encoder:
        texts = [(await http.get("/metrics")).text for http in (generator, encoder)]
    for text, label in zip(texts, ('schedules="', 'weights="full"'), strict=True):
        (line,) = [line for line in text.splitlines() if line.startswith("flux2_build_info{")]
        assert all(
            name in line for name in ('version="', 'model="weights"', 'revision="local"', 'profile="exact"', label)
        )
        assert "process_resident_memory_bytes " in text
        assert "process_open_fds " in text


async def test_the_error_of_estimates_is_exported(serve_generator: Serve) -> None:
    """Each image's estimate is compared with its time."""
    async with serve_generator() as http:
        for seed in range(3):
            await http.post("/generate", json=SMALL | {"seed": seed})
        counted = await metrics(http)
    assert counted["flux2_estimate_error_ratio_count"] == 3


async def test_retries_and_the_circuit_are_visible(serve_generator: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """A retry's log line says what was retried and why; a metric says whether requests fail fast."""
    caplog.set_level(logging.WARNING)
    replies = [503] * 3 + [200]

    def encoder(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/info":
            return httpx.Response(404)
        status = replies.pop(0) if replies else 503
        return httpx.Response(status, content=dump_torch(torch.zeros(1, 32, 384)) if status == 200 else b"")

    with stamina.set_testing(True, attempts=4):
        async with serve_generator(httpx.MockTransport(encoder)) as http:
            assert (await http.post("/generate", json=SMALL | {"prompt": "secret"})).status_code == 200
            assert (await metrics(http))["flux2_encoder_circuit_open"] == 0
            for prompt in "abc":
                assert (await http.post("/generate", json=SMALL | {"prompt": prompt})).status_code == 503
            assert (await metrics(http))["flux2_encoder_circuit_open"] == 1
    reason = "because the last one failed: the text encoder is unavailable (status 503)"
    ours = [record.getMessage() for record in caplog.records if record.name == "flux2"]
    assert ours[:3] == [f"embedding a prompt: attempt {number}, {reason}" for number in (2, 3, 4)]
    assert "secret" not in caplog.text
