"""Counts the running replicas of each deployment, as reported by Serve's controller."""

import asyncio
import logging
from typing import Self

from ray import serve
from ray.serve.schema import ReplicaState

from flux2_shared.thread_pool import ThreadPool

logger = logging.getLogger("flux2")

INTERVAL_S = 0.5


class ReplicaCount:
    """Polls the number of replicas within its context. Before the first poll it assumes one of each deployment.

    Args:
        application: the name of the Serve application.
    """

    def __init__(self, application: str) -> None:
        self._application = application
        self._counts: dict[str, int] = {}
        self._threads = ThreadPool("replicas", 1)
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._count_again(), name="replicas")
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._threads.__aexit__()

    def running(self, deployment: str) -> int:
        """Return the number of running replicas of a deployment."""
        return self._counts.get(deployment, 1)

    async def _count_again(self) -> None:
        while True:
            try:
                self._counts = await self._threads.run(self._count)
            except Exception:
                logger.exception("the replicas could not be counted")  # the last count remains valid
            await asyncio.sleep(INTERVAL_S)

    def _count(self) -> dict[str, int]:
        deployments = serve.status().applications[self._application].deployments
        return {name: status.replica_states.get(ReplicaState.RUNNING, 0) for name, status in deployments.items()}
