"""An encoder of another model or revision: its embeddings are neither used nor kept."""

from collections.abc import Mapping

import httpx
import pytest
import torch

from flux2_shared.embedding import ModelVersion
from flux2_shared.schemas import EncoderInfo
from flux2_shared.wire import dump_torch
from generator_service.clients.breaker import FAILURES_TO_OPEN
from generator_service.clients.readiness import SHARED_S
from tests.conftest import Serve
from tests.control import Clock
from tests.generator_service.test_generate import SMALL

pytestmark = pytest.mark.anyio

OWN = ModelVersion("weights", "local")
INFO = EncoderInfo(
    model=OWN.name,
    revision=OWN.revision,
    hidden_layers=(1, 2, 3),
    hidden_size=128,
    max_sequence_length=32,
    dtype="float32",
    version="1",
)


class Encoder:
    """A text encoder whose version changes; ``value`` fills its embeddings."""

    def __init__(self, headers: Mapping[str, str], info: EncoderInfo | None = None, value: float = 0.0) -> None:
        self.headers = dict(headers)
        self.info = info
        self.value = value
        self.num_prompts = 0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/info":
            return httpx.Response(404) if self.info is None else httpx.Response(200, text=self.info.model_dump_json())
        self.num_prompts += 1
        content = dump_torch(torch.full((1, 32, 384), self.value))
        return httpx.Response(200, content=content, headers=self.headers)


OTHERS = [
    ModelVersion("weights", "r2").headers(),
    ModelVersion("other", "local").headers(),
    ModelVersion("Weights", "local").headers(),
    {"x-model": "other"},
    {"x-model-revision": ""},
    {"x-model": "%FF%00", "x-model-revision": "local"},
    {"x-model": "weights, weights", "x-model-revision": "local"},
]


@pytest.mark.parametrize("headers", OTHERS)
async def test_an_embedding_of_another_model_is_refused(serve_generator: Serve, headers: dict[str, str]) -> None:
    """It is 503 ``encoder_mismatch`` after one request, is not cached, and does not open the circuit."""
    right = Encoder(OWN.headers(), value=0.0)
    wrong = Encoder(headers, value=1.0)
    encoder = right

    def current(request: httpx.Request) -> httpx.Response:
        return encoder(request)

    async with serve_generator(httpx.MockTransport(current)) as http:
        cached = await http.post("/generate", json=SMALL)
        encoder = wrong
        new = SMALL | {"prompt": "another prompt"}
        refused = [await http.post("/generate", json=new) for _ in range(FAILURES_TO_OPEN + 1)]
        still_cached = await http.post("/generate", json=SMALL)
        encoder = right
        image = await http.post("/generate", json=new)
    assert {(r.status_code, r.json()["code"]) for r in refused} == {(503, "encoder_mismatch")}
    assert int(refused[0].headers["retry-after"]) > 1
    assert "weights" not in refused[0].text
    assert wrong.num_prompts == len(refused)
    assert cached.status_code == still_cached.status_code == image.status_code == 200
    assert image.content != cached.content  # only the prompt in the file differs; the embedding is the right one
    assert right.num_prompts == 2


@pytest.mark.parametrize(
    "headers", [OWN.headers(), {"x-model": "weights"}, {"x-model-revision": "loc%61l"}, {}], ids=str
)
async def test_the_own_model_and_unnamed_ones_are_accepted(serve_generator: Serve, headers: dict[str, str]) -> None:
    """The public encoder names nothing; what is named must be equal after decoding."""
    async with serve_generator(httpx.MockTransport(Encoder(headers))) as http:
        assert (await http.post("/generate", json=SMALL)).status_code == 200


async def test_info_speaks_for_unnamed_embeddings(serve_generator: Serve, clock: Clock) -> None:
    """An encoder whose embeddings name no model is believed until a probe shows that it serves another one."""
    encoder = Encoder({}, INFO.model_copy(update={"revision": "r2"}))
    prompts = iter(range(100))

    async def status(http: httpx.AsyncClient) -> int:
        response = await http.post("/generate", json=SMALL | {"prompt": f"prompt {next(prompts)}"})
        return response.status_code

    async with serve_generator(httpx.MockTransport(encoder)) as http:
        assert await status(http) == 200
        assert (await http.get("/health/ready")).status_code == 503
        assert await status(http) == 503
        encoder.headers = OWN.headers()  # the embedding's own words count more
        assert await status(http) == 200
        encoder.headers = {}
        for info in (INFO, None):
            encoder.info = INFO.model_copy(update={"model": "other"})
            clock.advance(SHARED_S)
            await http.get("/health/ready")
            assert await status(http) == 503
            encoder.info = info
            clock.advance(SHARED_S)
            assert (await http.get("/health/ready")).status_code == 200
            assert await status(http) == 200


@pytest.mark.parametrize("name", ["black-forest-labs/FLUX.2-dev", "modèle d'été", "100 %", "モデル", "a\nb: c", ""])
def test_every_name_survives_the_headers(name: str) -> None:
    """Names are percent-encoded UTF-8; those of the hub stay readable."""
    version = ModelVersion(name, "main")
    headers = version.headers()
    assert all(value.isascii() and value.isprintable() for value in headers.values())
    assert version.mismatches(httpx.Headers(headers)) is False
    assert ModelVersion(name + "x", "main").mismatches(httpx.Headers(headers)) is True
    if name.startswith("black"):
        assert headers == {"x-model": name, "x-model-revision": "main"}
