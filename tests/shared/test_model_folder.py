"""Which model folders are loaded, and the properties read from them."""

import json
import shutil
from pathlib import Path

import pytest
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE

from flux2_shared.errors import ModelRefused
from flux2_shared.model.folder import PromptFormat, find_model, read_prompt_format
from flux2_shared.model.subfolders import ALL_SUBFOLDERS


@pytest.fixture
def folder(tmp_path: Path, random_weights: Path) -> Path:
    """A model folder that a test may damage."""
    return shutil.copytree(random_weights, tmp_path / "model")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "old.ckpt", "modeling.py", "sub/deep.PKL"])
@pytest.mark.parametrize("part", ["text_encoder", "transformer"])
def test_pickles_and_code_are_refused(folder: Path, part: str, name: str) -> None:
    """A component with pickled weights or code is refused, at any depth."""
    file = folder / part / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"")
    with pytest.raises(ModelRefused, match=file.name):
        find_model(str(folder), "main", ALL_SUBFOLDERS)


def test_a_missing_component_is_reported(folder: Path) -> None:
    """A folder without one of the required components is refused with the component's name."""
    shutil.rmtree(folder / "vae")
    with pytest.raises(ModelRefused, match="vae"):
        find_model(str(folder), "main", ALL_SUBFOLDERS)
    assert find_model(str(folder), "main", ("transformer",)).name == "model"


def test_unknown_models_are_refused() -> None:
    """A name that is neither a folder nor on the hub is refused in one sentence."""
    with pytest.raises(ModelRefused, match="no/such-model"):
        find_model("no/such-model", "main", ALL_SUBFOLDERS)


def test_the_demo_model_states_its_prompt_format(random_weights: Path) -> None:
    """Layers and length come from the model's own folder."""
    prompt_format = read_prompt_format(find_model(str(random_weights), "main", ALL_SUBFOLDERS))
    assert (prompt_format.hidden_layers, prompt_format.max_sequence_length) == ((1, 2, 3), 32)


def test_flux2_dev_is_the_default(folder: Path) -> None:
    """A folder without a prompt format has FLUX.2 [dev]'s, which diffusers defines."""
    config = folder / "text_encoder" / "config.json"
    stated = json.loads(config.read_text())
    del stated["flux2_prompt_format"]
    config.write_text(json.dumps(stated))
    assert read_prompt_format(find_model(str(folder), "main", ALL_SUBFOLDERS)) == PromptFormat()
    assert PromptFormat() == PromptFormat((10, 20, 30), 512, SYSTEM_MESSAGE)


def test_an_unknown_key_is_refused(folder: Path) -> None:
    """A misspelled key in the prompt format is refused."""
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps({"flux2_prompt_format": {"layers": [1]}}))
    with pytest.raises(ModelRefused, match="unknown key"):
        read_prompt_format(find_model(str(folder), "main", ALL_SUBFOLDERS))


def test_the_fingerprint_depends_on_the_component(folder: Path) -> None:
    """It changes with the content of its component, and only with that."""
    model = find_model(str(folder), "main", ALL_SUBFOLDERS)
    before = {part: model.fingerprint(part) for part in ALL_SUBFOLDERS}
    (folder / "vae" / "config.json").write_text("{}")
    changed = {part for part in ALL_SUBFOLDERS if model.fingerprint(part) != before[part]}
    assert changed == {"vae"}
