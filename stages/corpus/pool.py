"""Units in, committed parts out: in this process or in a bounded pool of them.

Legend: ``V`` vocabulary.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from typing import Any

import numpy as np

from data.errors import UserError
from data.processes import worker_pool
from stages.corpus.worker import (
    Done,
    PartSettings,
    Unit,
    do_unit,
    do_unit_here,
    find_done,
    open_tokenizer,
    start_process,
)


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
    units: Iterator[Unit],
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

    def unfinished() -> Iterator[Unit]:
        for unit in units:
            done = find_done(settings, unit)
            if done is None:
                yield unit
            else:
                tally.add(done)
                tally.kept += 1
                progress(unit.text_bytes)

    work = unfinished()
    head: list[Unit] = []
    for unit in work:
        head.append(unit)
        if sum(u.text_bytes for u in head) >= pool_from:
            break
    size = sum(u.text_bytes for u in head)
    rest = chain(head, work)
    if workers == 1 or size < pool_from:
        _run_here(settings, rest, workers > 1, tally, progress)
    else:
        _run_pool(settings, rest, workers, tally, progress)
    return tally


def _run_here(
    settings: PartSettings,
    units: Iterable[Unit],
    threads: bool,
    tally: Tally,
    progress: Callable[[int], None],
) -> None:
    with _threads(threads):
        tokenizer = open_tokenizer(settings)
        for unit in units:
            tally.add(do_unit(settings, tokenizer, unit, progress))


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
    units: Iterable[Unit],
    workers: int,
    tally: Tally,
    progress: Callable[[int], None],
) -> None:
    running: dict[Future[Done], int] = {}

    def collect(count: int) -> None:
        while len(running) > count:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                tally.add(future.result())
                progress(running.pop(future))

    pool = worker_pool(workers, start_process, settings)
    try:
        for unit in units:
            running[pool.submit(do_unit_here, unit)] = unit.text_bytes
            collect(workers + 1)  # one unit waits; more would only hold memory
        collect(0)
    except BrokenProcessPool:
        raise UserError(
            "corpus: tokenising processes must stay alive, got one that ended (out of memory?); "
            "repeat the command, finished parts are kept; --set corpus.workers=1 needs least"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
