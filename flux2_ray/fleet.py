"""A fleet of generators behind one API: queueing, dispatching, and retries when a machine is lost.

It replaces the engine of a single machine. If a generator dies, its requests are generated again by another one; the
result is the same, because the seed is part of the request.
"""

import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractContextManager, aclosing
from contextvars import Context
from functools import partial
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException

from flux2_shared.errors import Busy, DeviceLost, Flux2Error, ShuttingDown
from generator_service.engine.admission import Permit
from generator_service.engine.events import ProgressEvent, StepStarted
from generator_service.engine.generation import Generation, GenerationResult
from generator_service.engine.latency import LatencyModel
from generator_service.engine.metrics import GeneratorMetrics
from generator_service.engine.queue import Queue
from generator_service.engine.request import Request
from generator_service.errors import GeneratorUnavailable
from generator_service.pipelines.model_info import ModelInfo

logger = logging.getLogger("flux2")

MAX_ATTEMPTS = 4
DEFAULT_ESTIMATE_S = 10.0
"""The assumed time per image before one was generated."""


class Fleet:
    """Dispatches generations to the replicas of a deployment.

    Args:
        handle: handle of the ``GeneratorReplica`` deployment.
        info: the model of the generators.
        latencies: estimates the time of an image.
        num_generators: returns the number of running generators.
        max_waiting: largest number of waiting requests, in addition to the running ones.
        metrics: receives the number of requests in flight, and how generations ended.
        share: share of the queue that one owner may have.
    """

    def __init__(
        self,
        handle: Any,
        info: ModelInfo,
        latencies: LatencyModel,
        num_generators: Callable[[], int],
        max_waiting: int,
        metrics: GeneratorMetrics,
        share: float = 1.0,
    ) -> None:
        self.info = info
        self.latencies = latencies
        self._handle = handle.options(stream=True)
        self._queue = Queue[None](lambda: num_generators() + max_waiting, num_devices=num_generators, share=share)
        self._metrics = metrics
        metrics.queue_depth.set_function(lambda: self._queue.num_in_flight)

    def is_cached(self, _prompt: str, /) -> bool:
        """Return False: each generator has a cache of its own."""
        return False

    def admit(self, owner: str = "", is_embedded: Callable[[], bool] = lambda: False) -> AbstractContextManager[Permit]:
        """See ``Admission.admit``.

        Raises:
            Busy: the queue is full.
            ShuttingDown: the fleet is closed.
        """
        return self._queue.admit(owner, is_embedded)

    def submit(self, request: Request, permit: Permit) -> Generation:
        """See ``Engine.submit``. Serve's router picks the next request, so positions are estimates.

        The generation fails with ``GeneratorUnavailable`` if ``MAX_ATTEMPTS`` generators are lost in a row.
        """
        generation = Generation(request, on_end=self._end)
        self._queue.enter(generation, permit)
        for index, params in enumerate(request.all_params()):
            self._queue.add(generation, params, index)
        generation.start(partial(self._with_retries, request), permit.admitted)
        return generation

    def _end(self, generation: Generation) -> None:
        self._queue.leave(generation)
        self._metrics.record_end(generation)

    def close(self) -> None:
        """Fail all live generations with ``ShuttingDown`` and stop admitting requests."""
        self._queue.close(ShuttingDown)

    async def _with_retries(self, request: Request, generation: Generation) -> list[GenerationResult]:
        for number in range(1, MAX_ATTEMPTS + 1):
            try:
                return await self._attempt(request, generation)
            except GeneratorUnavailable as error:
                logger.warning("attempt %d: %s", number, error, exc_info=error.__cause__)
        lost = "the generators failed repeatedly before the image was finished"
        raise GeneratorUnavailable(lost, retry_after_s=DEFAULT_ESTIMATE_S)

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
        """Stream the events of one generator."""
        # Outside of the HTTP request's context: Serve would cancel a job when the client that started it disconnects.
        stream = Context().run(ask)
        try:
            async for event in stream:
                if isinstance(event, DeviceLost):
                    raise GeneratorUnavailable("a generator's GPU has failed") from event
                if isinstance(event, Flux2Error):
                    raise event
                yield event
        except RayTaskError:
            raise  # a bug, not a lost machine
        except BackPressureError as error:
            raise Busy("the service is busy: the queue is full", retry_after_s=DEFAULT_ESTIMATE_S) from error
        except (RayError, RayServeException) as error:
            raise GeneratorUnavailable("a generator was lost") from error
        finally:
            stream.cancel()  # does nothing if the stream has ended

    def _learn(self, request: Request, result: GenerationResult) -> None:
        if request.params.adapters or request.preview_steps:
            return  # these take longer than other images of the same size
        schedule = result.params.schedule
        self.latencies.observe(
            request.num_tokens,
            num_computed=schedule.num_computed,
            num_steps=schedule.num_steps,
            denoise_s=result.timings.denoise_s,
            decode_s=result.timings.decode_s,
        )
