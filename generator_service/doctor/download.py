"""A model that is not here, or not whole: where it would come from, and whether the disk has room for it."""

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from generator_service.doctor.check import Check, failed, ok, skipped, warning
from generator_service.doctor.host import Host, existing_folder
from generator_service.doctor.model import Model, hub_cache, hub_home
from generator_service.weights import Service
from shared.settings import FLUX2_DEV

YES = {"1", "ON", "YES", "TRUE"}
"""Values that huggingface_hub reads as true."""
IN_CONTAINER = "docker compose run --rm weights, on the host (on Kubernetes: the job weights)"


def how_to_fetch(model: Model, host: Host) -> str:
    """The command that completes a model."""
    if model.revision == "local":
        return f"copy the file to {model.path} again"
    return f"run {IN_CONTAINER if host.is_our_image else 'flux2 weights'}"


def check_presence(model: Model, problems: Mapping[str, str], host: Host) -> Iterator[Check]:
    """Whether the model is on this machine."""
    name = "model"
    fix = how_to_fetch(model, host)
    if model.is_incomplete:
        yield failed(name, f"{model.name}@{model.revision} is not whole in {model.path}", fix)
    elif model.path is not None:
        whole = "with broken parts" if problems else "complete"
        yield ok(name, f"{model.name}@{model.revision} in {model.path}, {whole}")
    else:
        yield _check_absence(name, model, fix, host)


def _check_absence(name: str, model: Model, fix: str, host: Host) -> Check:
    places = f"a folder of {Path.cwd()} nor in the hub's cache, {hub_cache(host)}"
    detail = f"{model.name}@{model.revision} is neither {places}"
    if host.environ.get("HF_HUB_OFFLINE", "").upper() in YES:
        return failed(name, f"{detail}; HF_HUB_OFFLINE forbids the services to fetch it", fix)
    if model.name == FLUX2_DEV and token_source(host) is None:
        return failed(name, f"{detail}; without a token the hub does not give it", f"{fix}, with a token: see below")
    return warning(name, f"{detail}; the services would fetch it when they start", f"{fix} ahead")


def token_source(host: Host) -> str | None:
    """Where the Hugging Face token comes from, as huggingface_hub finds it. The token itself is never printed."""
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if host.environ.get(variable, "").strip():
            return variable
    file = Path(host.environ.get("HF_TOKEN_PATH") or hub_home(host) / "token").expanduser()
    try:
        return str(file) if file.read_text(encoding="utf-8").strip() else None
    except (OSError, UnicodeDecodeError):
        return None


def check_token(model: Model, host: Host) -> Iterator[Check]:
    """The token that the hub wants before it gives FLUX.2 [dev]."""
    name = "token"
    source = token_source(host)
    if model.path is not None and not model.is_incomplete:
        yield skipped(name, "the model is here: none is needed")
    elif source is not None:
        yield ok(name, f"there is one, in {source}; its account must have accepted the licence on the model's page")
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
    """Whether the disk has room for the missing files."""
    name = "disk"
    if model.path is not None and not model.is_incomplete:
        yield skipped(name, "the model is here: nothing is fetched")
        return
    cache = hub_cache(host)
    folder = existing_folder(cache)
    free = shutil.disk_usage(folder).free
    detail = f"{free / 1e9:.0f} GB are free in {folder}"
    blobs = cache / f"models--{model.name.replace('/', '--')}" / "blobs"
    present = sum(file.stat().st_size for file in blobs.glob("*")) if blobs.is_dir() else 0
    if file_bytes is not None and model.path is None:
        missing = max(0, sum(file_bytes[service] for service in services) - present)
        detail += f"; {missing / 1e9:.0f} GB are to be fetched"
        if missing > free:
            yield failed(name, detail, "free some space, or set HF_HOME to a folder on a larger disk")
            return
    if not os.access(folder, os.W_OK | os.X_OK) and not host.is_our_image:
        yield failed(
            name, f"{detail}, but this user may not write there", "set HF_HOME to a folder that may be written"
        )
    else:
        yield ok(name, detail)
