"""The command ``flux2`` against services in this process, over a real socket."""

import errno
import http.server
import os
import re
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner, Result

from demo_model.services import WEIGHTS
from generator_service.cli.app import app
from generator_service.cli.generate import StepTimeline
from generator_service.engine.imaging import read_provenance

PROMPT = "a large red circle in the center on a white background"
QUICK = ("--steps", "4", "--size", "64x64", "--seed", "7")


def run(*arguments: object, **environment: str) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200", **environment})


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image)


def test_an_image_is_generated_and_summarized(generator_url: str, tmp_path: Path) -> None:
    """The file is written, and seed, schedule and time are printed."""
    result = run("generate", PROMPT, *QUICK, "--cache", 2, "-o", tmp_path / "x.png", "--url", generator_url)
    assert result.exit_code == 0, result.output
    assert pixels(tmp_path / "x.png").shape == (64, 64, 3)
    assert "seed 7" in result.stdout
    assert "2 of 4 steps computed" in result.stdout
    generated = read_provenance(tmp_path / "x.png")
    assert (generated.prompt, generated.num_inference_steps, generated.seed, generated.cache, generated.width) == (
        PROMPT,
        4,
        7,
        2,
        64,
    )


@pytest.mark.parametrize(("name", "kind"), [("x.jpg", "JPEG"), ("x.JPEG", "JPEG"), ("x.webp", "WEBP")])
def test_the_file_extension_chooses_the_format(generator_url: str, tmp_path: Path, name: str, kind: str) -> None:
    """The file's extension decides the format."""
    assert run("generate", PROMPT, *QUICK, "-o", tmp_path / name, "--url", generator_url).exit_code == 0
    with Image.open(tmp_path / name) as image:
        assert image.format == kind


def test_an_image_can_be_inspected_and_repeated(generator_url: str, tmp_path: Path) -> None:
    """``inspect`` prints every parameter; ``--like`` repeats the image bit for bit, and other options change it."""
    first, again, other = (tmp_path / f"{name}.png" for name in ("first", "again", "other"))
    generated = run("generate", PROMPT, "--size", "64x80", "--cache", "ultra", "-o", first, "--url", generator_url)
    assert generated.exit_code == 0
    message = run("inspect", first)
    assert message.exit_code == 0
    for part in ("AI generated", PROMPT, "ultra", "num_inference_steps", str(read_provenance(first).seed)):
        assert part in message.stdout
    assert run("generate", "--like", first, "-o", again, "--url", generator_url).exit_code == 0
    assert np.array_equal(pixels(first), pixels(again))
    assert read_provenance(first) == read_provenance(again)
    assert run("generate", "--like", first, "--seed", 1, "-o", other, "--url", generator_url).exit_code == 0
    assert not np.array_equal(pixels(first), pixels(other))
    assert read_provenance(other).prompt == PROMPT


def test_local_generation_equals_that_of_the_services(generator_url: str, tmp_path: Path) -> None:
    """``--local`` generates the same image as the services."""
    options = ("generate", PROMPT, *QUICK, "--cache", "fast")
    assert run(*options, "-o", tmp_path / "remote.png", "--url", generator_url).exit_code == 0
    local = run(*options, "--local", "-o", tmp_path / "local.png", FLUX2_MODEL=str(WEIGHTS))
    assert local.exit_code == 0, local.output
    assert np.array_equal(pixels(tmp_path / "remote.png"), pixels(tmp_path / "local.png"))
    assert read_provenance(tmp_path / "remote.png") == read_provenance(tmp_path / "local.png")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--cache", "turbo"), "there is no schedule 'turbo': choose one of none, slow"),
        (("--size", "64"), "--size must be WIDTHxHEIGHT"),
        (("--size", "65x64"), "width: must be a multiple of 16"),
        (("-o", "x.gif"), ".png, .jpg"),
        (("-o", "absent/x.png"), "absent/x.png cannot be written: No such file or directory"),
        (("--url", "http://127.0.0.1:9"), "no response from http://127.0.0.1:9"),
        (("--url", "nonsense"), "no response from nonsense"),
    ],
)
def test_mistakes_are_one_line(generator_url: str, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    """An error is one readable message with a nonzero status, and no complete or partial file is left."""
    result = run("generate", PROMPT, *QUICK, "--url", generator_url, *options)
    assert result.exit_code in (1, 2)
    assert message in re.sub(r"[\s│]+", " ", result.output)
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_is_required(generator_url: str) -> None:
    """Without ``--like`` a prompt is required."""
    result = run("generate", "--url", generator_url)
    assert result.exit_code == 2
    assert "give a prompt, or --like FILE" in result.output


def test_a_file_without_provenance_is_one_line(tmp_path: Path) -> None:
    """A file that this service did not write is refused."""
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    for arguments in (("inspect", tmp_path / "x.png"), ("generate", "--like", tmp_path / "x.png")):
        result = run(*arguments)
        assert result.exit_code == 1
        assert "flux2: x.png was not generated by this service" in result.output


def test_the_timeline_distinguishes_computed_from_predicted_steps() -> None:
    """Each step adds a block or a dot."""
    timeline = StepTimeline(Console(quiet=True).status(""))
    for step, is_computed in enumerate((True, True, False, True)):
        timeline.on_step(step, is_computed)
    assert str(timeline._timeline) == "██·█"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--guidance", "nan"), "--guidance must be a finite number, not nan"),
        (("--guidance", "inf"), "--guidance must be a finite number, not inf"),
        (("--lora", "ink:nan"), "--lora must be a finite number, not nan"),
        (("--lora", "ink:²"), "--lora must be NAME or NAME:SCALE, not 'ink:²'"),
        (("--size", "²x²"), "--size must be WIDTHxHEIGHT"),
        (("--size", "٣٢x٣٢"), "--size must be WIDTHxHEIGHT"),
        (("--image", "missing.png"), "missing.png does not exist"),
        (("--image", "."), ". is not a file"),
        (("--like", "missing.png"), "missing.png does not exist"),
        (("--token", "²"), "the token contains characters that a header cannot have"),
        (("-o", "missing/x.png"), "missing/x.png cannot be written: No such file or directory"),
        (("-o", "folder.png"), "folder.png is a folder; give the name of a file"),
        (("-o", "x.gif"), "the output's name must end in one of .png, .jpg, .jpeg, .webp"),
        (("-o", "x" * 300 + ".png"), "cannot be written: File name too long"),
        (("--url", "nothing"), "no response from nothing"),
        (("--url", "http://[::1"), "no response from http://[::1"),
    ],
)
def test_mistakes_are_reported_before_the_generation(
    options: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line names the option and what would be right; nothing is requested and no file is left."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    result = run("generate", PROMPT, *QUICK, "--url", "http://127.0.0.1:1", *options)
    assert result.exit_code in (1, 2)
    assert re.fullmatch(rf"flux2: .*{re.escape(message)}[^\n]*\n", result.stderr), result.stderr
    assert "Traceback" not in result.output
    assert [file.name for file in tmp_path.iterdir()] == ["folder.png"]


def test_an_unknown_cache_is_the_services_error(generator_url: str, tmp_path: Path) -> None:
    """A digit that is not ASCII is not a number; the service says that there is no such schedule."""
    result = run("generate", PROMPT, *QUICK, "--cache", "²", "-o", tmp_path / "x.png", "--url", generator_url)
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "cache: " in result.stderr


@pytest.mark.parametrize("broken", ["folder", "disk"])
def test_a_file_that_cannot_be_written_is_reported_before_the_generation(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a folder without write permission nor a full disk costs a generation, nor the file that is there."""

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC if broken == "disk" else errno.EACCES, "reason")

    (tmp_path / "x.png").write_bytes(b"before")
    if broken == "disk":
        monkeypatch.setattr(os, "posix_fallocate", fail)
    else:
        monkeypatch.setattr(Path, "open", fail)
    result = run("generate", PROMPT, *QUICK, "-o", tmp_path / "x.png", "--url", "http://127.0.0.1:1")
    monkeypatch.undo()
    assert (result.exit_code, result.stderr) == (1, f"flux2: {tmp_path}/x.png cannot be written: reason\n")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("x.png", b"before")]


def test_the_default_file_is_not_replaced(generator_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ``-o``, an existing ``flux2.png`` is kept unless ``--force`` is given."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flux2.png").write_bytes(b"before")
    refused = run("generate", PROMPT, *QUICK, "--url", generator_url)
    assert (refused.exit_code, refused.stderr) == (
        1,
        "flux2: flux2.png exists; give a name with -o, or replace it with --force\n",
    )
    assert (tmp_path / "flux2.png").read_bytes() == b"before"
    assert run("generate", PROMPT, *QUICK, "--url", generator_url, "--force").exit_code == 0
    assert pixels(tmp_path / "flux2.png").shape == (64, 64, 3)
    assert run("generate", PROMPT, *QUICK, "--url", generator_url, "-o", "flux2.png").exit_code == 0


def test_a_prompt_that_is_not_text_is_one_line(tmp_path: Path) -> None:
    """Bytes of another encoding in the terminal, which Python reads as lone surrogates, are refused."""
    result = run("generate", "\udcff", "-o", tmp_path / "x.png")
    assert (result.exit_code, result.stderr) == (2, "flux2: the prompt and all names must be UTF-8\n")


def test_invalid_settings_are_one_line(tmp_path: Path) -> None:
    """An invalid variable of the environment is named, also with ``--local``."""
    result = run("generate", PROMPT, "--local", "-o", tmp_path / "x.png", GENERATOR_DRAIN_S="soon")
    assert result.exit_code == 1
    assert re.fullmatch(r"flux2: bad setting: (generator_)?drain_s: [^\n]*\n", result.stderr, re.IGNORECASE), (
        result.stderr
    )


@pytest.mark.parametrize(
    "answer", [b"{}", b"event: completed\ndata: {}\n\n", b"event: step\ndata: x\n\n", b"data: 1\n\n"]
)
def test_another_server_is_one_line(answer: bytes, tmp_path: Path) -> None:
    """The response of something that is not a generator is reported, whatever it is."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request).start()
        url = f"http://127.0.0.1:{server.server_port}"
        result = run("generate", PROMPT, *QUICK, "-o", tmp_path / "x.png", "--url", url)
    assert result.exit_code == 1
    assert re.fullmatch(r"flux2: [^\n]*(not that of a generator|is incomplete)\n", result.stderr), result.stderr
    assert list(tmp_path.iterdir()) == []
