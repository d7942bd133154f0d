"""Units in, committed parts out: in this process or in a bounded pool of them.

    unit ──pieces──▶ processes ──tokens──▶ unit ──▶ a process packs, writes and syncs its part

Pieces, not units, are what the processes share: they stay busy to the end of the text, and of all
text no more lies in memory than a unit or two.

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
from distilcache.stages.corpus.tokenise import Tokens, cut_pieces, utf8_bytes
from distilcache.stages.corpus.worker import (
    Done,
    PartSettings,
    Unit,
    commit_here,
    corpus_tokenizer,
    do_unit,
    find_done,
    start_process,
    tokenise_here,
)
from distilcache.stages.workers.processes import worker_pool

Work = tuple[Unit, list[str]]
"""A unit and its documents."""


class Tally:
    """What the committed units hold together."""

    def __init__(self, vocab_size: int) -> None:
        self.kept = 0
        """Units that an earlier run had committed."""
        self.counts = np.zeros(vocab_size, dtype=np.int64)
        """int64 [V], over the train split."""
        self._markers: dict[tuple[str, int], dict[str, Any]] = {}

    def add(self, done: Done) -> None:
        """Take in one committed unit."""
        self._markers[done.split, done.index] = done.marker
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
    """Commit every unit; those that are committed already are taken as they are.

    Args:
        settings: What the parts have in common.
        units: Work, read no further ahead than the processes need.
        workers: Processes.
        pool_from: Bytes of text from which on processes are started.
        progress: Is told the bytes done since the last call.

    Returns:
        What all units together hold.
    """
    tally = Tally(settings.vocab_size)

    def unfinished() -> Iterator[Work]:
        for unit, documents in units:
            done = find_done(settings, unit)
            if done is None:
                yield unit, documents
            else:
                tally.add(done)
                tally.kept += 1
                progress(unit.text_bytes)

    work = unfinished()
    head = _take(work, pool_from)
    size = sum(unit.text_bytes for unit, _ in head)

    def whole() -> Iterator[Work]:
        while head:
            yield head.popleft()  # once done, its text is not kept
        yield from work

    if workers == 1 or size < pool_from:
        _run_here(settings, whole(), workers > 1, tally, progress)
    else:
        _run_pool(settings, whole(), workers, tally, progress)
    return tally


def _take(work: Iterator[Work], size: int) -> deque[Work]:
    """The first units, up to that many bytes of text."""
    head: deque[Work] = deque()
    for unit, documents in work:
        head.append((unit, documents))
        size -= unit.text_bytes
        if size <= 0:
            break
    return head


def _run_here(
    settings: PartSettings,
    work: Iterable[Work],
    threads: bool,
    tally: Tally,
    progress: Callable[[int], None],
) -> None:
    with _threads(threads):
        tokenizer = corpus_tokenizer(settings)
        for unit, documents in work:
            tally.add(do_unit(settings, tokenizer, unit, documents, progress))


@contextlib.contextmanager
def _threads(on: bool) -> Iterator[None]:
    """Let the tokenizer use all cores, or one; the library listens to nothing but this variable."""
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
    running: dict[Future[Any], int] = {}  # bytes of text
    units: deque[tuple[Unit, list[Future[Tokens]]]] = deque()  # whose pieces are at work
    pool = worker_pool(workers, start_process, settings)

    def settle(most: int) -> None:
        """Commit the units that are tokenised; wait until at most so many tasks are left."""
        while True:
            while units and all(piece.done() for piece in units[0][1]):
                unit, pieces = units.popleft()
                tokens = [piece.result() for piece in pieces]
                running[pool.submit(commit_here, unit, tokens)] = 0
            if len(running) <= most:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                progress(running.pop(future))
                if isinstance(result := future.result(), Done):
                    tally.add(result)

    try:
        for unit, documents in work:
            settle(2 * workers)
            pieces = []
            for piece in cut_pieces(documents):  # all at once: they last while the next is read
                pieces.append(pool.submit(tokenise_here, piece))
                running[pieces[-1]] = utf8_bytes(piece)
            units.append((unit, pieces))
        settle(0)
    except BrokenProcessPool:
        raise UserError(
            "corpus: tokenising processes must stay alive, got one that ended (out of memory?); "
            "repeat the command, finished parts are kept; --set corpus.workers=1 needs least"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
