"""The tokenizer of a model, whichever version of transformers wrote its files."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils._paths import filter_repo_objects

from demo_model.services import WEIGHTS
from flux2_shared.errors import ModelRefused
from flux2_shared.model import folder as model_folder
from flux2_shared.model.folder import ModelFolder, find_model
from flux2_shared.model.tokenizer import load_tokenizer
from tests.dev_layout import lay_out_as_dev
from tests.text_encoder_service.test_encoder import encoder

CHAT = [{"role": "user", "content": [{"type": "text", "text": "a small red circle, É [INST]"}]}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder without weights and without a chat template in any file."""
    copied = tmp_path / "model"
    shutil.copytree(WEIGHTS / "tokenizer", copied / "tokenizer")
    (copied / "tokenizer" / "chat_template.jinja").unlink()
    return copied


def token_ids(folder: Path) -> Any:
    """A padded row of token ids."""
    tokenizer = load_tokenizer(ModelFolder("model", "local", folder))
    row = tokenizer.apply_chat_template(
        CHAT, tokenize=True, return_dict=True, padding="max_length", truncation=True, max_length=24
    )
    return row["input_ids"], row["attention_mask"]


@pytest.mark.parametrize("padding_side", ["left", None])
@pytest.mark.parametrize("name", ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast"])
def test_files_of_transformers_4_give_the_same_tokens(tmp_path: Path, name: str, padding_side: str | None) -> None:
    """Any class name, and an unspecified padding side, give the same tokens."""
    dev = lay_out_as_dev(WEIGHTS, tmp_path / "dev", tokenizer_class=name, padding_side=padding_side)
    ids, mask = token_ids(dev)
    assert (ids, mask) == token_ids(WEIGHTS)
    assert mask[0] == 0


@pytest.mark.parametrize("subfolder", ["tokenizer", "processor", "."])
@pytest.mark.parametrize("name", ["chat_template.json", "chat_template.jinja"])
def test_the_chat_template_is_read_from_any_location(folder: Path, subfolder: str, name: str) -> None:
    """A chat template is read from old and new processors' files, in the tokenizer's or the processor's folder."""
    template = (WEIGHTS / "tokenizer" / "chat_template.jinja").read_text()
    (folder / subfolder).mkdir(exist_ok=True)
    text = json.dumps({"chat_template": template}) if name.endswith("json") else template
    (folder / subfolder / name).write_text(text)
    assert token_ids(folder) == token_ids(WEIGHTS)


def test_a_missing_chat_template_is_an_error(folder: Path) -> None:
    """The error names the files that were looked for."""
    with pytest.raises(ModelRefused) as refused:
        token_ids(folder)
    for name in ("tokenizer/tokenizer_config.json", "tokenizer/chat_template.json", "processor/chat_template.json"):
        assert name in str(refused.value)
    assert ", chat_template.jinja, chat_template.json" in str(refused.value)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"chat_template": null}'])
def test_an_empty_chat_template_is_an_error(folder: Path, content: str) -> None:
    """A ``chat_template.json`` without a template is an error."""
    (folder / "tokenizer" / "chat_template.json").write_text(content)
    with pytest.raises(ModelRefused, match=r"tokenizer/chat_template\.json holds no text under chat_template"):
        token_ids(folder)


def test_a_tokenizer_that_cannot_be_read_is_refused(folder: Path) -> None:
    """The error is one line, not the library's traceback."""
    (folder / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(ModelRefused, match="the tokenizer of model cannot be loaded"):
        token_ids(folder)


def test_chat_templates_are_fetched_from_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Chat templates are downloaded from every possible location, and no other files are."""
    names = [
        f"{subfolder}chat_template.{kind}"
        for subfolder in ("", "processor/", "tokenizer/")
        for kind in ("json", "jinja")
    ]
    repository = [*names, "tokenizer/processor_config.json", "flux2-dev.safetensors", "processor/weights.safetensors"]
    fetched: list[str] = []

    def snapshot_download(*_: object, allow_patterns: list[str], **_more: object) -> str:
        fetched.extend(filter_repo_objects(repository, allow_patterns=allow_patterns))
        (tmp_path / "tokenizer").mkdir()
        return str(tmp_path)

    monkeypatch.setattr(model_folder, "snapshot_download", snapshot_download)
    find_model("a/model", "main", ("tokenizer",))
    assert fetched == [*names, "tokenizer/processor_config.json"]


def test_the_encoder_uses_the_chat_template(folder: Path, random_weights: Path) -> None:
    """A model with a chat template only in ``chat_template.json`` is served."""
    shutil.copytree(random_weights, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("chat_template.jinja"))
    template = (WEIGHTS / "tokenizer" / "chat_template.jinja").read_text()
    (folder / "tokenizer" / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    ours, theirs = (encoder(model).encode(["a red circle"])[0].tensor for model in (folder, random_weights))
    assert ours.equal(theirs)
