"""Many generators behind the API of one: who waits, who draws, and what happens when a machine is lost.

Stands where a single machine has its engine. A request whose generator dies is drawn again by another: the seed is part
of the order, so the picture is the same.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from contextvars import Context
from functools import partial
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException

from generator_service.cost import CostModel
from generator_service.engine import Delivery, work_s
from generator_service.happenings import Happening, Listener, StepBegun, ignore
from generator_service.line import Line
from generator_service.order import Order
from generator_service.pipelines.card import ModelCard
from shared.errors import Busy, DeadlineExceeded, DeviceLost, Flux2Error, GeneratorUnavailable
from shared.metrics import Metrics

logger = logging.getLogger("flux2")

MAX_ATTEMPTS = 4
FIRST_GUESS_S = 10.0
"""How long a picture is taken to last before one was drawn."""


class Fleet:
    """Delivers pictures by whichever generator is free.

    Args:
        handle: of the deployment of ``GeneratorReplica``.
        card: their model.
        cost: what is known of their speed.
        num_generators: how many there are now.
        max_waiting: how many requests may wait beside those that are drawn.
        metrics: get the number of places taken.
    """

    def __init__(
        self,
        handle: Any,
        card: ModelCard,
        cost: CostModel,
        num_generators: Callable[[], int],
        max_waiting: int,
        metrics: Metrics,
    ) -> None:
        self.card = card
        self.cost = cost
        self._handle = handle.options(stream=True)
        self._num_generators = num_generators
        self._max_waiting = max_waiting
        self._num_places_taken = 0
        self._line = Line(num_devices=num_generators)
        metrics.queue_depth.set_function(lambda: self._num_places_taken)

    async def deliver(self, orders: Sequence[Order], listener: Listener | None = None) -> list[Delivery]:
        """As ``Engine.deliver``; what happened before a generator was lost is told again by the next.

        Raises:
            Busy: too many wait.
            DeadlineExceeded: the drawing has not begun in time.
            GeneratorUnavailable: one generator after the other was lost.
            Flux2Error: what the generator says.
        """
        tell = listener or ignore
        ask = self._handle.deliver_quietly if listener is None else self._handle.deliver
        attempt = partial(self._attempt, partial(ask.remote, orders), tell)
        with self._place(), self._line.waiting(work_s(orders), tell):
            try:
                async with asyncio.timeout(orders[0].deadline_s) as until_begun:
                    return await self._with_retries(partial(attempt, until_begun))
            except TimeoutError:
                if until_begun.expired():
                    told = "the deadline passed before it was this request's turn"
                    raise DeadlineExceeded(told) from None
                raise

    @contextmanager
    def _place(self) -> Iterator[None]:
        devices = self._num_generators()
        if self._num_places_taken >= devices + self._max_waiting:
            cost = self.cost.of(self.card.default_num_tokens)
            picture_s = FIRST_GUESS_S if cost is None else cost.total_s(50, 50)
            rounds = self._num_places_taken / max(1, devices)
            raise Busy("the service is busy: the queue is full", retry_after_s=rounds * picture_s)
        self._num_places_taken += 1
        try:
            yield
        finally:
            self._num_places_taken -= 1

    async def _with_retries(self, attempt: Callable[[], Awaitable[list[Delivery]]]) -> list[Delivery]:
        for number in range(1, MAX_ATTEMPTS + 1):
            try:
                return await attempt()
            except GeneratorUnavailable as error:
                logger.warning("attempt %d: %s", number, error, exc_info=error.__cause__)
        told = "one generator after the other was lost before the picture was finished"
        raise GeneratorUnavailable(told, retry_after_s=FIRST_GUESS_S)

    async def _attempt(self, ask: Callable[[], Any], tell: Listener, until_begun: asyncio.Timeout) -> list[Delivery]:
        deliveries = []
        async with aclosing(self._events(ask)) as events:
            async for event in events:
                if isinstance(event, Delivery):
                    self._learn(event)
                    deliveries.append(event)
                    continue
                if isinstance(event, StepBegun):
                    until_begun.reschedule(None)
                tell(event)
        return deliveries

    async def _events(self, ask: Callable[[], Any]) -> AsyncGenerator[Happening | Delivery, None]:
        """What some generator tells."""
        # Outside of the HTTP request's context: Serve would cancel a job when the client that began it leaves.
        stream = Context().run(ask)
        try:
            async for event in stream:
                if isinstance(event, DeviceLost):
                    raise GeneratorUnavailable("a generator's GPU has failed") from event
                if isinstance(event, Flux2Error):
                    raise event
                yield event
        except RayTaskError:
            raise  # not the machines but the code
        except BackPressureError as error:
            raise Busy("the service is busy: the queue is full", retry_after_s=FIRST_GUESS_S) from error
        except (RayError, RayServeException) as error:
            raise GeneratorUnavailable("a generator was lost") from error
        finally:
            stream.cancel()  # of a stream that has ended there is nothing left to cancel

    def _learn(self, delivery: Delivery) -> None:
        order = delivery.order
        if order.adapters or order.preview_steps:
            return  # they took longer than others of their size
        self.cost.observe(
            order.num_tokens,
            num_computed=order.schedule.num_computed,
            num_steps=order.schedule.num_steps,
            denoise_s=delivery.timings.denoise_s,
            decode_s=delivery.timings.decode_s,
        )
