"""The documents: the names in them exist, their links are valid, and their code compiles."""

import ast
import io
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from dotenv import dotenv_values

from flux2_shared.errors import Flux2Error, ModelRefused
from flux2_shared.settings import ServiceSettings
from generator_service.api.schemas import GenerateRequest
from generator_service.engine.metrics import GeneratorMetrics
from generator_service.settings import GeneratorSettings
from text_encoder_service.settings import TextEncoderSettings

ROOT = Path(__file__).parents[1]
SETTINGS: tuple[type[ServiceSettings], ...] = (TextEncoderSettings, GeneratorSettings)
LOCAL_PATHS = ("/tmp/", "/work/", "/root/")  # noqa: S108 - searched for, not used


def documents() -> list[Path]:
    """Every Markdown file of the project."""
    folders = [folder for folder in ROOT.iterdir() if folder.is_dir() and not folder.name.startswith(".")]
    return sorted([*ROOT.glob("*.md"), *(file for folder in folders for file in folder.rglob("*.md"))])


def relative(file: Path) -> str:
    """The file's path inside the project."""
    return file.relative_to(ROOT).as_posix()


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def without_code(text: str) -> str:
    """A document without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)


def rows(text: str) -> Iterator[list[str]]:
    """The cells of every row of every table."""
    for line in without_code(text).splitlines():
        if line.startswith("| "):
            yield [cell.strip() for cell in line.strip("|").split(" | ")]


def variables(settings: type[ServiceSettings]) -> dict[str, str]:
    """The environment variable of every setting, and the setting's own name."""
    names = {}
    for name, field in settings.model_fields.items():
        alias = field.validation_alias
        prefixed = f"{settings.model_config.get('env_prefix', '')}{name}".upper()
        names[alias if isinstance(alias, str) else prefixed] = name
    return names


def compose_variables() -> dict[str, str]:
    """The variables that the compose files read, with their defaults."""
    defaults: dict[str, str] = {}
    for name in ("docker-compose.one-gpu.yml", "docker-compose.yml"):  # the second default applies
        text = text_of(name)
        defaults |= dict(re.findall(r"\$\{(\w+):-([^}]*)\}", text))
        assert len(re.findall(r"\$\{", text)) == len(re.findall(r"\$\{\w+:[-+]", text)), "a variable without a default"
        for arguments in re.findall(r"args: \[(.*)\]", text):  # set in the Dockerfile
            defaults |= dict.fromkeys(arguments.split(", "), "")
    return defaults


def documented_settings() -> list[tuple[str, str]]:
    """The variables of ``.env.example`` and their defaults, in its order; the default of an unset one is empty."""
    return re.findall(r"^# ?([A-Z0-9_]+)=(.*)$", text_of(".env.example"), re.MULTILINE)


def test_every_setting_is_documented() -> None:
    """``.env.example`` has exactly the settings and the variables of the compose files, each below its description."""
    known = {v for s in SETTINGS for v in variables(s)} | compose_variables().keys()
    assert {variable for variable, _ in documented_settings()} == known
    lines = text_of(".env.example").splitlines()
    assert [line for above, line in pairwise(lines) if re.match(r"#[A-Z]", line) and not above.startswith("# ")] == []


def test_documented_defaults_of_compose_are_correct() -> None:
    """The documented default of a variable that only the compose files read is the one in them."""
    documented = dict(documented_settings())
    settings = {v for s in SETTINGS for v in variables(s)}
    alone = {k: v for k, v in compose_variables().items() if k not in settings}
    assert {k: documented[k] for k in alone} == alone


NOTHING: tuple[object, ...] = (None, (), frozenset())


@pytest.mark.parametrize("settings", SETTINGS)
def test_documented_defaults_are_correct(
    settings: type[ServiceSettings], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The documented default of a setting is correct; an unset setting has none."""
    monkeypatch.chdir(tmp_path)
    defaults = settings()
    documented = documented_settings()
    Path(".env").write_text("\n".join(f"{k}={v}" for k, v in documented if v), encoding="utf-8")
    assert settings() == defaults
    unset = {variable for variable, default in documented if not default}
    assert {v for v, field in variables(settings).items() if getattr(defaults, field) in NOTHING} == unset & set(
        variables(settings)
    )


def test_the_example_is_a_valid_dotenv_file() -> None:
    """``.env.example`` sets nothing as it is, and each of its lines is valid without its leading #."""
    text = text_of(".env.example")
    assert dotenv_values(stream=io.StringIO(text)) == {}
    documented = documented_settings()
    uncommented = re.sub(r"^#(?=[A-Z0-9_]+=)", "", text, flags=re.MULTILINE)
    assert dotenv_values(stream=io.StringIO(uncommented)) == dict(documented)
    assert len(documented) == len(dict(documented))


def test_every_metric_is_documented() -> None:
    """``docs/run.md`` has exactly the metrics that the services export."""
    endings = {"counter": "_total", "info": "_info"}
    families = [family for family in GeneratorMetrics().registry.collect() if family.name.startswith("flux2_")]
    metrics = {family.name + endings.get(family.type, "") for family in families}
    assert {row[0].strip("`") for row in rows(text_of("docs/run.md")) if "`flux2_" in row[0]} == metrics


def test_every_error_is_documented() -> None:
    """``docs/wire-format.md`` has exactly the statuses and codes that clients can receive."""
    clients_meet: set[type[Flux2Error]] = {Flux2Error, *Flux2Error.__subclasses__()}
    clients_meet.remove(ModelRefused)
    documented = {(row[0], row[1].strip("`")) for row in rows(text_of("docs/wire-format.md")) if row[0].isdigit()}
    assert documented == {(str(error.status), error.code) for error in clients_meet}


def test_every_field_of_a_generation_is_documented() -> None:
    """``docs/wire-format.md`` has exactly the fields of ``POST /generate``."""
    section = text_of("docs/wire-format.md").split("## `POST /generate`")[1].split("\n### ")[0]
    names = [name for row in rows(section) for name in row[0].split(", ") if re.fullmatch(r"`\w+`", name)]
    assert sorted(names) == sorted(f"`{name}`" for name in GenerateRequest.model_fields)


def members(tree: ast.AST) -> set[str]:
    """The names defined at the top of a module or class, and the attributes that its methods set."""
    names = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    attributes = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    if isinstance(tree, ast.ClassDef):
        names |= {node.attr for node in attributes if isinstance(node.ctx, ast.Store)}
    return names


def test_names_in_the_tour_exist() -> None:
    """Every name in the tours of ``docs/architecture.md`` is defined in a file that was named before it."""
    tour = text_of("docs/architecture.md").split("\n## The life of ", 1)[1].split("\n## Layers")[0]
    trees: list[ast.Module] = []
    checked = 0
    for name in re.findall(r"`([^`]+)`", tour):
        if re.fullmatch(r"[\w/]+\.py", name):
            trees.append(ast.parse(text_of(name)))
        elif re.fullmatch(r"[A-Za-z_]+(\.[a-z_]+)?", name) and name not in ("compare", "native"):
            head, _, attribute = name.partition(".")
            holders = [tree for tree in trees if head in members(tree)]
            assert holders, f"no file before it defines {name}"
            if attribute:
                (definition,) = (
                    node for node in holders[-1].body if isinstance(node, ast.ClassDef) and node.name == head
                )
                assert attribute in members(definition), name
            checked += 1
    assert checked > 40


@pytest.mark.parametrize("document", documents(), ids=relative)
def test_links_are_valid(document: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", without_code(document.read_text(encoding="utf-8")))
    inside = [link.split("#")[0] for link in links if not re.match(r"[a-z]+:|#", link)]
    assert [link for link in inside if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("document", documents(), ids=relative)
def test_python_in_documents_compiles(document: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    for block in blocks:
        compile(block, relative(document), "exec")


@pytest.mark.parametrize("document", [*documents(), ROOT / ".env.example"], ids=relative)
def test_documents_name_no_local_paths(document: Path) -> None:
    """No document has a path that is valid only on its author's machine."""
    text = document.read_text(encoding="utf-8")
    assert [path for path in LOCAL_PATHS if path in text] == []
