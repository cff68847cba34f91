"""A Ray cluster of four nodes on this machine, with logical GPUs, that serves the demo model."""

import os
import re
import secrets
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from demo_model.services import WEIGHTS

ROOT = Path(__file__).parents[2]
PATIENCE_S = 300.0
NUM_GPU_NODES = 3
API_TOKEN = "of-the-clients"
FAST_HEALTH = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}
"""Detect a lost node within seconds. Real clusters set ``RAY_health_check_...``, see docs/run.md."""


def free_port() -> int:
    """A port that no process uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(folder: Path, settings: dict[str, str]) -> dict[str, str]:
    """The environment of Ray's processes, and of the services in them."""
    token = folder / "token"
    token.write_text(secrets.token_hex(32), encoding="utf-8")
    return {
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "flux2_ray.proxy:middleware",
        "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "2",  # few cores for many processes: they respond late
        "OMP_NUM_THREADS": "1",  # so that images are bit-identical to those of one thread
        "HF_HUB_OFFLINE": "1",
        "FLUX2_MODEL": str(WEIGHTS),
        "GENERATOR_TOKEN": API_TOKEN,
        **settings,
    }


class SimulatedCluster:
    """A head with the API, and nodes with two logical GPUs each.

    Args:
        folder: for what is written.
        variables: the environment of every node; this process must have it too when it begins.
    """

    def __init__(self, folder: Path, variables: dict[str, str]) -> None:
        import ray  # noqa: PLC0415 - optional
        from ray.cluster_utils import Cluster  # noqa: PLC0415

        self._config_file = folder / "serve.yaml"
        self._variables = variables
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 8,
                "num_gpus": 0,
                "resources": {"flux2_api": 1},
                "include_dashboard": False,
                "_system_config": FAST_HEALTH,
            },
        )
        self._nodes: list[Any] = []
        self.complete()
        ray.init(self.address, log_to_driver=False)

    @property
    def address(self) -> str:
        """The address of the head."""
        address: str = self._cluster.address
        return address

    def complete(self) -> None:
        """Replace nodes that were lost."""
        with pytest.MonkeyPatch.context() as patch:  # a test removed the settings from this process's environment
            for name, value in self._variables.items():
                patch.setenv(name, value)
            while len(self._nodes) < NUM_GPU_NODES:
                self._nodes.append(self._cluster.add_node(num_cpus=16, num_gpus=2))
        self._cluster.wait_for_nodes()

    def close(self) -> None:
        import ray  # noqa: PLC0415 - optional
        from ray import serve  # noqa: PLC0415

        serve.shutdown()
        ray.shutdown()
        self._cluster.shutdown()

    def deploy(self, min_generators: int, max_generators: int) -> None:
        """Apply ``deploy/ray/serve.yaml`` with another port, number of generators and delay, and wait for it."""
        config = yaml.safe_load((ROOT / "deploy/ray/serve.yaml").read_text(encoding="utf-8"))
        config["http_options"]["port"] = self._port
        deployments = {entry["name"]: entry for entry in config["applications"][0]["deployments"]}
        for deployment in deployments.values():
            deployment["health_check_period_s"] = 1
        deployments["generator"]["autoscaling_config"] |= {
            "min_replicas": min_generators,
            "max_replicas": max_generators,
            "upscale_delay_s": 1,
            "downscale_delay_s": 5,
        }
        self._config_file.write_text(yaml.safe_dump(config), encoding="utf-8")
        command = [str(Path(sys.executable).with_name("serve")), "run", "--non-blocking", str(self._config_file)]
        variables = os.environ | {"RAY_ADDRESS": self.address}
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        assert done.returncode == 0, done.stderr
        self.wait_until_ready(min_generators)

    def wait_until_ready(self, num_generators: int) -> None:
        """Wait until this number of generators and one text encoder run, and the API is ready."""
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            counts = {name: len(self.nodes_of(name)) for name in ("api", "generator", "text-encoder")}
            if counts == {"api": 1, "generator": num_generators, "text-encoder": 1} and self.is_ready():
                return
            time.sleep(0.5)
        raise AssertionError(f"not ready: {counts}")

    def client(self) -> httpx.Client:
        """A client of the API with a valid token."""
        headers = {"Authorization": f"Bearer {API_TOKEN}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=PATIENCE_S)

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health/ready", timeout=10).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    def nodes_of(self, deployment: str) -> list[str]:
        """The nodes on which the replicas of a deployment run."""
        return [replica["node_id"] for replica in self.replicas_of(deployment)]

    def replicas_of(self, deployment: str) -> list[dict[str, Any]]:
        """Serve's status of the running replicas."""
        from ray.serve.context import _get_global_client  # noqa: PLC0415 - optional

        details = _get_global_client().get_serve_details()
        entry = details["applications"].get("flux2", {}).get("deployments", {}).get(deployment, {})
        return [replica for replica in entry.get("replicas", []) if replica["state"] == "RUNNING"]

    def kill(self, node_id: str) -> None:
        """Kill the processes of a node."""
        (node,) = [node for node in self._nodes if node.node_id == node_id]
        self._nodes.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)

    def num_responses(self) -> Counter[str]:
        """The number of requests that each generator has completed, from Serve's logs."""
        logs = Path(self._cluster.head_node.get_logs_dir_path()) / "serve"
        pattern = re.compile(r"replica_flux2_generator_(\w+)\.log")
        counts: Counter[str] = Counter()
        for file in logs.iterdir():
            if match := pattern.fullmatch(file.name):
                counts[match[1]] = len(re.findall(r"CALL generate\w* OK", file.read_text(encoding="utf-8")))
        return counts
