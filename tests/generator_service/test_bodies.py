"""Bodies of the wrong kind: each error says what is wrong, what would be right, and names the client's own field."""

import json
from typing import Any

import pytest

from tests.conftest import Serve
from tests.generator_service.test_generate import SMALL

pytestmark = pytest.mark.anyio

JSON_ROUTES = ("/generate", "/jobs", "/v1/images/generations")
BLANK = ("", " ", "\n\t", "\u00a0\u2003", "\u200b", "\ufeff", "\x00\x1f", "\u2028")


def form(name: str, value: str) -> bytes:
    """A multipart body with one field and the boundary x."""
    return f'--x\r\ncontent-disposition: form-data; name="{name}"\r\n\r\n{value}\r\n--x--'.encode()


@pytest.mark.parametrize("route", JSON_ROUTES)
@pytest.mark.parametrize(
    ("content_type", "body", "status", "message"),
    [
        (None, b'{"prompt": "a"}', 415, "content-type: is missing; send JSON with the content type application/json"),
        (
            "text/plain",
            b'{"prompt": "a"}',
            415,
            "content-type: must not be text/plain; send JSON with the content type application/json",
        ),
        ("application/x-www-form-urlencoded", b"prompt=a", 415, "send JSON"),
        ("multipart/form-data; boundary=x", b"--x--", 415, "send JSON"),
        ("application/json", b"", 400, "the body is empty: send JSON"),
        (None, b"", 400, "the body is empty: send JSON"),
        ("application/json", b"{", 400, "the body is not valid JSON"),
        ("application/json", b"\xff", 400, "the body is not valid JSON"),
    ],
)
async def test_bodies_that_are_not_json(
    serve_generator: Serve, route: str, content_type: str | None, body: bytes, status: int, message: str
) -> None:
    """A missing or other content type, an empty body and invalid JSON are told apart."""
    headers = {} if content_type is None else {"content-type": content_type}
    async with serve_generator() as http:
        response = await http.post(route, content=body, headers=headers)
    assert response.status_code == status
    assert message in response.json()["detail"]


@pytest.mark.parametrize("content_type", ["application/json", "Application/JSON; charset=utf-8", "application/a+json"])
async def test_json_content_types(serve_generator: Serve, content_type: str) -> None:
    """Any spelling of JSON's content type is read."""
    async with serve_generator() as http:
        body = json.dumps(SMALL).encode()
        response = await http.post("/generate", content=body, headers={"content-type": content_type})
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("content_type", "body", "status", "message"),
    [
        ("application/json", b'{"prompt": "a"}', 415, "must be multipart/form-data with the files as parts `image`"),
        (None, b"", 415, "content-type: must be multipart/form-data"),
        ("multipart/form-data", b"--x--", 400, "the multipart form cannot be read: Missing boundary"),
        ("multipart/form-data; boundary=x", b"garbage", 400, "the multipart form cannot be read"),
        ("multipart/form-data; boundary=x", b"", 422, "prompt: Field required"),
        ("multipart/form-data; boundary=x; charset=punycode", form("a", "a-!!"),
         400, "unknown charset"),
        ("multipart/form-data; boundary=x; charset=undefined", form("a", "b"),
         400, "unknown charset"),
        ("multipart/form-data; boundary=x; charset=unicode_escape",
         form("\\ud800", "b"), 422, "body: Input should be a valid string"),
    ],
)  # fmt: skip
async def test_bodies_that_are_not_forms(
    serve_generator: Serve, content_type: str | None, body: bytes, status: int, message: str
) -> None:
    """JSON where a form is wanted, and forms that cannot be read, say so; none is an internal error."""
    headers = {} if content_type is None else {"content-type": content_type}
    async with serve_generator() as http:
        response = await http.post("/v1/images/edits", content=body, headers=headers)
    assert response.status_code == status, response.text
    assert message in response.json()["detail"]


@pytest.mark.parametrize("prompt", BLANK)
@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("/generate", {"prompt": ...}, "prompt"),
        ("/jobs", {"prompt": ...}, "prompt"),
        ("/v1/images/generations", {"prompt": ...}, "prompt"),
        ("/generate", {"inputs": ...}, "inputs"),
        ("/generate", {"inputs": "aGk=", "parameters": {"prompt": ...}}, "prompt"),
    ],
)
async def test_blank_prompts_are_refused(
    serve_generator: Serve, route: str, body: dict[str, Any], param: str, prompt: str
) -> None:
    """A prompt without anything visible is refused in every API."""
    text = json.dumps(body, default=lambda _: prompt) if ... in body.values() else json.dumps(
        body | {"parameters": {"prompt": prompt}}
    )  # fmt: skip
    async with serve_generator() as http:
        response = await http.post(route, content=text, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["param"]) == (422, param)
    assert "must not be blank" in response.json()["detail"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"inputs": "a", "parameters": {"width": 65}}, "width"),
        ({"inputs": "a", "parameters": {"width": "64"}}, "width"),
        ({"inputs": "a", "parameters": {"colour": 1}}, "colour"),
        ({"inputs": "aGk=", "parameters": {"prompt": "a"}}, "inputs"),
        ({"inputs": "!", "parameters": {"prompt": "a"}}, "inputs"),
        ({"inputs": "x " * 10_001}, "inputs"),
        ({"inputs": "data:image/png;base64,AAAA"}, "prompt"),
        ({"inputs": "iVBORw0KGgo" * 100}, "prompt"),
        ({"inputs": ("A" * 76 + "\r\n") * 3}, "prompt"),
        ({"inputs": "a " * 9000, "parameters": {"target_size": {"width": 65, "height": 64}}}, "target_size"),
    ],
)
async def test_hugging_faces_fields_are_named(serve_generator: Serve, body: dict[str, Any], param: str) -> None:
    """Errors name the field of Hugging Face's API, in the code and in the text."""
    async with serve_generator() as http:
        response = await http.post("/generate", json=body)
    assert response.json()["error"]["param"] == param, response.text
    assert param in response.json()["detail"]


@pytest.mark.parametrize(
    "change",
    [
        {"deadline_ms": 10**400}, {"max_latency_ms": 10**400}, {"width": 10**400}, {"height": -(10**400)},
        {"num_images": 10**400}, {"seed": 10**400}, {"num_inference_steps": 10**400}, {"cache": 10**400},
        {"output_compression": 10**400}, {"previews": 10**400}, {"guidance_scale": 10**400},
        {"cache": {"max_error": 10**400}}, {"lora": [{"name": "x", "scale": 10**400}]}, {"deadline_ms": 0},
        {"deadline_ms": 86_400_001}, {"cache": "\ud800"}, {"lora": "\ud800"}, {"images": ["\ud800"]},
        {"prompt_embeds": "\ud800", "prompt": None}, {"lora": [{"name": "\ud800"}]}, {"\ud800": 1}, {"x\ud800": 1},
    ],
)  # fmt: skip
@pytest.mark.parametrize("route", ["/generate", "/jobs"])
async def test_extreme_values_are_refused(serve_generator: Serve, route: str, change: dict[str, Any]) -> None:
    """Numbers beyond any bound and text that is not Unicode are 422 with the field's name; the error is short."""
    text = json.dumps({"prompt": "a"} | change)  # JSON can write lone surrogates
    headers = {"content-type": "application/json", "idempotency-key": "a"}
    async with serve_generator() as http:
        response = await http.post(route, content=text, headers=headers)
    assert response.status_code == 422, response.text
    assert len(response.content) < 3000
    name = next(iter(change))
    assert response.json()["error"]["param"] == (name if name.isascii() else None)
