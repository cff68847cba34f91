"""Many generators behind the API of one: who waits, who draws, and what happens when a machine is lost.

Stands where a single machine has its engine. A request whose generator dies is drawn again by another: the seed is part
of the order, so the picture is the same.
"""

import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractContextManager, aclosing
from contextvars import Context
from functools import partial
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException

from flux2_shared.errors import Busy, DeviceLost, Flux2Error, GeneratorUnavailable, ShuttingDown
from flux2_shared.observability.metrics import Metrics
from generator_service.engine.events import ProgressEvent, StepStarted
from generator_service.engine.generation import Generation, GenerationResult
from generator_service.engine.latency import LatencyModel
from generator_service.engine.queue import Permit, Queue
from generator_service.engine.request import Request
from generator_service.pipelines.model_info import ModelInfo

logger = logging.getLogger("flux2")

MAX_ATTEMPTS = 4
FIRST_GUESS_S = 10.0
"""How long an image is taken to last before one was generated."""


class Fleet:
    """Generates images by whichever generator is free.

    Args:
        handle: of the deployment of ``GeneratorReplica``.
        info: their model.
        latencies: how long images take them.
        num_generators: how many there are now.
        max_waiting: how many requests may wait beside those that run.
        metrics: get the number of requests in flight.
    """

    def __init__(
        self,
        handle: Any,
        info: ModelInfo,
        latencies: LatencyModel,
        num_generators: Callable[[], int],
        max_waiting: int,
        metrics: Metrics,
    ) -> None:
        self.info = info
        self.latencies = latencies
        self._handle = handle.options(stream=True)
        self._queue = Queue[None](lambda: num_generators() + max_waiting, num_devices=num_generators)
        metrics.queue_depth.set_function(lambda: self._queue.num_in_flight)

    def admit(self) -> AbstractContextManager[Permit]:
        """As ``Engine.admit``.

        Raises:
            Busy: too many wait.
        """
        return self._queue.admit()

    def submit(self, request: Request, permit: Permit) -> Generation:
        """As ``Engine.submit``. Serve's router picks the next request, so positions are estimates.

        The generation fails with ``GeneratorUnavailable`` if one generator after the other is lost.
        """
        generation = Generation(request, on_end=self._queue.leave)
        self._queue.enter(generation, permit)
        for index, params in enumerate(request.all_params()):
            self._queue.add(generation, params, index)
        generation.start(partial(self._with_retries, request))
        return generation

    def close(self) -> None:
        """End everything that has not ended; nothing is admitted any more."""
        self._queue.close(ShuttingDown)

    async def _with_retries(self, request: Request, generation: Generation) -> list[GenerationResult]:
        for number in range(1, MAX_ATTEMPTS + 1):
            try:
                return await self._attempt(request, generation)
            except GeneratorUnavailable as error:
                logger.warning("attempt %d: %s", number, error, exc_info=error.__cause__)
        lost = "one generator after the other was lost before the image was finished"
        raise GeneratorUnavailable(lost, retry_after_s=FIRST_GUESS_S)

    async def _attempt(self, request: Request, generation: Generation) -> list[GenerationResult]:
        method = self._handle.generate if request.is_followed else self._handle.generate_without_events
        results = []
        async with aclosing(self._events(partial(method.remote, request))) as events:
            async for event in events:
                if isinstance(event, GenerationResult):
                    self._learn(request, event)
                    results.append(event)
                    continue
                if isinstance(event, StepStarted):
                    self._queue.begin(generation)
                generation.emit(event)
        return results

    async def _events(self, ask: Callable[[], Any]) -> AsyncGenerator[ProgressEvent | GenerationResult, None]:
        """What some generator sends."""
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

    def _learn(self, request: Request, result: GenerationResult) -> None:
        if request.params.adapters or request.preview_steps:
            return  # they took longer than others of their size
        schedule = result.params.schedule
        self.latencies.observe(
            request.num_tokens,
            num_computed=schedule.num_computed,
            num_steps=schedule.num_steps,
            denoise_s=result.timings.denoise_s,
            decode_s=result.timings.decode_s,
        )
