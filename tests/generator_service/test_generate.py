"""``POST /generate`` and related routes over HTTP."""

import asyncio
import base64
import io
import json
import math
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import stamina
import torch
from PIL import Image

from flux2_shared.errors import ModelRefused
from flux2_shared.wire import dump_safetensors, dump_torch
from generator_service.lemica import schedule_for
from generator_service.pipelines.callbacks import Previews
from generator_service.pipelines.flux2 import Flux2Model
from generator_service.pipelines.params import Params
from tests.conftest import Serve
from tests.control import ModelControl, until, until_queued

pytestmark = pytest.mark.anyio

SMALL: dict[str, Any] = {
    "prompt": "a red circle",
    "width": 64,
    "height": 64,
    "num_inference_steps": 4,
    "seed": 7,
    "cache": "none",
}
LONG = SMALL | {"num_inference_steps": 100, "width": 256, "height": 256}
EMBEDDING_SHAPE = (1, 32, 384)
JSON = {"content-type": "application/json"}
STREAM = {"Accept": "text/event-stream"}


@pytest.fixture(autouse=True)
def no_waiting() -> Iterator[None]:
    """Retry the encoder without waiting."""
    with stamina.set_testing(True, attempts=2):
        yield


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def as_base64(tensor: torch.Tensor) -> str:
    """Encode a tensor as the field ``prompt_embeds`` expects it."""
    return base64.b64encode(dump_safetensors(tensor)).decode()


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Names and data of server-sent events, without those before the first step."""
    return [event for event in all_events(text) if event[0] not in ("queued", "encoding")]


def all_events(text: str) -> list[tuple[str, dict[str, Any]]]:
    blocks = [block.splitlines() for block in text.replace("\r\n", "\n").split("\n\n") if "event: " in block]
    return [(block[0].removeprefix("event: "), json.loads(block[1].removeprefix("data: "))) for block in blocks]


async def metrics(http: httpx.AsyncClient) -> dict[str, float]:
    lines = (await http.get("/metrics")).text.splitlines()
    return {name: float(value) for name, value in (x.rsplit(" ", 1) for x in lines if not x.startswith("#"))}


async def steps_run(http: httpx.AsyncClient) -> float:
    """The number of computed steps in the metrics."""
    return (await metrics(http)).get('flux2_steps_total{kind="computed"}', 0)


def unavailable(_request: httpx.Request) -> httpx.Response:
    """A text encoder that refuses connections."""
    raise httpx.ConnectError("refused")


async def test_a_prompt_is_enough(serve_generator: Serve) -> None:
    """All other fields have defaults: the model's size, 50 steps, medium, a random seed; the headers report them."""
    async with serve_generator() as http:
        response = await http.post("/generate", json={"prompt": "a red circle"})
    assert (response.status_code, response.headers["content-type"]) == (200, "image/png")
    assert pixels(response.content).shape == (128, 128, 3)
    headers = response.headers
    assert (headers["x-steps-computed"], headers["x-steps-total"]) == ("20", "50")
    assert headers["x-schedule"].startswith("medium; source=")
    assert 0 <= int(headers["x-seed"]) < 2**32
    assert all(float(headers[f"x-{stage}-ms"]) >= 0 for stage in ("queue", "encode", "denoise", "decode"))
    assert float(headers["x-denoise-ms"]) > 0
    assert headers["x-request-id"]


async def test_a_random_seed_is_returned(serve_generator: Serve) -> None:
    """The seed in the response reproduces the image; a request without a seed gives another one."""
    body = {name: value for name, value in SMALL.items() if name != "seed"}
    async with serve_generator() as http:
        first, other = [await http.post("/generate", json=body) for _ in range(2)]
        again = await http.post("/generate", json=body | {"seed": int(first.headers["x-seed"])})
    assert np.array_equal(pixels(first.content), pixels(again.content))
    assert not np.array_equal(pixels(first.content), pixels(other.content))
    assert len({response.headers["x-request-id"] for response in (first, other, again)}) == 3


async def test_every_seed_gives_another_image(serve_generator: Serve) -> None:
    """The smallest, the largest and adjacent seeds give different images."""
    async with serve_generator() as http:
        responses = {seed: await http.post("/generate", json=SMALL | {"seed": seed}) for seed in (0, 1, 2**63 - 1)}
    assert all(response.headers["x-seed"] == str(seed) for seed, response in responses.items())
    assert len({pixels(response.content).tobytes() for response in responses.values()}) == 3


async def test_embeddings_instead_of_a_prompt(serve_generator: Serve, serve_encoder: Serve) -> None:
    """The embedding of a prompt gives the same image as the prompt."""
    async with serve_encoder() as http:
        accept = {"Accept": "application/vnd.safetensors"}
        embedding = await http.post("/predict", json={"prompt": SMALL["prompt"]}, headers=accept)
    body = SMALL | {"prompt_embeds": base64.b64encode(embedding.content).decode()}
    del body["prompt"]
    async with serve_generator() as http:
        by_prompt, by_embedding = [await http.post("/generate", json=b) for b in (SMALL, body)]
    assert np.array_equal(pixels(by_prompt.content), pixels(by_embedding.content))


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
async def test_formats(serve_generator: Serve, image_format: str) -> None:
    """The image has the requested format and size."""
    async with serve_generator() as http:
        response = await http.post("/generate", json=SMALL | {"output_format": image_format, "height": 80})
    assert response.headers["content-type"] == f"image/{image_format}"
    image = Image.open(io.BytesIO(response.content))
    assert (image.format, image.size) == (image_format.upper(), (64, 80))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"width": 100}, "width"),
        ({"width": 0}, "width"),
        ({"width": 48}, "width"),
        ({"height": 8192}, "height"),
        ({"width": 4096, "height": 4096}, "width"),
        ({"width": "64"}, "width"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 101}, "num_inference_steps"),
        ({"num_inference_steps": 4.0}, "num_inference_steps"),
        ({"guidance_scale": -1}, "guidance_scale"),
        ({"guidance_scale": "4"}, "guidance_scale"),
        ({"guidance_scale": math.nan}, "guidance_scale"),
        ({"guidance_scale": math.inf}, "guidance_scale"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"seed": "7"}, "seed"),
        ({"seed": False}, "seed"),
        ({"cache": "turbo"}, "cache"),
        ({"cache": 0}, "cache"),
        ({"cache": 5}, "cache"),
        ({"cache": 51, "num_inference_steps": 50}, "cache"),
        ({"cache": True}, "cache"),
        ({"cache": {"max_error": -1.0}}, "cache"),
        ({"cache": {"max_errors": 1.0}}, "cache"),
        ({"cache": {"max_error": 0.1}}, "cache"),
        ({"prompt_embeds": "AAAA"}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": None, "prompt_embeds": "?"}, "prompt_embeds"),
        ({"prompt": None, "prompt_embeds": "é"}, "prompt_embeds"),
        ({"prompt": None, "prompt_embeds": "AAAA"}, "prompt_embeds"),
        ({"prompt": None, "prompt_embeds": as_base64(torch.zeros(1, 32, 383))}, "prompt_embeds"),
        ({"prompt": None, "prompt_embeds": as_base64(torch.full(EMBEDDING_SHAPE, math.nan))}, "prompt_embeds"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": "x" * 20_001}, "prompt"),
        ({"prompt": "half a character: \ud800"}, "prompt"),
        ({"prompt": "家" * 11_000, "output_format": "jpeg"}, "prompt"),
        ({"prompts": "a"}, "prompts"),
        ({"output_format": "gif"}, "output_format"),
    ],
    ids=lambda value: ascii(value)[:60],
)
async def test_bad_bodies_name_the_field(serve_generator: Serve, change: dict[str, Any], field: str | None) -> None:
    """Invalid values are refused with the field's name, and nothing is generated."""
    async with serve_generator() as http:
        response = await http.post("/generate", content=json.dumps(SMALL | change), headers=JSON)
        assert await steps_run(http) == 0
    problem = response.json()
    assert response.status_code == problem["status"] == 422
    assert response.headers["content-type"] == "application/problem+json"
    assert problem["error"]["param"] == field
    assert problem["error"]["message"] == problem["detail"]
    assert problem["request_id"] == response.headers["x-request-id"]
    assert response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("body", [b"{", b'{"prompt": }', b"\xff", b"[" * 100_000], ids=["cut", "gap", "bytes", "deep"])
async def test_a_body_that_is_not_json_is_400(serve_generator: Serve, body: bytes) -> None:
    """Malformed JSON has an error code of its own."""
    async with serve_generator() as http:
        response = await http.post("/generate", content=body, headers=JSON)
    assert (response.status_code, response.json()["code"]) == (400, "malformed_body")


@pytest.mark.parametrize("headers", [{}, STREAM], ids=["plain", "stream"])
async def test_a_full_queue_refuses_at_once(
    serve_generator: Serve, model_control: ModelControl, headers: dict[str, str]
) -> None:
    """While one image is generated and one waits, other requests, streamed or not, get 429 with ``Retry-After``."""
    async with serve_generator(max_waiting=1) as http:
        with model_control.holding():
            calls = [asyncio.create_task(http.post("/generate", json=SMALL, headers=headers)) for _ in range(5)]
            await until(lambda: sum(call.done() for call in calls) == 3)
        responses = await asyncio.gather(*calls)
        later = await http.post("/generate", json=SMALL)
    assert sorted(response.status_code for response in responses) == [200, 200, 429, 429, 429]
    for response in responses:
        if response.status_code == 429:
            assert int(response.headers["Retry-After"]) >= 1
            assert response.json()["code"] == "busy"
    assert later.status_code == 200


async def test_retry_after_is_never_zero(serve_generator: Serve, model_control: ModelControl) -> None:
    """If images take milliseconds, ``Retry-After`` is still a second, since 0 would make clients poll in a loop."""
    async with serve_generator(max_waiting=1) as http:
        for _ in range(10):
            await http.post("/generate", json=SMALL | {"num_inference_steps": 1})
        with model_control.holding():
            accepted = [asyncio.create_task(http.post("/generate", json=SMALL)) for _ in range(2)]
            await until_queued(http, 2)
            refused = await http.post("/generate", json=SMALL)
        assert [response.status_code for response in await asyncio.gather(*accepted)] == [200, 200]
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1


async def test_an_encoder_that_recovers(serve_generator: Serve) -> None:
    """While the encoder is unavailable requests get 503 and occupy no slot; when it is back, images are generated."""
    is_down = True

    def encoder(request: httpx.Request) -> httpx.Response:
        return (
            unavailable(request) if is_down else httpx.Response(200, content=dump_torch(torch.zeros(EMBEDDING_SHAPE)))
        )

    async with serve_generator(httpx.MockTransport(encoder), max_waiting=1) as http:
        responses = [await http.post("/generate", json=SMALL) for _ in range(3)]
        assert (await metrics(http))["flux2_queue_depth"] == 0
        is_down = False
        await http.get("/health/ready")
        assert (await http.post("/generate", json=SMALL)).status_code == 200
    assert [response.status_code for response in responses] == [503] * 3
    assert responses[0].json()["code"] == "encoder_unavailable"
    assert int(responses[0].headers["Retry-After"]) >= 1
    assert all("refused" not in response.text for response in responses)


@pytest.mark.parametrize("headers", [{}, STREAM], ids=["plain", "stream"])
async def test_an_unexpected_failure_reveals_nothing(
    serve_generator: Serve, headers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unexpected exception is a plain internal error without details; the next image is generated."""

    def fail(*_: object) -> None:
        raise ValueError("secret")

    async with serve_generator() as http:
        with monkeypatch.context() as broken:
            broken.setattr(Flux2Model, "generate", fail)
            failed = await http.post("/generate", json=SMALL, headers=headers)
        counted = await metrics(http)
        after = await http.post("/generate", json=SMALL)
    problem = events(failed.text)[0][1] if headers else failed.json()
    assert (problem["status"], problem["code"]) == (500, "internal_error")
    assert problem["request_id"] == failed.headers["x-request-id"]
    assert "secret" not in failed.text
    assert after.status_code == 200
    labels = f'code="internal_error",route="/generate",status="{failed.status_code}"'
    assert counted[f"flux2_requests_total{{{labels}}}"] == 1
    assert counted['flux2_generations_total{code="internal_error",status="failed"}'] == 1


async def test_ready_with_a_matching_encoder(serve_generator: Serve) -> None:
    """The generator is ready with an encoder of its own model, and with one that has no ``/info``."""
    async with serve_generator() as http:
        assert (await http.get("/health/ready")).json() == {"status": "ready"}
    async with serve_generator(httpx.MockTransport(lambda _request: httpx.Response(404))) as http:
        assert (await http.get("/health/ready")).status_code == 200


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"hidden_size": 64}, "[32, 192]"), ({"model": "other"}, "other@local"), ({"revision": "r2"}, "weights@r2")],
)
async def test_not_ready_with_another_models_encoder(
    serve_generator: Serve, change: dict[str, Any], reason: str
) -> None:
    """The generator is not ready while its encoder serves another model, and names that model."""
    info = {
        "model": "weights",
        "revision": "local",
        "hidden_layers": [1, 2, 3],
        "hidden_size": 128,
        "max_sequence_length": 32,
        "dtype": "float32",
        "version": "1",
    }
    transport = httpx.MockTransport(lambda _request: httpx.Response(200, json=info | change))
    async with serve_generator(transport) as http:
        ready = await http.get("/health/ready")
    assert ready.status_code == 503
    assert reason in ready.json()["reason"]


async def test_not_ready_without_an_encoder(serve_generator: Serve) -> None:
    """The reason names the unavailable encoder; the process is alive."""
    async with serve_generator(httpx.MockTransport(unavailable)) as http:
        live, ready = await http.get("/health/live"), await http.get("/health/ready")
    assert (live.status_code, ready.status_code) == (200, 503)
    assert ready.json() == {"status": "not ready", "reason": "the text encoder cannot be reached"}


async def test_the_service_answers_while_it_generates(serve_generator: Serve, model_control: ModelControl) -> None:
    """The event loop does not wait for the device: health, metrics and modes respond while it is busy."""
    async with serve_generator() as http:
        with model_control.holding():
            generating = asyncio.create_task(http.post("/generate", json=SMALL))
            await model_control.is_held()
            for path in ("/health/live", "/health/ready", "/metrics", "/modes", "/"):
                assert (await http.get(path)).status_code == 200, path
            assert not generating.done()
        assert (await generating).status_code == 200


@pytest.mark.parametrize("accept", [b"*/*", b"text/event-stream"])
async def test_a_disconnect_stops_the_generation(serve_generator: Serve, accept: bytes) -> None:
    """When the client disconnects, no further steps run and its slot is free."""
    disconnected = asyncio.Event()
    messages = [{"type": "http.request", "body": json.dumps(LONG).encode(), "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await disconnected.wait()
        return {"type": "http.disconnect"}

    async def send(_message: object) -> None:
        """Discard the response."""

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/generate",
        "raw_path": b"/generate",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"accept", accept)],
        "scheme": "http",
        "server": ("test", 80),
        "client": ("test", 1),
    }
    async with serve_generator(max_waiting=1) as http:
        app: Any = http._transport.app  # type: ignore[attr-defined]
        request = asyncio.create_task(app(scope, receive, send))
        while await steps_run(http) < 2:  # noqa: ASYNC110 - the device thread has no event to wait for
            await asyncio.sleep(0.01)
        disconnected.set()
        await request
        assert (await metrics(http))["flux2_queue_depth"] == 0
        stopped = await steps_run(http)
        after = await http.post("/generate", json=SMALL)  # waits until the device is free
        assert after.status_code == 200
        assert await steps_run(http) - stopped <= SMALL["num_inference_steps"] + 1
    assert stopped < LONG["num_inference_steps"]


async def test_steps_are_streamed(serve_generator: Serve) -> None:
    """With ``Accept: text/event-stream`` every step is an event, computed or not, and the image comes last."""
    body = SMALL | {"cache": 2}
    async with serve_generator() as http:
        plain = await http.post("/generate", json=body)
        streamed = await http.post("/generate", json=body, headers=STREAM)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    *steps, (name, image) = events(streamed.text)
    assert [(kind, data["index"], data["step"], data["total"], data["computed"]) for kind, data in steps] == [
        ("step", 0, step, 4, is_computed) for step, is_computed in enumerate([True, False, False, True])
    ]
    assert name == "completed"
    assert np.array_equal(pixels(base64.b64decode(image["image"])), pixels(plain.content))
    for header in ("x-seed", "x-schedule", "x-steps-computed", "x-steps-total"):
        assert image[header] == plain.headers[header]


async def test_a_failure_is_an_event(serve_generator: Serve) -> None:
    """An error after the stream has started is sent as an event with the same problem details."""
    async with serve_generator(httpx.MockTransport(unavailable)) as http:
        response = await http.post("/generate", json=SMALL, headers=STREAM)
    [(name, problem)] = events(response.text)
    assert (name, problem["status"], problem["code"]) == ("error", 503, "encoder_unavailable")
    assert problem["request_id"] == response.headers["x-request-id"]


async def test_steps_and_embeddings_are_counted(serve_generator: Serve) -> None:
    """The metrics count computed and reused steps, and embeddings by cache hit; they contain no prompt."""
    async with serve_generator() as http:
        for cache in (1, 2):
            await http.post("/generate", json=SMALL | {"cache": cache})
        counted, text = await metrics(http), (await http.get("/metrics")).text
    assert counted['flux2_steps_total{kind="computed"}'] == 3
    assert counted['flux2_steps_total{kind="reused"}'] == 5
    assert counted['flux2_embedding_cache_total{result="miss"}'] == 1
    assert counted['flux2_embedding_cache_total{result="hit"}'] == 1
    assert counted['flux2_requests_total{code="ok",route="/generate",status="200"}'] == 2
    assert counted['flux2_stage_seconds_count{stage="denoise"}'] == 2
    assert counted["flux2_queue_depth"] == 0
    assert "circle" not in text


async def test_images_are_counted_by_mode(serve_generator: Serve) -> None:
    """Images are counted by the schedule's name; all requests with a number of steps share one label."""
    async with serve_generator() as http:
        for cache in ("none", "fast", 2, 3):
            assert (await http.post("/generate", json=SMALL | {"cache": cache})).status_code == httpx.codes.OK
        counted = await metrics(http)
    assert {mode: counted[f'flux2_picture_seconds_count{{mode="{mode}"}}'] for mode in ("none", "fast", "other")} == {
        "none": 1,
        "fast": 1,
        "other": 2,
    }


@pytest.mark.parametrize(
    ("settings", "is_logged"),
    [
        ({}, False),
        ({"host": "0.0.0.0"}, True),  # noqa: S104 - nothing listens
        ({"host": "0.0.0.0", "token": "secret"}, False),  # noqa: S104
        ({"host": "0.0.0.0", "published_host": "127.0.0.1"}, False),  # noqa: S104
        ({"host": "0.0.0.0", "published_host": "192.0.2.1"}, True),  # noqa: S104
    ],
)
async def test_a_service_without_authentication_logs_a_warning(
    serve_generator: Serve, caplog: pytest.LogCaptureFixture, settings: dict[str, str], is_logged: bool
) -> None:
    """A generator that other hosts can reach without keys logs a warning; on loopback, or with keys, it does not."""
    async with serve_generator(**settings):
        pass
    assert ("without authentication" in caplog.text) == is_logged


@pytest.mark.parametrize(("token", "status"), [(None, 401), ("wrong", 401), ("right", 200)])
async def test_api_keys_can_be_required(serve_generator: Serve, token: str | None, status: int) -> None:
    """With API keys only requests that carry one are served; health routes stay open."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with serve_generator(token="right") as http:
        response = await http.post("/generate", json=SMALL, headers=headers)
        assert (await http.get("/health/live")).status_code == 200
    assert response.status_code == status
    assert (response.headers.get("www-authenticate") == "Bearer") == (status == 401)


async def test_an_unknown_default_schedule_is_refused_at_start(serve_generator: Serve) -> None:
    """The service refuses to start if ``GENERATOR_DEFAULT_CACHE`` names an unknown schedule."""
    with pytest.raises(ModelRefused, match="GENERATOR_DEFAULT_CACHE: there is no schedule 'turbo'"):
        async with serve_generator(default_cache="turbo"):
            pass


async def test_previews_are_streamed(serve_generator: Serve) -> None:
    """``previews`` sends evenly spaced previews of the image, and does not change it. A slow reader may skip some."""
    body = SMALL | {"num_inference_steps": 12, "cache": "none"}
    async with serve_generator() as http:
        plain = await http.post("/generate", json=body)
        streamed = await http.post("/generate", json=body | {"previews": 3}, headers=STREAM)
    stream_events = events(streamed.text)
    places = {
        data["number"]: stream_events[k - 1][1].get("step")
        for k, (name, data) in enumerate(stream_events)
        if name == "preview"
    }
    assert places
    assert places.items() <= {0: 3, 1: 6, 2: 9}.items()
    final = pixels(plain.content).astype(float)
    assert np.array_equal(pixels(base64.b64decode(stream_events[-1][1]["image"])), final)
    shown = [pixels(base64.b64decode(data["image"])).astype(float) for name, data in stream_events if name == "preview"]
    distances = [np.abs(image - final).mean() for image in shown]
    assert max(distances) < 3  # of 255: flows are nearly straight, and JPEG costs some


def test_a_preview_after_the_last_step_is_the_image(demo: Flux2Model) -> None:
    """After the last step the preview equals the image up to rounding."""
    shown: list[Image.Image] = []
    embeds = torch.zeros(1, 32, demo.info.embedding_width)
    request = Params(embeds, 128, 64, 4.0, 1, schedule_for("fast", 6))
    image = demo.generate(request, previews=Previews(frozenset({0, 5}), shown.append)).image
    assert len(shown) == 1
    assert np.abs(np.asarray(shown[0], dtype=float) - np.asarray(image, dtype=float)).max() <= 1


async def test_the_duration_is_estimated(serve_generator: Serve) -> None:
    """Every response has the estimated duration, and every step the estimated rest, which decreases."""
    async with serve_generator() as http:
        response = await http.post("/generate", json=SMALL)
        streamed = await http.post("/generate", json=SMALL, headers=STREAM)
    assert float(response.headers["x-estimate-ms"]) > 0
    remaining_ms = [data["eta_ms"] for name, data in events(streamed.text) if name == "step"]
    assert remaining_ms == sorted(remaining_ms, reverse=True)
    assert remaining_ms[0] > remaining_ms[-1] > 0


async def test_queue_positions_are_streamed(serve_generator: Serve, model_control: ModelControl) -> None:
    """A waiting request gets its position and wait at once, and again whenever the queue moves."""
    async with serve_generator() as http:
        await http.post("/generate", json=SMALL)
        with model_control.holding():
            requests = []
            for body in (LONG | {"num_inference_steps": 20}, SMALL, SMALL):
                requests.append(asyncio.create_task(http.post("/generate", json=body, headers=STREAM)))
                await until_queued(http, len(requests))  # preserves this order
        responses = await asyncio.gather(*requests)
    first, second, third = (all_events(response.text) for response in responses)
    assert [name for name, _ in first[:3]] == ["queued", "encoding", "step"]
    assert first[0][1] == {"position": 0, "wait_ms": 0}
    positions = [[data for name, data in stream if name == "queued"] for stream in (second, third)]
    assert [[data["position"] for data in stream] for stream in positions] == [[1, 0], [2, 1, 0]]
    assert positions[1][0]["wait_ms"] > positions[0][0]["wait_ms"] > 0
    assert [stream[-1]["wait_ms"] for stream in positions] == [0, 0]


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("application/json, text/plain, */*", "image/png"),
        ("image/*;q=0.5, application/json", "application/json"),
        ("Application/JSON", "application/json"),
        ("application/json;q=0, */*", "image/png"),
        ("text/event-stream;q=0, image/png", "image/png"),
        ("application/json;q=high", "image/png"),
        ("text/html", "image/png"),
    ],
)
async def test_accept_is_parsed(serve_generator: Serve, accept: str, kind: str) -> None:
    """``/generate``, with ``keep`` too, and the result of a job are JSON only if ``Accept`` prefers it to an image."""
    headers = {"Accept": accept}
    async with serve_generator() as http:
        responses = [
            await http.post("/generate", json=SMALL, headers=headers),
            kept := await http.post("/generate", json=SMALL | {"on_disconnect": "keep"}, headers=headers),
            await http.get(f"/jobs/{kept.headers['x-job-id']}/result", headers=headers),
        ]
    assert [(response.status_code, response.headers["content-type"]) for response in responses] == [(200, kind)] * 3
