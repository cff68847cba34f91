"""Many generators behind one API, with fakes of Ray's handles; skipped without Ray."""

import asyncio
import importlib.util
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any, Self

import pytest

from flux2_shared.errors import Busy, DeadlineExceeded, DeviceLost, Flux2Error, OutOfMemory
from generator_service.engine.events import EncodingPrompt, StepStarted
from generator_service.engine.generation import Generation, GenerationResult, Timings
from generator_service.engine.latency import LatencyModel
from generator_service.engine.metrics import GeneratorMetrics
from generator_service.engine.request import Request
from generator_service.errors import GeneratorUnavailable
from generator_service.lemica import schedule_for
from generator_service.pipelines.model_info import ModelInfo
from generator_service.pipelines.params import Params

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra ray is not installed"),
    pytest.mark.filterwarnings("ignore"),  # Ray makes deprecated calls of pydantic
]

INFO = ModelInfo("model", "1", "transformer 0", "float32", "none", 4, 64, 16)
REQUEST = Request(Params(None, 64, 64, 4.0, 1, schedule_for("none", 2), prompt="a prompt"), num_tokens=16)
RESULT = GenerationResult(REQUEST.params, b"file", Timings(0.0, 0.0, 1.0, 0.1))
STEP_STARTED = StepStarted(0, 0, is_computed=True, seconds_left=None)


@dataclass
class FakeHandle:
    """Answers each call with the next of ``scripts``: events, exceptions to raise, and seconds to wait."""

    scripts: list[list[Any]]
    calls: list[str] = field(default_factory=list)
    num_cancelled: int = 0

    def options(self, **_: object) -> Self:
        return self

    def __getattr__(self, name: str) -> "FakeMethod":
        return FakeMethod(self, name)


@dataclass
class FakeMethod:
    """A remote method of the replicas."""

    handle: FakeHandle
    name: str

    def remote(self, request: Request) -> "FakeStream":
        assert request.params.prompt
        self.handle.calls.append(self.name)
        return FakeStream(self.handle, self.handle.scripts.pop(0))


@dataclass
class FakeStream:
    """The stream of a replica's events."""

    handle: FakeHandle
    script: list[Any]

    async def __aiter__(self) -> AsyncIterator[Any]:
        for item in self.script:
            if isinstance(item, float):
                await asyncio.sleep(item)
            elif callable(item):
                raise item()
            else:
                yield item

    def cancel(self) -> None:
        self.handle.num_cancelled += 1


def lost() -> Exception:
    """The error that Ray raises after a replica has died."""
    from ray.exceptions import ActorDiedError  # noqa: PLC0415 - optional

    died: Exception = ActorDiedError()
    return died


def fleet_of(handle: FakeHandle, max_waiting: int = 8) -> Any:
    from flux2_ray.fleet import Fleet  # noqa: PLC0415 - optional

    return Fleet(handle, INFO, LatencyModel(), lambda: 1, max_waiting, GeneratorMetrics())


def submit(fleet: Any, *, request: Request = REQUEST, is_followed: bool = False) -> Generation:
    """Submit a request for one image."""
    with fleet.admit() as permit:
        generation: Generation = fleet.submit(replace(request, is_followed=is_followed), permit)
    return generation


async def test_a_lost_generator_is_replaced() -> None:
    """The request goes to another generator, and its events start again."""
    handle = FakeHandle([[EncodingPrompt(), STEP_STARTED, lost], [EncodingPrompt(), STEP_STARTED, RESULT]])
    generation = submit(fleet_of(handle), is_followed=True)
    assert await generation.images() == [RESULT]
    assert handle.calls == ["generate", "generate"]
    seen = [event async for event in generation.events()]
    assert seen == [EncodingPrompt(), STEP_STARTED, EncodingPrompt(), STEP_STARTED, RESULT]


async def test_repeated_losses_are_an_error() -> None:
    """After four attempts the client gets an error with a time to retry after."""
    with pytest.raises(GeneratorUnavailable) as caught:
        await submit(fleet_of(FakeHandle([[lost]] * 4))).images()
    assert caught.value.retry_after_s


async def test_a_generator_with_a_lost_device_is_replaced() -> None:
    """A generator whose last event is a lost device is replaced by another one."""
    handle = FakeHandle([[EncodingPrompt(), STEP_STARTED, DeviceLost()], [STEP_STARTED, RESULT]])
    assert await submit(fleet_of(handle)).images() == [RESULT]
    assert len(handle.calls) == 2


async def test_errors_of_a_generator_are_final() -> None:
    """An error of the generator is the response, and no other generator is called."""
    handle = FakeHandle([[EncodingPrompt(), OutOfMemory("too large")]])
    with pytest.raises(OutOfMemory):
        await submit(fleet_of(handle)).images()
    assert len(handle.calls) == 1


async def test_an_unexpected_error_is_not_retried() -> None:
    """An exception in the replica's code would be raised again."""
    from ray.exceptions import RayTaskError  # noqa: PLC0415 - optional

    handle = FakeHandle([[lambda: RayTaskError("generate", "traceback", ValueError("x"))]])
    with pytest.raises(Flux2Error) as caught:
        await submit(fleet_of(handle)).images()
    assert caught.value.code == "internal_error"
    assert "traceback" not in str(caught.value)
    assert len(handle.calls) == 1


async def test_a_full_queue_refuses_at_once() -> None:
    """With one running and the queue full, the next request is refused before anything is sent; slots are released."""
    handle = FakeHandle([[30.0], [30.0], [RESULT]])
    fleet = fleet_of(handle, max_waiting=1)
    running = [submit(fleet) for _ in range(2)]
    with pytest.raises(Busy) as caught:
        submit(fleet)
    assert caught.value.retry_after_s
    await asyncio.sleep(0)  # each has made its call
    assert len(handle.calls) == 2
    for generation in running:
        generation.cancel()
    assert await submit(fleet).images() == [RESULT]
    assert handle.num_cancelled == 3  # an ended stream is cancelled, too


@pytest.mark.parametrize("script", [[60.0, STEP_STARTED, RESULT], [STEP_STARTED, 60.0, RESULT]])
async def test_a_deadline_ends_a_generation(script: list[Any]) -> None:
    """A generation that is not finished at its deadline is aborted, whether a generator has started it or not."""
    handle = FakeHandle([script])
    generation = submit(fleet_of(handle), request=replace(REQUEST, deadline_s=0.1))
    with pytest.raises(DeadlineExceeded):
        await generation.images()
    await asyncio.sleep(0.01)
    assert handle.num_cancelled == 1


async def test_events_are_sent_only_if_followed() -> None:
    """Unless events are followed, the generator sends none."""
    handle = FakeHandle([[STEP_STARTED, RESULT]])
    await submit(fleet_of(handle)).images()
    assert handle.calls == ["generate_without_events"]


async def test_the_fleet_learns_latencies() -> None:
    """The times in each result are used for the estimates of later requests."""
    fleet = fleet_of(FakeHandle([[RESULT]]))
    assert fleet.latencies.estimate(16) is None
    await submit(fleet).images()
    assert fleet.latencies.estimate(16).total_s(2, 2) == pytest.approx(1.1, rel=0.05)
