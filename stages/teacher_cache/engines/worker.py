"""A worker of any engine: makes shards of a cache until all are there.

Workers know of each other only through the cache's folder. A finished shard has a marker. A shard
that is being made is locked, and the lock ends with its process. A shard is published whole or not
at all, and making it twice writes the same bytes. A shard that failed is tried again by itself, by
any worker, and given up after some attempts.

Some file systems keep the locks of one machine from the others, or have none. There the count of
the tokens that are made tells that a shard has a worker, and the first one that is published stays.
"""

import itertools
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing, nullcontext, suppress
from typing import Any

from distilcache.data.corpus.store import Corpus
from distilcache.data.errors import UserError, may_pass, one_line
from distilcache.data.progress import Bar
from distilcache.stages.teacher_cache.build import Build
from distilcache.stages.teacher_cache.console import say
from distilcache.stages.teacher_cache.engines.shard_locks import (
    ShardLocks,
    clear_leftovers,
    tokens_made,
)
from distilcache.stages.teacher_cache.phases import finish, finished, one_at_a_time, prepare
from distilcache.stages.teacher_cache.pipeline import run_shards
from distilcache.stages.teacher_cache.task import Job, ShardTask, done_marker, tasks_of

ATTEMPTS = 3
"""Times that a shard is tried before it is given up."""
ENDED = "its worker ended"
"""Reason of a failed attempt, until another is known."""
ENDINGS = 8
"""Times that it is tried where workers ended: that is seldom for the shard, since machines are lost
and taken away."""
STILL_SECONDS = 10.0
"""For so long no token is added to a shard whose worker is taken to have ended."""


def make_cache(build: Build, begin: float = 0.0, show: bool = False) -> None:
    """Prepare the cache, make shards that no other worker makes, and finish the cache.

    ``begin`` is where to begin, as a fraction of all shards; the shards before it come last.

    Raises:
        UserError: Bad input, or shards that failed again and again.
    """
    job = prepare(build)
    if finished(build):
        return
    with closing(ShardLocks(build.out)) as locks:
        with token_bar(build, job.corpus) if show else nullcontext() as bar:
            maker = _ShardMaker(job, locks, bar)
            maker.make_all(begin)
        if show:
            say_found(maker.found, len(maker.tasks))
        with one_at_a_time(build):
            if not finished(build):
                finish(job)
            if locks.all_free() and _all_still(build):
                clear_leftovers(build.out)


def _all_still(build: Build) -> bool:
    """Whether no worker whose lock is not seen here is still at a shard, though it is there.

    One that was killed as it ended a shard leaves a count that no longer changes.
    """
    before = tokens_made(build.out)
    if before:
        time.sleep(STILL_SECONDS)
    return tokens_made(build.out) == before


def token_bar(build: Build, corpus: Corpus, found: int = 0) -> Any:
    """A progress bar over the tokens of all rounds, of which some were there before.

    Its rate is the one since it began: workers' shards come in bursts.
    """
    return Bar(
        smoothing=0,
        initial=found,
        total=int(corpus.manifest.splits["train"]["tokens"]) * build.config.rounds,
        unit="tok",
        unit_scale=True,
        desc="teacher cache" if build.teacher else "masks",
    )


def shard_tokens(marker: dict[str, Any]) -> int:
    """Tokens of a finished shard."""
    return sum(block["tokens"] for block in marker["blocks"])


def say_found(found: int, of: int) -> None:
    """Print how many shards did not have to be made."""
    if found:
        say(f"{found} of {of} shards were there already")


class _ShardMaker:
    """Makes shards, in one run of the pipeline as far as possible.

    The pipeline reads ahead, so several shards may be locked. When a run fails, the first of them
    is blamed.
    """

    def __init__(self, job: Job, locks: ShardLocks, bar: Any) -> None:
        self._job = job
        self._locks = locks
        self._bar = bar
        self.tasks = tasks_of(job.corpus, job.config)
        self._done = bytearray(len(self.tasks))  # 1: finished or given up
        self.found = 0
        self._failed: dict[int, str] = {}
        self._again: list[int] = []  # failed before, to be tried alone
        self._locked: deque[int] = deque()  # by this process, in the order of the pipeline
        self._made = 0  # tokens of the first of them
        self._before = (0, 0, "")  # its number, and its failures before this attempt
        self._changing = threading.Lock()  # of that queue: the pipeline appends in another thread

    def make_all(self, begin: float) -> None:
        """Work until every shard is finished or given up.

        Raises:
            UserError: Some were given up.
        """
        count = len(self.tasks)
        first = int(begin * count)
        left = [(first + n) % count for n in range(count)]
        while left:
            self._make(left)
            again, self._again = self._again, []
            for number in self._without_worker(again):
                self._make([number], alone=True)
            left = [n for n in left if not self._done[n]]
            if left:
                self._locks.wait_for(left[0])
        # Another worker may have made one since.
        failed = [n for n in sorted(self._failed) if self._marker(n) is None]
        if failed:
            raise give_up({str(self.tasks[n]): self._failed[n] for n in failed})

    def _make(self, numbers: Iterable[int], alone: bool = False) -> None:
        """Make shards that are missing and that no other worker makes.

        ``alone``: it is one shard that failed before; without it such shards are put off.

        Raises:
            Exception: Several shards failed one after the other, so the cause is another one.
        """
        left, in_a_row = iter(numbers), 0
        while True:
            try:
                with closing(run_shards(self._job, self._lock(left, alone), self._count)) as made:
                    for _ in made:
                        self._next_is_first()
                        in_a_row = 0
                return
            except Exception as error:
                if not self._locked or not may_pass(error):
                    self._uncount_attempt()
                    raise
                others = self._blame(one_line(error))
                in_a_row += 1
                if in_a_row == ATTEMPTS and not alone:
                    raise
                traceback.print_exc()
                left = itertools.chain(others, left)
            except BaseException:  # stopped from outside
                self._uncount_attempt()
                raise

    def _without_worker(self, numbers: list[int]) -> list[int]:
        """Those of some unlocked shards that no worker makes, whose locks are not seen here."""
        if all(self._locks.failures(number)[1] != ENDED for number in numbers):
            return numbers
        before = tokens_made(self._job.out)
        time.sleep(STILL_SECONDS)
        now = tokens_made(self._job.out)
        return [number for number in numbers if before.get(number) == now.get(number)]

    def _marker(self, number: int) -> dict[str, Any] | None:
        return done_marker(self._job.out, self.tasks[number], self._job.identity)

    def _lock(self, numbers: Iterator[int], alone: bool) -> Iterator[ShardTask]:
        """Lock the next missing shard whenever the pipeline asks for one."""
        for number in numbers:
            if self._done[number] or not self._locks.take(number):
                continue
            task, marker = self.tasks[number], self._marker(number)
            tries, reason = self._locks.failures(number)
            most = ENDINGS if reason == ENDED else ATTEMPTS
            if marker is None and tries < most and (alone or not tries):
                if reason == ENDED:
                    say(f"{task} failed, attempt {tries} of {most}: {reason}")
                with self._changing:
                    self._locked.append(number)
                    if len(self._locked) == 1:
                        self._count_attempt()
                yield task
                continue
            if marker is not None:
                self._done[number] = True
                self.found += 1
                if self._bar is not None:
                    tokens = shard_tokens(marker)
                    self._bar.initial += tokens  # the rate is that of this process
                    self._bar.update(tokens)
            elif alone:
                self._done[number] = True
                self._failed[number] = reason
            else:
                self._again.append(number)
            self._locks.release(number)

    def _count(self, tokens: int) -> None:
        """Show the tokens of a block that is made."""
        self._made += tokens
        self._locks.set_made(self._locked[0], self._made)
        if self._bar is not None:
            self._bar.update(tokens)

    def _next_is_first(self) -> None:
        """The first of the locked shards is finished."""
        with self._changing:
            number = self._locked.popleft()
            self._done[number] = True
            self._locks.set_made(number, 0)
            self._locks.release(number)
            if self._locked:
                self._count_attempt()

    def _count_attempt(self) -> None:
        """Record the first of the locked shards as failed, in case this process ends now."""
        self._made, number = 0, self._locked[0]
        tries, reason = self._locks.failures(number)
        self._before = number, tries, reason
        self._locks.set_failures(number, tries + 1, ENDED)

    def _uncount_attempt(self) -> None:
        """The first of the locked shards has not failed."""
        if self._locked:
            with suppress(UserError):  # what ends this run is named
                self._locks.set_failures(*self._before)

    def _blame(self, reason: str) -> list[int]:
        """Record why the first of the locked shards failed, unlock all, and return the others."""
        blamed, *others = self._locked
        _, before, reason_before = self._before
        tries = 1 if reason_before == ENDED else before + 1  # lost workers are no failures of it
        self._locks.set_failures(blamed, tries, reason)
        say(f"{self.tasks[blamed]} failed, attempt {tries} of {ATTEMPTS}: {reason}")
        for number in self._locked:
            self._locks.release(number)
        self._locked.clear()
        return others


def give_up(failures: dict[str, str]) -> UserError:
    """The error that lists the shards that could not be made."""
    listed = "; ".join(f"{task}: {reason}" for task, reason in list(failures.items())[:5])
    more = f" and {len(failures) - 5} more" if len(failures) > 5 else ""
    return UserError(
        f"teacher: every shard must be computed, got {len(failures)} that failed {ATTEMPTS} times "
        f"or more: {listed}{more}; repeat the command once that is mended: the others are kept"
    )
