"""Checks for a missing or incomplete model: its download, the token and the disk."""

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from flux2_shared.model.subfolders import Service
from flux2_shared.settings import FLUX2_DEV
from generator_service.doctor.check import Check, failed, ok, skipped, warning
from generator_service.doctor.host import Host, existing_folder
from generator_service.doctor.model import Model, hub_cache, hub_home

YES = {"1", "ON", "YES", "TRUE"}
"""Values that huggingface_hub reads as true."""
IN_CONTAINER = "docker compose run --rm weights, on the host (on Kubernetes: the job weights)"


def download_hint(model: Model, host: Host) -> str:
    """Return the command that completes a model."""
    if model.revision == "local":
        return f"copy the file to {model.path} again"
    return f"run {IN_CONTAINER if host.is_our_image else 'flux2 weights'}"


def check_presence(model: Model, problems: Mapping[str, str], host: Host) -> Iterator[Check]:
    """Check whether the model is on this machine."""
    name = "model"
    fix = download_hint(model, host)
    if model.is_incomplete:
        yield failed(name, f"{model.name}@{model.revision} is incomplete in {model.path}", fix)
    elif model.path is not None:
        state = "with broken parts" if problems else "complete"
        yield ok(name, f"{model.name}@{model.revision} in {model.path}, {state}")
    else:
        yield _check_absence(name, model, fix, host)


def _check_absence(name: str, model: Model, fix: str, host: Host) -> Check:
    places = f"a folder of {Path.cwd()} nor in the hub's cache, {hub_cache(host)}"
    detail = f"{model.name}@{model.revision} is neither {places}"
    if host.environ.get("HF_HUB_OFFLINE", "").upper() in YES:
        return failed(name, f"{detail}; HF_HUB_OFFLINE prevents the services from downloading it", fix)
    if model.name == FLUX2_DEV and token_source(host) is None:
        return failed(name, f"{detail}; downloading it needs a token", f"{fix}, with a token: see below")
    return warning(name, f"{detail}; the services would download it at startup", f"{fix} first")


def token_source(host: Host) -> str | None:
    """Return where huggingface_hub finds its token: a variable or a file. The token itself is never printed."""
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if host.environ.get(variable, "").strip():
            return variable
    file = Path(host.environ.get("HF_TOKEN_PATH") or hub_home(host) / "token").expanduser()
    try:
        return str(file) if file.read_text(encoding="utf-8").strip() else None
    except (OSError, UnicodeDecodeError):
        return None


def check_token(model: Model, host: Host) -> Iterator[Check]:
    """Check the Hugging Face token, which downloading FLUX.2 [dev] needs."""
    name = "token"
    source = token_source(host)
    if model.path is not None and not model.is_incomplete:
        yield skipped(name, "not needed: the model is present")
    elif source is not None:
        yield ok(name, f"set in {source}; its account must have accepted the licence on the model's page")
    elif host.is_our_image:
        yield skipped(name, "none in this container: only the download, docker compose run --rm weights, has it")
    elif model.name == FLUX2_DEV:
        fix = "accept the licence on the model's page, then hf auth login, or set HF_TOKEN or HF_TOKEN_PATH"
        yield warning(name, "none is set, and the model is gated", fix)
    else:
        yield skipped(name, "none is set; a public model needs none")


def check_disk(
    model: Model, file_bytes: Mapping[Service, int] | None, services: tuple[Service, ...], host: Host
) -> Iterator[Check]:
    """Check whether the disk has space for the missing files."""
    name = "disk"
    if model.path is not None and not model.is_incomplete:
        yield skipped(name, "not needed: the model is present")
        return
    cache = hub_cache(host)
    folder = existing_folder(cache)
    free = shutil.disk_usage(folder).free
    detail = f"{free / 1e9:.0f} GB are free in {folder}"
    blobs = cache / f"models--{model.name.replace('/', '--')}" / "blobs"
    present = sum(file.stat().st_size for file in blobs.glob("*")) if blobs.is_dir() else 0
    if file_bytes is not None and model.path is None:
        missing = max(0, sum(file_bytes[service] for service in services) - present)
        detail += f"; {missing / 1e9:.0f} GB must be downloaded"
        if missing > free:
            yield failed(name, detail, "free some space, or set HF_HOME to a folder on a larger disk")
            return
    if not os.access(folder, os.W_OK | os.X_OK) and not host.is_our_image:
        yield failed(name, f"{detail}, but not writable for this user", "set HF_HOME to a writable folder")
    else:
        yield ok(name, detail)
