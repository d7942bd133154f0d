"""Units in, committed parts out: in this process, or in a pool of worker processes.

    unit ──batches──▶ processes ──tokens──▶ unit ──▶ a process packs, writes and syncs its part

The processes work on batches, not on units, so all of them stay busy to the end of the text, and
only a unit or two of text are in memory.

Legend: ``V`` vocabulary.
"""

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np

from distilcache.data.errors import UserError
from distilcache.stages.corpus.tokenise import Tokens, tokenise
from distilcache.stages.corpus.worker import (
    Done,
    PartSettings,
    Unit,
    Work,
    commit_unit,
    corpus_tokenizer,
    find_done,
    start_process,
    tokenise_here,
)
from distilcache.stages.workers.processes import worker_pool


class Tally:
    """Totals of the committed units."""

    def __init__(self, vocab_size: int) -> None:
        self.kept = 0
        """Number of units that an earlier run has committed."""
        self.unknown = 0
        """Number of unknown tokens."""
        self.counts = np.zeros(vocab_size, dtype=np.int64)
        """Token counts of the train split, int64 [V]."""
        self._markers: dict[tuple[str, int], dict[str, Any]] = {}

    def add(self, done: Done) -> None:
        """Add one committed unit."""
        self._markers[done.split, done.index] = done.marker
        self.unknown += done.marker.get("unknown_tokens", 0)
        if done.split == "train":
            self.counts += done.counts

    def markers(self, split: str) -> list[tuple[int, dict[str, Any]]]:
        """Number and commit marker of each unit of a split, in order."""
        found = [(i, marker) for (name, i), marker in self._markers.items() if name == split]
        return sorted(found, key=lambda item: item[0])


def run_units(
    settings: PartSettings,
    units: Iterator[Work],
    *,
    workers: int,
    pool_from: int,
    progress: Callable[[int], None],
) -> Tally:
    """Commit every unit that is not yet committed.

    Args:
        settings: Common settings of the parts.
        units: The units, read only as far ahead as the processes need.
        workers: Number of processes.
        pool_from: Bytes of text from which processes are worth their start.
        progress: Called with the bytes done since the last call.

    Returns:
        Totals of all units.
    """
    tally = Tally(settings.vocab_size)

    def unfinished() -> Iterator[Work]:
        for unit, batches in units:
            done = find_done(settings, unit)
            if done is None:
                yield unit, batches
            else:
                tally.add(done)
                tally.kept += 1
                progress(unit.text_bytes)

    work = unfinished()
    first = _take(work, pool_from)
    size = sum(unit.text_bytes for unit, _ in first)

    def whole() -> Iterator[Work]:
        while first:
            yield first.popleft()  # Its text is freed when it is done.
        yield from work

    if workers == 1 or size < pool_from:
        _run_here(settings, whole(), workers > 1, tally, progress)
    else:
        _run_pool(settings, whole(), workers, tally, progress)
    return tally


def _take(work: Iterator[Work], size: int) -> deque[Work]:
    """The first units, up to that many bytes of text."""
    first: deque[Work] = deque()
    for unit, batches in work:
        first.append((unit, batches))
        size -= unit.text_bytes
        if size <= 0:
            break
    return first


def _run_here(
    settings: PartSettings,
    work: Iterable[Work],
    threads: bool,
    tally: Tally,
    progress: Callable[[int], None],
) -> None:
    with _threads(threads):
        tokenizer = corpus_tokenizer(settings)
        for unit, batches in work:
            tokens = []
            for batch in batches:
                tokens.append(tokenise(tokenizer, batch.texts, settings.dtype))
                progress(batch.size)
            tally.add(commit_unit(settings, unit, tokens))


@contextlib.contextmanager
def _threads(on: bool) -> Iterator[None]:
    """Let the tokenizer use all cores, or one; this variable is the only way to say so."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "true" if on else "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _run_pool(
    settings: PartSettings,
    work: Iterable[Work],
    workers: int,
    tally: Tally,
    progress: Callable[[int], None],
) -> None:
    running: dict[Future[Any], int] = {}  # Bytes of text.
    units: deque[tuple[Unit, list[Future[Tokens]]]] = deque()  # Being tokenised.
    pool = worker_pool(workers, start_process, settings)

    def settle(most: int) -> None:
        """Commit the units that are tokenised; wait until at most ``most`` tasks are left."""
        while True:
            while units and all(batch.done() for batch in units[0][1]):
                unit, batches = units.popleft()
                tokens = [batch.result() for batch in batches]
                running[pool.submit(commit_unit, settings, unit, tokens)] = 0
            if len(running) <= most:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                progress(running.pop(future))
                if isinstance(result := future.result(), Done):
                    tally.add(result)

    try:
        for unit, batches in work:
            settle(2 * workers)
            # All batches at once: they keep the processes busy while the next unit is read.
            futures = [pool.submit(tokenise_here, batch.texts) for batch in batches]
            running |= {f: batch.size for f, batch in zip(futures, batches, strict=True)}
            units.append((unit, futures))
        settle(0)
    except BrokenProcessPool:
        raise UserError(
            "corpus: tokenising processes must stay alive, got one that ended (out of memory?); "
            "repeat the command, finished parts are kept; --set corpus.workers=1 needs the least "
            "memory"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
