"""The circuit breaker in front of the text encoder."""

import asyncio
from collections.abc import Awaitable, Callable

import httpx
import pytest
import stamina
import torch

from flux2_shared.errors import InvalidRequest
from flux2_shared.wire import dump_torch
from generator_service.clients.breaker import FAILURES_TO_OPEN, OPEN_S, CircuitBreaker, CircuitOpen
from generator_service.clients.retrying import RetryingEncoder
from generator_service.clients.text_encoder import TextEncoderClient
from tests.conftest import Serve
from tests.control import PATIENCE_S, Clock
from tests.generator_service.test_generate import SMALL


class Unreachable(Exception):
    """A failure of the service."""


async def send(breaker: CircuitBreaker, outcome: Exception | None = None) -> bool:
    """Whether the breaker lets a request through, which ends at once with ``outcome``."""
    try:
        with breaker.sending(asyncio.timeout(None)):
            if outcome is not None:
                raise outcome
    except CircuitOpen:
        return False
    except (Unreachable, InvalidRequest):
        pass
    return True


async def opened() -> CircuitBreaker:
    """A breaker that has just opened."""
    breaker = CircuitBreaker((Unreachable,))
    for _ in range(FAILURES_TO_OPEN):
        assert await send(breaker, Unreachable())
    assert breaker.is_open
    return breaker


@pytest.mark.anyio
async def test_it_opens_and_closes(clock: Clock) -> None:
    """It opens after consecutive failures, then admits one trial every two seconds; one success closes it."""
    breaker = await opened()
    assert not await send(breaker)
    clock.advance(OPEN_S)
    assert [await send(breaker, Unreachable()) for _ in range(3)] == [True, False, False]
    clock.advance(OPEN_S)
    assert [await send(breaker) for _ in range(3)] == [True] * 3


@pytest.mark.anyio
async def test_a_trial_is_alone_until_it_has_ended(clock: Clock) -> None:
    """While the circuit is open one request waits, however long; if its client leaves, the next one soon follows."""
    breaker = await opened()
    clock.advance(OPEN_S)

    async def wait_for_ever() -> None:
        with breaker.sending(asyncio.timeout(None)):
            await asyncio.Event().wait()

    trial = asyncio.create_task(wait_for_ever())
    await asyncio.sleep(0)
    for _ in range(3):
        clock.advance(10 * OPEN_S)
        assert not await send(breaker)
    trial.cancel()
    await asyncio.gather(trial, return_exceptions=True)
    assert breaker.is_open
    assert await send(breaker)
    assert not breaker.is_open


@pytest.mark.anyio
async def test_single_failures_do_not_open_it() -> None:
    """An answer between failures resets the count, also if it is an error."""
    breaker = CircuitBreaker((Unreachable,))
    for outcome in [Unreachable(), None, Unreachable(), InvalidRequest("a prompt")] * 5:
        assert await send(breaker, outcome)
    assert await send(breaker)


@pytest.mark.anyio
async def test_a_reachable_service_gets_one_failure() -> None:
    """An answer to another kind of request closes the circuit, and one more failure opens it again."""
    breaker = await opened()
    breaker.record_reachable()
    assert not breaker.is_open
    assert await send(breaker, Unreachable())
    assert breaker.is_open


@pytest.mark.anyio
async def test_requests_fail_fast_while_the_encoder_is_unavailable(serve_generator: Serve) -> None:
    """While the encoder is known to be unavailable, most requests get 503 without contacting it.

    Cached prompts still work, and new ones do again once the encoder is back.
    """
    is_down = False
    requests: list[httpx.Request] = []

    def encoder(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        if is_down:
            raise httpx.ConnectError("refused")
        return httpx.Response(200, content=dump_torch(torch.zeros(1, 32, 384)))

    async with serve_generator(httpx.MockTransport(encoder)) as http:
        assert (await http.post("/generate", json=SMALL)).status_code == 200
        is_down = True
        with stamina.set_testing(True, attempts=2):
            for k in range(FAILURES_TO_OPEN):
                assert (await http.post("/generate", json=SMALL | {"prompt": f"away {k}"})).status_code == 503
            requests.clear()
            for k in range(40):
                response = await http.post("/generate", json=SMALL | {"prompt": f"still away {k}"})
                assert (response.status_code, response.json()["code"]) == (503, "encoder_unavailable")
                assert int(response.headers["retry-after"]) >= 1
            assert len(requests) < 40  # one request in two seconds may try, twice
        assert (await http.post("/generate", json=SMALL)).status_code == 200  # its embedding is cached
        is_down = False
        async with asyncio.timeout(PATIENCE_S):
            while (await http.post("/generate", json=SMALL | {"prompt": "back"})).status_code != 200:  # noqa: ASYNC110 - as a client
                await asyncio.sleep(0.1)


async def hang(_request: httpx.Request) -> httpx.Response:
    """Never answer."""
    await asyncio.Event().wait()
    raise AssertionError


async def read_timeout(_request: httpx.Request) -> httpx.Response:
    """Fail as an attempt that exceeds its own time limit does."""
    raise httpx.ReadTimeout("no answer")


@pytest.mark.anyio
@pytest.mark.parametrize("encoder", [hang, read_timeout])
async def test_an_encoder_that_never_answers_opens_it(
    serve_generator: Serve, encoder: Callable[[httpx.Request], Awaitable[httpx.Response]]
) -> None:
    """After three timeouts the encoder counts as unavailable: most requests are refused without contacting it.

    The third may already be refused as unavailable, when its silence opens the circuit.
    """
    requests: list[httpx.Request] = []

    async def counted(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return await encoder(request)

    async with serve_generator(httpx.MockTransport(counted), text_encoder_timeout_s=0.05) as http:
        responses = [await http.post("/generate", json=SMALL) for _ in range(FAILURES_TO_OPEN + 20)]
    codes = [response.json()["code"] for response in responses]
    assert codes[: FAILURES_TO_OPEN - 1] == ["encoder_timeout"] * (FAILURES_TO_OPEN - 1)
    assert set(codes) == {"encoder_timeout", "encoder_unavailable"}
    assert codes.count("encoder_timeout") <= len(requests) < len(responses)
    assert len(requests) >= FAILURES_TO_OPEN


@pytest.mark.anyio
async def test_a_refused_prompt_is_not_a_failure() -> None:
    """A refused prompt or a malformed response does not open the circuit breaker."""
    replies = httpx.MockTransport(lambda _request: httpx.Response(422))
    async with TextEncoderClient("http://encoder", (4, 8), transport=replies) as client:
        encoder = RetryingEncoder(client, timeout_s=5.0, cache_bytes=0)
        for _ in range(2 * FAILURES_TO_OPEN):
            with pytest.raises(InvalidRequest, match="rejected by"):
                await encoder.embed("a")
