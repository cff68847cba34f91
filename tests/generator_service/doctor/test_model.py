"""Whether a model folder is complete, and the properties read from its files."""

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

ALL_COMPONENTS = (*SUBFOLDERS[Service.GENERATOR], *SUBFOLDERS[Service.TEXT_ENCODER])
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "someone/demo"


def problems_of(folder: Path, wanted: tuple[str, ...] = ALL_COMPONENTS) -> dict[str, str]:
    """The problems of a folder's components."""
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
    model, problems = inspect(Model("weights", "local", WEIGHTS), ALL_COMPONENTS)
    assert problems == {}
    assert model.configs.keys() == set(ALL_COMPONENTS)
    assert model.weights.keys() == {"transformer", "vae", "text_encoder"}
    assert model.prompt_format == PromptFormat((1, 2, 3), 32)
    assert model.embedding_shape == (32, 384)
    assert all(check.status is Status.OK for check in check_parts(model, problems, ALL_COMPONENTS, "nothing"))


def test_flux2_dev_is_complete(flux2_dev: Path) -> None:
    """A sharded folder in the layout of FLUX.2 [dev] has no problems."""
    model, problems = inspect(Model("FLUX.2-dev", "local", flux2_dev), ALL_COMPONENTS)
    assert problems == {}
    assert {component: weights.num_files for component, weights in model.weights.items()} == {
        "transformer": 7,
        "vae": 1,
        "text_encoder": 10,
    }
    assert model.embedding_shape == (512, 15_360)
    assert model.pixels_per_token == 16


@pytest.mark.parametrize(
    ("component", "damage", "message"),
    [
        ("vae", shutil.rmtree, "the folder vae is missing"),
        ("vae", replace_by_file, "the folder vae is missing"),
        (
            "scheduler",
            lambda component: (component / "scheduler_config.json").unlink(),
            "scheduler_config.json is missing",
        ),
        ("transformer", lambda component: (component / "config.json").write_text("{"), "config.json is not JSON"),
        (
            "transformer",
            lambda component: edit(component / "config.json", _class_name="FluxTransformer2DModel"),
            "FLUX.2 has",
        ),
        ("transformer", lambda component: (component / "old.ckpt").write_text("x"), "transformer/old.ckpt is refused"),
        ("vae", lambda component: (component / "diffusion_pytorch_model.safetensors").unlink(), "is missing"),
        ("text_encoder", lambda component: (component / "model.safetensors").write_bytes(b""), "is empty"),
        ("text_encoder", lambda component: edit(component / "config.json", model_type="t5"), "FLUX.2 has 'mistral3'"),
        (
            "text_encoder",
            lambda component: edit(component / "config.json", flux2_prompt_format={"layers": 1}),
            "unknown key",
        ),
        (
            "text_encoder",
            lambda component: edit(component / "config.json", flux2_prompt_format=None),
            "it has 4 layers",
        ),
        ("tokenizer", lambda component: (component / "tokenizer.json").unlink(), "there is no vocabulary"),
        ("tokenizer", lambda component: (component / "tokenizer.json").write_text("{"), "tokenizer.json is not JSON"),
        ("tokenizer", lambda component: (component / "chat_template.jinja").unlink(), "there is no chat template"),
        (
            "tokenizer",
            lambda component: (component / "tokenizer_config.json").unlink(),
            "tokenizer_config.json is missing",
        ),
    ],
)
def test_a_broken_component_is_reported(
    folder: Path, component: str, damage: Callable[[Path], object], message: str
) -> None:
    """Only the broken component is reported, with its problem."""
    damage(folder / component)
    problems = problems_of(folder)
    assert problems.keys() == {component}
    assert message in problems[component]


def test_a_chat_template_may_be_in_three_files(folder: Path) -> None:
    """A chat template may be in ``chat_template.jinja``, ``chat_template.json`` or the tokenizer's configuration."""
    component = folder / "tokenizer"
    template = (component / "chat_template.jinja").read_text()
    (component / "chat_template.jinja").unlink()
    (component / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert problems_of(folder) == {}
    (component / "chat_template.json").write_text("{}")
    assert "there is no chat template" in problems_of(folder)["tokenizer"]
    (component / "chat_template.json").unlink()
    edit(component / "tokenizer_config.json", chat_template="x")
    assert problems_of(folder) == {}


def test_a_transformer_for_another_text_encoder_is_reported(folder: Path) -> None:
    """A transformer for embeddings of another width than the text encoder's is a problem."""
    edit(folder / "transformer" / "config.json", joint_attention_dim=999)
    assert problems_of(folder) == {"text_encoder": "its embeddings have 384 numbers, the transformer takes 999"}


def test_only_the_components_of_a_service_are_checked(folder: Path) -> None:
    """The generator's host needs only the configuration of the text encoder."""
    shutil.rmtree(folder / "tokenizer")
    (folder / "text_encoder" / "model.safetensors").unlink()
    assert problems_of(folder, SUBFOLDERS[Service.GENERATOR]) == {}
    (folder / "text_encoder" / "config.json").unlink()
    assert problems_of(folder, SUBFOLDERS[Service.GENERATOR]) == {
        "text_encoder": "config.json of the text encoder cannot be read"
    }


def test_each_component_is_one_check(folder: Path) -> None:
    """Each broken component is a failed check with the fix."""
    (folder / "text_encoder" / "config.json").unlink()
    (folder / "vae" / "config.json").write_text("")
    wanted = SUBFOLDERS[Service.GENERATOR]
    model, problems = inspect(Model(folder.name, "local", folder), wanted)
    checks = by_name(list(check_parts(model, problems, wanted, "fetch it")))
    failed = {name for name, check in checks.items() if check.status is Status.FAILED}
    assert failed == {"vae", "text_encoder"}
    assert checks["vae"].fix == "fetch it"
    assert checks["transformer"].detail.startswith("1 file, 0.01 GB")


def create_cache(home: Path, folder: Path) -> Path:
    """Create a hub cache with this model; returns the folder of its commit."""
    cached_folder = home / "hub" / "models--someone--demo" / "snapshots" / COMMIT
    shutil.copytree(folder, cached_folder)
    refs = home / "hub" / "models--someone--demo" / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    return cached_folder


@pytest.mark.parametrize("revision", ["main", COMMIT])
def test_a_model_of_the_hub_is_located_in_the_cache(tmp_path: Path, folder: Path, revision: str) -> None:
    """A cached model is located by branch or commit without the network."""
    host = described(tmp_path, HF_HOME=str(tmp_path / "hf"))
    cached_folder = create_cache(tmp_path / "hf", folder)
    assert find(NAME, revision, ALL_COMPONENTS, host) == Model(NAME, COMMIT, cached_folder)
    assert find(NAME, "other", ALL_COMPONENTS, host) == Model(NAME, "other")


@pytest.mark.parametrize(
    "variables", [{"HF_HUB_CACHE": "{}/hf/hub"}, {"XDG_CACHE_HOME": "{}"}, {"HF_HOME": "{}/hf"}, {"HOME": "{}/home"}]
)
def test_the_cache_is_that_of_the_library(tmp_path: Path, folder: Path, variables: dict[str, str]) -> None:
    """The cache is located by the same variables as in huggingface_hub."""
    create_cache(tmp_path / "hf", folder)
    (tmp_path / "huggingface").symlink_to(tmp_path / "hf")
    host = described(tmp_path, **{name: value.format(tmp_path) for name, value in variables.items()})
    (tmp_path / "home" / ".cache").mkdir()
    (tmp_path / "home" / ".cache" / "huggingface").symlink_to(tmp_path / "hf")
    assert find(NAME, "main", ALL_COMPONENTS, host).path is not None


def test_a_cache_without_all_files_of_the_hub_is_incomplete(tmp_path: Path, folder: Path) -> None:
    """A cached commit that lacks files of the hub's listing is incomplete for the services that need them."""
    host = described(tmp_path, HF_HOME=str(tmp_path / "hf"))
    cached_folder = create_cache(tmp_path / "hf", folder)
    trees = tmp_path / "hf" / "hub" / "models--someone--demo" / "trees"
    trees.mkdir()
    entry = {"size": 1, "blob_id": "0" * 40, "lfs_sha256": None, "lfs_size": None, "xet_hash": None}
    files = {"vae/config.json": entry, "vae/other.json": entry}
    (trees / f"{COMMIT}.json").write_text(json.dumps({"format_version": 1, "files": files}))
    model = find(NAME, COMMIT, ALL_COMPONENTS, host)
    assert (model.path, model.is_incomplete) == (cached_folder, True)
    assert not find(NAME, COMMIT, SUBFOLDERS[Service.TEXT_ENCODER], host).is_incomplete


@pytest.mark.parametrize("name", ["/models/flux2", "./model", "a/b/c", "a name"])
def test_invalid_model_names_are_refused(tmp_path: Path, name: str) -> None:
    """A name that is neither an existing folder nor a valid hub id is refused."""
    with pytest.raises(BrokenFile, match="neither a folder nor"):
        find(name, "main", ALL_COMPONENTS, described(tmp_path))


def test_interrupted_downloads_are_reported(tmp_path: Path, folder: Path) -> None:
    """Interrupted downloads are a warning with the command that removes them."""
    host = described(tmp_path, HF_HOME=str(tmp_path / "hf"))
    cached_folder = create_cache(tmp_path / "hf", folder)
    model = Model(NAME, COMMIT, cached_folder)
    blobs = cached_folder.parents[1] / "blobs"
    assert list(check_leftovers(model, host)) == []
    blobs.mkdir()
    (blobs / "abc.incomplete").write_bytes(bytes(100))
    [check] = check_leftovers(model, host)
    assert check.status is Status.WARNING
    assert f"1 interrupted downloads in {blobs}" in check.detail
    assert check.fix.endswith(f"find {blobs} -name '*.incomplete' -delete")
