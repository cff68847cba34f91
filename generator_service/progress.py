"""Work that tells how far it is, from the device thread to whoever answers a request."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Self

from generator_service.engine import Delivery
from generator_service.happenings import Happening, Listener
from generator_service.line import Queued


class Progress:
    """A running ``Engine.deliver``: an iterator over what happens to it, and at last its deliveries."""

    def __init__(self, work: Callable[[Listener], Coroutine[Any, Any, list[Delivery]]]) -> None:
        loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Happening | None] = asyncio.Queue()
        self.queued: Queued | None = None
        """The work's place in the line, as far as it was told."""

        def listen(event: Happening) -> None:
            if isinstance(event, Queued):
                self.queued = event
            loop.call_soon_threadsafe(self._events.put_nowait, event)

        self._task = asyncio.create_task(work(listen))
        self._task.add_done_callback(lambda _task: self._events.put_nowait(None))

    @classmethod
    async def start(cls, work: Callable[[Listener], Coroutine[Any, Any, list[Delivery]]]) -> Self:
        """Begin.

        Raises:
            Busy: the queue is full; nothing was begun.
        """
        progress = cls(work)
        await asyncio.sleep(0)  # the work takes its place in the queue, or is refused
        if progress._task.done():
            progress._task.result()
        return progress

    def cancel(self) -> None:
        """Stop the work, within one step."""
        self._task.cancel()

    async def __aiter__(self) -> AsyncIterator[Happening | Delivery]:
        """Everything as it happens. Leaving early cancels the work; what fails in it is raised here."""
        try:
            while (event := await self._events.get()) is not None:
                yield event
            for delivery in self._task.result():
                yield delivery
        finally:
            self.cancel()
