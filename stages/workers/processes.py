"""Worker processes that never outlive the process that started them."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

from distilcache.data.cores import cores
from distilcache.data.progress import share_no_lock

END_SECONDS = 10.0
"""Time for a worker to end by itself, before it is killed."""


def threads_each(processes: int) -> str:
    """``OMP_NUM_THREADS`` of each of several processes that share this machine.

    A user's own number stays: sums have another order of terms with other numbers.
    """
    return os.environ.get("OMP_NUM_THREADS") or str(max(1, cores() // processes))


def worker_pool(
    workers: int, setup: Callable[..., None] | None = None, *args: Any
) -> ProcessPoolExecutor:
    """A pool of fresh ("spawn") processes; each calls ``setup(*args)`` first.

    An executor's own processes stay for ever where their parent is killed, and print tracebacks
    on Ctrl-C; these do neither.
    """
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start, initargs=(setup, *args)
    )


class Worker:
    """One fresh process that answers calls, one at a time. No other worker's end affects it.

    The variables of ``environment`` are set before the process imports anything heavy.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        """Readable once there is an answer, or the process has ended."""
        self._process = context.Process(
            target=_serve, args=(theirs, dict(environment)), daemon=True
        )
        self._process.start()
        theirs.close()

    def call(self, function: Callable[..., Any], *args: Any) -> None:
        """Ask for ``function(*args)``, which must not raise; calls are answered in order."""
        with contextlib.suppress(OSError):  # it has ended: the answer will say so
            self.connection.send((function, args))

    def answer(self) -> Any:
        """The next answer; waits for it.

        Raises:
            EOFError: The process has ended.
        """
        try:
            return self.connection.recv()
        except OSError:  # reset, where it was killed while it wrote
            raise EOFError from None

    def reason(self) -> str:
        """How a process that has ended did so."""
        self._process.join(END_SECONDS)
        code = self._process.exitcode
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            return f"worker ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
        return f"worker ended with exit code {code}"

    def stop(self) -> None:
        """Send SIGTERM, which ends the process unless its call has a handler."""
        self._process.terminate()

    def close(self, kill: bool = False) -> None:
        """End the process: once it has nothing to do, or at once."""
        self.connection.close()
        if not kill:
            self._process.join(END_SECONDS)
        self._process.kill()
        self._process.join()
        self._process.close()


def _serve(connection: Connection, environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    _start()
    try:
        while True:
            function, args = connection.recv()
            connection.send(function(*args))
    except (EOFError, OSError):  # the parent has closed the connection, or is gone
        os._exit(0)


def _start(setup: Callable[..., None] | None = None, *args: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    share_no_lock()
    if setup is not None:
        setup(*args)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
