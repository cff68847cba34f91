"""The client of the text encoder: how it handles good and bad responses."""

import asyncio
import gzip
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from functools import partial

import httpx
import pytest
import stamina
import torch
from pydantic import SecretStr

from flux2_shared.errors import Flux2Error, InvalidRequest, OutOfMemory
from flux2_shared.schemas import EncoderInfo
from flux2_shared.wire import SAFETENSORS_MEDIA_TYPE, TORCH_MEDIA_TYPE, dump_safetensors, dump_torch
from generator_service.clients.breaker import FAILURES_TO_OPEN
from generator_service.clients.retrying import RetryingEncoder
from generator_service.clients.text_encoder import TextEncoderClient
from generator_service.errors import BadEncoderResponse, EncoderTimeout, EncoderUnavailable

pytestmark = pytest.mark.anyio

EMBEDDING = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(0))
INFO = EncoderInfo(
    model="m", revision="r", hidden_layers=(1, 2), hidden_size=3, max_sequence_length=4, dtype="float32", version="1"
)
NUM_ATTEMPTS = 4
Reply = Callable[[], httpx.Response | Exception]


@pytest.fixture(autouse=True)
def no_waiting() -> Iterator[None]:
    """Retry without waiting, as often as the client allows."""
    with stamina.set_testing(True, attempts=100, cap=True):
        yield


class Encoder:
    """Returns the next reply for each request, repeats the last one, and records the requests."""

    def __init__(self, *replies: Reply) -> None:
        self.replies = list(replies)
        self.requests: list[httpx.Request] = []

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        reply = (self.replies.pop(0) if len(self.replies) > 1 else self.replies[0])()
        if isinstance(reply, Exception):
            raise reply
        return reply


@asynccontextmanager
async def client(
    encoder: Callable[[httpx.Request], Coroutine[None, None, httpx.Response]],
    *,
    url: str = "http://encoder",
    token: str | None = None,
    cache: int = 0,
    timeout_s: float = 5,
) -> AsyncIterator[RetryingEncoder]:
    """A client of ``encoder`` for embeddings with the shape of ``EMBEDDING``."""
    async with TextEncoderClient(
        url,
        (4, 6),
        token=SecretStr(token) if token else None,
        timeout_s=timeout_s,
        transport=httpx.MockTransport(encoder),
    ) as http:
        yield RetryingEncoder(http, timeout_s=timeout_s, cache_bytes=cache)


def body(content: bytes, media_type: str = TORCH_MEDIA_TYPE) -> Reply:
    """A reply in the form of an embedding."""
    return lambda: httpx.Response(200, content=content, headers={"content-type": media_type})


def status(code: int) -> Reply:
    """A reply with a status and a secret body."""
    return lambda: httpx.Response(code, headers={"location": "http://elsewhere/secret"}, text="secret")


def refused() -> Exception:
    return httpx.ConnectError("secret")


good = body(dump_torch(EMBEDDING))


@pytest.mark.parametrize("url", ["http://encoder", "http://encoder/", "http://encoder/predict", "http://encoder/x/"])
async def test_the_embedding_arrives(url: str) -> None:
    """The prompt is sent in the public protocol, with or without /predict in the setting."""
    encoder = Encoder(good)
    async with client(encoder, url=url) as sut:
        embedding, was_cached = await sut.embed("a „house“")
    [request] = encoder.requests
    assert torch.equal(embedding.tensor, EMBEDDING)
    assert not was_cached
    assert (request.method, request.url.path) == ("POST", "/x/predict" if "/x" in url else "/predict")
    assert request.content == '{"prompt":"a „house“"}'.encode()
    assert "authorization" not in request.headers


async def test_safetensors_are_preferred() -> None:
    """Both formats are accepted, uncompressed; the media type of the response decides how it is read."""
    encoder = Encoder(body(dump_safetensors(EMBEDDING), SAFETENSORS_MEDIA_TYPE))
    async with client(encoder) as sut:
        assert torch.equal((await sut.embed("a"))[0].tensor, EMBEDDING)
    request_headers = encoder.requests[0].headers
    assert request_headers["accept"] == "application/vnd.safetensors, application/octet-stream;q=0.9"
    assert request_headers["accept-encoding"] == "identity"


def problem(code: str) -> Reply:
    """A 503 of this project's encoder."""
    return lambda: httpx.Response(503, json={"code": code, "detail": "secret", "status": 503})


async def test_out_of_memory_in_the_encoder_is_not_retried() -> None:
    """It reaches the client as ``oom`` after one request, and does not count as a failure of the encoder."""
    encoder = Encoder(problem("oom"))
    async with client(encoder) as sut:
        for _ in range(2 * FAILURES_TO_OPEN):
            with pytest.raises(OutOfMemory) as caught:
                await sut.embed("a")
    assert len(encoder.requests) == 2 * FAILURES_TO_OPEN
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "reply", [problem("starting"), problem("busy"), status(503), lambda: httpx.Response(503, json=1)]
)
async def test_any_other_503_is_retried(reply: Reply) -> None:
    """Whatever its body, a 503 may be temporary."""
    encoder = Encoder(reply)
    async with client(encoder) as sut:
        with pytest.raises(EncoderUnavailable):
            await sut.embed("a")
    assert len(encoder.requests) == NUM_ATTEMPTS


async def test_the_token_is_sent() -> None:
    """A configured token is sent as a bearer token."""
    encoder = Encoder(good)
    async with client(encoder, token="t") as sut:
        await sut.embed("a")
    assert encoder.requests[0].headers["authorization"] == "Bearer t"


async def test_a_repeated_prompt_is_cached() -> None:
    """Embeddings are cached within the limit of bytes."""
    encoder = Encoder(good)
    async with client(encoder, cache=EMBEDDING.nbytes) as sut:
        results = [await sut.embed(prompt) for prompt in ("a", "a", "b", "a")]
    assert [was_cached for _, was_cached in results] == [False, True, False, False]
    assert all(torch.equal(embedding.tensor, EMBEDDING) for embedding, _ in results)
    assert len(encoder.requests) == 3


@pytest.mark.parametrize(
    ("header", "is_truncated"), [(None, False), ("", False), ("0", True), (" 0 ", True), ("10", False), ("x", False)]
)
async def test_a_truncated_prompt_is_remembered(header: str | None, is_truncated: bool) -> None:
    """The encoder's header says whether the prompt was truncated; the cache keeps that."""
    headers = {"content-type": TORCH_MEDIA_TYPE} | ({} if header is None else {"x-truncated-prompts": header})
    encoder = Encoder(lambda: httpx.Response(200, content=dump_torch(EMBEDDING), headers=headers))
    async with client(encoder, cache=2**20) as sut:
        results = [await sut.embed("a") for _ in range(2)]
    assert [(each.is_truncated, was_cached) for each, was_cached in results] == [
        (is_truncated, False),
        (is_truncated, True),
    ]


async def test_similar_prompts_are_different_prompts() -> None:
    """The cache key is the exact prompt: case, spaces and accents matter."""
    prompts = ["a Red circle", "a red circle", " a red circle", "a  red circle", "a réd circle", "a re\u0301d circle"]
    encoder = Encoder(*(body(dump_torch(EMBEDDING + k)) for k in range(len(prompts))))
    async with client(encoder, cache=2**20) as sut:
        first = [await sut.embed(prompt) for prompt in prompts]
        again = [await sut.embed(prompt) for prompt in prompts]
    assert [was_cached for _, was_cached in first] == [False] * len(prompts)
    assert all(was_cached and torch.equal(each.tensor, EMBEDDING + k) for k, (each, was_cached) in enumerate(again))


async def test_failures_are_not_cached() -> None:
    """A prompt that failed is requested again when it is repeated."""
    encoder = Encoder(status(422), good)
    async with client(encoder, cache=2**20) as sut:
        with pytest.raises(InvalidRequest):
            await sut.embed("a")
        assert not (await sut.embed("a"))[1]


@pytest.mark.parametrize("failure", [refused, *map(status, (429, 502, 503, 504))])
async def test_temporary_failures_are_retried(failure: Reply) -> None:
    """A refused connection and an overloaded encoder are retried until the encoder responds."""
    encoder = Encoder(*[failure] * (NUM_ATTEMPTS - 1), good)
    async with client(encoder) as sut:
        assert torch.equal((await sut.embed("a"))[0].tensor, EMBEDDING)
    assert len(encoder.requests) == NUM_ATTEMPTS


@pytest.mark.parametrize("failure", [refused, status(503)])
async def test_lasting_failures_are_503(failure: Reply) -> None:
    """After the last attempt the error has a time to retry after."""
    encoder = Encoder(failure)
    async with client(encoder) as sut:
        with pytest.raises(EncoderUnavailable) as caught:
            await sut.embed("a")
    assert (caught.value.status, len(encoder.requests)) == (503, NUM_ATTEMPTS)
    assert caught.value.retry_after_s is not None


async def test_the_attempts_take_about_a_second() -> None:
    """The waits between attempts grow and take less than 2 s in total."""
    waits: list[float] = []
    encoder = Encoder(refused)
    stamina.instrumentation.set_on_retry_hooks([lambda details: waits.append(details.wait_for)])
    try:
        with stamina.set_testing(False):
            async with client(encoder, timeout_s=60) as sut:
                with pytest.raises(EncoderUnavailable):
                    await sut.embed("a")
    finally:
        stamina.instrumentation.set_on_retry_hooks(None)
    assert len(encoder.requests) == NUM_ATTEMPTS
    assert len(waits) == NUM_ATTEMPTS - 1
    assert 0 < sum(waits) < 2
    assert waits[-1] > waits[0]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no tensor",
        dump_torch(EMBEDDING[:, :3]),
        dump_torch(EMBEDDING * float("nan")),
        dump_torch(EMBEDDING.double()),
        dump_torch(EMBEDDING)[:-10],
        dump_safetensors(EMBEDDING),  # with torch's media type
    ],
)
async def test_bad_embeddings_are_502(content: bytes) -> None:
    """A bad response is requested exactly once more, then refused."""
    encoder = Encoder(body(content))
    async with client(encoder) as sut:
        with pytest.raises(BadEncoderResponse) as caught:
            await sut.embed("a")
    assert (caught.value.status, len(encoder.requests)) == (502, 2)


async def test_one_bad_response_is_retried() -> None:
    """If the second response is valid, the request succeeds."""
    async with client(Encoder(body(b"no tensor"), good)) as sut:
        assert torch.equal((await sut.embed("a"))[0].tensor, EMBEDDING)


@pytest.mark.parametrize("code", [302, 401, 404, 500])
async def test_other_statuses_are_502(code: int) -> None:
    """Any other status is an error of the encoder, and redirects are not followed."""
    encoder = Encoder(status(code))
    async with client(encoder) as sut:
        with pytest.raises(BadEncoderResponse, match=str(code)):
            await sut.embed("a")
    assert {request.url.host for request in encoder.requests} == {"encoder"}


@pytest.mark.parametrize("code", [413, 422])
async def test_a_refused_prompt_is_not_retried(code: int) -> None:
    """The client's prompt is the reason, and it is not retried."""
    encoder = Encoder(status(code))
    async with client(encoder) as sut:
        with pytest.raises(InvalidRequest) as caught:
            await sut.embed("a")
    assert (caught.value.param, len(encoder.requests)) == ("prompt", 1)


async def test_a_long_response_is_refused() -> None:
    """A body is read only up to the length of an embedding, and requested once more."""
    num_chunks = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal num_chunks
        for _ in range(1000):
            num_chunks += 1
            yield b"x" * 1000

    encoder = Encoder(lambda: httpx.Response(200, content=chunks()))
    async with client(encoder) as sut:
        with pytest.raises(BadEncoderResponse, match="too large"):
            await sut.embed("a")
    assert len(encoder.requests) == 2
    assert num_chunks <= 2 * 5  # 4 KiB of header and 96 bytes of embedding, each time


async def test_a_compressed_response_is_refused() -> None:
    """A few bytes could unpack to gigabytes, so a compressed body is refused unread."""
    num_chunks = 0

    async def bomb() -> AsyncIterator[bytes]:
        nonlocal num_chunks
        num_chunks += 1
        yield gzip.compress(dump_torch(EMBEDDING))

    headers = {"content-encoding": "gzip"}
    async with client(Encoder(lambda: httpx.Response(200, content=bomb(), headers=headers))) as sut:
        with pytest.raises(BadEncoderResponse, match="compressed"):
            await sut.embed("a")
    assert num_chunks == 0


async def hang(_request: httpx.Request) -> httpx.Response:
    """Never respond."""
    await asyncio.Event().wait()
    raise AssertionError


async def slow_body(_request: httpx.Request) -> httpx.Response:
    """Respond with a byte at a time."""

    async def body_chunks() -> AsyncIterator[bytes]:
        while True:
            await asyncio.sleep(0.05)
            yield b"x"

    return httpx.Response(200, content=body_chunks())


async def fail_slowly(_request: httpx.Request) -> httpx.Response:
    """Refuse the connection after a while."""
    await asyncio.sleep(0.2)
    raise httpx.ConnectError("refused")


@pytest.mark.parametrize("encoder", [hang, slow_body, fail_slowly])
async def test_there_is_one_time_limit(
    encoder: Callable[[httpx.Request], Coroutine[None, None, httpx.Response]],
) -> None:
    """The limit applies to all attempts together, whatever the encoder does."""
    async with client(encoder, timeout_s=0.3) as sut:
        with pytest.raises(EncoderTimeout, match=r"0\.3 s") as caught:
            await sut.embed("a")
    assert caught.value.status == 504


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (httpx.ConnectError, EncoderUnavailable),
        (httpx.ReadError, EncoderUnavailable),
        (httpx.WriteError, EncoderUnavailable),
        (httpx.CloseError, EncoderUnavailable),
        (httpx.ProxyError, EncoderUnavailable),
        (httpx.UnsupportedProtocol, EncoderUnavailable),
        (httpx.LocalProtocolError, EncoderUnavailable),
        (httpx.RemoteProtocolError, BadEncoderResponse),
        (httpx.ConnectTimeout, EncoderUnavailable),
        (httpx.ReadTimeout, EncoderTimeout),
        (httpx.WriteTimeout, EncoderTimeout),
        (httpx.PoolTimeout, EncoderUnavailable),
    ],
)
async def test_network_failures_are_own_errors(failure: type[httpx.TransportError], error: type[Flux2Error]) -> None:
    """No exception of the HTTP library reaches the caller, from either request."""
    async with client(Encoder(lambda: failure("secret"))) as sut:
        for ask in (partial(sut.embed, "a"), sut.info):
            with pytest.raises(error):
                await ask()


@pytest.mark.parametrize(
    "reply", [refused, body(b"secret"), body(b"secret" * 1000), *map(status, (302, 401, 413, 422, 429, 500, 503))]
)
async def test_errors_do_not_quote_the_response(reply: Reply) -> None:
    """Errors for clients contain nothing from the encoder's response."""
    async with client(Encoder(reply)) as sut:
        for ask in (partial(sut.embed, "a"), sut.info):
            with pytest.raises(Flux2Error) as caught:
                await ask()
            assert "secret" not in str(caught.value)


async def test_info_of_the_encoder() -> None:
    """``/info`` is requested from beside ``/predict``."""
    encoder = Encoder(lambda: httpx.Response(200, text=INFO.model_dump_json()))
    async with client(encoder, url="http://encoder/predict") as sut:
        assert await sut.info() == INFO
    assert (encoder.requests[0].method, encoder.requests[0].url.path) == ("GET", "/info")
    assert INFO.embedding_shape == (4, 6)


@pytest.mark.parametrize("response", [httpx.Response(200, text=INFO.model_dump_json()), httpx.Response(404)])
async def test_a_probe_closes_the_circuit_breaker(response: httpx.Response) -> None:
    """While the encoder is unavailable prompts fail fast; once it answers ``/info`` requests are sent again."""
    encoder = Encoder(refused)
    async with client(encoder) as sut:
        for _ in range(FAILURES_TO_OPEN + 1):
            with pytest.raises(EncoderUnavailable):
                await sut.embed("a")
        assert len(encoder.requests) == FAILURES_TO_OPEN * NUM_ATTEMPTS
        encoder.replies = [lambda: response]
        await sut.info()
        encoder.replies = [good]
        assert torch.equal((await sut.embed("a"))[0].tensor, EMBEDDING)


@pytest.mark.parametrize("code", [404, 405])
async def test_an_encoder_without_info(code: int) -> None:
    """The public encoder has no ``/info``, which is not an error."""
    async with client(Encoder(status(code))) as sut:
        assert await sut.info() is None


def info_with(**change: object) -> str:
    """``INFO`` as JSON with other values."""
    return INFO.model_copy(update=change).model_dump_json(warnings=False)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "no JSON",
        "[" * 60_000,
        " " * 70_000 + INFO.model_dump_json(),
        info_with(model="m" * 1000),
        info_with(revision="r" * 60_000),
        info_with(hidden_size=10**4000, hidden_layers=(1,) * 5000),
        info_with(max_sequence_length=-1),
        info_with(model="x").replace('"x"', '"\\ud800"'),
    ],
    ids=lambda text: text[:20],
)
async def test_a_malformed_info_is_502(text: str) -> None:
    """A malformed or unbounded ``/info`` is refused, before it becomes the reason for not being ready."""
    async with client(Encoder(lambda: httpx.Response(200, text=text))) as sut:
        with pytest.raises(BadEncoderResponse):
            await sut.info()
