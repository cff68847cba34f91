"""Every argument of the installed OpenAI client is served, ignored on purpose, or refused."""

import inspect
import io
import json
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_type_hints

import httpx
import openai
import pytest
from openai.resources.images import Images
from openai.types import image_edit_params, image_generate_params
from PIL import Image

from generator_service.api.dialects.openai_schemas import UNSUPPORTED, ImagesRequest

PROMPT = "a red circle"
QUICK: dict[str, Any] = {"num_inference_steps": 2, "seed": 7, "cache": "none"}
TRANSPORT = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
"""Arguments that are not part of the body."""
FILES = {"image", "mask", "markup"}
SAMPLE_OF_UNSUPPORTED: dict[str, Any] = {"complexity": "low", "frame_count": 2, "frame_duration_ms": 9, "svg": {"a": 1}}
UNSERVED = {
    ("background", "transparent"),
    ("output_format", "gif"),
    ("output_format", "svg"),
    ("response_format", "url"),
}
PARAMS = {
    "generate": image_generate_params.ImageGenerateParamsBase,
    "edit": image_edit_params.ImageEditParamsBase,
}


def png_file() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def client(generator_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{generator_url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("method", ["generate", "edit"])
def test_every_argument_is_known(method: str) -> None:
    """An argument that a new version of the client adds must be decided upon: served, ignored, or refused."""
    arguments = set(inspect.signature(getattr(Images, method)).parameters) - TRANSPORT
    assert arguments <= set(ImagesRequest.model_fields) | UNSUPPORTED.keys() | FILES


def literals(method: str) -> list[tuple[str, Any]]:
    """Every value that the client's types name for an argument; sizes take long, and have tests of their own."""

    def values(hint: Any) -> list[Any]:
        if getattr(hint, "__origin__", None) is Literal:
            return list(get_args(hint))
        return [value for part in get_args(hint) for value in values(part)]

    hints = get_type_hints(PARAMS[method])
    return [(name, value) for name, hint in hints.items() for value in values(hint) if name != "size"]


@pytest.mark.parametrize(("name", "value"), literals("generate"))
def test_every_named_value_is_served_or_refused(client: openai.OpenAI, name: str, value: Any) -> None:
    """A value that the client's types name is served, or refused as unsupported."""
    arguments = {"prompt": PROMPT, "size": "64x64", "extra_body": QUICK} | {name: value}
    if (name, value) in UNSERVED or name in UNSUPPORTED:
        with pytest.raises(openai.BadRequestError) as caught:
            client.images.generate(**arguments)
        assert (caught.value.code, caught.value.param) == ("unsupported_parameter", name)
    else:
        assert client.images.generate(**arguments).data


@pytest.mark.parametrize("name", sorted(SAMPLE_OF_UNSUPPORTED))
@pytest.mark.parametrize("method", ["generate", "edit"])
def test_unsupported_arguments_are_400(client: openai.OpenAI, method: str, name: str) -> None:
    """An argument that cannot be served is 400 ``unsupported_parameter``; it is never silently ignored."""
    files = {"image": png_file()} if method == "edit" else {}
    with pytest.raises(openai.BadRequestError) as caught:
        getattr(client.images, method)(prompt=PROMPT, **files, extra_body={name: SAMPLE_OF_UNSUPPORTED[name]})
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", name)


@pytest.mark.parametrize("name", ["mask", "markup"])
def test_unsupported_files_are_400(client: openai.OpenAI, name: str) -> None:
    """A mask or a markup is 400 ``unsupported_parameter``, too."""
    arguments: dict[str, Any] = {name: png_file()}
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.edit(image=png_file(), prompt=PROMPT, **arguments)
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", name)


def test_every_optional_field_may_be_null(client: openai.OpenAI) -> None:
    """Null means the default, for the arguments of the client and for this service's own fields."""
    fields = {name: None for name, field in ImagesRequest.model_fields.items() if not field.is_required()}
    fields |= dict.fromkeys(UNSUPPORTED)
    body = fields | {"prompt": PROMPT, "size": "64x64"} | QUICK
    assert client.images.generate(prompt=PROMPT, extra_body=body).data
    nulls: dict[str, Any] = {"n": None, "size": None, "model": None, "output_format": None, "stream": None}
    assert client.images.generate(prompt=PROMPT, **nulls, partial_images=None, extra_body=QUICK | {"lora": None}).data


def test_null_is_the_default_everywhere(generator_url: str) -> None:
    """The native API and Hugging Face's read null as they read an absent field; a required field must be there."""
    native = {"prompt": PROMPT, "width": 64, "height": 64, **QUICK, "num_images": None, "lora": None, "previews": None}
    inference = {"inputs": PROMPT, "parameters": {"width": 64, "height": 64, **QUICK, "target_size": None}}
    for body in (native, inference, inference | {"options": None}):
        assert httpx.post(f"{generator_url}/generate", json=body, timeout=60).status_code == 200
    for body, param in (({"prompt": None}, "prompt"), ({"inputs": None}, "inputs"), ({"prompt": "a", "x": None}, "x")):
        refused = httpx.post(f"{generator_url}/generate", json=body)
        assert refused.status_code == 422
        assert param in refused.json()["detail"]


def test_edits_carry_nested_fields(client: openai.OpenAI, generator_url: str) -> None:
    """``cache`` and ``lora`` of an edit may be objects, in the form that the client sends."""
    arguments: dict[str, Any] = {"image": png_file(), "prompt": PROMPT}
    quick = {"num_inference_steps": 2, "seed": 7}
    with pytest.raises(openai.UnprocessableEntityError, match="max_error needs a calibrated schedule") as caught:
        client.images.edit(**arguments, extra_body=quick | {"cache": {"max_error": 0.5}})
    assert caught.value.param == "cache"
    for lora in ([{"name": "x", "scale": 0.5}], [{"name": "x"}, {"name": "y"}], "x"):
        with pytest.raises(openai.UnprocessableEntityError, match="there is no adapter 'x'") as caught:
            client.images.edit(**arguments, extra_body=quick | {"lora": lora})
        assert caught.value.param == "lora"
    with pytest.raises(openai.UnprocessableEntityError, match="scale is needed for each of the 2"):
        client.images.edit(**arguments, extra_body={"lora": [{"name": "x"}, {"name": "y", "scale": 1}]})
    files = {"image": ("a.png", png_file())}
    as_json = {"prompt": PROMPT, "num_inference_steps": "2", "cache": json.dumps({"max_error": 0.5})}
    refused = httpx.post(f"{generator_url}/v1/images/edits", files=files, data=as_json, timeout=60)
    assert "max_error needs a calibrated schedule" in refused.text


@pytest.mark.parametrize("images", [b"not an image", [png_file(), b"not an image"]])
def test_a_bad_image_is_named_as_the_client_names_it(client: openai.OpenAI, images: Any) -> None:
    """The field of a bad image is ``image``, with its index if there are several."""
    with pytest.raises(openai.APIStatusError) as caught:
        client.images.edit(image=images, prompt=PROMPT)
    assert caught.value.param == ("image" if isinstance(images, bytes) else "image[1]")
