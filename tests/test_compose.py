"""The containers' configuration, read from the files: what is started, and the rights of each container."""

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from demo_model.services import OPENMP
from generator_service.engine.metrics import GeneratorMetrics
from generator_service.settings import GeneratorSettings
from tests.test_docs import ROOT, SETTINGS, compose_variables, variables

Service = dict[str, Any]
PROFILES = {
    "text-encoder": [],
    "generator": [],
    "weights": ["setup"],
    "demo-text-encoder": ["demo"],
    "demo": ["demo"],
    "prometheus": ["monitoring"],
    "grafana": ["monitoring"],
}
ENCODERS = ("text-encoder", "demo-text-encoder")
GENERATORS = ("generator", "demo")
ON_GPUS = ("text-encoder", "generator")
OF_LIBRARIES = {
    "GOMP_SPINCOUNT",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "HF_TOKEN",
    "HF_TOKEN_PATH",
    "OMP_NUM_THREADS",
    "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR",
}
DEFAULT = re.compile(r"\$\{\w+:[-+]([^}]*)\}")


class Loader(yaml.SafeLoader):
    """A loader that ignores compose's own tags."""


def list_of(loader: Loader, node: yaml.Node) -> list[Any]:
    """The list behind ``!override``."""
    assert isinstance(node, yaml.SequenceNode)
    return loader.construct_sequence(node, deep=True)


Loader.add_constructor("!override", list_of)


def read(name: str) -> dict[str, Any]:
    """A compose file with resolved anchors and the default of every variable; ``:+`` is resolved as if it were set."""
    text = DEFAULT.sub(r"\1", (ROOT / name).read_text(encoding="utf-8"))
    loaded: dict[str, Any] = yaml.load(text, Loader)  # noqa: S506 - the loader is a safe one
    return loaded


COMPOSE = read("docker-compose.yml")
SERVICES: dict[str, Service] = COMPOSE["services"]
EVERY_SERVICE = pytest.mark.parametrize("name", PROFILES)
OURS = (*ENCODERS, *GENERATORS)


@cache
def stages() -> dict[str, str]:
    """The Dockerfile's stages by name."""
    stage_texts = re.split(r"^FROM ", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {re.match(r"\S+ AS ([\w-]+)", stage)[1]: stage for stage in stage_texts}  # type: ignore[index]


def gpus(service: Service) -> list[dict[str, Any]]:
    """The GPUs that a service reserves."""
    devices: list[dict[str, Any]] = (
        service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices")
    )
    return devices or []


def volumes(service: Service) -> dict[str, tuple[str, bool]]:
    """The mount point of each volume, and whether it is read-only, by its source."""
    mounts = [volume.split(":") for volume in service.get("volumes", [])]
    return {source: (target, mode == ["ro"]) for source, target, *mode in mounts}


def seconds(duration: str) -> int:
    """``330s`` or ``30m`` as a number."""
    return int(duration[:-1]) * {"s": 1, "m": 60}[duration[-1]]


def test_services_that_are_started() -> None:
    """``up`` without options starts the two services; everything else needs its profile."""
    assert {name: service.get("profiles", []) for name, service in SERVICES.items()} == PROFILES


def test_each_service_has_a_gpu_of_its_own() -> None:
    """GPUs are reserved by id or UUID, in the long form, and only by the two services."""
    reserved = {name: gpus(service) for name, service in SERVICES.items() if gpus(service)}
    assert set(reserved) == set(ON_GPUS)
    for (device,) in reserved.values():
        assert device.keys() == {"driver", "device_ids", "capabilities"}
        assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert reserved["text-encoder"][0]["device_ids"] != reserved["generator"][0]["device_ids"]
    assert {"ENCODER_GPU", "GENERATOR_GPU"} <= compose_variables().keys()
    assert all(SERVICES[name]["environment"][f"{prefix}_DEVICE"] == "cuda" for name, prefix in prefixes(ON_GPUS))


def prefixes(names: tuple[str, ...]) -> list[tuple[str, str]]:
    """Each service with the prefix of its variables."""
    return [(name, "TEXT_ENCODER" if name in ENCODERS else "GENERATOR") for name in names]


def test_the_demo_shares_the_cpu_as_make_serve_does() -> None:
    """OpenMP's settings in the demo's containers equal those of ``demo_model.services``."""
    containers = {"text_encoder_service": "demo-text-encoder", "generator_service": "demo"}
    for module, defaults in OPENMP.items():
        environment = SERVICES[containers[module]]["environment"]
        assert {k: v for k, v in environment.items() if k.startswith(("OMP_", "GOMP_"))} == defaults


def test_both_services_can_share_a_gpu() -> None:
    """The override file gives both services the same GPU."""
    assert "devices: !override" in (ROOT / "docker-compose.one-gpu.yml").read_text(encoding="utf-8")
    override = read("docker-compose.one-gpu.yml")["services"]
    assert override.keys() == set(ON_GPUS)
    assert all(service.keys() == {"deploy"} for service in override.values())
    assert gpus(override["text-encoder"]) == gpus(override["generator"]) != []


def test_both_services_load_at_the_same_time() -> None:
    """Neither waits for the other to start: readiness decides about traffic."""
    assert not any("depends_on" in SERVICES[name] for name in ON_GPUS)
    assert SERVICES["demo"]["depends_on"] == ["demo-text-encoder"]  # the short form: started, not ready


@EVERY_SERVICE
def test_containers_have_minimal_rights(name: str) -> None:
    """Containers have no root user, writable root file system, capabilities, new privileges or writable mounts."""
    service = SERVICES[name]
    assert int(service["user"].split(":")[0]) > 0
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert any(mount.startswith("/tmp:size=") for mount in service["tmpfs"])  # noqa: S108 - the container's own
    loosening = {"privileged", "cap_add", "devices", "network_mode", "pid", "ipc", "userns_mode", "volumes_from"}
    assert loosening.isdisjoint(service)
    writable = {("weights", "weights"), ("prometheus", "metrics"), *((on_gpu, "compiled") for on_gpu in ON_GPUS)}
    for source, (_, is_read_only) in volumes(service).items():
        assert is_read_only or (name, source) in writable
        assert "docker.sock" not in source


@EVERY_SERVICE
def test_resources_are_limited(name: str) -> None:
    """Memory is limited, logs are rotated, and an init process reaps zombies."""
    service = SERVICES[name]
    assert re.fullmatch(r"\d+[mg]", service["mem_limit"])
    assert service["logging"]["options"].keys() == {"max-size", "max-file"}
    assert service["init"] is True


IDLE_MIB = 520
"""The resident size of the demo's generator after its start, as measured."""
LARGEST_IMAGE_MIB = 1300
"""What an image of 2048x2048 takes in addition while it is generated, as measured."""


@pytest.mark.parametrize("name", GENERATORS)
def test_no_request_exceeds_the_memory(name: str) -> None:
    """The largest request fits beside full caches: body, reference images at full size, image and temporary files."""
    settings = GeneratorSettings()
    bodies = 5 * settings.max_body_bytes  # as pieces, as bytes, as text, as a field, and without base64
    references = settings.max_references * settings.max_reference_pixels * 3
    conversion = settings.max_reference_pixels * 11  # of one image at a time, from four channels to three
    caches = settings.embedding_cache_bytes + settings.max_job_bytes
    temporary = 256 * 2**20
    needed = bodies + references + conversion + caches + temporary + (IDLE_MIB + LARGEST_IMAGE_MIB) * 2**20
    assert needed <= int(SERVICES[name]["mem_limit"].removesuffix("g")) * 2**30 * 0.8


@pytest.mark.parametrize("name", ENCODERS)
def test_the_encoder_is_internal(name: str) -> None:
    """It has no published port and one network, which is internal."""
    assert SERVICES[name]["networks"] == ["encoder"]
    assert "ports" not in SERVICES[name]
    assert COMPOSE["networks"]["encoder"] == {"internal": True}
    on_it = {n for n, service in SERVICES.items() if "encoder" in service.get("networks", [])}
    assert on_it == {*OURS, "prometheus"}


def test_only_the_download_has_a_way_out() -> None:
    """Published ports need a network that is not internal: theirs is not masqueraded, unless ``ROUTE_OUT`` says so."""
    networks = {name: set(service.get("networks", ["default"])) for name, service in SERVICES.items()}
    assert {name for name, joined in networks.items() if "default" in joined} == {"weights"}
    assert {name for name, joined in networks.items() if "published" in joined} == {
        *GENERATORS,
        "prometheus",
        "grafana",
    }
    option = "com.docker.network.bridge.enable_ip_masquerade"
    assert COMPOSE["networks"]["published"] == {"driver_opts": {option: "false"}}
    assert COMPOSE["networks"].keys() == {"default", "encoder", "published"}


def test_ports_are_published_on_loopback() -> None:
    """The generator and Grafana are published on loopback; ``GENERATOR_HOST`` changes the generator's address."""
    published = {name: service["ports"] for name, service in SERVICES.items() if service.get("ports")}
    assert published == {
        "generator": ["127.0.0.1:8000:8000"],
        "demo": ["127.0.0.1:8000:8000"],
        "grafana": ["127.0.0.1:3000:3000"],
    }
    text = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    assert text.count("${GENERATOR_HOST:-127.0.0.1}") == 2  # the published port, and the generator's variable
    assert all(SERVICES[name]["environment"]["GENERATOR_PUBLISHED_HOST"] == "127.0.0.1" for name in GENERATORS)


@pytest.mark.parametrize("name", OURS)
def test_health_checks_use_the_services_own_python(name: str) -> None:
    """The image needs no other program for it; readiness is checked, and loading may take its time."""
    check = SERVICES[name]["healthcheck"]
    (_, prefix), *_ = prefixes((name,))
    port = SERVICES[name]["environment"][f"{prefix}_PORT"]
    assert check["test"][:3] == ["CMD", "python", "-c"]
    assert f"http://127.0.0.1:{port}/health/ready" in check["test"][3]
    compile(check["test"][3], name, "exec")
    assert seconds(check["start_period"]) >= 600


@pytest.mark.parametrize("name", OURS)
def test_running_generations_are_finished_at_shutdown(name: str) -> None:
    """Docker waits longer for a service to stop than the service waits for its requests; a failed one is restarted."""
    drain_s = GeneratorSettings.model_fields["drain_s"].default
    assert seconds(SERVICES[name]["stop_grace_period"]) > drain_s
    assert SERVICES[name]["restart"] == "unless-stopped"


def test_the_weights_are_fetched_once() -> None:
    """One service fetches them at a fixed commit; the others mount them read-only and never access the hub."""
    model = {"FLUX2_MODEL": "black-forest-labs/FLUX.2-dev"}
    for name in (*ON_GPUS, "weights"):
        environment = SERVICES[name]["environment"]
        assert environment.items() >= model.items()
        assert re.fullmatch(r"[0-9a-f]{40}", environment["FLUX2_REVISION"])
        assert volumes(SERVICES[name])["weights"] == ("/weights", name != "weights")
    assert "HF_HUB_OFFLINE" not in SERVICES["weights"]["environment"]
    assert all(SERVICES[name]["environment"]["HF_HUB_OFFLINE"] == "1" for name in OURS)
    assert SERVICES["weights"]["restart"] == "no"


def test_compiled_code_is_kept() -> None:
    """Both services keep compiled code in a volume, which a new container uses."""
    for name in ON_GPUS:
        assert volumes(SERVICES[name])["compiled"] == ("/compiled", False)
        environment = SERVICES[name]["environment"]
        for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
            assert Path(environment[variable]).is_relative_to("/compiled")


def test_secrets_are_files() -> None:
    """Tokens and keys are in files that only the services that need them can read, not in variables."""
    assert {name: service["secrets"] for name, service in SERVICES.items() if "secrets" in service} == {
        "weights": ["hf_token"],
        "text-encoder": ["text_encoder_keys"],
        "generator": ["generator_keys", "text_encoder_keys"],
        "demo": ["generator_keys"],
    }
    assert all(secret.keys() == {"file"} for secret in COMPOSE["secrets"].values())
    for service in SERVICES.values():
        for variable, value in service.get("environment", {}).items():
            if variable.endswith(("_KEYS_FILE", "_TOKEN_PATH")):
                assert value == f"/run/secrets/{variable.removesuffix('_FILE').removesuffix('_PATH').lower()}"
            assert value == "" or not variable.endswith("_TOKEN")


@pytest.mark.parametrize(
    ("name", "variables"),
    [
        ("text-encoder", {"TEXT_ENCODER_KEYS_FILE"}),
        ("generator", {"GENERATOR_KEYS_FILE", "TEXT_ENCODER_KEYS_FILE"}),
        ("demo", {"GENERATOR_KEYS_FILE"}),
    ],
)
def test_keys_are_read(name: str, variables: set[str]) -> None:
    """A service with mounted keys also has the variable that requires them, else it would serve every client."""
    keys_files = {variable for variable in SERVICES[name]["environment"] if variable.endswith("_KEYS_FILE")}
    assert keys_files == variables


def test_an_open_service_is_a_decision(tmp_path: Path) -> None:
    """Without a keys file of the operator none is read; the operator's own must hold a key, or the setting says so."""
    text = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    read_files = re.findall(r"^ +(\w+)_KEYS_FILE: (.*)$", text, re.MULTILINE)
    assert [value for prefix, value in read_files if f"${{{prefix}_KEYS_FILE:+/run/secrets/" not in value] == []
    assert len(read_files) == 4
    (tmp_path / "keys").write_bytes((ROOT / "deploy" / "no-keys").read_bytes())
    with pytest.raises(ValidationError, match="holds no key"):
        GeneratorSettings(keys_file=tmp_path / "keys")
    for name, prefix in prefixes(OURS):
        assert SERVICES[name]["environment"][f"{prefix}_ALLOW_UNAUTHENTICATED"] == "False"
    assert all(SERVICES[name]["environment"]["TEXT_ENCODER_ALLOW_UNAUTHENTICATED"] == "False" for name in OURS)


@pytest.mark.parametrize("name", [*OURS, "weights"])
def test_every_variable_is_a_setting(name: str) -> None:
    """Every variable of our containers is a setting, or is read by a library."""
    allowed_variables = {variable for settings in SETTINGS for variable in variables(settings)} | OF_LIBRARIES
    assert SERVICES[name]["environment"].keys() <= allowed_variables


def test_bases_are_pinned() -> None:
    """Every image has a version and a digest, both in a variable, and is from the default registry."""
    (argument,) = re.findall(r"^ARG PYTHON_IMAGE=(\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    foreign = [argument, SERVICES["prometheus"]["image"], SERVICES["grafana"]["image"]]
    pinned = re.compile(r"[\w-]+(/[\w-]+)?:v?\d+\.\d+\.\d+[\w.-]*@sha256:[0-9a-f]{64}")
    assert all(pinned.fullmatch(image) for image in foreign)
    assert {stage.split()[0] for stage in stages().values()} == {
        "scratch",
        "${PYTHON_IMAGE}",
        "runtime",
    }
    assert {"PYTHON_IMAGE", "TORCH_INDEX_URL", "PROMETHEUS_IMAGE", "GRAFANA_IMAGE"} <= compose_variables().keys()


def test_our_images_are_built_here() -> None:
    """They are never pulled, so no other image of the same name is run."""
    for name in (*OURS, "weights"):
        target = SERVICES[name]["build"]["target"]
        assert target == ("text-encoder" if name in ENCODERS else "generator")
        assert SERVICES[name]["image"] == f"flux2-{target}"
        assert SERVICES[name]["pull_policy"] == "build"


@pytest.mark.parametrize(
    ("target", "module"), [("text-encoder", "text_encoder_service"), ("generator", "generator_service")]
)
def test_an_image_has_the_packages_of_its_service(target: str, module: str) -> None:
    """Its own extra and torchao are installed from a wheel that another stage built, and it does not run as root."""
    stage = stages()[target]
    assert re.findall(r"\[([\w,-]+)\]\"", stage) == [f"{target},quantization"]
    assert "from=project" in stage
    assert "COPY" not in stage
    assert re.findall(r"^USER (\d+):", stage, re.MULTILINE) == ["1000"]
    assert json.loads(stage.split("CMD ")[1]) == ["python", "-m", module]


ALLOCATOR_VARIABLES = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"}


def test_gpu_memory_does_not_fragment() -> None:
    """Every image configures PyTorch's allocator for expandable segments, and ``.env`` can override it."""
    assert set(re.findall(r"\bPYTORCH_\w+=\S+", stages()["runtime"])) == {"PYTORCH_ALLOC_CONF=expandable_segments:True"}
    assert {name for name, stage in stages().items() if stage.startswith("runtime ")} == {
        "text-encoder",
        "generator",
        "ray",
    }
    for name in (*OURS, "weights"):
        assert ALLOCATOR_VARIABLES.isdisjoint(SERVICES[name]["environment"])
        assert ALLOCATOR_VARIABLES.isdisjoint(SERVICES[name]["build"]["args"])
    assert all(SERVICES[name]["env_file"] == [{"path": ".env", "required": False}] for name in ON_GPUS)


@pytest.mark.parametrize(
    ("of_operator", "settings"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:512"}, "max_split_size_mb:512"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"}, "max_split_size_mb:512"),
    ],
)
def test_the_operators_allocator_setting_wins(of_operator: dict[str, str], settings: str) -> None:
    """PyTorch uses the image's value unless a container sets the variable, or its older name."""
    environment = os.environ | {"PYTORCH_ALLOC_CONF": "expandable_segments:True"} | of_operator
    code = "import torch; print(torch._C._accelerator_getAllocatorSettings())"
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == settings


def test_no_private_file_is_in_the_build_context() -> None:
    """The context is an allow-list of the files that the images need, without keys, weights or history."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    assert allowed == {
        "LICENSE",
        "README.md",
        "constraints.txt",
        "flux2_ray",
        "flux2_shared",
        "generator_service",
        "pyproject.toml",
        "shared",
        "text_encoder_service",
    }


def exported_metrics() -> set[str]:
    """Every time series of the services' metrics, and those that Prometheus adds."""
    endings = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "info": ("_info",)}
    exported = set()
    for metric in GeneratorMetrics().registry.collect():
        exported |= {metric.name + ending for ending in endings.get(metric.type, ("",))}
    return exported


@pytest.mark.parametrize("file", ["alerts.yml", "grafana/dashboards/flux2.json"])
def test_dashboard_and_alerts_use_existing_metrics(file: str) -> None:
    """Dashboard and alerts name only metrics that the services have."""
    text = (ROOT / "deploy" / "monitoring" / file).read_text(encoding="utf-8")
    named = set(re.findall(r"\bflux2_\w+", text))
    assert named
    assert named <= exported_metrics()


def test_every_metric_is_on_the_dashboard() -> None:
    dashboard = json.loads((ROOT / "deploy/monitoring/grafana/dashboards/flux2.json").read_text(encoding="utf-8"))
    shown = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    families = {metric.name for metric in GeneratorMetrics().registry.collect()}
    assert {family for family in families if family not in shown} == set()


def test_prometheus_scrapes_both_services() -> None:
    """It scrapes both services, on GPUs or as the demo, at their ports; the dashboard reads from it."""
    folder = ROOT / "deploy" / "monitoring"
    config = yaml.safe_load((folder / "prometheus.yml").read_text(encoding="utf-8"))
    targets = {job["job_name"]: job["dns_sd_configs"][0] for job in config["scrape_configs"]}
    assert {name: set(target["names"]) for name, target in targets.items()} == {
        "generator": set(GENERATORS),
        "text-encoder": set(ENCODERS),
    }
    assert {name: target["port"] for name, target in targets.items()} == {"generator": 8000, "text-encoder": 8006}
    (source,) = yaml.safe_load((folder / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    dashboard = json.loads((folder / "grafana/dashboards/flux2.json").read_text(encoding="utf-8"))
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"]} == {source["uid"]}
    assert set(config["rule_files"]) == {"/etc/prometheus/alerts.yml"}
    assert Path(folder / "alerts.yml").is_file()
