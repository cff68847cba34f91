"""Hooks of mkdocs, for the site of the documents: ``make docs``."""

import json
from pathlib import Path

from fastapi import FastAPI
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

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


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Take pages from the whole repository, at their own paths, so that relative links hold there and in the site."""
    of_theme = [file for file in files if file.src_dir != config.docs_dir]
    paths = sorted({path.relative_to(ROOT).as_posix() for pattern in PAGES for path in ROOT.glob(pattern)})
    pages = [File(path, str(ROOT), config.site_dir, config.use_directory_urls) for path in paths]
    schemas = [
        schema(config, "generator", create_generator(GeneratorSettings())),
        schema(config, "text-encoder", create_text_encoder(TextEncoderSettings())),
    ]
    return Files([*of_theme, *pages, *schemas])


def schema(config: MkDocsConfig, name: str, app: FastAPI) -> File:
    """The OpenAPI schema of a service, without starting it."""
    return File.generated(config, f"docs/openapi/{name}.json", content=json.dumps(app.openapi()))
