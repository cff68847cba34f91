"""Hooks of mkdocs, for the site of the documents: ``make docs``."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

from fastapi import FastAPI
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from generator_service.app import create_app as create_generator
from generator_service.settings import GeneratorSettings
from text_encoder_service.app import create_app as create_text_encoder
from text_encoder_service.settings import TextEncoderSettings

ROOT = Path(__file__).parents[1]
PAGES = (
    "*.md",
    "LICENSE",
    ".env.example",
    "demo_model/README.md",
    "docs/*.md",
    "docs/images/**/*.png",
    "benchmarks/results/**/*.json",
)
SETTINGS = "<!-- settings -->"
PACKAGES = ("generator_service", "text_encoder_service", "shared", "flux2_ray", "demo_model", "benchmarks")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Take pages from the whole repository, at their own paths, so that relative links hold there and in the site."""
    of_theme = [file for file in files if file.src_dir != config.docs_dir]
    paths = sorted({path.relative_to(ROOT).as_posix() for pattern in PAGES for path in ROOT.glob(pattern)})
    pages = [File(path, str(ROOT), config.site_dir, config.use_directory_urls) for path in paths]
    schemas = [
        schema(config, "generator", create_generator(GeneratorSettings())),
        schema(config, "text-encoder", create_text_encoder(TextEncoderSettings())),
    ]
    modules = File.generated(config, "docs/modules.md", content="\n".join(module_tables()))
    return Files([*of_theme, *pages, *schemas, modules])


def schema(config: MkDocsConfig, name: str, app: FastAPI) -> File:
    """The OpenAPI schema of a service, without starting it."""
    return File.generated(config, f"docs/openapi/{name}.json", content=json.dumps(app.openapi()))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001 - mkdocs passes them by name
    """Show the settings of ``.env.example`` as tables."""
    if SETTINGS not in markdown:
        return markdown
    example = (ROOT / ".env.example").read_text(encoding="utf-8")
    return markdown.replace(SETTINGS, "\n".join(setting_tables(example)))


def setting_tables(example: str) -> Iterator[str]:
    """A heading and a table of variable, default and meaning for each section of the file."""
    for section in re.split(r"^# --- ", example, flags=re.MULTILINE)[1:]:
        title, _, body = section.partition("\n")
        yield f"\n## {title.rstrip(' -').capitalize()}\n"
        *prose, rows = body.strip().split("\n\n")
        yield from (paragraph.replace("# ", "") + "\n" for paragraph in prose)
        yield "| variable | default | meaning |\n|---|---|---|"
        for comment, variable, default in re.findall(r"((?:^# .*\n)+)^#([A-Z0-9_]+)=(.*)$", rows, re.MULTILINE):
            meaning = " ".join(comment.replace("# ", "").split())
            yield f"| `{variable}` | {f'`{default}`' if default else 'unset'} | {meaning} |"


def module_tables() -> Iterator[str]:
    """A page with a table of the modules of each folder, and the first line of their docstrings."""
    yield "# Modules\n\nThe first line of each module, in the order of the folders."
    for package in PACKAGES:
        for folder in sorted({file.parent for file in (ROOT / package).rglob("*.py")}):
            yield f"\n## `{folder.relative_to(ROOT).as_posix()}/`\n\n| module | what it is |\n|---|---|"
            yield from (f"| `{file.name}` | {first_line(file)} |" for file in sorted(folder.glob("*.py")))


def first_line(file: Path) -> str:
    """The first line of a module's docstring."""
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return docstring.split("\n\n")[0].replace("\n", " ").replace("``", "`").replace("|", "\\|")
