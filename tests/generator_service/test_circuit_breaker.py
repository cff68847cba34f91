"""The breaker before the text encoder."""

import asyncio
from collections.abc import Awaitable, Callable

import httpx
import pytest
import stamina
import torch

from flux2_shared.errors import InvalidRequest
from flux2_shared.wire import dump_torch
from generator_service.clients.breaker import FAILURES_TO_OPEN, OPEN_S, CircuitBreaker
from generator_service.clients.retrying import RetryingEncoder
from generator_service.clients.text_encoder import TextEncoderClient
from tests.conftest import Serve
from tests.control import PATIENCE_S
from tests.generator_service.test_generate import SMALL


def test_it_opens_and_closes() -> None:
    """After some failures in a row one caller in two seconds may try; one answer closes it."""
    now = [100.0]
    breaker = CircuitBreaker(lambda: now[0])
    for _ in range(FAILURES_TO_OPEN):
        assert breaker.allow_request()
        breaker.record_failure()
    assert not breaker.allow_request()
    now[0] += OPEN_S
    assert [breaker.allow_request() for _ in range(3)] == [True, False, False]
    breaker.record_success()
    assert [breaker.allow_request() for _ in range(3)] == [True] * 3


def test_single_failures_do_not_open_it() -> None:
    """Failures with answers between them are not in a row."""
    breaker = CircuitBreaker()
    for _ in range(10):
        breaker.record_failure()
        breaker.record_success()
    assert breaker.allow_request()


@pytest.mark.anyio
async def test_an_encoder_that_is_away_costs_no_time(serve_generator: Serve) -> None:
    """While the encoder is known to be unavailable most requests are 503 without asking it; known prompts work.

    It is found again when it is back.
    """
    is_down = False
    asked: list[httpx.Request] = []

    def encoder(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        if is_down:
            raise httpx.ConnectError("refused")
        return httpx.Response(200, content=dump_torch(torch.zeros(1, 32, 384)))

    async with serve_generator(httpx.MockTransport(encoder)) as http:
        assert (await http.post("/generate", json=SMALL)).status_code == 200
        is_down = True
        with stamina.set_testing(True, attempts=2):
            for k in range(FAILURES_TO_OPEN):
                assert (await http.post("/generate", json=SMALL | {"prompt": f"away {k}"})).status_code == 503
            asked.clear()
            for k in range(40):
                answer = await http.post("/generate", json=SMALL | {"prompt": f"still away {k}"})
                assert (answer.status_code, answer.json()["code"]) == (503, "encoder_unavailable")
                assert int(answer.headers["retry-after"]) >= 1
            assert len(asked) < 40  # one request in two seconds may try, twice
        assert (await http.post("/generate", json=SMALL)).status_code == 200  # its embedding is known
        is_down = False
        async with asyncio.timeout(PATIENCE_S):
            while (await http.post("/generate", json=SMALL | {"prompt": "back"})).status_code != 200:  # noqa: ASYNC110 - as a client
                await asyncio.sleep(0.1)


async def hang(_request: httpx.Request) -> httpx.Response:
    """Never answers."""
    await asyncio.Event().wait()
    raise AssertionError


async def read_timeout(_request: httpx.Request) -> httpx.Response:
    """Fails as an attempt does whose own limit has passed."""
    raise httpx.ReadTimeout("no answer")


@pytest.mark.anyio
@pytest.mark.parametrize("encoder", [hang, read_timeout])
async def test_an_encoder_that_never_answers_opens_it(
    serve_generator: Serve, encoder: Callable[[httpx.Request], Awaitable[httpx.Response]]
) -> None:
    """After three time-outs the encoder counts as unavailable: most requests are refused without asking it."""
    asked: list[httpx.Request] = []

    async def counted(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return await encoder(request)

    async with serve_generator(httpx.MockTransport(counted), text_encoder_timeout_s=0.05) as http:
        answers = [await http.post("/generate", json=SMALL) for _ in range(FAILURES_TO_OPEN + 20)]
    codes = [answer.json()["code"] for answer in answers]
    assert codes[:FAILURES_TO_OPEN] == ["encoder_timeout"] * FAILURES_TO_OPEN
    assert set(codes) == {"encoder_timeout", "encoder_unavailable"}
    assert codes.count("encoder_timeout") == len(asked) < len(answers)


@pytest.mark.anyio
async def test_a_prompt_that_is_refused_is_no_failure() -> None:
    """An encoder that refuses a prompt, or answers nonsense, is not away."""
    replies = httpx.MockTransport(lambda _request: httpx.Response(422))
    async with TextEncoderClient("http://encoder", (4, 8), transport=replies) as client:
        encoder = RetryingEncoder(client, timeout_s=5.0, cache_bytes=0)
        for _ in range(2 * FAILURES_TO_OPEN):
            with pytest.raises(InvalidRequest, match="rejected by"):
                await encoder.embed("a")
