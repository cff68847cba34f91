"""Jobs: creation, events, results, cancellation, idempotency, expiry and isolation by key."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.conftest import Serve
from tests.control import ModelControl
from tests.generator_service.test_generate import LONG, SMALL, events, metrics, pixels, steps_run

pytestmark = pytest.mark.anyio


async def ended(http: httpx.AsyncClient, job_id: str) -> dict[str, Any]:
    """Wait until a job has ended, and return it."""
    job: dict[str, Any]
    while (job := (await http.get(f"/jobs/{job_id}")).json())["status"] in ("queued", "running"):  # noqa: ASYNC110 - as a client would
        await asyncio.sleep(0.01)
    return job


async def test_the_result_of_a_job_is_that_of_generate(serve_generator: Serve) -> None:
    """``POST /jobs`` responds at once with 202; the job's result is the response of ``/generate``."""
    async with serve_generator() as http:
        created = await http.post("/jobs", json=SMALL)
        job = await ended(http, created.json()["id"])
        result = await http.get(f"{created.headers['location']}/result")
        direct = await http.post("/generate", json=SMALL)
    assert created.status_code == 202
    assert (job["status"], job["seed"]) == ("completed", 7)
    assert created.json()["position"] == 0
    assert created.json()["estimate_ms"] > 0
    assert result.headers["content-type"] == "image/png"
    assert result.headers["x-schedule"] == direct.headers["x-schedule"]
    assert np.array_equal(pixels(result.content), pixels(direct.content))


async def test_hugging_faces_body_starts_a_job(serve_generator: Serve) -> None:
    """``POST /jobs`` takes the body of Hugging Face's API too, and gives the same job for equivalent bodies."""
    body = {"inputs": SMALL["prompt"], "parameters": {name: SMALL[name] for name in SMALL if name != "prompt"}}
    key = {"Idempotency-Key": "one"}
    async with serve_generator() as http:
        created = await http.post("/jobs", json=body, headers=key)
        job = await ended(http, created.json()["id"])
        native = await http.post("/jobs", json=SMALL, headers=key)
        refused = await http.post("/jobs", json={"inputs": "a", "parameters": {"scheduler": "x"}})
    assert (created.status_code, job["status"], job["seed"]) == (202, "completed", 7)
    assert native.json()["id"] == job["id"]
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "scheduler")


async def test_events_can_be_read_at_any_time(serve_generator: Serve) -> None:
    """``/events`` has all events from the start, for early and late readers."""
    async with serve_generator() as http:
        job_id = (await http.post("/jobs", json=SMALL)).json()["id"]
        early = await http.get(f"/jobs/{job_id}/events")
        late = await http.get(f"/jobs/{job_id}/events")
    for response in (early, late):
        names = [name for name, _ in events(response.text)]
        assert names == ["step"] * 4 + ["completed"]


async def test_previews_are_sent_only_while_a_job_runs(serve_generator: Serve) -> None:
    """A reader sees previews while the job runs; after its end the events have no previews."""
    body = SMALL | {"num_inference_steps": 30, "previews": 3}
    async with serve_generator() as http:
        job_id = (await http.post("/jobs", json=body)).json()["id"]
        early = await http.get(f"/jobs/{job_id}/events")
        late = await http.get(f"/jobs/{job_id}/events")
    names = [name for name, _ in events(early.text)]
    assert 1 <= names.count("preview") <= 3
    assert [name for name in names if name != "preview"] == ["step"] * 30 + ["completed"]
    assert [name for name, _ in events(late.text)] == ["step"] * 30 + ["completed"]


async def test_cancelling_queued_jobs(serve_generator: Serve) -> None:
    """A job that is cancelled before it starts frees its slot."""
    async with serve_generator(max_waiting=3) as http:
        ids = [(await http.post("/jobs", json=LONG)).json()["id"] for _ in range(3)]
        job = await asyncio.gather(*(http.delete(f"/jobs/{job_id}") for job_id in ids))
        assert (await metrics(http))["flux2_queue_depth"] == 0
    assert [response.json()["status"] for response in job] == ["cancelled"] * 3


async def test_cancelling_stops_within_a_step(serve_generator: Serve) -> None:
    """``DELETE`` cancels a running job: no further steps run, its slot is free, and its result is 409."""
    async with serve_generator(max_waiting=1) as http:
        job_id = (await http.post("/jobs", json=LONG)).json()["id"]
        while await steps_run(http) < 2:  # noqa: ASYNC110 - the device thread has no event to wait for
            await asyncio.sleep(0.01)
        early = await http.get(f"/jobs/{job_id}/result")
        deleted = await http.delete(f"/jobs/{job_id}")
        stopped = await steps_run(http)
        result = await http.get(f"/jobs/{job_id}/result")
        after = await http.post("/generate", json=SMALL)
        assert (await metrics(http))["flux2_queue_depth"] == 0
        assert await steps_run(http) - stopped <= SMALL["num_inference_steps"] + 1
    assert (early.status_code, early.json()["code"]) == (409, "job_not_finished")
    assert "retry-after" in early.headers
    assert deleted.json()["status"] == "cancelled"
    assert deleted.json()["problem"]["code"] == "job_cancelled"
    assert (result.status_code, result.json()["code"]) == (409, "job_cancelled")
    assert after.status_code == 200


async def test_a_failed_job_reports_its_error(serve_generator: Serve) -> None:
    """The error of a failed job is in the job, its result and its last event."""

    def unavailable(_request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    async with serve_generator(httpx.MockTransport(unavailable), text_encoder_timeout_s=1) as http:
        job_id = (await http.post("/jobs", json=SMALL)).json()["id"]
        job = await ended(http, job_id)
        result = await http.get(f"/jobs/{job_id}/result")
        event_stream = await http.get(f"/jobs/{job_id}/events")
    assert job["status"] == "failed"
    assert job["problem"]["status"] == result.status_code
    assert events(event_stream.text)[-1][0] == "error"


async def test_a_repeated_request_finds_its_job(serve_generator: Serve) -> None:
    """The same ``Idempotency-Key`` and body give the same job; the key with another body is refused."""
    key = {"Idempotency-Key": "order-1"}
    async with serve_generator() as http:
        first, second = await asyncio.gather(*(http.post("/jobs", json=SMALL, headers=key) for _ in range(2)))
        other = await http.post("/jobs", json=SMALL | {"seed": 8}, headers=key)
        without = await http.post("/jobs", json=SMALL)
    assert first.json()["id"] == second.json()["id"] != without.json()["id"]
    assert (other.status_code, other.json()["error"]["param"]) == (422, "Idempotency-Key")


async def test_old_jobs_are_removed(serve_generator: Serve) -> None:
    """The store is bounded by the number, the bytes and the age of ended jobs."""
    for limits in ({"max_jobs": 2}, {"max_job_bytes": 0}, {"job_ttl_s": 1e-6}):
        async with serve_generator(**limits) as http:
            ids = []
            for seed in range(3):
                ids.append((await http.post("/jobs", json=SMALL | {"seed": seed})).json()["id"])
                await http.get(f"/jobs/{ids[-1]}/events")
            statuses = [(await http.get(f"/jobs/{job_id}")).status_code for job_id in ids]
        assert statuses == ([404, 200, 200] if "max_jobs" in limits else [404, 404, 404])


async def test_the_queue_bounds_jobs_too(serve_generator: Serve, model_control: ModelControl) -> None:
    """Jobs use the same queue: one that finds it full gets 429 and is not stored."""
    async with serve_generator(max_waiting=2) as http:
        with model_control.holding():
            responses = [await http.post("/jobs", json=SMALL) for _ in range(5)]
    assert [response.status_code for response in responses] == [202, 202, 202, 429, 429]
    assert [response.json()["position"] for response in responses[:3]] == [0, 1, 2]


async def test_keys_do_not_see_each_other(serve_generator: Serve, tmp_path: Path) -> None:
    """With several API keys, each key sees, follows and cancels only its own jobs."""
    (tmp_path / "keys").write_text("# ours\nalice\n\nbob\n")
    alice, bob, unauthorized = ({"Authorization": f"Bearer {key}"} for key in ("alice", "bob", "# ours"))
    async with serve_generator(keys_file=tmp_path / "keys", token="operator") as http:
        job_id = (await http.post("/jobs", json=SMALL, headers=alice)).json()["id"]
        routes = [("GET", ""), ("GET", "/result"), ("GET", "/events"), ("DELETE", "")]
        strange = [await http.request(method, f"/jobs/{job_id}{path}", headers=bob) for method, path in routes]
        refused = [await http.request(method, f"/jobs/{job_id}{path}", headers=unauthorized) for method, path in routes]
        own = await http.get(f"/jobs/{job_id}/events", headers=alice)
        operator = await http.post("/jobs", json=SMALL, headers={"Authorization": "Bearer operator"})
    assert [(r.status_code, r.json()["code"]) for r in strange] == [(404, "job_not_found")] * 4
    assert [r.status_code for r in refused] == [401] * 4
    assert events(own.text)[-1][0] == "completed"
    assert operator.status_code == 202


async def test_ids_cannot_be_guessed(serve_generator: Serve) -> None:
    """A job's id has 128 random bits, and an unknown one is 404."""
    async with serve_generator() as http:
        ids = {(await http.post("/jobs", json=SMALL)).json()["id"] for _ in range(2)}
        refused = await http.get("/jobs/1")
    assert {len(job_id) for job_id in ids} == {32}
    assert (refused.status_code, json.loads(refused.content)["code"]) == (404, "job_not_found")


@pytest.mark.parametrize("headers", [{}, {"Accept": "text/event-stream"}], ids=["plain", "stream"])
async def test_a_kept_generation_can_be_fetched_as_a_job(generator_url: str, headers: dict[str, str]) -> None:
    """With ``on_disconnect: keep`` a generation finishes without its client, which can fetch it as a job."""
    body = SMALL | {"num_inference_steps": 60, "on_disconnect": "keep", "seed": 11}
    headers |= {"Idempotency-Key": f"come back {headers}"}
    async with httpx.AsyncClient(base_url=generator_url, timeout=60) as http:
        created = await steps_run(http)
        leaving = asyncio.create_task(http.post("/generate", json=body, headers=headers))
        while await steps_run(http) < created + 2:  # noqa: ASYNC110 - as a client would
            await asyncio.sleep(0.01)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        again = await http.post("/generate", json=body, headers=headers)
        job = await ended(http, again.headers["x-job-id"])
        result = await http.get(f"/jobs/{job['id']}/result")
        assert await steps_run(http) == created + 60
    assert job["status"] == "completed"
    if headers.get("Accept"):
        assert [name for name, _ in events(again.text)] == ["step"] * 60 + ["completed"]
    else:
        assert again.content == result.content
    assert pixels(result.content).shape == (64, 64, 3)


async def test_a_kept_generation_that_fails(serve_generator: Serve) -> None:
    """Its error is the response, as without ``keep``."""

    def unavailable(_request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    async with serve_generator(httpx.MockTransport(unavailable), text_encoder_timeout_s=1) as http:
        response = await http.post("/generate", json=SMALL | {"on_disconnect": "keep"})
    assert (response.status_code, response.json()["code"]) == (503, "encoder_unavailable")
