"""Several processes on this machine: one per GPU, or sharing the cores of the CPU."""

import os
from collections.abc import Callable, Hashable
from multiprocessing.connection import wait
from typing import Any

from distilcache.data.cache.manifest import CacheManifest
from distilcache.stages.models.device import resolve_device
from distilcache.stages.teacher_cache.engines.drive import drive
from distilcache.stages.teacher_cache.engines.work import Reply, answer
from distilcache.stages.teacher_cache.run import Build
from distilcache.stages.workers.processes import Worker

VISIBLE = "CUDA_VISIBLE_DEVICES"


class LocalEngine:
    """One process per device.

    Args:
        workers: Processes; 0: one per GPU, or one where there is none.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers

    def run(self, build: Build) -> CacheManifest:
        """Drive the workers through all phases."""
        return drive(LocalCrew(places(build.device, self._workers)), build)


def places(device: str, workers: int) -> list[dict[str, str]]:
    """Environment of each worker: the GPU that it sees, or its share of the cores.

    Args:
        device: As in the recipe; with a number (``cuda:1``) all workers share that GPU.
        workers: 0: one per device.
    """
    target = resolve_device(device)
    if target.type != "cuda":
        workers = workers or 1
        # Whoever sets it knows better; sums have another order of terms on other numbers.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        own = os.environ.get("OMP_NUM_THREADS") or str(max(1, (cores or 1) // workers))
        return [{"OMP_NUM_THREADS": own} if workers > 1 else {} for _ in range(workers)]
    if target.index is not None:
        return [{} for _ in range(workers or 1)]
    import torch

    named = os.environ.get(VISIBLE)
    devices = named.split(",") if named else [str(n) for n in range(torch.cuda.device_count())]
    return [{VISIBLE: devices[n % len(devices)]} for n in range(workers or len(devices))]


class LocalCrew:
    """Processes of this machine; each is started when there is work for it.

    Args:
        environments: One per worker.
    """

    def __init__(self, environments: list[dict[str, str]]) -> None:
        self._environments = environments
        self._idle: dict[int, Worker] = {}
        self._busy: dict[int, Worker] = {}

    def size(self) -> int:
        """Number of workers."""
        return len(self._environments)

    def room(self) -> int:
        """Workers without a call."""
        return len(self._environments) - len(self._busy)

    def start(self, function: Callable[..., Any], *args: Any) -> Hashable:
        """Call on an idle worker, or on a new one."""
        if self._idle:
            place, worker = self._idle.popitem()
        else:
            place = next(n for n in range(self.size()) if n not in self._busy)
            worker = Worker(self._environments[place])
        self._busy[place] = worker
        worker.call(answer, function, *args)
        return place

    def wait(self, seconds: float) -> list[tuple[Hashable, Reply]]:
        """Answers, and what became of workers that ended."""
        places = {worker.connection: place for place, worker in self._busy.items()}
        answered: list[tuple[Hashable, Reply]] = []
        for connection in wait(list(places), seconds):
            place = places[connection]  # type: ignore[index]
            worker = self._busy.pop(place)
            try:
                reply = worker.answer()
            except EOFError:
                reply = Reply(lost=worker.reason())
                worker.close(kill=True)
            else:
                self._idle[place] = worker
            answered.append((place, reply))
        return answered

    def close(self, kill: bool) -> None:
        """End all workers; those at work are killed."""
        for worker in self._busy.values():
            worker.close(kill=True)
        for worker in self._idle.values():
            worker.close(kill)
        self._busy.clear()
        self._idle.clear()
