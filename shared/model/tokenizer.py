"""Loads a model's tokenizer, for the text encoder service and the command line.

It is loaded from ``tokenizer/`` only, even if ``model_index.json`` names a processor, as in FLUX.2 [dev]: the rest of a
processor is for images and needs torchvision.
"""

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from flux2_shared.errors import ModelRefused
from flux2_shared.model.folder import LOADING_ERRORS, ModelFolder, PromptFormat

CHAT_TEMPLATE_FOLDERS = ("tokenizer", "processor", "")
"""Folders that are searched for a chat template, in this order; the last is the root."""
CHAT_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
"""The first is the template itself. The second, written by older processors and not read by tokenizers, has it under
the key ``chat_template``."""


def load_tokenizer(folder: ModelFolder) -> Any:
    """Load the tokenizer of ``folder`` with its chat template. It pads on the left.

    Raises:
        ModelRefused: the tokenizer cannot be loaded, or has no chat template.
    """
    try:
        # The padding side is part of FLUX.2's prompt format. If the files do not define it, transformers 4 takes it
        # from the tokenizer's class, and transformers 5 pads on the right.
        tokenizer: Any = AutoTokenizer.from_pretrained(folder.path / "tokenizer", padding_side="left")
    except LOADING_ERRORS as error:
        raise ModelRefused(f"the tokenizer of {folder.name} cannot be loaded") from error
    if not tokenizer.chat_template:
        tokenizer.chat_template = find_chat_template(folder)
    return tokenizer


def find_chat_template(folder: ModelFolder) -> str:
    """Read the chat template from a separate file.

    Raises:
        ModelRefused: there is no such file, or it is invalid.
    """
    names = [str(Path(subfolder, name)) for subfolder in CHAT_TEMPLATE_FOLDERS for name in CHAT_TEMPLATE_FILES]
    for name in names:
        if (folder.path / name).is_file():
            return _template_in(folder, name)
    searched = ", ".join(["tokenizer/tokenizer_config.json", *names])
    raise ModelRefused(f"{folder.name} has no chat template, which FLUX.2 needs; looked for in {searched}")


def conversation(prompt: str, system_message: str) -> list[dict[str, object]]:
    """Return a prompt as FLUX.2's conversation, for the chat template."""
    content = prompt.replace("[IMG]", "")  # the placeholder of an image, which prompts do not have
    return [
        {"role": "system", "content": [{"type": "text", "text": system_message}]},
        {"role": "user", "content": [{"type": "text", "text": content}]},
    ]


def is_longer(tokenizer: Any, prompt: str, prompt_format: PromptFormat) -> bool:
    """Return whether the conversation of a prompt has more tokens than the model's maximum."""
    whole: Any = tokenizer.apply_chat_template(
        conversation(prompt, prompt_format.system_message), tokenize=True, return_dict=True
    )
    return len(whole["input_ids"]) > prompt_format.max_sequence_length


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
