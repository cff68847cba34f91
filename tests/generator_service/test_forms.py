"""Text fields of multipart forms have the values, and the strictness, of JSON."""

from typing import Any

import pytest
from starlette.datastructures import FormData, UploadFile

from flux2_shared.errors import InvalidRequest
from generator_service.api.dialects.form import form_fields


def fields(*pairs: tuple[str, Any]) -> dict[str, Any]:
    return form_fields(FormData(list(pairs)), files=["image"])


@pytest.mark.parametrize("name", ["stream", "upsample_prompt"])
def test_truth_values(name: str) -> None:
    """True, true and 1 are true, False, false and 0 are false; anything else is refused, never taken for false."""
    assert [fields((name, text))[name] for text in ("True", "true", "1")] == [True] * 3
    assert [fields((name, text))[name] for text in ("False", "false", "0")] == [False] * 3
    for text in ("yes", "no", "maybe", "TRUE", "on", "", " true", "2", "None"):
        with pytest.raises(InvalidRequest, match=f"^{name}: must be true or false$"):
            fields((name, text))


@pytest.mark.parametrize("name", ["n", "num_inference_steps", "seed", "partial_images", "guidance_scale"])
def test_numbers(name: str) -> None:
    """A number is written as in JSON; Python's other spellings are refused, as are more digits than any field has."""
    assert fields((name, "4"))[name] == 4
    assert fields((name, "-4"))[name] == -4
    assert fields((name, "4.5e0"))[name] == 4.5
    for text in ("1_000", " 7", "7 ", "+7", "07", "٣", "²", "nan", "inf", "1e", ".5", "0x10", "", "9" * 400, "True"):
        with pytest.raises(InvalidRequest, match=f"^{name}: must be a number$"):
            fields((name, text))


def test_nested_values() -> None:
    """Objects and lists of objects come in the names that clients give their parts, or as text with JSON."""
    assert fields(("cache[max_error]", "0.01")) == {"cache": {"max_error": 0.01}}
    assert fields(("cache", '{"max_error": 0.01}')) == {"cache": {"max_error": 0.01}}
    assert fields(("cache", "12")) == {"cache": 12}
    assert fields(("cache", "fast")) == {"cache": "fast"}
    wanted = {"lora": [{"name": "a", "scale": 0.5}, {"name": "b", "scale": 1}]}
    python = [("lora[][name]", "a"), ("lora[][name]", "b"), ("lora[][scale]", "0.5"), ("lora[][scale]", "1")]
    axios = [("lora[0][name]", "a"), ("lora[0][scale]", "0.5"), ("lora[1][name]", "b"), ("lora[1][scale]", "1")]
    as_json = [("lora", '[{"name": "a", "scale": 0.5}, {"name": "b", "scale": 1}]')]
    for pairs in (python, axios, as_json):
        assert fields(*pairs) == wanted
    assert fields(("lora", "a")) == {"lora": "a"}


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([("n", "1"), ("n", "2")], "n: given 2 times"),
        ([("lora[][name]", "a"), ("lora[][name]", "b"), ("lora[][scale]", "1")], "scale is needed for each of the 2"),
        ([("lora[][scale]", "much")], r"lora\.scale: must be a number"),
        ([("cache[max_error]", "nan")], r"cache\.max_error: must be a number"),
        ([("cache", "{"), ], "cache: must be text, or valid JSON"),
        ([("lora", "[" * 100_000)], "lora: must be text, or valid JSON"),
        ([("cache", "fast"), ("cache[max_error]", "1")], "cache: given in more than one form"),
        ([("lora", "a"), ("lora[][name]", "b")], "lora: given in more than one form"),
    ],
)  # fmt: skip
def test_ambiguous_forms_are_refused(pairs: list[tuple[str, str]], message: str) -> None:
    """What cannot be understood in one way only is refused with the field's name."""
    with pytest.raises(InvalidRequest, match=message):
        fields(*pairs)


def test_files_are_left_to_the_caller() -> None:
    """Files under the given names are left out; a file under another name stays, and the schema refuses it."""
    file = UploadFile(None)  # type: ignore[arg-type]
    assert fields(("image", file), ("prompt", file)) == {"prompt": file}
