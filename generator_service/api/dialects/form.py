"""The text fields of multipart forms, as the values that a JSON body would have.

Nested values have the names that clients give them: ``cache[max_error]``, and for a list of adapters
``lora[][name]`` (openai-python and Node) or ``lora[0][name]`` (axios); or the field is text with JSON.
"""

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import FormData, UploadFile

from flux2_shared.errors import InvalidRequest

INTEGER = re.compile(r"-?(0|[1-9]\d{0,30})", re.ASCII)
NUMBER = re.compile(r"-?(0|[1-9]\d{0,30})(\.\d{1,100})?([eE][+-]?\d{1,3})?", re.ASCII)
"""Numbers of JSON."""
BOOLEANS = {"true": True, "True": True, "1": True, "false": False, "False": False, "0": False}
OBJECT_FIELD = re.compile(r"(\w+)\[([A-Za-z_]\w*)\]", re.ASCII)
LIST_FIELD = re.compile(r"(\w+)\[\d*\]\[(\w+)\]", re.ASCII)
NUMERIC_FIELDS = ("n", "num_inference_steps", "output_compression", "partial_images", "seed", "guidance_scale")
BOOLEAN_FIELDS = ("stream", "upsample_prompt")
NESTED_NUMBERS = ("max_error", "scale")
JSON_FIELDS = ("cache", "lora")
"""Fields that may be text, or text with JSON."""


def form_fields(form: FormData, files: Sequence[str]) -> dict[str, Any]:
    """Convert the text fields of a form; ``files`` are the names of fields to leave out.

    Raises:
        InvalidRequest: a value has the wrong type, or a field is repeated.
    """
    texts: dict[str, list[Any]] = defaultdict(list)
    for name, value in form.multi_items():
        if name not in files:
            texts[name].append(value)
    fields: dict[str, Any] = {}
    objects: dict[str, dict[str, Any]] = defaultdict(dict)
    columns: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for name, values in texts.items():
        if match := LIST_FIELD.fullmatch(name):
            columns[match[1]][match[2]] += [nested_value(match[1], match[2], value) for value in values]
        elif len(values) > 1:
            raise InvalidRequest(f"{name}: given {len(values)} times", param=name)
        elif match := OBJECT_FIELD.fullmatch(name):
            objects[match[1]][match[2]] = nested_value(match[1], match[2], values[0])
        else:
            fields[name] = value_of(name, values[0])
    lists = {name: list_of(name, values) for name, values in columns.items()}
    for name in (fields.keys() & objects.keys()) | (fields.keys() & lists.keys()) | (objects.keys() & lists.keys()):
        raise InvalidRequest(f"{name}: given in more than one form", param=name)
    return fields | objects | lists


def nested_value(name: str, key: str, value: Any) -> Any:
    return number(f"{name}.{key}", name, value) if key in NESTED_NUMBERS else value


def list_of(name: str, columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Return objects from the values of each key.

    Raises:
        InvalidRequest: only some objects have a key; the form does not say which.
    """
    count = max(map(len, columns.values()))
    for key, values in columns.items():
        if len(values) != count:
            raise InvalidRequest(f"{name}: {key} is needed for each of the {count}, or for none", param=name)
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def value_of(name: str, value: Any) -> Any:
    """Convert the text of a field without brackets."""
    if isinstance(value, UploadFile):
        return value  # refused by the schema
    if name in NUMERIC_FIELDS:
        return number(name, name, value)
    if name in BOOLEAN_FIELDS:
        if value not in BOOLEANS:
            raise InvalidRequest(f"{name}: must be true or false", param=name)
        return BOOLEANS[value]
    if name in JSON_FIELDS and value.lstrip()[:1] in ("{", "["):
        return json_of(name, value)
    return int(value) if name == "cache" and INTEGER.fullmatch(value) else value


def number(path: str, param: str, text: Any) -> int | float:
    """Convert a number as strictly as JSON does; ``path`` and ``param`` name it in errors."""
    if not isinstance(text, str) or not NUMBER.fullmatch(text):
        raise InvalidRequest(f"{path}: must be a number", param=param)
    return int(text) if INTEGER.fullmatch(text) else float(text)


def json_of(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidRequest(f"{name}: must be text, or valid JSON", param=name) from None
