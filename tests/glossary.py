"""Checks that identifiers use the field's words: ``python -m tests.glossary``, a part of ``make check``.

Each word stands for what vLLM, diffusers, text-embeddings-inference or HTTP call otherwise. The words of public names
(JSON fields, metrics, settings) are not looked at, because they are strings.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from tests import ROOT

INSTEAD = {
    "picture": "image",
    "draw": "generate",
    "drawn": "generated",
    "told": "what it is: detail, payload, message",
    "found": "what it is: matches, result, schedule",
    "sibling": "with_seeds, all_params",
    "deliver": "generate, respond",
    "delivery": "GenerationResult",
    "happening": "ProgressEvent",
    "listener": "callback",
    "shelf": "ScheduleRegistry",
    "recording": "CalibrationRun",
    "studio": "Backend",
    "census": "ReplicaCount",
    "introduction": "GeneratorInfo",
    "embedder": "RetryingEncoder",
    "optimised": "optimized",
    "optimisation": "optimization",
    "quantise": "quantize",
    "rival": "compareWith",
    "race": "comparison",
    "spread": "summary",
    "floor": "roofline",
}
ALLOWED = {"JobNotFound", "identify_listener", "x_embedder"}
"""HTTP's own words, who listens on a port, and diffusers' name."""
RESULT_KEYS = {"floor_s", "drawn", "pictures"}
"""Keys of committed result files, which are fields in ``benchmarks/generator/profile_run.py``."""
PACKAGES = ("shared", "text_encoder_service", "generator_service", "flux2_ray", "demo_model", "benchmarks", "tests")
JAVASCRIPT = re.compile(r"\b(?:const|let|function|class)\s+(\w+)")


def identifiers(source: str) -> Iterator[tuple[int, str]]:
    """The names that Python code defines or assigns, with their lines."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.lineno, node.name
            case ast.arg():
                yield node.lineno, node.arg
            case ast.Name(ctx=ast.Store()):
                yield node.lineno, node.id
            case ast.Attribute(ctx=ast.Store()):
                yield node.lineno, node.attr


def javascript_identifiers(source: str) -> Iterator[tuple[int, str]]:
    """The names that JavaScript declares, with their lines."""
    for number, line in enumerate(source.splitlines(), 1):
        yield from ((number, name) for name in JAVASCRIPT.findall(line))


def words_of(name: str) -> list[str]:
    """The words of ``snake_case`` or ``CamelCase`` in lower case, without a plural's s."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)
    return [word.lower().removesuffix("s") for word in words]


def violations(file: Path) -> Iterator[str]:
    """A line for each identifier of ``file`` with a word that has a better one."""
    source = file.read_text(encoding="utf-8")
    names = identifiers(source) if file.suffix == ".py" else javascript_identifiers(source)
    allowed = ALLOWED | (RESULT_KEYS if file.name == "profile_run.py" else set())
    for number, name in sorted({(number, name) for number, name in names if name not in allowed}):
        for word in INSTEAD.keys() & words_of(name):
            yield f"{file.relative_to(ROOT)}:{number}: {name}: instead of {word!r}: {INSTEAD[word]}"


def main() -> int:
    """Print what is wrong; 1 if anything is."""
    files = sorted(file for package in PACKAGES for kind in ("*.py", "*.js") for file in (ROOT / package).rglob(kind))
    lines = [line for file in files for line in violations(file)]
    print("\n".join(lines) or "every identifier uses the field's words")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
