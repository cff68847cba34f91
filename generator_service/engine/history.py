"""The events of one generation, for any number of readers, who may come late or stop reading."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from generator_service.engine.events import EmittedEvent, PendingPreview, Preview, ProgressEvent, Queued

if TYPE_CHECKING:
    from generator_service.engine.generation import GenerationResult


@dataclass
class History:
    """The events in their order. Belongs to the event loop.

    Of the queue positions, and of the previews of each image, only the newest is kept, so that the history stays small
    if nobody reads it. A reader who has not come to an older one skips it.
    """

    _events: "list[EmittedEvent | GenerationResult | None]" = field(default_factory=list)
    """None replaces dropped events, because readers count."""
    _newest: dict[object, int] = field(default_factory=dict)
    """Positions in ``_events`` of those that a later event will replace."""
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _is_closed: bool = False

    def add(self, event: EmittedEvent) -> None:
        """Append an event; drop the one that it replaces."""
        key = replacement_key(event)
        if key is not None:
            if key in self._newest:
                self._events[self._newest[key]] = None
            self._newest[key] = len(self._events)
        self._events.append(event)
        self._wake()

    def close(self, results: "Sequence[GenerationResult]") -> None:
        """Append the results and let readers end. Jobs are kept for long, so previews and positions are dropped."""
        for position in self._newest.values():
            self._events[position] = None
        self._events.extend(results)
        self._is_closed = True
        self._wake()

    async def read(self) -> "AsyncIterator[ProgressEvent | GenerationResult]":
        """Yield all events from the start, including future ones, until ``close``."""
        position = 0
        while True:
            changed = self._changed
            while position < len(self._events):
                event = self._events[position]
                position += 1
                if isinstance(event, PendingPreview):
                    # Shielded, because a reader who leaves would cancel it for the others.
                    preview: asyncio.Future[Preview] = asyncio.wrap_future(event.preview)
                    yield await asyncio.shield(preview)
                elif event is not None:
                    yield event
            if self._is_closed:
                return
            await changed.wait()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


def replacement_key(event: EmittedEvent) -> object:
    """Return a key that is equal for events of which only the newest matters; None if each event matters."""
    if isinstance(event, Queued):
        return Queued
    return (Preview, event.index) if isinstance(event, Preview | PendingPreview) else None
