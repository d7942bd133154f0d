"""Pools of worker processes that never outlive the process that started them."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any


def worker_pool(
    workers: int, setup: Callable[..., None] | None = None, *args: Any
) -> ProcessPoolExecutor:
    """A pool of fresh ("spawn") processes; each calls ``setup(*args)`` first.

    An executor's own processes stay for ever where their parent is killed, and print tracebacks
    on Ctrl-C; these do neither.
    """
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start, initargs=(setup, args)
    )


def _start(setup: Callable[..., None] | None, args: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if setup is not None:
        setup(*args)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
