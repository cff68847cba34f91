"""The events that a generation keeps for its readers."""

import asyncio
import gc
import threading
import weakref
from concurrent.futures import Future

import numpy as np
import pytest
from PIL import Image

from flux2_shared.thread_pool import ThreadPool
from generator_service.engine.events import EmittedEvent, PendingPreview, Preview, Queued, StepStarted
from generator_service.engine.history import History
from generator_service.engine.imaging import preview_file
from tests.conftest import Serve
from tests.control import ModelControl
from tests.generator_service.test_generate import SMALL, events

pytestmark = pytest.mark.anyio


def pending(index: int, number: int) -> PendingPreview:
    """A preview that is not encoded yet."""
    return PendingPreview(index, Future())


def finish(event: PendingPreview, number: int) -> Preview:
    """Encode a preview."""
    preview = Preview(event.index, number, b"%d" % number)
    event.preview.set_result(preview)
    return preview


async def read_all(history: History) -> list[object]:
    return [event async for event in history.read()]


async def test_only_the_newest_is_kept() -> None:
    """A reader who comes late gets the newest position, the newest preview of each image, and every step."""
    history = History()
    for k in range(1000):
        history.add(Queued(1000 - k, None))
        history.add(Preview(k % 2, k // 2, bytes(1)))
    step = StepStarted(0, 0, True, None)
    history.add(step)
    reader = history.read()
    read = [await anext(reader) for _ in range(4)]
    assert read == [Preview(0, 499, bytes(1)), Queued(1, None), Preview(1, 499, bytes(1)), step]
    assert [event for event in history._events if event is not None] == read


async def test_a_reader_that_keeps_up_gets_everything() -> None:
    """Each event that is read before the next one comes is read, in order, previews in the place of their request."""
    history, seen = History(), list[object]()
    given: list[EmittedEvent] = [
        Queued(2, None),
        Queued(1, None),
        Preview(0, 0, b"a"),
        Preview(0, 1, b"b"),
        StepStarted(0, 3, True, None),
    ]

    async def read() -> None:
        async for event in history.read():
            seen.append(event)
            was_read.set()

    was_read = asyncio.Event()
    reader = asyncio.create_task(read())
    for event in given:
        was_read.clear()
        history.add(event)
        await was_read.wait()
    history.close([])
    await reader
    assert seen == given


async def test_a_preview_is_never_after_the_end() -> None:
    """Readers wait for a preview that is being encoded, also when the generation ends meanwhile."""
    history, event = History(), pending(0, 0)
    history.add(event)
    reading = [asyncio.create_task(read_all(history)) for _ in range(2)]
    await asyncio.sleep(0)
    step = StepStarted(0, 5, True, None)
    history.add(step)
    history.close([])
    preview = finish(event, 0)
    assert [await each for each in reading] == [[preview, step]] * 2
    assert await read_all(history) == [step]


async def test_a_reader_who_leaves_does_not_disturb_the_others() -> None:
    """A reader who is cancelled while a preview is encoded does not cancel it for the other readers."""
    history, event = History(), pending(0, 0)
    history.add(event)
    leaving, staying = (asyncio.create_task(read_all(history)) for _ in range(2))
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    preview = finish(event, 0)
    history.close([])
    assert await staying == [preview]


async def test_previews_are_kept_as_files(serve_generator: Serve, model_control: ModelControl) -> None:
    """Nobody has to read a stream for its previews to be encoded: what waits is the newest, as JPEG."""
    async with serve_generator() as http:
        body = SMALL | {"num_inference_steps": 30, "previews": 10}
        job = (await http.post("/jobs", json=body)).json()["id"]
        state = http._transport.app.state.generator  # type: ignore[attr-defined]
        history = next(iter(state.jobs._jobs.values())).generation._history
        most = 0

        def count() -> None:
            nonlocal most
            kept = [event for event in history._events if isinstance(event, Preview | PendingPreview)]
            most = max(most, len(kept))
            for event in kept:
                file = event.preview.result(60).file if isinstance(event, PendingPreview) else event.file
                assert file.startswith(b"\xff\xd8")

        model_control.on_step = count
        assert events((await http.get(f"/jobs/{job}/events")).text)[-1][0] == "completed"
    assert most == 1


async def test_an_encoded_preview_frees_its_image() -> None:
    """The raw image is only kept until it is encoded."""
    may_encode = threading.Event()
    async with ThreadPool("previews", 1) as threads:
        blocked = threads.submit(may_encode.wait, 60)
        image = Image.fromarray(np.zeros((64, 64, 3), np.uint8))
        freed = weakref.ref(image)
        file = threads.submit(preview_file, image)
        del image
        may_encode.set()
        assert blocked.result()
        assert file.result()[:2] == b"\xff\xd8"
        await threads.run(gc.collect)
    assert freed() is None
