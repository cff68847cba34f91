"""Fixtures of the whole suite: two models on disk, loaded once, and the services with them in this process."""

import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from fastapi import FastAPI

from demo_model.services import WEIGHTS
from demo_model.train.__main__ import save
from demo_model.train.autoencoder import make_autoencoder
from demo_model.train.denoiser import make_transformer
from demo_model.train.prompts import make_text_encoder, make_tokenizer
from flux2_shared.model.folder import ModelFolder
from generator_service.app import create_app as create_generator
from generator_service.pipelines.flux2 import Flux2Model
from generator_service.settings import GeneratorSettings
from tests import OUR_PREFIXES
from tests.control import Clock, ModelControl
from text_encoder_service.app import create_app as create_encoder
from text_encoder_service.settings import TextEncoderSettings

CPU = torch.device("cpu")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option for the long forms of ``tests/threats``."""
    parser.addoption("--soak", action="store_true", help="run the long forms of tests/threats: hours, not minutes")


@pytest.fixture
def times(request: pytest.FixtureRequest) -> "Times":
    """How often to repeat something: ``times(few, many)`` is ``many`` with ``--soak``."""
    is_long = bool(request.config.getoption("--soak"))
    return lambda few, many: many if is_long else few


@pytest.fixture
def anyio_backend() -> str:
    """Asynchronous tests run on asyncio, as the services do."""
    return "asyncio"


@pytest.fixture(scope="session", autouse=True)
def empty_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Services that outlive a test start in an empty folder, so that they read no ``.env`` file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("empty"))
        yield


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hide settings of longer-lived fixtures and ``.env`` files from tests."""
    for name in list(os.environ):
        if name.startswith(OUR_PREFIXES):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def clock() -> Clock:
    """The clocks of this process, which a test can move forward."""
    return Clock()


@pytest.fixture
def model_control(monkeypatch: pytest.MonkeyPatch) -> ModelControl:
    """Hooks into the models that this test serves."""
    return ModelControl(monkeypatch)


@pytest.fixture(scope="session")
def random_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with the demo's architecture and random weights."""
    folder = tmp_path_factory.mktemp("model") / "random"
    torch.manual_seed(1)
    tokenizer = make_tokenizer(0)
    save(folder, make_autoencoder(), make_transformer(), make_text_encoder(tokenizer), tokenizer)
    return folder


@pytest.fixture(scope="session", params=["demo", "random"])
def weights(request: pytest.FixtureRequest, random_weights: Path) -> Path:
    """The demo model, then the random one."""
    return WEIGHTS if request.param == "demo" else random_weights


def local_model(folder: Path) -> Flux2Model:
    """The generator's components of the model in ``folder``, on the CPU in float32."""
    return Flux2Model.load(ModelFolder(folder.name, "local", folder), CPU, torch.float32)


@pytest.fixture(scope="session")
def model(weights: Path) -> Flux2Model:
    """The loaded model of ``weights``."""
    return local_model(weights)


@pytest.fixture(scope="session")
def demo() -> Flux2Model:
    """The loaded demo model."""
    return local_model(WEIGHTS)


@asynccontextmanager
async def served(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an app whose lifespan runs until the block ends."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        yield http


Times = Callable[[int, int], int]
Serve = Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]


@pytest.fixture
def serve_encoder() -> Serve:
    """Serves the text encoder with the demo model and the given settings."""

    def serve(**settings: Any) -> AbstractAsyncContextManager[httpx.AsyncClient]:
        return served(create_encoder(TextEncoderSettings(model=str(WEIGHTS), **settings)))

    return serve


@pytest.fixture
def serve_generator() -> Serve:
    """Serves the generator with the demo model and the given settings, connected to an encoder in this process."""

    @asynccontextmanager
    async def serve(
        transport: httpx.AsyncBaseTransport | None = None, **settings: Any
    ) -> AsyncIterator[httpx.AsyncClient]:
        encoder = create_encoder(TextEncoderSettings(model=str(WEIGHTS)))
        generator_settings = GeneratorSettings(model=str(WEIGHTS), **settings)
        async with encoder.router.lifespan_context(encoder):
            joined = transport or httpx.ASGITransport(encoder)
            async with served(create_generator(generator_settings, joined)) as http:
                yield http

    return serve


@contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """The address of an app that uvicorn serves."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.05)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="session")
def encoder_url() -> Iterator[str]:
    """The address of a text encoder, behind a real socket."""
    with listening(create_encoder(TextEncoderSettings(model=str(WEIGHTS)))) as url:
        yield url


@pytest.fixture(scope="session")
def generator_url(encoder_url: str) -> Iterator[str]:
    """The address of a generator with its encoder, behind a real socket."""
    with listening(create_generator(GeneratorSettings(model=str(WEIGHTS), text_encoder_url=encoder_url))) as url:
        yield url
