"""Pools of workers that answer calls; those of this machine.

A worker that ends takes with it the call that it was at, and nothing else.
"""

import os
import traceback
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any, Protocol

from distilcache.data.errors import UserError, of_storage, one_line
from distilcache.stages.models.device import resolve_device
from distilcache.stages.workers.processes import Worker, threads_each

VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True)
class Reply:
    """The result of a call. Errors are results, too: no exception travels between processes."""

    value: Any = None
    user_error: str | None = None
    """Bad input or storage: to try again would not help."""
    failure: str | None = None
    """Any other exception, or how the worker ended, in one line."""


def answer(function: Callable[..., Any], *args: Any) -> Reply:
    """Call ``function(*args)``, in a worker."""
    try:
        return Reply(value=function(*args))
    except UserError as error:
        return Reply(user_error=str(error))
    except Exception as error:
        line = of_storage(error) if isinstance(error, OSError) else None
        if line is not None:
            return Reply(user_error=line)
        traceback.print_exc()
        return Reply(failure=one_line(error))


class Pool(Protocol):
    """Workers, started as there are calls for them."""

    def size(self) -> int:
        """Calls that can run at once."""
        ...

    def room(self) -> int:
        """Calls that may be started now."""
        ...

    def start(self, function: Callable[..., Any], *args: Any) -> Hashable:
        """Begin a call; returns its ticket."""
        ...

    def wait(self, seconds: float) -> list[tuple[Hashable, Reply]]:
        """Calls that have ended, by their tickets, after so many seconds at most."""
        ...

    def stop(self) -> None:
        """Ask calls to end: training saves a checkpoint first, as after a signal; wait for them."""
        ...

    def close(self, kill: bool) -> None:
        """End all workers: at once, or those without a call as they end by themselves."""
        ...


def places(device: str, workers: int) -> list[dict[str, str]]:
    """Environment of each worker on this machine: the GPU that it sees, or its number of threads.

    With a number (``cuda:1``) all workers share that GPU; 0 workers are one per device.
    """
    target = resolve_device(device)
    if target.type != "cuda":
        workers = workers or 1
        own = {"OMP_NUM_THREADS": threads_each(workers)} if workers > 1 else {}
        return [own] * workers
    if target.index is not None:
        return [{} for _ in range(workers or 1)]
    import torch

    named = os.environ.get(VISIBLE)
    devices = named.split(",") if named else [str(n) for n in range(torch.cuda.device_count())]
    return [{VISIBLE: devices[n % len(devices)]} for n in range(workers or len(devices))]


class LocalPool:
    """Processes of this machine, one per environment."""

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
        """Results, and how workers ended."""
        places = {worker.connection: place for place, worker in self._busy.items()}
        answered: list[tuple[Hashable, Reply]] = []
        for connection in wait(list(places), seconds):
            place = places[connection]  # type: ignore[index]
            worker = self._busy.pop(place)
            try:
                reply = worker.answer()
            except EOFError:
                reply = Reply(failure=worker.reason())
            if reply.failure is None:
                self._idle[place] = worker
            else:
                worker.close(kill=True)  # its device may be in no state to go on
            answered.append((place, reply))
        return answered

    def stop(self) -> None:
        """Send SIGTERM to workers with a call."""
        for worker in self._busy.values():
            worker.stop()

    def close(self, kill: bool) -> None:
        """End all workers; those with a call are killed."""
        for worker in self._busy.values():
            worker.close(kill=True)
        for worker in self._idle.values():
            worker.close(kill)
        self._busy.clear()
        self._idle.clear()
