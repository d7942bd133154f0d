"""Tasks on a Ray cluster, whose nodes may come and go.

Tasks, not actors: Ray itself repeats a task whose worker or node is lost. A worker process serves
many tasks and loads the teacher once (``max_calls=0``; for GPU tasks the default is 1). What is
sent are names of shards, never data: corpus and cache lie on storage that every node sees.
"""

import os
import socket
import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

from data.errors import UserError
from data.manifest import CacheManifest
from stages.teacher_cache.engines.base import one_line
from stages.teacher_cache.engines.drive import drive
from stages.teacher_cache.engines.work import Reply, answer
from stages.teacher_cache.run import Build

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = ("data", "stages")
"""Packages that the workers import: all nodes run the driver's code, whatever they have."""
REACH_SECONDS = 20.0
"""Within which the head of a cluster must answer."""
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
        try:
            import ray
        except ImportError:
            raise UserError(
                "engine: name must be one that is installed, got 'ray'; pip install "
                "'distilcache[ray]'"
            ) from None
        own = not ray.is_initialized()
        if own:
            self._connect(ray)
        try:
            return drive(RayCrew(ray, build.device, self._workers), build)
        finally:
            if own:
                ray.shutdown()

    def _connect(self, ray: Any) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Without an address Ray would join whatever cluster another program has started here.
        address = self._address or os.environ.get("RAY_ADDRESS") or "local"
        options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
        modules = [str(ROOT / name) for name in SHIPPED]
        try:
            _reach(address)
            ray.init(address=address, runtime_env={"py_modules": modules}, **options)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"engine: ray_address must be that of a running Ray cluster, got {address!r}: "
                f"{one_line(error)}"
            ) from None


def _reach(address: str) -> None:
    """Ask once whether anybody listens; Ray itself would ask for many minutes.

    Raises:
        OSError: Nobody does.
    """
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), REACH_SECONDS).close()


class RayCrew:
    """The workers of a cluster.

    Args:
        ray: The module.
        device: As in the recipe; ``auto``: GPUs where the cluster has some.
        workers: Tasks at once at most; 0: twice as many as can run, so that none has to wait.
    """

    def __init__(self, ray: Any, device: str, workers: int) -> None:
        self._ray = ray
        self._workers = workers
        self._asked = -SIZE_SECONDS
        self._size = 1
        gpus = ray.cluster_resources().get("GPU", 0) if device == "auto" else 0
        self._unit = "GPU" if gpus or device.startswith("cuda") else "CPU"
        self._task = ray.remote(
            num_cpus=1,
            num_gpus=1 if self._unit == "GPU" else 0,
            max_calls=0,
            max_retries=-1,
            scheduling_strategy="SPREAD",
        )(answer)
        self._calls: set[Any] = set()

    def size(self) -> int:
        """Tasks that can run now."""
        if time.monotonic() - self._asked >= SIZE_SECONDS:
            there = int(self._ray.cluster_resources().get(self._unit, 0))
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
