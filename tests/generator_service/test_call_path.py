"""The number of this project's functions that a request passes before the transformer runs."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import httpx
import pytest
import torch

from demo_model.services import WEIGHTS
from flux2_shared.device.thread import _checked
from flux2_shared.model.folder import find_model, read_prompt_format
from flux2_shared.model.subfolders import SUBFOLDERS, Service
from flux2_shared.wire import SAFETENSORS_MEDIA_TYPE, dump_safetensors
from generator_service.app import create_app
from generator_service.settings import GeneratorSettings
from tests.conftest import served

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[2]
OURS = (f"{ROOT}/generator_service/", f"{ROOT}/flux2_shared/")
"""The package in ``shared/`` is imported through the link ``flux2_shared``."""
BODY = {"prompt": "a large red circle", "num_inference_steps": 2, "cache": "none"}
MAX_FUNCTIONS = 80
"""The limit for a new prompt."""
MAX_FUNCTIONS_CACHED = 65
"""The limit for a prompt whose embedding is cached."""
MAX_FRAMES = 5
"""The limit between the device thread's entry and the pipeline."""


def is_own_function(code: CodeType) -> bool:
    """Whether ``code`` is a named function of the generator; comprehensions and lambdas belong to their function."""
    return code.co_filename.startswith(OURS) and not code.co_name.startswith("<")


class CallRecorder:
    """Collects this project's functions that run, on every thread, until the transformer's first forward pass."""

    def __init__(self) -> None:
        self.functions: set[str] = set()
        self.frames: list[str] = []
        self._is_active = False

    def __call__(self, frame: FrameType, event: str, _argument: Any) -> None:
        """The callback of ``sys.setprofile``."""
        if not self._is_active or event != "call":
            return
        code = frame.f_code
        if is_own_function(code):
            self.functions.add(f"{Path(code.co_filename).relative_to(ROOT)}:{code.co_qualname}")
        elif code.co_qualname == "Flux2Pipeline.__call__":
            self.frames = list(own_frames(frame))
        elif code.co_qualname == "Flux2Transformer2DModel.forward":
            self._is_active = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within the block this thread and every new one are profiled."""
        threading.setprofile(self)
        sys.setprofile(self)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)

    def start(self) -> None:
        """Forget earlier calls, and collect again."""
        self.functions.clear()
        self._is_active = True


def own_frames(frame: FrameType) -> Iterator[str]:
    """This project's callers of ``frame``, up to the device thread's entry."""
    caller = frame.f_back
    while caller is not None and caller.f_code is not _checked.__code__:
        if is_own_function(caller.f_code):
            yield caller.f_code.co_qualname
        caller = caller.f_back


def encoder(shape: tuple[int, int]) -> Callable[[httpx.Request], httpx.Response]:
    """A text encoder that responds at once with an embedding of ``shape``."""
    content = dump_safetensors(torch.zeros(1, *shape))

    def respond(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/info":
            return httpx.Response(404)
        return httpx.Response(200, content=content, headers={"content-type": SAFETENSORS_MEDIA_TYPE})

    return respond


async def test_a_request_passes_few_functions() -> None:
    """The limits of docs/architecture.md hold for a new prompt, for a cached one, and on the device thread."""
    settings = GeneratorSettings(model=str(WEIGHTS))
    folder = find_model(str(WEIGHTS), "main", SUBFOLDERS[Service.GENERATOR])
    shape = read_prompt_format(folder).max_sequence_length, 384
    recorder = CallRecorder()
    with recorder.installed():
        async with served(create_app(settings, httpx.MockTransport(encoder(shape)))) as http:
            empty = await http.post("/generate")  # the first request builds the middleware and the route's handler
            assert empty.status_code == 400
            recorder.start()
            (await http.post("/generate", json=BODY)).raise_for_status()
            new = set(recorder.functions)
            recorder.start()
            (await http.post("/generate", json=BODY)).raise_for_status()
            cached = set(recorder.functions)
    assert recorder.frames
    assert len(recorder.frames) <= MAX_FRAMES, recorder.frames
    assert len(new) <= MAX_FUNCTIONS, "\n".join(sorted(new))
    assert len(cached) <= MAX_FUNCTIONS_CACHED, "\n".join(sorted(cached))
