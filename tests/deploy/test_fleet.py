"""Many generators behind one API, with handles that stand for Ray's; where Ray is not installed this is not tested."""

import asyncio
import importlib.util
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any, Self

import pytest

from flux2_shared.errors import Busy, DeadlineExceeded, DeviceLost, Flux2Error, OutOfMemory
from flux2_shared.observability.metrics import Metrics
from generator_service.engine.events import EncodingPrompt, StepStarted
from generator_service.engine.generation import Generation, GenerationResult, Timings
from generator_service.engine.latency import LatencyModel
from generator_service.engine.request import Request
from generator_service.errors import GeneratorUnavailable
from generator_service.lemica import schedule_for
from generator_service.pipelines.model_info import ModelInfo
from generator_service.pipelines.params import Params

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra ray is not installed"),
    pytest.mark.filterwarnings("ignore"),  # Ray's own: deprecated calls of pydantic
]

CARD = ModelInfo("model", "1", "transformer 0", "float32", "none", 4, 64, 16)
REQUEST = Request(Params(None, 64, 64, 4.0, 1, schedule_for("none", 2), prompt="a prompt"), num_tokens=16)
RESULT = GenerationResult(REQUEST.params, b"file", Timings(0.0, 0.0, 1.0, 0.1))
BEGUN = StepStarted(0, 0, is_computed=True, seconds_left=None)


@dataclass
class FakeHandle:
    """Answers each request with the next of ``scripts``: what happens, what is raised, or how long it takes."""

    scripts: list[list[Any]]
    asked: list[str] = field(default_factory=list)
    num_cancelled: int = 0

    def options(self, **_: object) -> Self:
        """As Ray's."""
        return self

    def __getattr__(self, name: str) -> "FakeMethod":
        return FakeMethod(self, name)


@dataclass
class FakeMethod:
    """A method of the replicas."""

    handle: FakeHandle
    name: str

    def remote(self, request: Request) -> "FakeStream":
        """As Ray's."""
        assert request.params.prompt
        self.handle.asked.append(self.name)
        return FakeStream(self.handle, self.handle.scripts.pop(0))


@dataclass
class FakeStream:
    """What a replica tells."""

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
        """As Ray's."""
        self.handle.num_cancelled += 1


def lost() -> Exception:
    """What Ray raises where a replica has died."""
    from ray.exceptions import ActorDiedError  # noqa: PLC0415 - optional

    died: Exception = ActorDiedError()
    return died


def fleet_of(handle: FakeHandle, max_waiting: int = 8) -> Any:
    """A fleet of one generator."""
    from flux2_ray.fleet import Fleet  # noqa: PLC0415 - optional

    return Fleet(handle, CARD, LatencyModel(), lambda: 1, max_waiting, Metrics())


def submit(fleet: Any, *, request: Request = REQUEST, is_followed: bool = False) -> Generation:
    """Begin one image."""
    with fleet.admit() as permit:
        generation: Generation = fleet.submit(replace(request, is_followed=is_followed), permit)
    return generation


async def test_a_lost_generator_is_replaced() -> None:
    """The request goes to another generator; who follows is told again from the start."""
    handle = FakeHandle([[EncodingPrompt(), BEGUN, lost], [EncodingPrompt(), BEGUN, RESULT]])
    generation = submit(fleet_of(handle), is_followed=True)
    assert await generation.images() == [RESULT]
    assert handle.asked == ["generate", "generate"]
    seen = [event async for event in generation.events()]
    assert seen == [EncodingPrompt(), BEGUN, EncodingPrompt(), BEGUN, RESULT]


async def test_one_after_the_other_is_lost() -> None:
    """After four attempts the client is told, with a time to come back."""
    with pytest.raises(GeneratorUnavailable) as caught:
        await submit(fleet_of(FakeHandle([[lost]] * 4))).images()
    assert caught.value.retry_after_s


async def test_a_generator_whose_gpu_failed_is_replaced() -> None:
    """Its last word is that the device is lost; another generator is asked."""
    handle = FakeHandle([[EncodingPrompt(), BEGUN, DeviceLost()], [BEGUN, RESULT]])
    assert await submit(fleet_of(handle)).images() == [RESULT]
    assert len(handle.asked) == 2


async def test_what_a_generator_says_is_final() -> None:
    """An error of ours is the answer; nobody else is asked."""
    handle = FakeHandle([[EncodingPrompt(), OutOfMemory("too large")]])
    with pytest.raises(OutOfMemory):
        await submit(fleet_of(handle)).images()
    assert len(handle.asked) == 1


async def test_an_error_in_the_code_is_not_repeated() -> None:
    """What the replica's code raises would be raised again."""
    from ray.exceptions import RayTaskError  # noqa: PLC0415 - optional

    handle = FakeHandle([[lambda: RayTaskError("deliver", "traceback", ValueError("x"))]])
    with pytest.raises(Flux2Error) as caught:
        await submit(fleet_of(handle)).images()
    assert caught.value.code == "internal_error"
    assert "traceback" not in str(caught.value)
    assert len(handle.asked) == 1


async def test_refusals_come_at_once() -> None:
    """With one drawn and as many waiting as may, the next is refused before anything is sent; places are given back."""
    handle = FakeHandle([[30.0], [30.0], [RESULT]])
    fleet = fleet_of(handle, max_waiting=1)
    running = [submit(fleet) for _ in range(2)]
    with pytest.raises(Busy) as caught:
        submit(fleet)
    assert caught.value.retry_after_s
    await asyncio.sleep(0)  # each has asked
    assert len(handle.asked) == 2
    for generation in running:
        generation.cancel()
    assert await submit(fleet).images() == [RESULT]
    assert handle.num_cancelled == 3  # a stream that has ended is cancelled, too


@pytest.mark.parametrize(("script", "is_in_time"), [([0.5, BEGUN, RESULT], False), ([BEGUN, 0.5, RESULT], True)])
async def test_a_deadline_is_for_the_beginning(script: list[Any], *, is_in_time: bool) -> None:
    """A picture that has not begun in time is given up; one that has is finished."""
    handle = FakeHandle([script])
    generation = submit(fleet_of(handle), request=replace(REQUEST, deadline_s=0.1))
    if is_in_time:
        assert await generation.images() == [RESULT]
    else:
        with pytest.raises(DeadlineExceeded):
            await generation.images()
    await asyncio.sleep(0.01)
    assert handle.num_cancelled == 1


async def test_steps_that_nobody_follows_are_not_sent() -> None:
    """Unless somebody follows the generation, the generator is asked for no events."""
    handle = FakeHandle([[BEGUN, RESULT]])
    await submit(fleet_of(handle)).images()
    assert handle.asked == ["generate_without_events"]


async def test_the_fleet_learns_what_pictures_take() -> None:
    """Each file brings its times, from which later requests are told what to expect."""
    fleet = fleet_of(FakeHandle([[RESULT]]))
    assert fleet.latencies.estimate(16) is None
    await submit(fleet).images()
    assert fleet.latencies.estimate(16).total_s(2, 2) == pytest.approx(1.1, rel=0.05)
