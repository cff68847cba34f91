"""How many replicas of each deployment run now, as Serve's controller says."""

import asyncio
import logging
from typing import Self

from ray import serve
from ray.serve.schema import ReplicaState

logger = logging.getLogger("flux2")

EVERY_S = 0.5


class ReplicaCount:
    """Counts again and again while it is entered. Before the first count there is one of each.

    Args:
        application: the name of the Serve application.
    """

    def __init__(self, application: str) -> None:
        self._application = application
        self._counts: dict[str, int] = {}
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._count_again(), name="replicas")
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def running(self, deployment: str) -> int:
        """How many replicas of it run."""
        return self._counts.get(deployment, 1)

    async def _count_again(self) -> None:
        while True:
            try:
                self._counts = await asyncio.to_thread(self._count)
            except Exception:
                logger.exception("the replicas cannot be counted now")  # the last count holds
            await asyncio.sleep(EVERY_S)

    def _count(self) -> dict[str, int]:
        deployments = serve.status().applications[self._application].deployments
        return {name: found.replica_states.get(ReplicaState.RUNNING, 0) for name, found in deployments.items()}
