"""Whether a model folder is complete, and what its files say of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from demo_model.services import WEIGHTS
from flux2_shared.model.folder import PromptFormat
from flux2_shared.model.subfolders import SUBFOLDERS, Service
from generator_service.doctor.check import Status
from generator_service.doctor.model import Model, check_leftovers, check_parts, find, inspect
from generator_service.doctor.weights_files import BrokenFile
from tests.generator_service.doctor.hosts import by_name, described

ALL_PARTS = (*SUBFOLDERS[Service.GENERATOR], *SUBFOLDERS[Service.TEXT_ENCODER])
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "someone/demo"


def problems_of(folder: Path, wanted: tuple[str, ...] = ALL_PARTS) -> dict[str, str]:
    """What is wrong with a folder's parts."""
    return inspect(Model(folder.name, "local", folder), wanted)[1]


def edit(file: Path, **values: object) -> None:
    """Change keys of a JSON file; a value of None removes the key."""
    data = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def replace_by_file(folder: Path) -> None:
    """Replace a folder by a file of the same name."""
    shutil.rmtree(folder)
    folder.write_text("")


def test_the_demo_model_is_complete() -> None:
    """The demo model has no problems, and its configuration is read."""
    model, problems = inspect(Model("weights", "local", WEIGHTS), ALL_PARTS)
    assert problems == {}
    assert model.configs.keys() == set(ALL_PARTS)
    assert model.weights.keys() == {"transformer", "vae", "text_encoder"}
    assert model.prompt_format == PromptFormat((1, 2, 3), 32)
    assert model.embedding_shape == (32, 384)
    assert all(check.status is Status.OK for check in check_parts(model, problems, ALL_PARTS, "nothing"))


def test_flux2_dev_is_complete(flux2_dev: Path) -> None:
    """A sharded folder in the layout of FLUX.2 [dev] has no problems."""
    model, problems = inspect(Model("FLUX.2-dev", "local", flux2_dev), ALL_PARTS)
    assert problems == {}
    assert {part: weights.num_files for part, weights in model.weights.items()} == {
        "transformer": 7,
        "vae": 1,
        "text_encoder": 10,
    }
    assert model.embedding_shape == (512, 15_360)
    assert model.pixels_per_token == 16


@pytest.mark.parametrize(
    ("part", "damage", "message"),
    [
        ("vae", shutil.rmtree, "the folder vae is missing"),
        ("vae", replace_by_file, "the folder vae is missing"),
        ("scheduler", lambda part: (part / "scheduler_config.json").unlink(), "scheduler_config.json is missing"),
        ("transformer", lambda part: (part / "config.json").write_text("{"), "config.json is not JSON"),
        ("transformer", lambda part: edit(part / "config.json", _class_name="FluxTransformer2DModel"), "FLUX.2 has"),
        ("transformer", lambda part: (part / "old.ckpt").write_text("x"), "transformer/old.ckpt is refused"),
        ("vae", lambda part: (part / "diffusion_pytorch_model.safetensors").unlink(), "is missing"),
        ("text_encoder", lambda part: (part / "model.safetensors").write_bytes(b""), "is empty"),
        ("text_encoder", lambda part: edit(part / "config.json", model_type="t5"), "FLUX.2 has 'mistral3'"),
        ("text_encoder", lambda part: edit(part / "config.json", flux2_prompt_format={"layers": 1}), "unknown key"),
        ("text_encoder", lambda part: edit(part / "config.json", flux2_prompt_format=None), "it has 4 layers"),
        ("tokenizer", lambda part: (part / "tokenizer.json").unlink(), "there is no vocabulary"),
        ("tokenizer", lambda part: (part / "tokenizer.json").write_text("{"), "tokenizer.json is not JSON"),
        ("tokenizer", lambda part: (part / "chat_template.jinja").unlink(), "there is no chat template"),
        ("tokenizer", lambda part: (part / "tokenizer_config.json").unlink(), "tokenizer_config.json is missing"),
    ],
)
def test_a_broken_part_is_named(folder: Path, part: str, damage: Callable[[Path], object], message: str) -> None:
    """A broken part is reported with its problem, and no other part is."""
    damage(folder / part)
    problems = problems_of(folder)
    assert problems.keys() == {part}
    assert message in problems[part]


def test_a_chat_template_may_lie_in_three_places(folder: Path) -> None:
    """A chat template may be in ``chat_template.jinja``, ``chat_template.json`` or the tokenizer's configuration."""
    part = folder / "tokenizer"
    template = (part / "chat_template.jinja").read_text()
    (part / "chat_template.jinja").unlink()
    (part / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert problems_of(folder) == {}
    (part / "chat_template.json").write_text("{}")
    assert "there is no chat template" in problems_of(folder)["tokenizer"]
    (part / "chat_template.json").unlink()
    edit(part / "tokenizer_config.json", chat_template="x")
    assert problems_of(folder) == {}


def test_a_transformer_for_another_text_encoder_is_named(folder: Path) -> None:
    """A transformer that takes other embeddings than the text encoder gives is a problem."""
    edit(folder / "transformer" / "config.json", joint_attention_dim=999)
    assert problems_of(folder) == {"text_encoder": "its embeddings have 384 numbers, the transformer takes 999"}


def test_only_the_parts_of_a_service_are_looked_at(folder: Path) -> None:
    """The generator's host needs none of the text encoder but its configuration."""
    shutil.rmtree(folder / "tokenizer")
    (folder / "text_encoder" / "model.safetensors").unlink()
    assert problems_of(folder, SUBFOLDERS[Service.GENERATOR]) == {}
    (folder / "text_encoder" / "config.json").unlink()
    assert problems_of(folder, SUBFOLDERS[Service.GENERATOR]) == {
        "text_encoder": "config.json of the text encoder cannot be read"
    }


def test_each_part_is_one_check(folder: Path) -> None:
    """Each broken part is a failed check with the fix."""
    (folder / "text_encoder" / "config.json").unlink()
    (folder / "vae" / "config.json").write_text("")
    wanted = SUBFOLDERS[Service.GENERATOR]
    model, problems = inspect(Model(folder.name, "local", folder), wanted)
    checks = by_name(list(check_parts(model, problems, wanted, "fetch it")))
    failed = {name for name, check in checks.items() if check.status is Status.FAILED}
    assert failed == {"vae", "text_encoder"}
    assert checks["vae"].fix == "fetch it"
    assert checks["transformer"].detail.startswith("1 file, 0.01 GB")


def cached(home: Path, folder: Path) -> Path:
    """Create a hub cache with this model; returns its snapshot."""
    snapshot = home / "hub" / "models--someone--demo" / "snapshots" / COMMIT
    shutil.copytree(folder, snapshot)
    refs = home / "hub" / "models--someone--demo" / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    return snapshot


@pytest.mark.parametrize("revision", ["main", COMMIT])
def test_a_model_of_the_hub_is_found_in_its_cache(tmp_path: Path, folder: Path, revision: str) -> None:
    """A cached model is found by branch or commit without the network."""
    host = described(tmp_path, HF_HOME=str(tmp_path / "hf"))
    snapshot = cached(tmp_path / "hf", folder)
    assert find(NAME, revision, ALL_PARTS, host) == Model(NAME, COMMIT, snapshot)
    assert find(NAME, "other", ALL_PARTS, host) == Model(NAME, "other")


@pytest.mark.parametrize(
    "variables", [{"HF_HUB_CACHE": "{}/hf/hub"}, {"XDG_CACHE_HOME": "{}"}, {"HF_HOME": "{}/hf"}, {"HOME": "{}/home"}]
)
def test_the_cache_is_where_the_library_has_it(tmp_path: Path, folder: Path, variables: dict[str, str]) -> None:
    """The cache is located by the same variables as in huggingface_hub."""
    cached(tmp_path / "hf", folder)
    (tmp_path / "huggingface").symlink_to(tmp_path / "hf")
    host = described(tmp_path, **{name: value.format(tmp_path) for name, value in variables.items()})
    (tmp_path / "home" / ".cache").mkdir()
    (tmp_path / "home" / ".cache" / "huggingface").symlink_to(tmp_path / "hf")
    assert find(NAME, "main", ALL_PARTS, host).path is not None


def test_a_cache_that_lacks_files_of_the_hubs_list_is_incomplete(tmp_path: Path, folder: Path) -> None:
    """A snapshot that lacks files of the hub's listing is incomplete for the services that need them."""
    host = described(tmp_path, HF_HOME=str(tmp_path / "hf"))
    snapshot = cached(tmp_path / "hf", folder)
    trees = tmp_path / "hf" / "hub" / "models--someone--demo" / "trees"
    trees.mkdir()
    entry = {"size": 1, "blob_id": "0" * 40, "lfs_sha256": None, "lfs_size": None, "xet_hash": None}
    files = {"vae/config.json": entry, "vae/other.json": entry}
    (trees / f"{COMMIT}.json").write_text(json.dumps({"format_version": 1, "files": files}))
    found = find(NAME, COMMIT, ALL_PARTS, host)
    assert (found.path, found.is_incomplete) == (snapshot, True)
    assert not find(NAME, COMMIT, SUBFOLDERS[Service.TEXT_ENCODER], host).is_incomplete


@pytest.mark.parametrize("name", ["/models/flux2", "./model", "a/b/c", "a name"])
def test_what_can_be_neither_a_folder_nor_a_hub_id_is_named(tmp_path: Path, name: str) -> None:
    """A name that is neither an existing folder nor a valid hub id is refused."""
    with pytest.raises(BrokenFile, match="neither a folder nor"):
        find(name, "main", ALL_PARTS, described(tmp_path))


def test_interrupted_downloads_are_named(tmp_path: Path, folder: Path) -> None:
    """Interrupted downloads are a warning with the command that removes them."""
    host = described(tmp_path, HF_HOME=str(tmp_path / "hf"))
    snapshot = cached(tmp_path / "hf", folder)
    model = Model(NAME, COMMIT, snapshot)
    blobs = snapshot.parents[1] / "blobs"
    assert list(check_leftovers(model, host)) == []
    blobs.mkdir()
    (blobs / "abc.incomplete").write_bytes(bytes(100))
    [check] = check_leftovers(model, host)
    assert check.status is Status.WARNING
    assert f"1 interrupted downloads in {blobs}" in check.detail
    assert check.fix.endswith(f"find {blobs} -name '*.incomplete' -delete")
