"""One task of a Slurm array: each does its share, then what is left of the others'.

All tasks run the same command and know of each other only through the cache's folder: finished
shards by their markers, shards at work by claims, which end with their process. Whoever sees that
all shards are there writes index and manifest. Slurm does not repeat a killed array task;
submitting the array again completes the cache.
"""

import itertools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from os import environ

from distilcache.data.cache.cache import Cache
from distilcache.data.cache.manifest import CacheManifest
from distilcache.data.errors import UserError, require
from distilcache.data.storage.files import locked, remove_temporaries
from distilcache.stages.teacher_cache.encoding import say
from distilcache.stages.teacher_cache.engines.base import (
    ATTEMPTS,
    Progress,
    folder_of,
    give_up,
    name_of,
    one_line,
    tokens_of,
)
from distilcache.stages.teacher_cache.pipeline import run_shards
from distilcache.stages.teacher_cache.run import Build, finish, prepare, reused
from distilcache.stages.teacher_cache.task import Job, ShardTask, tasks_of
from distilcache.stages.workers.claims import Claims, turn

ID, COUNT = "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"
MIN, MAX, STEP = "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX", "SLURM_ARRAY_TASK_STEP"


class SlurmEngine:
    """This process as one of an array."""

    def run(self, build: Build) -> CacheManifest:
        """Prepare or wait until that is done, work, finish or leave it to whoever is last."""
        index, count = array_place(environ)
        with folder_of(build), locked(build.out, "cache", shared=True):
            job = prepare(build, alone=lambda: turn(build.out))
            if reused(build) is None:
                with closing(Claims(build.out)) as claims:
                    _Member(build, job, claims).work(index, count)
                    _finish_once(build, job, claims)
            return Cache.open(build.out).manifest


def array_place(variables: Mapping[str, str]) -> tuple[int, int]:
    """Which task of how many this is, from what Slurm sets.

    Raises:
        UserError: It is none, or a variable is no number.
    """
    require(
        ID in variables,
        f"engine: {ID} must be set where name is 'slurm', got none; submit the command with "
        "sbatch --array (see deploy/slurm)",
    )
    numbers = {}
    for name in (ID, COUNT, MIN, MAX, STEP):
        text = variables.get(name, "")
        if text:
            require(text.isdecimal(), f"engine: {name} must be a whole number, got {text!r}")
            numbers[name] = int(text)
    number, first = numbers[ID], numbers.get(MIN, 0)
    step = max(1, numbers.get(STEP, 1))
    last = numbers.get(MAX, number)
    count = max(1, numbers.get(COUNT, (last - first) // step + 1))
    # A list of any numbers has no step: two tasks may begin at one place, which costs nothing.
    return max(0, number - first) // step % count, count


def _finish_once(build: Build, job: Job, claims: Claims) -> None:
    with turn(build.out):
        if reused(build) is None:
            finish(job)
        if claims.none_held():  # nobody is writing
            remove_temporaries(build.out)
            claims.remove()


class _Member:
    """Works until every shard is there."""

    def __init__(self, build: Build, job: Job, claims: Claims) -> None:
        self._job = job
        self._claims = claims
        self._tasks = tasks_of(job.corpus, job.config)
        total = tokens_of(job.corpus.manifest, job.config.rounds)
        self._progress = Progress(build, job.identity, total)
        self._there = bytearray(len(self._tasks))
        self._tries: dict[int, int] = {}
        self._failed: dict[ShardTask, str] = {}

    def work(self, index: int, count: int) -> None:
        """From the start of the own share once around; then what others did not finish."""
        size = len(self._tasks)
        first = index * size // count
        order = [(first + n) % size for n in range(size)]
        with self._progress.bar:
            while True:
                self._pass(order)
                order = [n for n in order if not self._there[n] and self._open(n)]
                if not order:
                    break
                self._claims.wait_for(order[0])  # another has it
        if self._failed:
            raise give_up(self._failed)

    def _open(self, number: int) -> bool:
        return self._tasks[number] not in self._failed

    def _pass(self, numbers: Sequence[int]) -> None:
        """Make those that are not there and nobody else is making."""
        again: list[int] = list(self._run(numbers))
        while again:
            again = list(itertools.chain.from_iterable(self._run([n]) for n in again))

    def _run(self, numbers: Sequence[int]) -> Iterator[int]:
        """One run of the pipeline; yields what is to be tried again after a failure."""
        claimed: deque[int] = deque()
        left = iter(numbers)
        while True:
            tasks = self._claim(left, claimed)
            try:
                with closing(run_shards(self._job, tasks, self._progress.bar.update)) as made:
                    for _ in made:
                        number = claimed.popleft()
                        self._there[number] = True
                        self._claims.release(number)
                return
            except UserError:
                raise
            except Exception as error:
                if not claimed:
                    raise
                blamed, *begun = claimed
                for number in claimed:
                    self._claims.release(number)
                claimed.clear()
                yield from self._blame(blamed, error)
                left = itertools.chain(begun, left)

    def _blame(self, number: int, error: Exception) -> Iterator[int]:
        tries = self._tries[number] = self._tries.get(number, 0) + 1
        task, reason = self._tasks[number], one_line(error)
        say(f"{name_of(task)} failed, attempt {tries} of {ATTEMPTS}: {reason}")
        if tries < ATTEMPTS:
            yield number
        else:
            self._failed[task] = reason

    def _claim(self, numbers: Iterator[int], claimed: deque[int]) -> Iterator[ShardTask]:
        """Tasks as the pipeline asks for them, each only when it is this process's."""
        for number in numbers:
            if self._there[number] or not self._open(number) or not self._claims.take(number):
                continue
            # Another may have finished it before it could be claimed.
            if self._progress.finished(self._tasks[number], before=True):
                self._there[number] = True
                self._claims.release(number)
                continue
            claimed.append(number)
            yield self._tasks[number]
