"""API keys: which keys are accepted, and what they isolate."""

from pathlib import Path

import pytest

from tests.conftest import Serve
from tests.generator_service.test_generate import SMALL

pytestmark = pytest.mark.anyio

KEYS = ("sk-Alice-0001", "sk-Alice-0002", "sk-bob")
NEAR_MISSES = (
    "sk-",
    "sk-Alice-",
    "sk-Alice-0003",
    "sk-alice-0001",
    "SK-BOB",
    "sk-bo",
    "sk-bob2",
    "sk-bob sk-bob",
    "0001",
    "*",
)


def bearer(key: str) -> dict[str, str]:
    """The header that carries a key."""
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize("service", ["encoder", "generator"])
async def test_only_a_whole_key_is_accepted(
    service: str, serve_encoder: Serve, serve_generator: Serve, tmp_path: Path
) -> None:
    """Each key of the file is accepted; one that differs in case, length or any character is refused with 401."""
    (tmp_path / "keys").write_text("\n".join(KEYS), encoding="utf-8")
    serve, path = (serve_encoder, "/info") if service == "encoder" else (serve_generator, "/modes")
    async with serve(keys_file=tmp_path / "keys") as http:
        accepted = {key: await http.get(path, headers=bearer(key)) for key in KEYS}
        refused = {key: await http.get(path, headers=bearer(key)) for key in NEAR_MISSES}
        other_scheme = await http.get(path, headers={"Authorization": f"Basic {KEYS[0]}"})
    assert {key: response.status_code for key, response in accepted.items()} == dict.fromkeys(KEYS, 200)
    assert {key: response.status_code for key, response in refused.items()} == dict.fromkeys(NEAR_MISSES, 401)
    assert other_scheme.status_code == 401


async def test_an_idempotency_key_belongs_to_its_api_key(serve_generator: Serve, tmp_path: Path) -> None:
    """Two API keys with the same ``Idempotency-Key`` get a job each, and cannot see each other's."""
    (tmp_path / "keys").write_text("\n".join(KEYS), encoding="utf-8")
    same = {"Idempotency-Key": "request-1"}
    async with serve_generator(keys_file=tmp_path / "keys") as http:
        first = await http.post("/jobs", json=SMALL, headers=bearer(KEYS[0]) | same)
        second = await http.post("/jobs", json=SMALL | {"seed": 8}, headers=bearer(KEYS[1]) | same)
        again = await http.post("/jobs", json=SMALL, headers=bearer(KEYS[0]) | same)
    assert [response.status_code for response in (first, second, again)] == [202] * 3
    assert first.json()["id"] == again.json()["id"] != second.json()["id"]
