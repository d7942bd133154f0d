"""Starts the workers of a pool, and replaces those that end before the cache is finished."""

from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from distilcache.data.cache.shards import read_marker, shard_path
from distilcache.data.corpus.store import Corpus
from distilcache.data.errors import UserError
from distilcache.data.storage.files import read_json, sha256_json
from distilcache.stages.teacher_cache.build import Build
from distilcache.stages.teacher_cache.console import say
from distilcache.stages.teacher_cache.engines.shard_locks import FILE as LOCKS
from distilcache.stages.teacher_cache.engines.shard_locks import tokens_made
from distilcache.stages.teacher_cache.engines.worker import (
    ENDINGS,
    make_cache,
    say_found,
    shard_tokens,
    token_bar,
)
from distilcache.stages.teacher_cache.task import tasks_of
from distilcache.stages.workers.pool import Pool

LOOK_SECONDS = 1.0
"""Time between two looks for finished shards."""
GOLDEN = 0.618
"""Distance between the places where one worker and the next begin, as a fraction of all shards.
With the golden ratio any number of places is spread evenly, so workers seldom meet."""


def supervise(pool: Pool, build: Build) -> None:
    """Build a cache with the workers of a pool.

    Raises:
        UserError: A worker raised one, or workers ended again and again without making a shard.
    """
    done = False
    started = 0
    failures = 0  # since the last finished shard
    most = 0  # calls at once: a machine that is lost takes all of its own with it
    try:
        with closing(_Progress(build)) as progress:
            while not done:
                while pool.room() > 0:
                    pool.start(make_cache, build, started * GOLDEN % 1)
                    started += 1
                most = max(most, pool.size())
                replies = [reply for _, reply in pool.wait(LOOK_SECONDS)]
                failures = 0 if progress.look() else failures
                done = any(r.user_error is None and r.failure is None for r in replies)
                for reply in [] if done else replies:
                    if reply.user_error is not None:
                        raise UserError(reply.user_error)
                    say(str(reply.failure))
                    failures += 1
                    # One more than attempts: the next worker lists a shard that ends its worker.
                    if failures > ENDINGS * (1 + most):
                        raise UserError(
                            f"engine: workers must be able to run, got {failures} that failed, "
                            f"the last with: {reply.failure}"
                        )
            progress.look()
    finally:
        pool.close(kill=not done)


class _Progress:
    """A bar over the tokens that workers have made, as the cache's folder tells.

    It never goes back, though a shard that failed begins anew.
    """

    def __init__(self, build: Build) -> None:
        corpus = Corpus.open(build.corpus_dir)
        self._build = build
        self._corpus = corpus
        self._bar: Any = None
        self._shards = tasks_of(corpus, build.config)
        self._seen: set[Path] = set()
        self._tokens = self._found = self._count()
        if self._seen:
            say_found(len(self._seen), len(self._shards))

    def look(self) -> int:
        """Count the finished shards that are new, and show how many tokens there are.

        The bar begins when a worker has prepared the cache: rate and time left are those of the
        shards, without a calibration before them.
        """
        if self._bar is None:
            if not any((self._build.out / name).exists() for name in (LOCKS, "manifest.json")):
                return 0
            self._bar = token_bar(self._build, self._corpus, self._found)
        before = len(self._seen)
        self._tokens += self._count()
        self._bar.update(max(0, self._tokens + self._begun() - self._bar.n))
        return len(self._seen) - before

    def _count(self) -> int:
        """Tokens of finished shards that have not been seen before."""
        known: Any = None
        with suppress(UserError):
            known = read_json(self._build.out / "provenance.json", "cache: provenance")
        if not isinstance(known, dict) or "identity" not in known:  # nothing is prepared yet
            return 0
        identity = sha256_json(known["identity"])
        tokens = 0
        for round_index in range(self._build.config.rounds):
            folder = shard_path(self._build.out, round_index, 0).parent
            for path in folder.glob("*.json"):
                tar = path.with_suffix(".tar")
                marker = None if tar in self._seen else read_marker(tar)
                if marker is not None and marker["identity"] == identity:
                    self._seen.add(tar)
                    tokens += shard_tokens(marker)
        return tokens

    def _begun(self) -> int:
        """Tokens of shards that are not finished."""
        made = 0
        for number, tokens in tokens_made(self._build.out).items():
            task = self._shards[number]
            if shard_path(self._build.out, task.round_index, task.shard) not in self._seen:
                made += tokens
        return made

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()
