"""The manifests under ``deploy/``: they match Kubernetes' schemas, and grant as few rights as Compose does."""

import importlib.util
import re
from collections.abc import Iterator
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from generator_service.settings import GeneratorSettings
from tests.test_docs import variables
from text_encoder_service.settings import TextEncoderSettings

ROOT = Path(__file__).parents[1]
PLAIN = ROOT / "deploy/kubernetes"
KUBERNETES_VERSION = "1.33"
SERVICES = ("text-encoder", "generator")


def manifests() -> Iterator[dict[str, Any]]:
    """Every object of Kubernetes' own kinds."""
    for file in (ROOT / "deploy/ray/network.yaml", *(PLAIN / name for name in kustomization()["resources"])):
        yield from yaml.safe_load_all(file.read_text(encoding="utf-8"))


def kustomization() -> dict[str, Any]:
    """What ``kubectl apply -k`` applies."""
    return load(PLAIN / "kustomization.yaml")


def load(file: Path) -> dict[str, Any]:
    """A file with one document."""
    loaded: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return loaded


def named(kind: str, name: str) -> dict[str, Any]:
    """The only object of a kind and name."""
    (manifest,) = [m for m in manifests() if (m["kind"], m["metadata"]["name"]) == (kind, name)]
    return manifest


def ray_service() -> dict[str, Any]:
    """The specification of the RayService."""
    spec: dict[str, Any] = load(ROOT / "deploy/ray/rayservice.yaml")["spec"]
    return spec


def ray_templates() -> list[dict[str, Any]]:
    """The pods of the Ray cluster."""
    cluster = ray_service()["rayClusterConfig"]
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def pods() -> dict[str, dict[str, Any]]:
    """Every pod by its location in the manifests."""
    templates = {
        m["metadata"]["name"]: m["spec"]["template"]["spec"] for m in manifests() if "template" in m.get("spec", {})
    }
    return templates | {f"ray-{k}": spec for k, spec in enumerate(ray_templates())}


@pytest.fixture(params=["weights", "text-encoder", "generator", "ray-0", "ray-1"])
def pod(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The parametrized pod."""
    return pods()[request.param]


def container_of(pod: dict[str, Any]) -> dict[str, Any]:
    """The only container of a pod."""
    (container,) = pod["containers"]
    return dict(container)


def variables_of(pod: dict[str, Any]) -> dict[str, str]:
    """The environment of a pod's container."""
    return {variable["name"]: variable["value"] for variable in container_of(pod)["env"]}


def test_every_pod_is_tested() -> None:
    """The pods that the tests look at are all pods of the manifests."""
    assert set(pods()) == {"weights", "text-encoder", "generator", "ray-0", "ray-1"}


@pytest.mark.parametrize("manifest", [pytest.param(m, id=f"{m['kind']}-{m['metadata']['name']}") for m in manifests()])
def test_manifests_fit_the_schema(manifest: dict[str, Any]) -> None:
    """Every object has only fields of Kubernetes' schema."""
    kubernetes_validate.validate(manifest, KUBERNETES_VERSION, strict=True)


def test_the_schema_detects_mistakes() -> None:
    """A field that Kubernetes does not define is refused."""
    manifest = named("Deployment", "generator")
    manifest["spec"]["template"]["spec"]["containers"][0]["livenessProbes"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, KUBERNETES_VERSION, strict=True)


@pytest.mark.parametrize("number", [0, 1])
def test_ray_pods_fit_the_schema(number: int) -> None:
    """The pods of the RayService match Kubernetes' schema."""
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ray"}, "spec": ray_templates()[number]}
    kubernetes_validate.validate(pod, KUBERNETES_VERSION, strict=True)


def test_pods_have_minimal_rights(pod: dict[str, Any]) -> None:
    """Pods have user 1000, a read-only root, no capabilities or privileges; memory and temporary files are bounded."""
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 1000
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    container = container_of(pod)
    may = {"readOnlyRootFilesystem": True, "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert container["securityContext"] == may
    assert "memory" in container["resources"]["limits"]
    assert all(volume["emptyDir"]["sizeLimit"] for volume in pod["volumes"] if "emptyDir" in volume)


@pytest.mark.parametrize("name", ["weights", *SERVICES, "ray-1"])
def test_pods_have_no_access_to_the_cluster(name: str) -> None:
    """They have no token of a service account."""
    assert pods()[name]["automountServiceAccountToken"] is False


def test_service_links_are_disabled(pod: dict[str, Any]) -> None:
    """Kubernetes' own variables, such as ``GENERATOR_PORT=tcp://...``, would collide with settings."""
    assert pod["enableServiceLinks"] is False


def test_variables_are_settings(pod: dict[str, Any]) -> None:
    """Every variable is a setting, or is read by a library."""
    known = variables(TextEncoderSettings) | variables(GeneratorSettings)
    of_compilers = {"TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"}
    of_ray = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "RAY_USAGE_STATS_ENABLED"}
    of_libraries = {"HF_HUB_OFFLINE", "HF_TOKEN_PATH", *of_ray, *of_compilers}
    ours = {n for n in variables_of(pod) if n not in of_libraries and not n.startswith("RAY_health_check_")}
    assert ours <= set(known)


def test_every_pod_runs_one_of_our_images(pod: dict[str, Any]) -> None:
    """The images' setting for PyTorch's allocator applies in every pod, since no manifest overrides it."""
    image = re.split("[@:]", container_of(pod)["image"].rpartition("/")[2])[0]
    assert image in {"flux2-text-encoder", "flux2-generator", "flux2-ray"}
    assert {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}.isdisjoint(variables_of(pod))


def test_every_pod_uses_the_same_model() -> None:
    """Every pod has the same model at the same fixed commit, which is that of Compose."""
    compose = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    models = {(variables_of(p)["FLUX2_MODEL"], variables_of(p)["FLUX2_REVISION"]) for p in pods().values()}
    ((model, revision),) = models
    assert f"FLUX2_REVISION:-{revision}}}" in compose
    assert f"FLUX2_MODEL:-{model}}}" in compose


@pytest.mark.parametrize("name", SERVICES)
def test_services_are_probed(name: str) -> None:
    """Imports may take minutes on a cold disk; then readiness decides about traffic and liveness about restarts."""
    container = container_of(pods()[name])
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 300
    assert container["livenessProbe"]["httpGet"]["path"] == "/health/live"
    assert container["readinessProbe"]["httpGet"]["path"] == "/health/ready"
    assert container["readinessProbe"]["timeoutSeconds"] > 5  # the generator waits at most 5 s for the encoder


@pytest.mark.parametrize("name", SERVICES)
def test_services_have_a_gpu_and_time_to_stop(name: str) -> None:
    """Each has one GPU, read-only weights, keys from a secret, and more time to stop than the service takes."""
    pod = pods()[name]
    settings: type[Any] = {"text-encoder": TextEncoderSettings, "generator": GeneratorSettings}[name]
    assert pod["terminationGracePeriodSeconds"] > settings.model_fields["drain_s"].default
    container = container_of(pod)
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert {"name": "weights", "mountPath": "/weights", "readOnly": True} in container["volumeMounts"]
    keys = f"{name.replace('-', '_').upper()}_KEYS_FILE"
    assert variables_of(pod)[keys].startswith("/run/secrets/flux2/")


def test_the_autoscaler_reads_our_queue() -> None:
    """Generators scale with the depth of their queue, and only the autoscaler sets their number."""
    scaler = named("HorizontalPodAutoscaler", "generator")["spec"]
    (metric,) = scaler["metrics"]
    assert metric["pods"]["metric"]["name"] == "flux2_queue_depth"
    assert scaler["scaleTargetRef"]["name"] == "generator"
    assert "replicas" not in named("Deployment", "generator")["spec"]


def test_only_generators_can_reach_the_encoder() -> None:
    """Everything is denied by default; the encoder admits generators and Prometheus, and has no egress."""
    everything = named("NetworkPolicy", "nothing")["spec"]
    assert everything == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    policy = named("NetworkPolicy", "text-encoder")["spec"]
    assert "egress" not in policy
    (rule,) = policy["ingress"]
    assert {"podSelector": {"matchLabels": {"app": "generator"}}} in rule["from"]
    assert all(named("Service", name)["spec"].get("type", "ClusterIP") == "ClusterIP" for name in SERVICES)


def test_no_pod_reaches_the_internet() -> None:
    """Only the download may: generators and Ray's pods reach each other, the DNS and private addresses."""
    dns = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}}}
    policies = {m["metadata"]["name"]: m["spec"] for m in manifests() if m["kind"] == "NetworkPolicy"}
    open_to_all = {name for name, spec in policies.items() if any("to" not in rule for rule in spec.get("egress", []))}
    assert open_to_all == {"weights"}
    for name, own in (("generator", {"app": "text-encoder"}), ("ray", {"ray.io/is-ray-node": "yes"})):
        assert "Egress" in policies[name]["policyTypes"]
        targets = [target for rule in policies[name]["egress"] for target in rule["to"]]
        assert targets == [{"podSelector": {"matchLabels": own}}, dns]
    (head,) = policies["ray-head"]["egress"]
    assert all(ip_network(target["ipBlock"]["cidr"]).is_private for target in head["to"])
    assert {rule["port"] for rule in head["ports"]} == {443, 6443}


def test_images_are_named_by_digest() -> None:
    """A tag could be moved to another image; the digests are zeros until the operator has built the images."""
    digest = re.compile(r"sha256:[0-9a-f]{64}")
    assert all(digest.fullmatch(image["digest"]) and "newTag" not in image for image in kustomization()["images"])
    names = {container_of(pod)["image"] for name, pod in pods().items() if not name.startswith("ray")}
    assert names == {image["name"] for image in kustomization()["images"]}
    assert all(digest.fullmatch(container_of(pod)["image"].partition("@")[2]) for pod in ray_templates())


def test_serves_proxies_limit_bodies() -> None:
    """Every Ray process has the variable with which Serve's proxies get the limits of the API."""
    name = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
    assert {variables_of(pod)[name] for pod in ray_templates()} == {"flux2_ray.proxy:middleware"}
    assert f"{name}=flux2_ray.proxy:middleware" in (ROOT / "docs/run.md").read_text(encoding="utf-8")


def test_only_ray_can_reach_ray() -> None:
    """Access to Ray means running code in it, so other pods reach only the API, and every client needs a token."""
    rules = named("NetworkPolicy", "ray")["spec"]["ingress"]
    assert [rule["ports"] for rule in rules if "from" not in rule] == [[{"port": 8000}]]
    assert ray_service()["rayClusterConfig"]["authOptions"] == {"mode": "token"}


def test_both_ray_configurations_are_equal() -> None:
    """The RayService has the configuration of ``serve.yaml``, and the version of Ray that the tests use."""
    config = yaml.safe_load(ray_service()["serveConfigV2"])
    assert config["applications"] == load(ROOT / "deploy/ray/serve.yaml")["applications"]
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    assert f"ray=={ray_service()['rayClusterConfig']['rayVersion']}" in pinned


@pytest.mark.parametrize("name", ["serve.yaml", "rayservice.yaml"])
@pytest.mark.filterwarnings("ignore")  # Ray makes deprecated calls of pydantic
def test_ray_accepts_the_configuration(name: str) -> None:
    """Both configurations are valid in Ray's own schema; the test is skipped without Ray."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("the extra ray is not installed")
    from ray.serve.schema import ServeDeploySchema  # noqa: PLC0415 - optional

    text = ray_service()["serveConfigV2"] if name == "rayservice.yaml" else (ROOT / "deploy/ray" / name).read_text()
    schema = ServeDeploySchema.model_validate(yaml.safe_load(text))
    assert [deployment.name for deployment in schema.applications[0].deployments] == [
        "api",
        "text-encoder",
        "generator",
    ]
