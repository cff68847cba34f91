"""Which media type an ``Accept`` header prefers."""

import time

import pytest
from fastapi import Request

from flux2_shared.web.accept import preferred_type
from flux2_shared.wire import SAFETENSORS_MEDIA_TYPE, TORCH_MEDIA_TYPE
from generator_service.api.routes.generate import RESPONSE_TYPES

IMAGE, JSON, STREAM = "image/png", "application/json", "text/event-stream"
ENCODER_TYPES = (TORCH_MEDIA_TYPE, SAFETENSORS_MEDIA_TYPE)


def with_accept(*values: str) -> Request:
    """A request with an ``Accept`` header for each value."""
    return Request({"type": "http", "headers": [(b"accept", value.encode("latin-1")) for value in values]})


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        (JSON, JSON),
        (STREAM, STREAM),
        ("*/*", IMAGE),
        ("", IMAGE),
        ("application/json, text/plain, */*", IMAGE),
        ("application/json, text/javascript, */*; q=0.01", JSON),
        ("image/*;q=0.5, application/json", JSON),
        ("application/json, image/*;q=0.5", JSON),
        ("application/json, image/png", IMAGE),
        ("application/json;q=0.5, image/png;q=0.4", JSON),
        ("image/png, application/json;q=0.9", IMAGE),
        ("APPLICATION/JSON; Q=0.9 , Image/PNG;q=0.1", JSON),
        ("application/json;q=0, */*", IMAGE),
        ("application/json;q=0", IMAGE),
        ("application/json;q=0.000", IMAGE),
        ("application/*", JSON),
        ("application/*;q=0.1, application/json;q=0", IMAGE),
        ("image/*;q=0, multipart/*;q=0, */*", JSON),
        ("text/event-stream, */*;q=0.1", STREAM),
        ("*/*;q=0.1, text/event-stream", STREAM),
        ("text/event-stream, */*", STREAM),
        ("application/json, text/event-stream", STREAM),
        ("text/event-stream;q=0, */*", IMAGE),
        ("text/*", STREAM),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8", "image/webp"),
        ("application/json;charset=utf-8", JSON),
        ('application/json;profile="a, image/png;q=1"', JSON),
        ("application/jsonp", IMAGE),
        ("text/html", IMAGE),
    ],
)
def test_the_generators_types(accept: str, media_type: str) -> None:
    """The largest weight wins, a file wins over JSON of the same weight, and without a match the default is a file."""
    assert preferred_type(with_accept(accept), RESPONSE_TYPES) == media_type


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        ("", TORCH_MEDIA_TYPE),
        ("*/*", TORCH_MEDIA_TYPE),
        (JSON, TORCH_MEDIA_TYPE),
        (SAFETENSORS_MEDIA_TYPE, SAFETENSORS_MEDIA_TYPE),
        (SAFETENSORS_MEDIA_TYPE.upper(), SAFETENSORS_MEDIA_TYPE),
        (f"{SAFETENSORS_MEDIA_TYPE}, */*", SAFETENSORS_MEDIA_TYPE),
        (f"{TORCH_MEDIA_TYPE};q=0.9, {SAFETENSORS_MEDIA_TYPE}", SAFETENSORS_MEDIA_TYPE),
        (f"{TORCH_MEDIA_TYPE}, {SAFETENSORS_MEDIA_TYPE};q=0.9", TORCH_MEDIA_TYPE),
        (f"{SAFETENSORS_MEDIA_TYPE};q=0, */*", TORCH_MEDIA_TYPE),
        (f"{TORCH_MEDIA_TYPE};q=0, */*", SAFETENSORS_MEDIA_TYPE),
    ],
)
def test_the_text_encoders_types(accept: str, media_type: str) -> None:
    """The text encoder follows the same rules, and its default is ``torch.save``'s format."""
    assert preferred_type(with_accept(accept), ENCODER_TYPES) == media_type


@pytest.mark.parametrize(
    "accept",
    [
        ",",
        ";;;",
        "/",
        "json",
        "*/json",
        "application/json;q=high",
        "application/json;q=",
        "application/json;q=.",
        "application/json;q=-1",
        "application/json;q=nan",
        "application json",
        "\xff\xfe/\x00",
        '"',
    ],
)
def test_malformed_ranges_are_skipped(accept: str) -> None:
    """A header without a valid range counts as absent; the valid ranges of others are used."""
    assert preferred_type(with_accept(accept), RESPONSE_TYPES) == IMAGE
    assert preferred_type(with_accept(f"{accept},application/json"), RESPONSE_TYPES) in {IMAGE, JSON}
    assert preferred_type(with_accept(f"application/json,{accept}"), RESPONSE_TYPES) == JSON


def test_several_headers_are_one_list() -> None:
    assert preferred_type(with_accept("image/png;q=0.5", JSON), RESPONSE_TYPES) == JSON


@pytest.mark.parametrize("accept", ['"\\' * 30_000, "application/json;q=0.1," * 2500, ";" * 60_000, "*/" * 30_000])
def test_long_headers_are_parsed_quickly(accept: str) -> None:
    """The time is linear in the header's length."""
    began = time.perf_counter()
    preferred_type(with_accept(accept), RESPONSE_TYPES)
    assert time.perf_counter() - began < 1
