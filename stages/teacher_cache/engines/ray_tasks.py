"""Tasks on a Ray cluster, whose nodes may come and go.

Tasks, not actors: Ray itself repeats a task whose worker or node is lost. A worker process serves
many tasks and loads the teacher once (``max_calls=0``; for GPU tasks the default is 1). What is
sent are names of shards, never data: corpus and cache lie on storage that every node sees.
"""

import time
from collections.abc import Callable, Hashable
from typing import Any

from distilcache.data.cache.manifest import CacheManifest
from distilcache.stages.teacher_cache.engines.base import one_line
from distilcache.stages.teacher_cache.engines.drive import drive
from distilcache.stages.teacher_cache.engines.work import Reply, answer
from distilcache.stages.teacher_cache.run import Build
from distilcache.stages.workers.ray_cluster import cores_each, joined, unit_of

SHIPPED = ("data", "stages")
"""Packages that the workers import."""
RETRIES = 3
"""Times that Ray repeats a call by itself where its worker or node is lost; after that the driver
tries its shards one by one, so that one that always ends its worker is named in the end."""
SIZE_SECONDS = 2.0
"""Between two questions about the size of the cluster."""


class RayEngine:
    """Shards as Ray tasks.

    Args:
        workers: Tasks at once at most; 0: what the cluster has room for.
        address: Of a running cluster; "": RAY_ADDRESS, or one is started on this machine.
    """

    def __init__(self, workers: int, address: str) -> None:
        self._workers = workers
        self._address = address

    def run(self, build: Build) -> CacheManifest:
        """Drive the cluster through all phases."""
        with joined(self._address, SHIPPED) as ray:
            cores = cores_each(ray, build.device, self._workers)
            return drive(RayCrew(ray, build.device, self._workers, cores=cores), build)


class RayCrew:
    """The workers of a cluster.

    Args:
        ray: The module.
        device: As in the recipe; ``auto``: GPUs where the cluster has some.
        workers: Tasks at once at most; 0: twice as many as can run, so that none has to wait.
        retries: Times that Ray repeats a task whose worker or node is lost.
        calls: Tasks after which a worker process ends; 0: never.
        cores: Of each task, which are its threads on a CPU.
    """

    def __init__(
        self,
        ray: Any,
        device: str,
        workers: int,
        *,
        retries: int = RETRIES,
        calls: int = 0,
        cores: int = 1,
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
            max_calls=calls,
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
        """Tasks that are answered."""
        if not self._calls:
            return []
        calls = list(self._calls)
        if not self._ray.wait(calls, num_returns=1, timeout=seconds)[0]:
            return []
        ready = self._ray.wait(calls, num_returns=len(calls), timeout=0)[0]
        self._calls.difference_update(ready)
        return [(call, self._reply(call)) for call in ready]

    def close(self, kill: bool) -> None:
        """Take back the tasks that are not answered."""
        for call in self._calls:
            self._ray.cancel(call, force=kill)
        self._calls.clear()

    def _reply(self, call: Any) -> Reply:
        try:
            reply: Reply = self._ray.get(call)
        except self._ray.exceptions.RayError as error:
            return Reply(lost=one_line(error))
        return reply
