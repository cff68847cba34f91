"""Owners of API keys next to each other: their shares of the queue, their turns, and their jobs."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from flux2_shared.errors import Busy
from generator_service.engine.admission import EXTRA_SLOTS
from generator_service.engine.generation import Generation
from generator_service.engine.queue import Queue
from generator_service.settings import GeneratorSettings
from tests.conftest import Serve
from tests.generator_service.test_generate import SMALL
from tests.generator_service.test_queue import RecordedGeneration, request_of
from tests.generator_service.test_queue_http import Device, Encoder, queue_of

pytestmark = pytest.mark.anyio

KEYS = {"alice": {"Authorization": "Bearer alice"}, "bob": {"Authorization": "Bearer bob"}}


class Owners:
    """A queue whose generations are named by their owner and a number."""

    def __init__(self, capacity: int = 9, **options: Any) -> None:
        self.queue = Queue[None](lambda: capacity, **options)
        self.name_of: dict[Generation, str] = {}

    def enter(self, owner: str, *, needs_encoder: bool = False, is_ready: bool = True) -> RecordedGeneration:
        """Admit a generation of ``owner``, with one image that is ready for the device or not."""
        with self.queue.admit(owner, lambda: not needs_encoder) as permit:
            generation = RecordedGeneration(request_of(1.0), on_end=self.queue.leave)
            generation.is_encoding = needs_encoder and not is_ready
            self.queue.enter(generation, permit)
        count = sum(name.rstrip("0123456789") == owner for name in self.name_of.values())
        self.name_of[generation] = f"{owner}{count}"
        if is_ready:
            self.queue.add(generation, generation.request.params, 0)
        return generation

    async def serve_one(self) -> str:
        """Take the next image, and end its generation."""
        (work,) = await self.queue.take()
        self.queue.finish()
        work.generation.complete([])
        return self.name_of[work.generation]

    @property
    def order(self) -> list[str]:
        """The names in the order of their positions."""
        return [self.name_of[each] for each in self.queue.generations]


async def test_owners_take_turns() -> None:
    """An owner's next request waits for at most one of each other owner; those of one owner keep their order."""
    owners = Owners()
    for owner in "aaaa":
        owners.enter(owner)
    assert await owners.serve_one() == "a0"
    for owner in "bcb":
        owners.enter(owner)
    assert owners.order == ["b0", "c0", "a1", "b1", "a2", "a3"]
    assert [await owners.serve_one() for _ in range(6)] == ["b0", "c0", "a1", "b1", "a2", "a3"]


async def test_positions_follow_the_turns() -> None:
    """The reported position of a request rises when another owner's turn comes before it."""
    owners = Owners()
    first = owners.enter("a")
    (work,) = await owners.queue.take()
    second, third = owners.enter("a"), owners.enter("a")
    assert [owners.queue.position(each).position for each in (second, third)] == [1, 2]
    other = owners.enter("b")
    assert [owners.queue.position(each).position for each in (other, second, third)] == [1, 2, 3]
    assert (work.generation, third.positions[-1].position) == (first, 3)


async def test_one_owner_is_served_in_the_order_of_admission() -> None:
    """Without keys there is one owner, and the queue is first come, first served."""
    owners = Owners()
    for _ in range(5):
        owners.enter("")
    assert [await owners.serve_one() for _ in range(5)] == ["0", "1", "2", "3", "4"]


async def test_refused_requests_do_not_cost_a_turn() -> None:
    """A request that was admitted and then refused does not delay the owner's next one."""
    owners = Owners()
    owners.enter("a")
    await owners.queue.take()
    for _ in range(10):
        with owners.queue.admit("a"):
            pass
    owners.enter("a")
    owners.enter("b")
    owners.enter("b")
    assert owners.order == ["a0", "b0", "a1", "b1"]


async def test_an_idle_owner_saves_no_turns() -> None:
    """An owner that has waited for long does not come before all requests of the others."""
    owners = Owners()
    for _ in range(5):
        owners.enter("a")
        assert (await owners.serve_one())[0] == "a"
    for owner in "aabb":
        owners.enter(owner)
    assert [(await owners.serve_one())[0] for _ in range(4)] == ["b", "a", "b", "a"]


async def test_an_owner_has_a_share_of_the_queue() -> None:
    """Above its share an owner is refused, while the others are admitted."""
    owners = Owners(9, share=0.5)
    for _ in range(5):
        owners.enter("a")
    with pytest.raises(Busy, match="this key has its share of the queue") as caught:
        owners.enter("a")
    assert caught.value.retry_after_s == 5.0  # what waits
    for _ in range(4):
        owners.enter("b")
    with pytest.raises(Busy, match="the queue is full"):
        owners.enter("c")
    await owners.serve_one()
    owners.enter("c")


async def test_cached_prompts_do_not_wait_for_a_silent_encoder() -> None:
    """While all slots wait for the text encoder, a few requests that do not need it are admitted, and no others."""
    owners = Owners(3)
    waiting = [owners.enter("", needs_encoder=True, is_ready=False) for _ in range(3)]
    with pytest.raises(Busy, match="the queue is full"):
        owners.enter("", needs_encoder=True)
    for _ in range(EXTRA_SLOTS):
        owners.enter("")
    with pytest.raises(Busy, match="the queue is full"):
        owners.enter("")
    assert await owners.serve_one() == "3"
    owners.enter("")
    for generation in waiting:
        generation.cancel()
    assert owners.queue.num_in_flight == EXTRA_SLOTS


async def test_generations_with_a_cached_prompt_are_not_held_up() -> None:
    """There are no extra slots for a burst of one prompt, whose first embedding is cached while others still wait."""
    cached: set[str] = set()
    owners = Owners(3, is_cached=cached.__contains__)
    for _ in range(3):
        owners.enter("", needs_encoder=True, is_ready=False)
    cached.add("a prompt")  # of all of them
    with pytest.raises(Busy, match="the queue is full"):
        owners.enter("")


async def test_an_owners_share_has_extra_slots_too() -> None:
    """An owner whose share waits for the text encoder may use its cached prompts, also while the queue has room."""
    owners = Owners(9, share=0.3)
    for _ in range(3):
        owners.enter("a", needs_encoder=True, is_ready=False)
    with pytest.raises(Busy, match="this key has its share of the queue"):
        owners.enter("a", needs_encoder=True)
    for _ in range(EXTRA_SLOTS):
        owners.enter("a")
    with pytest.raises(Busy, match="this key has its share of the queue"):
        owners.enter("a")


async def test_there_are_no_extra_slots_otherwise() -> None:
    """Requests whose prompts are embedded, or that do not need the encoder, fill the queue as before."""
    owners = Owners(3)
    for needs_encoder in (True, False, False):
        owners.enter("", needs_encoder=needs_encoder, is_ready=needs_encoder)
    with pytest.raises(Busy, match="the queue is full"):
        owners.enter("")


@pytest.mark.parametrize(("keys", "share"), [("", 1.0), ("one", 1.0), ("one\none", 1.0), ("one\ntwo", 0.25)])
def test_the_share_applies_to_several_keys(tmp_path: Path, keys: str, share: float) -> None:
    """A service with one key, or without keys, has one owner, which may use the whole queue."""
    (tmp_path / "keys").write_text(keys or "# none", encoding="utf-8")
    settings = GeneratorSettings(keys_file=tmp_path / "keys" if keys else None, key_share=0.25)
    assert settings.queue_share() == share


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    """A file with the keys of ``KEYS``."""
    (tmp_path / "keys").write_text("\n".join(KEYS), encoding="utf-8")
    return tmp_path / "keys"


async def test_another_key_is_served_next(
    serve_generator: Serve, monkeypatch: pytest.MonkeyPatch, keys_file: Path
) -> None:
    """While one key holds its share, another key's request is admitted and starts after the running generation."""
    device = Device(monkeypatch)
    async with serve_generator(keys_file=keys_file) as http:
        jobs = [await http.post("/jobs", json=SMALL | {"seed": 0}, headers=KEYS["alice"])]
        while not device.seeds:  # noqa: ASYNC110 - the device thread has no event to wait for
            await asyncio.sleep(0.001)
        for seed in range(1, 6):
            body = SMALL | {"seed": seed}
            jobs += [await http.post("/jobs", json=body, headers=KEYS["alice"])]
        other = await http.post("/jobs", json=SMALL | {"seed": 100}, headers=KEYS["bob"])
        while any(slot.is_encoding for slot in queue_of(http)._slots.values()):  # noqa: ASYNC110 - there is no event
            await asyncio.sleep(0.001)
        device.may_run.set()
        for job, owner in ((jobs[4], "alice"), (other, "bob")):
            await http.get(f"{job.headers['location']}/events", headers=KEYS[owner])
    assert [job.status_code for job in jobs] == [202] * 5 + [429]
    assert "this key has its share" in jobs[5].json()["detail"]
    assert device.seeds[:2] == [0, 100]


async def ended_job(http: httpx.AsyncClient, key: dict[str, str], seed: int, *, is_cancelled: bool = False) -> str:
    """Start a job, wait until it has ended, and return its address."""
    url: str = (await http.post("/jobs", json=SMALL | {"seed": seed}, headers=key)).headers["location"]
    if is_cancelled:
        await http.delete(url, headers=key)
    await http.get(f"{url}/events", headers=key)
    return url


async def test_the_jobs_of_one_key_do_not_displace_those_of_another(serve_generator: Serve, keys_file: Path) -> None:
    """However many jobs a key starts, completed or cancelled, another key's results and idempotency keys are kept."""
    async with serve_generator(keys_file=keys_file, max_jobs=3) as http:
        again = KEYS["bob"] | {"Idempotency-Key": "mine"}
        first = await http.post("/jobs", json=SMALL, headers=again)
        url = first.headers["location"]
        await http.get(f"{url}/events", headers=KEYS["bob"])
        jobs = [await ended_job(http, KEYS["alice"], seed, is_cancelled=seed % 2 == 1) for seed in range(10)]
        result = await http.get(f"{url}/result", headers=KEYS["bob"])
        repeated = await http.post("/jobs", json=SMALL, headers=again)
        kept = [(await http.get(job, headers=KEYS["alice"])).status_code for job in jobs]
    assert result.status_code == 200
    assert repeated.json()["id"] == first.json()["id"]
    assert kept == [404] * 4 + [200, 404] * 3


async def test_cancelled_jobs_do_not_displace_results(serve_generator: Serve) -> None:
    """Of one owner's ended jobs those without results are dropped first."""
    async with serve_generator(max_jobs=2) as http:
        done = await ended_job(http, {}, 1)
        cancelled = [await ended_job(http, {}, seed, is_cancelled=True) for seed in range(5)]
        assert (await http.get(f"{done}/result")).status_code == 200
        assert [(await http.get(job)).status_code for job in cancelled] == [404] * 4 + [200]


async def test_the_largest_owner_loses_results_first(serve_generator: Serve, keys_file: Path) -> None:
    """The bytes of all results are bounded by dropping the oldest of the owner with the most."""
    async with serve_generator(keys_file=keys_file) as http:
        size = len((await http.post("/generate", json=SMALL, headers=KEYS["bob"])).content)
    async with serve_generator(keys_file=keys_file, max_job_bytes=int(3.9 * size)) as http:
        own = await ended_job(http, KEYS["bob"], SMALL["seed"])
        jobs = [await ended_job(http, KEYS["alice"], SMALL["seed"]) for _ in range(5)]
        assert (await http.get(f"{own}/result", headers=KEYS["bob"])).status_code == 200
        kept = [(await http.get(job, headers=KEYS["alice"])).status_code for job in jobs]
    assert kept == [404, 404, 404, 200, 200]


async def test_a_cached_prompt_is_generated_while_others_wait(serve_generator: Serve) -> None:
    """With every slot waiting for a silent text encoder, a cached prompt is generated at once."""
    encoder = Encoder()
    async with serve_generator(encoder, max_waiting=2) as http:
        assert (await http.post("/generate", json=SMALL)).status_code == 200
        waiting = [asyncio.create_task(http.post("/generate", json=SMALL | {"prompt": f"slow {k}"})) for k in range(3)]
        while sum(each.is_encoding for each in queue_of(http).generations) < 3:  # noqa: ASYNC110 - there is no event
            await asyncio.sleep(0.001)
        cached = await http.post("/generate", json=SMALL)
        refused = await http.post("/generate", json=SMALL | {"prompt": "slow too"})
        encoder.may_embed.set()
        others = await asyncio.gather(*waiting)
    assert (cached.status_code, refused.status_code) == (200, 429)
    assert [response.status_code for response in others] == [200] * 3


@pytest.mark.parametrize(
    ("body", "is_allowed"),
    [
        ({"num_inference_steps": 50}, True),
        ({"num_inference_steps": 51}, False),
        ({"num_inference_steps": 25, "num_images": 2}, True),
        ({"num_inference_steps": 26, "num_images": 2}, False),
        ({"num_inference_steps": 26, "compare": True, "cache": 5}, False),
        ({"num_inference_steps": 13, "compare": True, "num_images": 2, "cache": 5}, False),
        ({"num_inference_steps": 12, "width": 128, "cache": 5}, True),
        ({"num_inference_steps": 50, "width": 128}, False),
    ],
)
async def test_the_work_of_one_request_is_bounded(
    serve_generator: Serve, body: dict[str, Any], is_allowed: bool
) -> None:
    """Steps times tokens times images of a request have a limit, and the error names the factors."""
    async with serve_generator(max_token_steps=50 * 16) as http:
        response = await http.post("/generate", json=SMALL | {"cache": "none"} | body)
    assert response.status_code == (200 if is_allowed else 422)
    if not is_allowed:
        assert response.json()["error"]["param"] == "num_inference_steps"
        assert "token steps, more than 800; ask for fewer images" in response.json()["detail"]
