"""The Ray Serve application on four local nodes with logical GPUs and the demo model.

``make test-cluster`` runs this. Nodes are killed under load, and generators are added and removed.
"""

import importlib.util
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import httpx
import pytest
import torch

from tests.cluster.simulated import PATIENCE_S, SimulatedCluster, environment
from tests.conftest import Serve

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.filterwarnings("ignore"),  # Ray leaves sockets to the garbage collector and makes deprecated calls
]

BODIES = [
    {
        "prompt": f"a {size} {color} circle on a white background",
        "seed": seed,
        "num_inference_steps": 10,
        "cache": cache,
    }
    for (size, color), seed, cache in zip(
        itertools.product(("small", "large"), ("red", "green", "blue")),
        itertools.count(7),
        itertools.cycle(("none", "fast", 4)),
        strict=False,
    )
]
SLOW = {"prompt": "a large red circle on a blue background", "num_inference_steps": 100, "cache": "none"}
VERY_SLOW = SLOW | {"width": 512, "height": 512}
MAX_WAITING = 40
CLIENTS = 4
LOAD_S = 45.0
KILLED_AFTER_S = 5.0
KINDS = {"busy", "encoder_unavailable", "encoder_timeout", "generator_unavailable"}
"""Codes of the errors that a lost node may cause."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimulatedCluster]:
    """Four nodes, for all tests of this file."""
    if importlib.util.find_spec("ray") is None:  # Ray reads its environment when it is imported
        pytest.skip("the extra ray is not installed, so the cluster was not tested")
    folder = tmp_path_factory.mktemp("cluster")
    # No embedding is cached, so every request needs the text encoder.
    settings = {"TEXT_ENCODER_EMBEDDING_CACHE_BYTES": "0", "GENERATOR_EMBEDDING_CACHE_BYTES": "0"}
    variables = environment(folder, settings | {"GENERATOR_MAX_WAITING": str(MAX_WAITING)})
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        simulated = SimulatedCluster(folder, variables)
        yield simulated
        simulated.close()


@pytest.fixture
def generate_locally(serve_generator: Serve) -> Callable[[list[dict[str, Any]]], list[bytes]]:
    """Generates images with both services in this process, on one thread, as the reference."""

    async def generate(bodies: list[dict[str, Any]]) -> list[bytes]:
        async with serve_generator() as http:
            return [(await http.post("/generate", json=body)).raise_for_status().content for body in bodies]

    def on_one_thread(bodies: list[dict[str, Any]]) -> list[bytes]:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return anyio.run(generate, bodies)
        finally:
            torch.set_num_threads(before)

    return on_one_thread


@dataclass
class Load:
    """Clients that request one image after the other, and the responses they get."""

    cluster: SimulatedCluster
    references: list[bytes]
    successes: list[float] = field(default_factory=list)
    """Times of the successful responses."""
    failures: list[str] = field(default_factory=list)
    longest_gap_s: float = 0.0
    """Errors of the failed requests."""
    different: int = 0
    """The number of responses that differ from the reference."""

    @contextmanager
    def running(self) -> Iterator[None]:
        """Send requests until the block ends, then wait for the running ones."""
        over = threading.Event()
        clients = [threading.Thread(target=self._ask, args=(k, over)) for k in range(CLIENTS)]
        began = time.monotonic()
        for client in clients:
            client.start()
        try:
            yield
        finally:
            over.set()
            ended = time.monotonic()
            for client in clients:
                client.join()
            self.longest_gap_s = longest_gap(began, self.successes, ended)

    def _ask(self, first: int, over: threading.Event) -> None:
        with self.cluster.client() as http:
            for number in itertools.count(first):
                if over.is_set():
                    return
                which = number % len(BODIES)
                response = http.post("/generate", json=BODIES[which])
                if response.status_code != httpx.codes.OK:
                    is_ours = response.headers["content-type"] == "application/problem+json"
                    self.failures.append(
                        response.json()["code"] if is_ours else f"{response.status_code} {response.text}"
                    )
                    continue
                self.successes.append(time.monotonic())
                self.different += response.content != self.references[which]

    def __str__(self) -> str:
        total = len(self.successes) + len(self.failures)
        share = f"{len(self.successes)} of {total} requests succeeded"
        return f"{share}, longest gap {self.longest_gap_s:.1f} s, failures {self.failures}"


def longest_gap(began: float, successes: list[float], ended: float) -> float:
    """The longest time between successes, including before the first and after the last."""
    moments = [began, *sorted(successes), max([ended, *successes])]
    return max(after - before for before, after in itertools.pairwise(moments))


def check(load: Load, what: str) -> None:
    """Assert the availability that holds for clients while a node is lost."""
    print(f"\n{what}: {load}")
    assert load.different == 0
    assert set(load.failures) <= KINDS
    succeeded = len(load.successes)
    assert succeeded >= 100
    assert succeeded >= 0.99 * (succeeded + len(load.failures))
    assert load.longest_gap_s <= 20


def wait_for_jobs(http: httpx.Client, jobs: list[str]) -> list[str]:
    """Wait until the jobs have ended, and return their states."""
    until = time.monotonic() + PATIENCE_S
    states: list[str] = []
    while time.monotonic() < until:
        states = [http.get(job).json()["status"] for job in jobs]
        if not set(states) & {"queued", "running"}:
            break
        time.sleep(0.5)
    return states


def test_images_equal_those_of_one_process(
    cluster: SimulatedCluster, generate_locally: Callable[[list[dict[str, Any]]], list[bytes]]
) -> None:
    """Every file equals the one that a single process generates, and every generator generates some."""
    cluster.complete()
    cluster.deploy(2, 2)
    before = cluster.num_responses()
    load = Load(cluster, generate_locally(BODIES))
    with load.running():
        time.sleep(10)
    num_generated = cluster.num_responses() - before
    print(f"\nno disturbance: {load}; by generator {sorted(num_generated.values())}")
    assert load.failures == []
    assert load.different == 0
    assert len(num_generated) == 2
    assert min(num_generated.values()) >= 0.2 * sum(num_generated.values())


def test_the_api_is_that_of_one_generator(cluster: SimulatedCluster) -> None:
    """Jobs, idempotency, cancellation, streams, errors and refusals are those of one generator."""
    cluster.complete()
    cluster.deploy(2, 2)
    with cluster.client() as http:
        key = {"Idempotency-Key": "again"}
        created, again = (http.post("/jobs", json=BODIES[0], headers=key) for _ in range(2))
        assert created.status_code == 202
        assert created.json()["id"] == again.json()["id"]
        job = created.headers["location"]
        assert wait_for_jobs(http, [job]) == ["completed"]
        streamed = http.get(f"{job}/events").text
        assert [name in streamed for name in ("event: encoding", "event: step", "event: completed")] == [True] * 3
        plain = http.post("/generate", json=BODIES[0])
        assert http.get(f"{job}/result").content == plain.content
        assert plain.headers.get_list("x-request-id") != []
        assert len(plain.headers.get_list("x-request-id")) == 1
        refused = http.post("/generate", json=BODIES[0] | {"width": 7})
        assert (refused.status_code, refused.json()["code"]) == (422, "invalid_request")
        slow = http.post("/jobs", json=SLOW).headers["location"]
        assert http.delete(slow).json()["status"] == "cancelled"


def test_a_disconnect_stops_the_generation(cluster: SimulatedCluster) -> None:
    """A disconnect frees the slot; with ``on_disconnect: keep`` the image is finished, and generated once."""
    cluster.complete()
    cluster.deploy(2, 2)
    before = cluster.num_responses()
    kept, key = SLOW | {"on_disconnect": "keep", "seed": 1}, {"Idempotency-Key": "kept"}
    with cluster.client() as http:
        for body, headers in ((SLOW | {"seed": 2}, {}), (kept, key)):
            with pytest.raises(httpx.ReadTimeout):
                http.post("/generate", json=body, headers=headers, timeout=0.5)
        assert queue_depth(http, lambda depth: depth <= 1) <= 1
        assert http.post("/generate", json=kept, headers=key).status_code == 200
        assert queue_depth(http, lambda depth: depth == 0) == 0
    num_generated = cluster.num_responses() - before
    assert num_generated.total() == 1


def queue_depth(http: httpx.Client, enough: Callable[[float], bool]) -> float:
    """The number of requests in the service, once it is ``enough`` or after a while."""
    depth = 0.0
    for _ in range(100):
        (value,) = re.findall(r"^flux2_queue_depth (\S+)$", http.get("/metrics").text, re.MULTILINE)
        depth = float(value)
        if enough(depth):
            break
        time.sleep(0.1)
    return depth


def test_authentication_is_required(cluster: SimulatedCluster) -> None:
    """A client without a key gets 401, and a node with another token than the cluster's cannot join it."""
    cluster.complete()
    cluster.deploy(2, 2)
    assert httpx.post(f"{cluster.url}/generate", json=BODIES[0]).status_code == 401
    program = f"import ray; ray.init({cluster.address!r}, log_to_driver=False)"
    variables = {**os.environ, "RAY_AUTH_TOKEN": "0" * 64}
    del variables["RAY_AUTH_TOKEN_PATH"]
    done = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "InvalidAuthToken" in done.stderr


def test_requests_beyond_the_queue_are_refused(cluster: SimulatedCluster) -> None:
    """Two generations run and the queue is full; the next request gets 429 at once, and a deadline in the queue holds.

    Each image takes far longer than posting all of them, so that none ends meanwhile, however fast the machine is.
    """
    cluster.complete()
    cluster.deploy(2, 2)
    with cluster.client() as http:
        jobs = [http.post("/jobs", json=VERY_SLOW) for _ in range(MAX_WAITING + 4)]
        accepted = [job.headers["location"] for job in jobs if job.status_code == 202]
        refused = [job for job in jobs if job.status_code != 202]
        http.delete(accepted.pop()).raise_for_status()
        hurried = http.post("/generate", json=BODIES[0] | {"deadline_ms": 300})
        jobs_before = [http.get(job).json() for job in accepted]
        for job in accepted:
            http.delete(job)
        states = wait_for_jobs(http, accepted)
    assert len(refused) >= 1
    assert {(job.status_code, job.json()["code"]) for job in refused} == {(429, "busy")}
    assert all(int(job.headers["retry-after"]) >= 1 for job in refused)
    assert (hurried.status_code, hurried.json()["code"]) == (504, "deadline_exceeded")
    assert [job["status"] for job in jobs_before if job["status"] not in ("queued", "running")] == []
    assert max(job["position"] for job in jobs_before) > MAX_WAITING / 2
    assert set(states) == {"cancelled"}


@pytest.mark.parametrize("lost", ["generator", "text-encoder"])
def test_a_node_is_lost_under_load(
    lost: str, cluster: SimulatedCluster, generate_locally: Callable[[list[dict[str, Any]]], list[bytes]]
) -> None:
    """At least 99 % of the requests succeed, there is an image every 20 s, and failures are errors of this project."""
    cluster.complete()
    cluster.deploy(2, 2)
    load = Load(cluster, generate_locally(BODIES))
    with load.running():
        time.sleep(KILLED_AFTER_S)
        others = set(cluster.nodes_of("text-encoder")) if lost == "generator" else set()
        victim = next(node for node in cluster.nodes_of(lost) if node not in others)
        cluster.kill(victim)
        time.sleep(LOAD_S)
    check(load, f"{lost} node killed")
    cluster.wait_until_ready(2)
    assert victim not in cluster.nodes_of(lost)


def test_the_node_of_the_api_is_lost(cluster: SimulatedCluster) -> None:
    """With the process of the API only its jobs are lost; it is restarted automatically, and images are generated."""
    cluster.complete()
    cluster.deploy(2, 2)
    with cluster.client() as http:
        job = http.post("/jobs", json=SLOW).raise_for_status().headers["location"]
        (holder,) = cluster.replicas_of("api")
        generators = sorted(replica["pid"] for replica in cluster.replicas_of("generator"))
        began = time.monotonic()
        os.kill(holder["pid"], signal.SIGKILL)
        while (lost := cluster.replicas_of("api")) == [] or lost[0]["pid"] == holder["pid"]:
            assert time.monotonic() < began + PATIENCE_S
            time.sleep(0.2)
        cluster.wait_until_ready(2)
        print(f"\napi killed: back after {time.monotonic() - began:.1f} s")
        forgotten = http.get(job)
        assert (forgotten.status_code, forgotten.json()["code"]) == (404, "job_not_found")
        assert http.post("/generate", json=BODIES[0]).status_code == 200
        assert sorted(replica["pid"] for replica in cluster.replicas_of("generator")) == generators


def test_generators_are_autoscaled(
    cluster: SimulatedCluster, generate_locally: Callable[[list[dict[str, Any]]], list[bytes]]
) -> None:
    """With many jobs one generator becomes three, without them three become one, and no job is lost."""
    cluster.complete()
    cluster.deploy(1, 3)
    bodies = [SLOW | {"num_inference_steps": 50, "seed": seed} for seed in range(MAX_WAITING)]
    counts = [1]
    with cluster.client() as http:
        jobs = [http.post("/jobs", json=body).raise_for_status().headers["location"] for body in bodies]
        until = time.monotonic() + PATIENCE_S
        while not (3 in counts and counts[-1] == 1):
            assert time.monotonic() < until, counts
            time.sleep(0.5)
            counts.append(len(cluster.nodes_of("generator")))
        states = wait_for_jobs(http, jobs)
        results = [http.get(f"{job}/result").content for job in jobs]
    path = [count for count, _ in itertools.groupby(counts)]
    print(f"\n{len(jobs)} jobs: {states.count('completed')} completed; generators {path}")
    assert states == ["completed"] * len(jobs)
    assert max(path) == 3
    assert results[::8] == generate_locally(bodies[::8])
