"""Drives a crew of workers that come and go through the three phases of a build.

A call is a run of shards that takes a worker some seconds. The driver sees on disk which of them
are finished, so a worker that dies loses what it had in flight and nothing else; a shard that fails
is tried again by itself, a few times, and listed in the end.
"""

import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

from distilcache.data.cache.cache import Cache
from distilcache.data.cache.manifest import CacheManifest
from distilcache.data.corpus.store import Corpus
from distilcache.data.errors import UserError
from distilcache.data.storage.files import remove_temporaries
from distilcache.stages.teacher_cache.encoding import say
from distilcache.stages.teacher_cache.engines.base import (
    ATTEMPTS,
    Progress,
    alone,
    give_up,
    name_of,
    tokens_of,
)
from distilcache.stages.teacher_cache.engines.work import (
    Reply,
    finish_build,
    make_shards,
    prepare_build,
)
from distilcache.stages.teacher_cache.run import Build, begun_identity, reused
from distilcache.stages.teacher_cache.task import ShardTask, tasks_of

CALL_SECONDS = 20.0
"""Work per call: between two calls a worker's steps run empty, some tenths of a second at most."""
LOOK_SECONDS = 0.5
"""Between two looks at what is finished."""


class Crew(Protocol):
    """Processes somewhere that answer calls; new ones replace those that end."""

    def size(self) -> int:
        """Workers that there are, or could be at once."""
        ...

    def room(self) -> int:
        """Calls that may be started now."""
        ...

    def start(self, function: Callable[..., Any], *args: Any) -> Hashable:
        """Begin a call; returns its ticket."""
        ...

    def wait(self, seconds: float) -> list[tuple[Hashable, Reply]]:
        """Calls that are answered, after so many seconds at most."""
        ...

    def close(self, kill: bool) -> None:
        """End all workers, at once or as they are idle."""
        ...


def drive(crew: Crew, build: Build) -> CacheManifest:
    """Prepare, make what is missing, finish, all by the crew.

    Raises:
        UserError: A worker met one, or shards failed again and again.
    """
    with alone(build):
        done = False
        try:
            _ask(crew, prepare_build, build)
            if reused(build) is None:
                _make_missing(crew, build)
                _ask(crew, finish_build, build)
            done = True
        finally:
            crew.close(kill=not done)
            if not done and (build.out / "provenance.json").exists():
                remove_temporaries(build.out)
        return Cache.open(build.out).manifest


def _ask(crew: Crew, function: Callable[..., Any], build: Build) -> None:
    """One call, again where its worker is lost."""
    for attempt in range(1, ATTEMPTS + 1):
        ticket = crew.start(function, build)
        answered: list[tuple[Hashable, Reply]] = []
        while not answered:
            answered = [item for item in crew.wait(LOOK_SECONDS) if item[0] == ticket]
        reply = answered[0][1]
        if reply.user_error is not None:
            raise UserError(reply.user_error)
        reason = reply.lost or reply.failure
        if reason is None:
            return
        say(f"{function.__name__} failed, attempt {attempt} of {ATTEMPTS}: {reason}")
    raise UserError(
        f"engine: workers must be able to run, got {ATTEMPTS} that failed, the last with: {reason}"
    )


def _make_missing(crew: Crew, build: Build) -> None:
    corpus = Corpus.open(build.corpus_dir)
    tasks = tasks_of(corpus, build.config)
    total = tokens_of(corpus.manifest, build.config.rounds)
    progress = Progress(build, begun_identity(build.out), total)
    with progress.bar:
        missing = deque(
            n for n, task in enumerate(tasks) if not progress.finished(task, before=True)
        )
        if progress.reused:
            say(f"{progress.reused} of {len(tasks)} shards were there already")
        _Dispatcher(crew, build, progress, tasks, missing).run()


class _Dispatcher:
    """Hands out shards until all are finished or given up."""

    def __init__(
        self,
        crew: Crew,
        build: Build,
        progress: Progress,
        tasks: Sequence[ShardTask],
        missing: deque[int],
    ) -> None:
        self._crew = crew
        self._build = build
        self._progress = progress
        self._tasks = tasks
        self._todo = missing  # numbers: there may be many
        self._singly: deque[int] = deque()  # failed before: each in a call of its own
        self._flights: dict[Hashable, deque[int]] = {}  # what is not finished of each, in order
        self._tries: dict[int, int] = {}
        self._failed: dict[ShardTask, str] = {}
        self._in_vain = 0  # failures since the last finished shard
        self._shard_seconds = CALL_SECONDS  # the first calls are of one shard

    def run(self) -> None:
        """Until nothing is left."""
        looked = time.monotonic()
        while self._todo or self._singly or self._flights:
            while self._crew.room() > 0 and (numbers := self._next()):
                tasks = [self._tasks[n] for n in numbers]
                ticket = self._crew.start(make_shards, self._build, tasks)
                self._flights[ticket] = deque(numbers)
            for ticket, reply in self._crew.wait(LOOK_SECONDS):
                self._settle(self._flights.pop(ticket), reply)
            if time.monotonic() - looked > LOOK_SECONDS:
                for flight in self._flights.values():
                    self._look(flight)
                looked = time.monotonic()
        if self._failed:
            raise give_up(self._failed)

    def _next(self) -> list[int]:
        """Shards of the next call: some seconds' worth, fewer towards the end."""
        if self._singly:
            return [self._singly.popleft()]
        workers = self._crew.size()
        share = len(self._todo) if workers == 1 else len(self._todo) // (2 * workers)
        count = min(int(CALL_SECONDS / max(self._shard_seconds, 1e-3)), share)
        return [self._todo.popleft() for _ in range(min(max(1, count), len(self._todo)))]

    def _look(self, flight: deque[int]) -> None:
        """Count what a call has finished so far."""
        while flight and self._progress.finished(self._tasks[flight[0]]):
            flight.popleft()
            self._in_vain = 0

    def _settle(self, flight: deque[int], reply: Reply) -> None:
        self._look(flight)
        if reply.user_error is not None:
            raise UserError(reply.user_error)
        if reply.value is not None:
            self._shard_seconds = float(reply.value)
        reason = reply.lost or reply.failure
        if not flight:
            return
        number = flight.popleft()
        task = self._tasks[number]
        reason = reason or "its marker is not there, though the worker has written it"
        self._todo.extendleft(reversed(flight))  # not begun, or not far
        tries = self._tries[number] = self._tries.get(number, 0) + 1
        say(f"{name_of(task)} failed, attempt {tries} of {ATTEMPTS}: {reason}")
        if tries < ATTEMPTS:
            self._singly.append(number)
        else:
            self._failed[task] = reason
        self._in_vain += 1
        if self._in_vain >= ATTEMPTS * max(1, self._crew.size()):
            raise give_up(self._failed or {self._tasks[n]: reason for n in self._tries})
