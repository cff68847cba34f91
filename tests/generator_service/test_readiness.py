"""The readiness check: many probes, and an encoder that comes and goes."""

import asyncio
from dataclasses import dataclass, field

import httpx
import pytest

from demo_model.services import WEIGHTS
from flux2_shared.errors import Flux2Error
from flux2_shared.schemas import EncoderInfo
from flux2_shared.web.health import READY, Readiness
from generator_service.app import create_app
from generator_service.clients.readiness import SHARED_S, EncoderCheck
from generator_service.errors import EncoderTimeout, EncoderUnavailable
from generator_service.pipelines.model_info import ModelInfo
from generator_service.settings import GeneratorSettings
from tests.conftest import Serve, served
from tests.control import Clock, until
from tests.generator_service.test_generate import SMALL

pytestmark = pytest.mark.anyio

INFO = ModelInfo("model", "1", "transformer 0", "float32", "none", 6, 64, 16)
ENCODER_INFO = EncoderInfo(
    model="model",
    revision="1",
    hidden_layers=(1, 2),
    hidden_size=3,
    max_sequence_length=4,
    dtype="float32",
    version="1",
)
GRACE_S = 60.0
NUM_PROBES = 2000


@dataclass
class FakeEncoder:
    """Answers ``info`` with the next of ``answers``, the last one again and again, once the test lets it."""

    answers: list[EncoderInfo | Flux2Error | None] = field(default_factory=lambda: [ENCODER_INFO])
    last_answer: float | None = None
    num_calls: int = 0
    may_answer: asyncio.Event = field(default_factory=asyncio.Event)

    async def info(self) -> EncoderInfo | None:
        self.num_calls += 1
        await self.may_answer.wait()
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Flux2Error):
            raise answer
        self.last_answer = asyncio.get_running_loop().time()
        return answer


def check_of(encoder: FakeEncoder) -> EncoderCheck:
    """The readiness check of a generator with that encoder."""
    return EncoderCheck(encoder, INFO, (4, 6), GRACE_S)


@pytest.mark.parametrize("answer", [ENCODER_INFO, None, EncoderTimeout("slow")])
async def test_simultaneous_probes_share_an_answer(clock: Clock, answer: EncoderInfo | Flux2Error | None) -> None:
    """Probes that arrive while the encoder is asked, or within a second, get its answer or its error."""
    encoder = FakeEncoder([answer])
    check = check_of(encoder)
    probes = [asyncio.create_task(check()) for _ in range(NUM_PROBES)]
    await until(lambda: encoder.num_calls > 0)
    encoder.may_answer.set()
    expected = Readiness(is_ready=False, reason="slow") if isinstance(answer, Flux2Error) else READY
    assert await asyncio.gather(*probes) == [expected] * NUM_PROBES
    assert await check() == expected
    assert encoder.num_calls == 1
    clock.advance(SHARED_S)
    await check()
    assert encoder.num_calls == 2


async def test_a_probe_that_leaves_does_not_take_the_answer_along() -> None:
    """The client that caused the request leaves; the others get the answer."""
    encoder = FakeEncoder()
    check = check_of(encoder)
    first, second = (asyncio.create_task(check()) for _ in range(2))
    await until(lambda: encoder.num_calls > 0)
    first.cancel()
    await asyncio.sleep(0)
    encoder.may_answer.set()
    assert await second == READY
    assert first.cancelled()
    assert encoder.num_calls == 1


async def test_closing_ends_the_request() -> None:
    """A check that is closed leaves no task behind."""
    encoder = FakeEncoder()
    check = check_of(encoder)
    await check.aclose()
    probe = asyncio.create_task(check())
    await until(lambda: encoder.num_calls > 0)
    await check.aclose()
    await asyncio.gather(probe, return_exceptions=True)
    assert probe.cancelled()


async def test_a_generator_stays_ready_while_its_encoder_restarts(clock: Clock) -> None:
    """Without its encoder it is ready with a reason for the time of grace, and not ready afterwards."""
    encoder = FakeEncoder([ENCODER_INFO, EncoderUnavailable("gone"), EncoderUnavailable("gone"), ENCODER_INFO])
    encoder.may_answer.set()
    check = check_of(encoder)
    outcomes = []
    for _ in range(4):
        outcomes.append(await check())
        clock.advance(GRACE_S / 2 + SHARED_S)
    assert outcomes == [READY, Readiness(reason="gone"), Readiness(is_ready=False, reason="gone"), READY]


async def test_a_generator_that_never_reached_its_encoder_is_not_ready() -> None:
    """The time of grace begins with an answer."""
    encoder = FakeEncoder([EncoderUnavailable("gone")])
    encoder.may_answer.set()
    assert await check_of(encoder)() == Readiness(is_ready=False, reason="gone")


@pytest.mark.parametrize("change", [{"model": "other"}, {"revision": "2"}, {"hidden_size": 5}])
async def test_another_model_is_not_ready_at_once(clock: Clock, change: dict[str, object]) -> None:
    """There is no grace for an encoder of another model, revision or shape."""
    encoder = FakeEncoder([ENCODER_INFO, ENCODER_INFO.model_copy(update=change)])
    encoder.may_answer.set()
    check = check_of(encoder)
    assert await check() == READY
    clock.advance(SHARED_S)
    assert not (await check()).is_ready


async def test_the_degraded_state_is_in_the_body(serve_generator: Serve, clock: Clock) -> None:
    """While the encoder is away ``/health/ready`` is 200 with the reason, for the time of grace that is set."""
    is_down = False

    def encoder(_request: httpx.Request) -> httpx.Response:
        if is_down:
            raise httpx.ConnectError("refused")
        return httpx.Response(404)

    async with serve_generator(httpx.MockTransport(encoder), encoder_grace_s=GRACE_S) as http:
        ready = await http.get("/health/ready")
        is_down = True
        clock.advance(SHARED_S)
        degraded = await http.get("/health/ready")
        clock.advance(GRACE_S)
        late = await http.get("/health/ready")
    reason = "the text encoder cannot be reached"
    assert ready.json() == {"status": "ready"}
    assert (degraded.status_code, degraded.json()) == (200, {"status": "ready", "degraded": reason})
    assert (late.status_code, late.json()) == (503, {"status": "not ready", "reason": reason})


async def num_infos(http: httpx.AsyncClient) -> float:
    """How often the encoder was asked for ``/info``."""
    lines = (await http.get("/metrics")).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if "requests_total{" in line and 'route="/info"' in line)


async def test_a_flood_of_probes_leaves_the_encoder_reachable(encoder_url: str) -> None:
    """2 000 probes at once ask the encoder a handful of times, half of them leave, and a new prompt gets its image."""
    settings = GeneratorSettings(model=str(WEIGHTS), text_encoder_url=encoder_url)
    async with served(create_app(settings)) as http, httpx.AsyncClient(base_url=encoder_url) as encoder:
        before = await num_infos(encoder)
        probes = [asyncio.create_task(http.get("/health/ready")) for _ in range(NUM_PROBES)]
        await asyncio.sleep(0)
        for probe in probes[::2]:
            probe.cancel()
        answers = await asyncio.gather(*probes[1::2])
        image = await http.post("/generate", json=SMALL | {"prompt": "a prompt after the flood"})
        assert {answer.status_code for answer in answers} == {200}
        assert image.status_code == 200
        assert await num_infos(encoder) - before <= 10
