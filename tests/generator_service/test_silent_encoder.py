"""A text encoder that accepts prompts and answers none, or slowly."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import torch

from flux2_shared.embedding import Embedding
from flux2_shared.errors import InvalidRequest
from generator_service.clients.breaker import FAILURES_TO_OPEN, OPEN_S
from generator_service.clients.retrying import MAX_PATIENCE_S, RetryingEncoder
from generator_service.errors import EncoderTimeout, EncoderUnavailable
from tests.control import Clock, until

pytestmark = pytest.mark.anyio

TIMEOUT_S = 30.0
NUM_PROMPTS = 9


class HeldEncoder:
    """A text encoder that answers a prompt when the test says so."""

    def __init__(self) -> None:
        self.waiting: dict[str, asyncio.Future[None]] = {}

    async def info(self) -> None:
        """Not supported."""

    async def embed(self, prompt: str) -> Embedding:
        self.waiting[prompt] = asyncio.get_running_loop().create_future()
        try:
            await self.waiting[prompt]
        finally:
            del self.waiting[prompt]
        return Embedding(torch.zeros(1, 2, 3))

    def answer(self, prompt: str, error: Exception | None = None) -> None:
        """Answer a prompt that waits."""
        if error is None:
            self.waiting[prompt].set_result(None)
        else:
            self.waiting[prompt].set_exception(error)


class Prompts:
    """Prompts that were sent to a held encoder."""

    def __init__(self, max_attempts: int | None = 4) -> None:
        self.held = HeldEncoder()
        self.encoder = RetryingEncoder(self.held, timeout_s=TIMEOUT_S, cache_bytes=10_000, max_attempts=max_attempts)
        self.tasks: dict[str, asyncio.Task[object]] = {}

    async def send(self, *prompts: str) -> None:
        """Send prompts, and return once the encoder has all of them."""
        self.tasks |= {prompt: asyncio.create_task(self.encoder.embed(prompt)) for prompt in prompts}
        await until(lambda: set(prompts) <= self.held.waiting.keys())

    async def error(self, prompt: str) -> BaseException | None:
        """How a prompt ended; None if it was embedded."""
        [outcome] = await asyncio.gather(self.tasks[prompt], return_exceptions=True)
        return outcome if isinstance(outcome, BaseException) else None


@asynccontextmanager
async def prompts_of(max_attempts: int | None = 4) -> AsyncIterator[Prompts]:
    """Prompts that end with the block."""
    prompts = Prompts(max_attempts)
    try:
        yield prompts
    finally:
        for task in prompts.tasks.values():
            task.cancel()
        await asyncio.gather(*prompts.tasks.values(), return_exceptions=True)


def names(number: int, prefix: str = "") -> list[str]:
    return [f"{prefix}{index}" for index in range(number)]


async def pass_time(clock: Clock, seconds: float) -> None:
    """Let time pass, and every timer and task run that is due then."""
    clock.advance(seconds)
    for _ in range(20):
        await asyncio.sleep(0)


async def test_waiting_prompts_fail_together(clock: Clock) -> None:
    """Nine prompts wait in silence for five seconds, not thirty; then new ones are refused, and cached ones served."""
    async with prompts_of() as prompts:
        await prompts.send("cached")
        prompts.held.answer("cached")
        assert await prompts.error("cached") is None
        await prompts.send(*names(NUM_PROMPTS))
        await pass_time(clock, MAX_PATIENCE_S - 0.5)
        assert not any(prompts.tasks[name].done() for name in names(NUM_PROMPTS))
        await pass_time(clock, 1.0)
        errors = [await prompts.error(name) for name in names(NUM_PROMPTS)]
        assert {type(error) for error in errors} == {EncoderUnavailable}
        assert "within 5" in str(errors[0])
        assert prompts.encoder.is_circuit_open
        with pytest.raises(EncoderUnavailable):
            await prompts.encoder.embed("new")
        _, was_cached = await prompts.encoder.embed("cached")
        assert was_cached


async def test_fewer_prompts_wait_for_their_own_limit(clock: Clock) -> None:
    """Fewer prompts than open the circuit keep waiting, and each counts once."""
    async with prompts_of() as prompts:
        await prompts.send(*names(FAILURES_TO_OPEN - 1))
        await pass_time(clock, TIMEOUT_S - 1)
        assert not any(task.done() for task in prompts.tasks.values())
        await pass_time(clock, 2)
        assert isinstance(await prompts.error("0"), EncoderTimeout)
        assert not prompts.encoder.is_circuit_open


@pytest.mark.parametrize("error", [None, InvalidRequest("too long")])
async def test_a_slow_encoder_under_load_is_not_cut_off(clock: Clock, error: Exception | None) -> None:
    """While the encoder answers one prompt after another, even with errors, the others wait for their own limit."""
    async with prompts_of() as prompts:
        await prompts.send(*names(6))
        for name in names(6):
            await pass_time(clock, MAX_PATIENCE_S - 0.5)
            assert not prompts.tasks[name].done()
            prompts.held.answer(name, error)
            assert type(await prompts.error(name)) is type(error)
        assert not prompts.encoder.is_circuit_open


async def test_silence_after_an_answer_is_silence(clock: Clock) -> None:
    """An answer delays the end of the others only by the time that they would wait in silence."""
    async with prompts_of() as prompts:
        await prompts.send(*names(5))
        await pass_time(clock, MAX_PATIENCE_S / 2)
        prompts.held.answer("0")
        await prompts.error("0")
        await pass_time(clock, MAX_PATIENCE_S - 0.5)
        assert not prompts.tasks["1"].done()
        await pass_time(clock, 1.0)
        assert isinstance(await prompts.error("1"), EncoderUnavailable)


async def test_a_slow_answer_makes_patient(clock: Clock) -> None:
    """An encoder that took eight seconds for a prompt is not silent after eight more, despite a quick answer."""
    async with prompts_of() as prompts:
        for name, seconds in (("first", 8), ("quick", 0)):
            await prompts.send(name)
            await pass_time(clock, seconds)
            prompts.held.answer(name)
            await prompts.error(name)
        await prompts.send(*names(NUM_PROMPTS))
        await pass_time(clock, 8)
        for name in names(NUM_PROMPTS):
            prompts.held.answer(name)
            assert await prompts.error(name) is None


async def test_one_prompt_tries_a_silent_encoder(clock: Clock) -> None:
    """Once open, the circuit lets a single prompt through, which may take longer than the others were let."""
    async with prompts_of() as prompts:
        await prompts.send(*names(NUM_PROMPTS))
        await pass_time(clock, MAX_PATIENCE_S + 0.5)
        await pass_time(clock, OPEN_S)
        await prompts.send("trial")
        await pass_time(clock, 2 * MAX_PATIENCE_S)
        with pytest.raises(EncoderUnavailable):
            await prompts.encoder.embed("another")
        prompts.held.answer("trial")
        assert await prompts.error("trial") is None
        assert not prompts.encoder.is_circuit_open


async def test_a_trial_whose_client_leaves_makes_way(clock: Clock) -> None:
    """If the trial's client leaves, another prompt is tried soon."""
    async with prompts_of() as prompts:
        await prompts.send(*names(NUM_PROMPTS))
        await pass_time(clock, MAX_PATIENCE_S + 0.5 + OPEN_S)
        await pass_time(clock, OPEN_S)
        await prompts.send("trial")
        prompts.tasks["trial"].cancel()
        await pass_time(clock, OPEN_S)
        await prompts.send("second")


async def test_a_probe_lets_prompts_pass_but_not_for_long(clock: Clock) -> None:
    """An encoder that answers ``/info`` and no prompts: after a probe one prompt in silence opens the circuit again."""
    async with prompts_of() as prompts:
        await prompts.send(*names(NUM_PROMPTS))
        await pass_time(clock, MAX_PATIENCE_S + 0.5)
        await prompts.encoder.info()
        await prompts.send(*names(2, "after"))
        await pass_time(clock, MAX_PATIENCE_S + 0.5)
        assert isinstance(await prompts.error("after0"), EncoderUnavailable)
        assert prompts.encoder.is_circuit_open


async def test_in_a_cluster_prompts_wait_for_the_restart(clock: Clock) -> None:
    """Without a limit of attempts prompts wait for their own limit, because something else restarts the encoder."""
    async with prompts_of(max_attempts=None) as prompts:
        await prompts.send(*names(NUM_PROMPTS))
        await pass_time(clock, TIMEOUT_S - 1)
        prompts.held.answer("0")
        assert await prompts.error("0") is None


async def test_looking_into_the_cache_changes_nothing() -> None:
    """``is_cached`` asks nobody, and does not keep the embedding in the cache any longer."""
    async with prompts_of() as prompts:
        small = RetryingEncoder(prompts.held, timeout_s=TIMEOUT_S, cache_bytes=2 * 24)
        for name in ("a", "b", "c"):
            assert not small.is_cached(name)
            prompts.tasks[name] = asyncio.create_task(small.embed(name))
            await until(lambda name=name: name in prompts.held.waiting)  # type: ignore[misc]
            prompts.held.answer(name)
            await prompts.tasks[name]
            small.is_cached("a")
        assert [small.is_cached(name) for name in ("a", "b", "c")] == [False, True, True]
        assert prompts.held.waiting == {}
