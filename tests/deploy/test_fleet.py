"""Many generators behind one API, with handles that stand for Ray's; where Ray is not installed this is not tested."""

import asyncio
import importlib.util
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import pytest

from generator_service.cost import CostModel
from generator_service.engine import Delivery, Timings
from generator_service.happenings import Encoding, StepBegun
from generator_service.lemica import schedule_for
from generator_service.order import Order
from generator_service.pipelines.card import ModelCard
from generator_service.progress import Progress
from shared.errors import Busy, DeadlineExceeded, GeneratorUnavailable, OutOfMemory
from shared.metrics import Metrics

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra ray is not installed"),
    pytest.mark.filterwarnings("ignore"),  # Ray's own: deprecated calls of pydantic
]

CARD = ModelCard("model", "1", "transformer 0", "float32", "none", 4, 64, 16)
ORDER = Order("a prompt", None, 64, 64, 4.0, 1, "none", schedule_for("none", 2), num_tokens=16)
DELIVERY = Delivery(ORDER, b"file", Timings(0.0, 0.0, 1.0, 0.1))
BEGUN = StepBegun(0, 0, is_computed=True, seconds_left=None)


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

    def remote(self, orders: Sequence[Order]) -> "FakeStream":
        """As Ray's."""
        assert orders
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
    from deploy.ray.fleet import Fleet  # noqa: PLC0415 - optional

    return Fleet(handle, CARD, CostModel(), lambda: 1, max_waiting, Metrics())


async def test_a_lost_generator_is_replaced() -> None:
    """The request goes to another generator; who follows is told again from the start."""
    handle = FakeHandle([[Encoding(), BEGUN, lost], [Encoding(), BEGUN, DELIVERY]])
    told: list[object] = []
    assert await fleet_of(handle).deliver([ORDER], told.append) == [DELIVERY]
    assert handle.asked == ["deliver", "deliver"]
    assert told[1:] == [Encoding(), BEGUN, Encoding(), BEGUN]


async def test_one_after_the_other_is_lost() -> None:
    """After four attempts the client is told, with a time to come back."""
    with pytest.raises(GeneratorUnavailable) as caught:
        await fleet_of(FakeHandle([[lost]] * 4)).deliver([ORDER])
    assert caught.value.retry_after_s


async def test_what_a_generator_says_is_final() -> None:
    """An error of ours is the answer; nobody else is asked."""
    handle = FakeHandle([[Encoding(), OutOfMemory("too large")]])
    with pytest.raises(OutOfMemory):
        await fleet_of(handle).deliver([ORDER])
    assert len(handle.asked) == 1


async def test_an_error_in_the_code_is_not_repeated() -> None:
    """What the replica's code raises would be raised again."""
    from ray.exceptions import RayTaskError  # noqa: PLC0415 - optional

    handle = FakeHandle([[lambda: RayTaskError("deliver", "traceback", ValueError("x"))]])
    with pytest.raises(RayTaskError):
        await fleet_of(handle).deliver([ORDER])
    assert len(handle.asked) == 1


async def test_refusals_come_at_once() -> None:
    """With one drawn and as many waiting as may, the next is refused before anything is sent; places are given back."""
    handle = FakeHandle([[30.0], [30.0], [DELIVERY]])
    fleet = fleet_of(handle, max_waiting=1)
    running = [await Progress.start(lambda listener: fleet.deliver([ORDER], listener)) for _ in range(2)]
    with pytest.raises(Busy) as caught:
        await Progress.start(lambda listener: fleet.deliver([ORDER], listener))
    assert caught.value.retry_after_s
    assert len(handle.asked) == 2
    for progress in running:
        progress.cancel()
    await asyncio.sleep(0.01)
    assert handle.num_cancelled == 2
    assert await fleet.deliver([ORDER]) == [DELIVERY]


@pytest.mark.parametrize(("script", "is_in_time"), [([0.5, BEGUN, DELIVERY], False), ([BEGUN, 0.5, DELIVERY], True)])
async def test_a_deadline_is_for_the_beginning(script: list[Any], *, is_in_time: bool) -> None:
    """A picture that has not begun in time is given up; one that has is finished."""
    handle = FakeHandle([script])
    delivering = fleet_of(handle).deliver([replace(ORDER, deadline_s=0.1)])
    if is_in_time:
        assert await delivering == [DELIVERY]
    else:
        with pytest.raises(DeadlineExceeded):
            await delivering
    assert handle.num_cancelled == 1


async def test_steps_that_nobody_follows_are_not_sent() -> None:
    """Without a listener the generator is asked to be quiet."""
    handle = FakeHandle([[BEGUN, DELIVERY]])
    await fleet_of(handle).deliver([ORDER])
    assert handle.asked == ["deliver_quietly"]


async def test_the_fleet_learns_what_pictures_take() -> None:
    """Each file brings its times, from which later requests are told what to expect."""
    fleet = fleet_of(FakeHandle([[DELIVERY]]))
    assert fleet.cost.of(16) is None
    await fleet.deliver([ORDER])
    assert fleet.cost.of(16).total_s(2, 2) == pytest.approx(1.1, rel=0.05)
