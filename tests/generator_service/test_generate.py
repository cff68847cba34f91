"""``POST /generate`` and its neighbours, over HTTP."""

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
    """The encoder is asked again at once."""
    with stamina.set_testing(True, attempts=2):
        yield


def pixels(data: bytes) -> np.ndarray:
    """The picture in a file."""
    return np.asarray(Image.open(io.BytesIO(data)))


def as_base64(tensor: torch.Tensor) -> str:
    """What ``prompt_embeds`` takes."""
    return base64.b64encode(dump_safetensors(tensor)).decode()


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Names and data of server-sent events, without those from before the drawing."""
    return [event for event in all_events(text) if event[0] not in ("queued", "encoding")]


def all_events(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Names and data of server-sent events."""
    blocks = [block.splitlines() for block in text.replace("\r\n", "\n").split("\n\n") if "event: " in block]
    return [(block[0].removeprefix("event: "), json.loads(block[1].removeprefix("data: "))) for block in blocks]


async def metrics(http: httpx.AsyncClient) -> dict[str, float]:
    """The value of each metric that has one."""
    lines = (await http.get("/metrics")).text.splitlines()
    return {name: float(value) for name, value in (x.rsplit(" ", 1) for x in lines if not x.startswith("#"))}


async def steps_run(http: httpx.AsyncClient) -> float:
    """How many computed steps the metrics count."""
    return (await metrics(http)).get('flux2_steps_total{kind="computed"}', 0)


def down(_request: httpx.Request) -> httpx.Response:
    """A text encoder that is away."""
    raise httpx.ConnectError("refused")


async def test_a_prompt_is_enough(serve_generator: Serve) -> None:
    """Everything else has a default: the model's size, 50 steps, medium, a drawn seed; the answer tells all of it."""
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


async def test_a_drawn_seed_repeats_the_picture(serve_generator: Serve) -> None:
    """The returned seed gives the same picture again; another draw gives another."""
    body = {name: value for name, value in SMALL.items() if name != "seed"}
    async with serve_generator() as http:
        first, other = [await http.post("/generate", json=body) for _ in range(2)]
        again = await http.post("/generate", json=body | {"seed": int(first.headers["x-seed"])})
    assert np.array_equal(pixels(first.content), pixels(again.content))
    assert not np.array_equal(pixels(first.content), pixels(other.content))
    assert len({response.headers["x-request-id"] for response in (first, other, again)}) == 3


async def test_every_seed_is_its_own_picture(serve_generator: Serve) -> None:
    """From the smallest to the largest."""
    async with serve_generator() as http:
        answers = {seed: await http.post("/generate", json=SMALL | {"seed": seed}) for seed in (0, 1, 2**63 - 1)}
    assert all(answer.headers["x-seed"] == str(seed) for seed, answer in answers.items())
    assert len({pixels(answer.content).tobytes() for answer in answers.values()}) == 3


async def test_embeddings_instead_of_a_prompt(serve_generator: Serve, serve_encoder: Serve) -> None:
    """The prompt's embedding gives the prompt's picture."""
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
    """The picture comes in the format that was asked for, and of the size."""
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
        ({"prompt_embeds": "AAAA"}, None),
        ({"prompt": None}, None),
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
    """What cannot be used is refused with the field's name, and nothing is drawn."""
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
async def test_a_body_that_is_no_json_is_400(serve_generator: Serve, body: bytes) -> None:
    """Malformed JSON has a code of its own."""
    async with serve_generator() as http:
        response = await http.post("/generate", content=body, headers=JSON)
    assert (response.status_code, response.json()["code"]) == (400, "malformed_body")


@pytest.mark.parametrize("headers", [{}, STREAM], ids=["plain", "stream"])
async def test_a_full_queue_refuses_at_once(
    serve_generator: Serve, model_control: ModelControl, headers: dict[str, str]
) -> None:
    """While one image is generated and one waits, others, streamed or not, are refused with when to come back."""
    async with serve_generator(max_waiting=1) as http:
        with model_control.holding():
            calls = [asyncio.create_task(http.post("/generate", json=SMALL, headers=headers)) for _ in range(5)]
            await until(lambda: sum(call.done() for call in calls) == 3)
        answers = await asyncio.gather(*calls)
        later = await http.post("/generate", json=SMALL)
    assert sorted(answer.status_code for answer in answers) == [200, 200, 429, 429, 429]
    for answer in answers:
        if answer.status_code == 429:
            assert int(answer.headers["Retry-After"]) >= 1
            assert answer.json()["code"] == "busy"
    assert later.status_code == 200


async def test_retry_after_is_never_zero(serve_generator: Serve, model_control: ModelControl) -> None:
    """Where images take milliseconds, a refused client still waits a second: 0 would make it ask in a loop."""
    async with serve_generator(max_waiting=1) as http:
        for _ in range(10):
            await http.post("/generate", json=SMALL | {"num_inference_steps": 1})
        with model_control.holding():
            accepted = [asyncio.create_task(http.post("/generate", json=SMALL)) for _ in range(2)]
            await until_queued(http, 2)
            refused = await http.post("/generate", json=SMALL)
        assert [answer.status_code for answer in await asyncio.gather(*accepted)] == [200, 200]
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1


async def test_an_encoder_that_comes_back(serve_generator: Serve) -> None:
    """Without its encoder the generator answers 503 and keeps no place occupied; with it, it draws again."""
    is_down = True

    def encoder(request: httpx.Request) -> httpx.Response:
        return down(request) if is_down else httpx.Response(200, content=dump_torch(torch.zeros(EMBEDDING_SHAPE)))

    async with serve_generator(httpx.MockTransport(encoder), max_waiting=1) as http:
        answers = [await http.post("/generate", json=SMALL) for _ in range(3)]
        assert (await metrics(http))["flux2_queue_depth"] == 0
        is_down = False
        await http.get("/health/ready")
        assert (await http.post("/generate", json=SMALL)).status_code == 200
    assert [answer.status_code for answer in answers] == [503] * 3
    assert answers[0].json()["code"] == "encoder_unavailable"
    assert int(answers[0].headers["Retry-After"]) >= 1
    assert all("refused" not in answer.text for answer in answers)


@pytest.mark.parametrize("headers", [{}, STREAM], ids=["plain", "stream"])
async def test_an_unexpected_failure_tells_nothing(
    serve_generator: Serve, headers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What nobody thought of is an internal error and no more; the next picture is drawn."""

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
    assert counted[f'flux2_requests_total{{route="/generate",status="{failed.status_code}"}}'] == 1


async def test_ready_with_the_right_encoder(serve_generator: Serve) -> None:
    """The generator is ready with an encoder of its own model, and with one that does not say what it is."""
    async with serve_generator() as http:
        assert (await http.get("/health/ready")).json() == {"status": "ready"}
    async with serve_generator(httpx.MockTransport(lambda _request: httpx.Response(404))) as http:
        assert (await http.get("/health/ready")).status_code == 200


@pytest.mark.parametrize(
    ("change", "told"),
    [({"hidden_size": 64}, "[32, 192]"), ({"model": "other"}, "other@local"), ({"revision": "r2"}, "weights@r2")],
)
async def test_not_ready_with_another_models_encoder(serve_generator: Serve, change: dict[str, Any], told: str) -> None:
    """The generator is not ready while its encoder's embeddings are another model's, and says whose."""
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
    assert told in ready.json()["reason"]


async def test_not_ready_without_an_encoder(serve_generator: Serve) -> None:
    """It says that the encoder is away; the process is alive nevertheless."""
    async with serve_generator(httpx.MockTransport(down)) as http:
        live, ready = await http.get("/health/live"), await http.get("/health/ready")
    assert (live.status_code, ready.status_code) == (200, 503)
    assert ready.json() == {"status": "not ready", "reason": "the text encoder cannot be reached"}


async def test_the_service_answers_while_it_generates(serve_generator: Serve, model_control: ModelControl) -> None:
    """The event loop does not wait for the device: health, metrics and modes are answered while it is busy."""
    async with serve_generator() as http:
        with model_control.holding():
            generating = asyncio.create_task(http.post("/generate", json=SMALL))
            await model_control.is_held()
            for path in ("/health/live", "/health/ready", "/metrics", "/modes", "/"):
                assert (await http.get(path)).status_code == 200, path
            assert not generating.done()
        assert (await generating).status_code == 200


@pytest.mark.parametrize("accept", [b"*/*", b"text/event-stream"])
async def test_a_client_that_leaves_stops_its_picture(serve_generator: Serve, accept: bytes) -> None:
    """When the client is gone, no further steps run and its place is free."""
    left = asyncio.Event()
    messages = [{"type": "http.request", "body": json.dumps(LONG).encode(), "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(_message: object) -> None:
        """Nobody listens."""

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
        left.set()
        await request
        assert (await metrics(http))["flux2_queue_depth"] == 0
        stopped = await steps_run(http)
        after = await http.post("/generate", json=SMALL)  # waits until the device is free
        assert after.status_code == 200
        assert await steps_run(http) - stopped <= SMALL["num_inference_steps"] + 1
    assert stopped < LONG["num_inference_steps"]


async def test_steps_can_be_followed(serve_generator: Serve) -> None:
    """With ``Accept: text/event-stream`` every step is told, computed or not, and the picture comes last."""
    body = SMALL | {"cache": 2}
    async with serve_generator() as http:
        plain = await http.post("/generate", json=body)
        streamed = await http.post("/generate", json=body, headers=STREAM)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    *steps, (name, picture) = events(streamed.text)
    assert [(kind, data["index"], data["step"], data["total"], data["computed"]) for kind, data in steps] == [
        ("step", 0, step, 4, is_computed) for step, is_computed in enumerate([True, False, False, True])
    ]
    assert name == "completed"
    assert np.array_equal(pixels(base64.b64decode(picture["image"])), pixels(plain.content))
    for told in ("x-seed", "x-schedule", "x-steps-computed", "x-steps-total"):
        assert picture[told] == plain.headers[told]


async def test_a_failure_is_an_event(serve_generator: Serve) -> None:
    """What goes wrong after the stream has begun is told in it, as the problem it would have been."""
    async with serve_generator(httpx.MockTransport(down)) as http:
        response = await http.post("/generate", json=SMALL, headers=STREAM)
    [(name, problem)] = events(response.text)
    assert (name, problem["status"], problem["code"]) == ("error", 503, "encoder_unavailable")
    assert problem["request_id"] == response.headers["x-request-id"]


async def test_work_is_counted(serve_generator: Serve) -> None:
    """The metrics tell computed from reused steps and found from asked embeddings; no prompt is in them."""
    async with serve_generator() as http:
        for cache in (1, 2):
            await http.post("/generate", json=SMALL | {"cache": cache})
        counted, text = await metrics(http), (await http.get("/metrics")).text
    assert counted['flux2_steps_total{kind="computed"}'] == 3
    assert counted['flux2_steps_total{kind="reused"}'] == 5
    assert counted['flux2_embedding_cache_total{result="miss"}'] == 1
    assert counted['flux2_embedding_cache_total{result="hit"}'] == 1
    assert counted['flux2_requests_total{route="/generate",status="200"}'] == 2
    assert counted['flux2_stage_seconds_count{stage="denoise"}'] == 2
    assert counted["flux2_queue_depth"] == 0
    assert "circle" not in text


async def test_pictures_are_counted_by_mode(serve_generator: Serve) -> None:
    """By the name of the schedule; numbers of steps, which are many, are all one."""
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
    ("settings", "is_told"),
    [
        ({}, False),
        ({"host": "0.0.0.0"}, True),  # noqa: S104 - nothing listens
        ({"host": "0.0.0.0", "token": "secret"}, False),  # noqa: S104
        ({"host": "0.0.0.0", "published_host": "127.0.0.1"}, False),  # noqa: S104
        ({"host": "0.0.0.0", "published_host": "192.0.2.1"}, True),  # noqa: S104
    ],
)
async def test_strangers_are_warned_of(
    serve_generator: Serve, caplog: pytest.LogCaptureFixture, settings: dict[str, str], is_told: bool
) -> None:
    """A generator that others can reach without keys says so in its log; on loopback, or with keys, it does not."""
    async with serve_generator(**settings):
        pass
    assert ("without authentication" in caplog.text) == is_told


@pytest.mark.parametrize(("token", "status"), [(None, 401), ("wrong", 401), ("right", 200)])
async def test_a_token_can_be_required(serve_generator: Serve, token: str | None, status: int) -> None:
    """With a token set, only requests that carry it are served; health stays open."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with serve_generator(token="right") as http:
        response = await http.post("/generate", json=SMALL, headers=headers)
        assert (await http.get("/health/live")).status_code == 200
    assert response.status_code == status
    assert (response.headers.get("www-authenticate") == "Bearer") == (status == 401)


async def test_a_default_that_does_not_exist_is_refused_at_start(serve_generator: Serve) -> None:
    """``GENERATOR_DEFAULT_CACHE`` names a schedule that there is, or the service does not start."""
    with pytest.raises(ModelRefused, match="GENERATOR_DEFAULT_CACHE: there is no schedule 'turbo'"):
        async with serve_generator(default_cache="turbo"):
            pass


async def test_a_picture_can_be_watched(serve_generator: Serve) -> None:
    """``previews`` shows so many times, evenly, what the picture will be, and does not change it."""
    body = SMALL | {"num_inference_steps": 12, "cache": "none"}
    async with serve_generator() as http:
        plain = await http.post("/generate", json=body)
        streamed = await http.post("/generate", json=body | {"previews": 3}, headers=STREAM)
    found = events(streamed.text)
    names = [name for name, _ in found]
    assert [k for k, name in enumerate(names) if name == "preview"] == [4, 8, 12]  # after steps 3, 6 and 9
    final = pixels(plain.content).astype(float)
    assert np.array_equal(pixels(base64.b64decode(found[-1][1]["image"])), final)
    shown = [pixels(base64.b64decode(data["image"])).astype(float) for name, data in found if name == "preview"]
    distances = [np.abs(picture - final).mean() for picture in shown]
    assert max(distances) < 3  # of 255: flows are nearly straight, and JPEG costs some


def test_the_last_preview_would_be_the_picture(demo: Flux2Model) -> None:
    """After the last step the estimate is the picture itself, up to rounding."""
    shown: list[Image.Image] = []
    embeds = torch.zeros(1, 32, demo.info.embedding_width)
    request = Params(embeds, 128, 64, 4.0, 1, schedule_for("fast", 6))
    picture = demo.generate(request, previews=Previews(frozenset({0, 5}), shown.append)).image
    assert len(shown) == 1
    assert np.abs(np.asarray(shown[0], dtype=float) - np.asarray(picture, dtype=float)).max() <= 1


async def test_the_time_is_known_beforehand(serve_generator: Serve) -> None:
    """Every answer tells what was expected, and every step how long the rest will take: less and less."""
    async with serve_generator() as http:
        answer = await http.post("/generate", json=SMALL)
        streamed = await http.post("/generate", json=SMALL, headers=STREAM)
    assert float(answer.headers["x-estimate-ms"]) > 0
    left = [data["eta_ms"] for name, data in events(streamed.text) if name == "step"]
    assert left == sorted(left, reverse=True)
    assert left[0] > left[-1] > 0


async def test_the_line_can_be_watched(serve_generator: Serve, model_control: ModelControl) -> None:
    """Who waits is told at once how many are before and how long they take, and again as they go."""
    async with serve_generator() as http:
        await http.post("/generate", json=SMALL)
        with model_control.holding():
            tasks = []
            for body in (LONG | {"num_inference_steps": 20}, SMALL, SMALL):
                tasks.append(asyncio.create_task(http.post("/generate", json=body, headers=STREAM)))
                await until_queued(http, len(tasks))  # they keep this order
        streams = await asyncio.gather(*tasks)
    first, second, third = (all_events(stream.text) for stream in streams)
    assert [name for name, _ in first[:3]] == ["queued", "encoding", "step"]
    assert first[0][1] == {"position": 0, "wait_ms": 0}
    places = [[data for name, data in told if name == "queued"] for told in (second, third)]
    assert [[data["position"] for data in told] for told in places] == [[1, 0], [2, 1, 0]]
    assert places[1][0]["wait_ms"] > places[0][0]["wait_ms"] > 0
    assert [told[-1]["wait_ms"] for told in places] == [0, 0]
