"""``flux2 weights`` against a hub in this process: its requests, and how it resumes."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from demo_model.services import WEIGHTS

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = "text_encoder/model.safetensors"
UNWANTED = {"text_encoder/pytorch_model.bin": b"a pickle", "flux2-dev.safetensors": b"one file", "LICENSE.md": b"text"}
PATIENCE_S = 60


@dataclass
class Hub:
    """A model hub with one model: the demo model's files and some that are not needed."""

    files: dict[str, bytes]
    is_gated: bool = False
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    """Method, name and range of every request for a file."""
    is_stuck: bool = False
    """Send half of the large file, then nothing more."""
    stuck: threading.Event = field(default_factory=threading.Event)
    freed: threading.Event = field(default_factory=threading.Event)


class Handler(BaseHTTPRequestHandler):
    """The three routes of the hub that a download needs."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if self.hub.is_gated:
            self.respond(403, b"", {"X-Error-Code": "GatedRepo"})
        elif path == f"/api/models/someone/demo/revision/{COMMIT}":
            names = [{"rfilename": name} for name in self.hub.files]
            self.respond(200, json.dumps({"id": "someone/demo", "sha": COMMIT, "siblings": names}).encode())
        elif path.startswith(f"/api/models/someone/demo/tree/{COMMIT}"):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}  # noqa: S324 - as git
                for name, data in self.hub.files.items()
            ]
            self.respond(200, json.dumps(tree).encode())
        elif path.startswith(f"/someone/demo/resolve/{COMMIT}/"):
            self.send_file(path.split(f"{COMMIT}/")[1])
        else:
            self.respond(404, b"", {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET  # noqa: N815 - the name that the server calls

    def send_file(self, name: str) -> None:
        """Send a file, or the rest of it."""
        wanted = self.headers.get("Range", "")
        self.hub.requests.append((self.command, name, wanted))
        data = self.hub.files[name]
        etag = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        start = int(wanted.removeprefix("bytes=").split("-")[0] or 0) if wanted else 0
        if start:
            etag["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if self.command == "GET" and name == LARGE and self.hub.is_stuck:
            self.respond(200, data, etag, num_sent=len(data) // 2)
            self.wfile.flush()
            self.hub.stuck.set()
            self.hub.freed.wait(PATIENCE_S)
            self.close_connection = True
            return
        self.respond(206 if start else 200, data[start:], etag)

    def respond(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, num_sent: int | None = None
    ) -> None:
        """Send status, headers and, except for HEAD, the body."""
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:num_sent])

    def handle(self) -> None:
        """Serve a client until it disconnects, also without notice because it was killed."""
        with suppress(ConnectionError):
            super().handle()

    def log_message(self, *_arguments: object) -> None:
        """Suppress the log."""


@pytest.fixture
def hub() -> Iterator[tuple[Hub, str]]:
    """The hub and its address."""
    files = {file.relative_to(WEIGHTS).as_posix(): file.read_bytes() for file in WEIGHTS.rglob("*") if file.is_file()}
    model = Hub(files | UNWANTED)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": model}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield model, f"http://127.0.0.1:{server.server_port}"
    finally:
        model.freed.set()
        server.shutdown()
        server.server_close()
        thread.join()


def fetching(url: str, home: Path, *options: str) -> subprocess.Popen[str]:
    """The running command."""
    hub_variables = {"HF_ENDPOINT": url, "HF_HOME": str(home), "FLUX2_MODEL": "someone/demo", "FLUX2_REVISION": COMMIT}
    environment = {**os.environ, **hub_variables, "HF_HUB_OFFLINE": "0", "COLUMNS": "200"}
    command = [sys.executable, "-c", "from generator_service.cli.app import app; app()", "weights", *options]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=WEIGHTS.parents[1]
    )


def test_only_required_files_are_fetched(hub: tuple[Hub, str], tmp_path: Path) -> None:
    """The folders of the pipeline's components at one commit: no pickles, no second weights, no duplicates."""
    model, url = hub
    for _ in range(2):
        process = fetching(url, tmp_path)
        out, err = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, err
        assert f"someone/demo is available at revision {COMMIT}" in out
    fetched = [name for method, name, _ in model.requests if method == "GET"]
    assert sorted(fetched) == sorted(model.files.keys() - UNWANTED.keys())
    revision_folder = tmp_path / "hub" / "models--someone--demo" / "snapshots" / COMMIT
    assert all((revision_folder / name).read_bytes() == model.files[name] for name in fetched)


def test_a_service_fetches_only_its_own_components(hub: tuple[Hub, str], tmp_path: Path) -> None:
    """On a host with only the text encoder the transformer is not fetched."""
    model, url = hub
    process = fetching(url, tmp_path, "--for", "text-encoder")
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    folders = {name.split("/")[0] for method, name, _ in model.requests if method == "GET"}
    assert folders == {"model_index.json", "text_encoder", "tokenizer"}


def test_an_interrupted_download_resumes(hub: tuple[Hub, str], tmp_path: Path) -> None:
    """Files that had arrived when the process was killed are not fetched again."""
    model, url = hub
    model.is_stuck = True
    process = fetching(url, tmp_path)
    assert model.stuck.wait(PATIENCE_S)
    process.kill()
    process.communicate()
    first = [name for method, name, _ in model.requests if method == "GET"]
    model.is_stuck = False
    model.freed.set()
    model.requests.clear()
    process = fetching(url, tmp_path)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    second = [name for method, name, _ in model.requests if method == "GET"]
    assert len(first) > 1
    assert set(first) & set(second) == {LARGE}
    assert set(first) | set(second) == model.files.keys() - UNWANTED.keys()


def test_a_broken_connection_resumes(hub: tuple[Hub, str], tmp_path: Path) -> None:
    """Only the rest of a file is requested."""
    model, url = hub
    model.files[LARGE] = bytes(24 * 2**20)  # the client resumes at multiples of 10 MiB
    model.is_stuck = True
    process = fetching(url, tmp_path, "--for", "text-encoder")
    assert model.stuck.wait(PATIENCE_S)
    model.is_stuck = False
    model.freed.set()  # the connection ends half way
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    spans = [span for method, name, span in model.requests if (method, name) == ("GET", LARGE)]
    assert [span for span in spans if span.startswith("bytes=") and not span.startswith("bytes=0-")]
    revision_folder = tmp_path / "hub" / "models--someone--demo" / "snapshots" / COMMIT
    assert (revision_folder / LARGE).read_bytes() == model.files[LARGE]


def test_a_gated_model_is_one_line(hub: tuple[Hub, str], tmp_path: Path) -> None:
    """Without a valid token the error says that the license must be accepted."""
    model, url = hub
    model.is_gated = True
    process = fetching(url, tmp_path)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert "licence must be accepted" in " ".join(err.split())
    assert "Traceback" not in err
