"""The tokenizer of a model's prompts: the same for the text encoder service and for the command line.

It is loaded from ``tokenizer/`` alone, also where ``model_index.json`` names a processor, as FLUX.2 [dev]'s does: what
a processor has beside its tokenizer is for images, and needs torchvision.
"""

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from shared.errors import ModelRefused
from shared.model_folder import LOADING_ERRORS, ModelFolder

CHAT_TEMPLATE_FOLDERS = ("tokenizer", "processor", "")
"""Where in a repository a chat template is looked for, in this order; the last is its root."""
CHAT_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
"""The first holds the template itself. The second, which older processors wrote and no tokenizer reads, holds it under
``chat_template``."""


def load_tokenizer(folder: ModelFolder) -> Any:
    """The tokenizer of ``folder``, with its chat template. It pads on the left.

    Raises:
        ModelRefused: it cannot be loaded, or has no chat template.
    """
    try:
        # The side is part of FLUX.2's format (see PromptFormat). transformers 4 took it from the tokenizer's class
        # where the files do not say it; transformers 5 then pads on the right.
        tokenizer: Any = AutoTokenizer.from_pretrained(folder.path / "tokenizer", padding_side="left")
    except LOADING_ERRORS as error:
        raise ModelRefused(f"the tokenizer of {folder.name} cannot be loaded") from error
    if not tokenizer.chat_template:
        tokenizer.chat_template = find_chat_template(folder)
    return tokenizer


def find_chat_template(folder: ModelFolder) -> str:
    """The chat template that a file of its own holds.

    Raises:
        ModelRefused: there is no such file, or it holds no template.
    """
    names = [str(Path(place, name)) for place in CHAT_TEMPLATE_FOLDERS for name in CHAT_TEMPLATE_FILES]
    for name in names:
        if (folder.path / name).is_file():
            return _template_in(folder, name)
    wanted = ", ".join(["tokenizer/tokenizer_config.json", *names])
    raise ModelRefused(f"{folder.name} has no chat template, which FLUX.2 needs; looked for in {wanted}")


def _template_in(folder: ModelFolder, name: str) -> str:
    text = (folder.path / name).read_text(encoding="utf-8")
    if name.endswith(".jinja"):
        return text
    try:
        template = json.loads(text)["chat_template"]
    except (ValueError, KeyError, TypeError):
        template = None
    if not isinstance(template, str):
        raise ModelRefused(f"{folder.name}: {name} holds no text under chat_template")
    return template
