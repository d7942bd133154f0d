"""Workers on a Ray cluster, whose nodes may come and go."""

import time
from collections.abc import Callable, Hashable
from typing import Any

from distilcache.data.errors import one_line
from distilcache.stages.workers.pool import Reply, answer
from distilcache.stages.workers.ray_cluster import unit_of

SIZE_SECONDS = 2.0
"""Between two questions about the size of the cluster."""


class RayPool:
    """Each call is a Ray task in a process of its own.

    A process that has used one GPU would stay on it, though Ray may give its next task another.

    Args:
        ray: The module.
        device: As in the recipe; ``auto``: GPUs where the cluster has some.
        workers: Tasks at once at most; 0: twice as many as can run. Those that wait begin as soon
            as there is a place for them, and tell an autoscaler that more nodes would be of use.
        retries: Times that Ray repeats a task whose worker or node is lost.
        cores: Of each task, which are its threads on a CPU.
    """

    def __init__(
        self, ray: Any, device: str, workers: int, *, retries: int = 0, cores: int = 1
    ) -> None:
        self._ray = ray
        self._workers = workers
        self._cores = cores
        self._asked = -SIZE_SECONDS
        self._size = 1
        self._unit = unit_of(ray, device)
        self._task = ray.remote(
            num_cpus=cores,
            num_gpus=1 if self._unit == "GPU" else 0,
            max_calls=1,
            max_retries=retries,
            scheduling_strategy="SPREAD",
        )(answer)
        self._calls: set[Any] = set()

    def size(self) -> int:
        """Tasks that can run now."""
        if time.monotonic() - self._asked >= SIZE_SECONDS:
            there = int(self._ray.cluster_resources().get(self._unit, 0))
            there //= self._cores if self._unit == "CPU" else 1
            self._size = max(1, min(there, self._workers or there))
            self._asked = time.monotonic()
        return self._size

    def room(self) -> int:
        """Tasks that may be handed to the cluster now."""
        return (self._workers or 2 * self.size()) - len(self._calls)

    def start(self, function: Callable[..., Any], *args: Any) -> Hashable:
        """Hand a task to the cluster."""
        call = self._task.options(name=function.__name__).remote(function, *args)
        self._calls.add(call)
        ticket: Hashable = call
        return ticket

    def wait(self, seconds: float) -> list[tuple[Hashable, Reply]]:
        """Tasks that have ended."""
        if not self._calls:
            return []
        calls = list(self._calls)
        if not self._ray.wait(calls, num_returns=1, timeout=seconds)[0]:
            return []
        ready = self._ray.wait(calls, num_returns=len(calls), timeout=0)[0]
        self._calls.difference_update(ready)
        return [(call, self._reply(call)) for call in ready]

    def stop(self) -> None:
        """Interrupt tasks that run, as Ctrl-C would, and take back the others."""
        for call in self._calls:
            self._ray.cancel(call, force=False)

    def close(self, kill: bool) -> None:
        """Take back the tasks that have not ended."""
        for call in self._calls:
            self._ray.cancel(call, force=kill)
        self._calls.clear()

    def _reply(self, call: Any) -> Reply:
        try:
            reply: Reply = self._ray.get(call)
        except self._ray.exceptions.RayError as error:
            return Reply(failure=one_line(error))
        return reply
