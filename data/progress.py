"""How long work shows that it goes on: a bar on a terminal, elsewhere a plain line now and then."""

import sys
import threading
import time
from typing import Any

from tqdm import tqdm

FIRST_SECONDS, MOST_SECONDS = 5.0, 60.0
"""Time to the first plain line, and the longest time between two."""


def share_no_lock() -> None:
    """Bars of this process, those of libraries too, lock only each other out.

    tqdm's lock is also one of processes, a semaphore. Where a process ends at once, as workers do,
    Python prints that it leaks.
    """
    tqdm.set_lock(threading.RLock())


class Bar(tqdm):  # type: ignore[misc]
    """A bar of tqdm. Where stderr is no terminal, it prints plain lines, the last one at the end.

    A log file would hold the bar as one line with all its states. Work that is done before a
    line is due prints none, and no state is printed twice.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self._plain = not sys.stderr.isatty()
        self._begun = time.monotonic()
        self._due = FIRST_SECONDS
        self._said: Any = None
        super().__init__(*args, dynamic_ncols=True, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        """Show the state."""
        if not self._plain:
            return super().display(msg, pos)
        gone = time.monotonic() - self._begun
        if gone >= self._due and self.n != self._said:
            self._due = gone + min(MOST_SECONDS, max(FIRST_SECONDS, gone / 4))
            self._say()
        return True

    def clear(self, nolock: bool = False) -> None:
        """Make room for a line of text."""
        if not self._plain:
            super().clear(nolock)

    def close(self) -> None:
        """Leave the last state."""
        if self._plain and not self.disable:
            if self._said not in (None, self.n):
                self._say()
            self.sp = None  # tqdm writes nothing more
        super().close()

    def __del__(self) -> None:
        """Do nothing: bars are closed where they end, and Ctrl-C in here would be lost."""

    def _say(self) -> None:
        """One line: how much is done, of how much, the rate, the time left."""
        self._said = self.n
        values, gone = self.format_dict, time.monotonic() - self._begun
        scaled = self.format_sizeof if values["unit_scale"] else "{:,}".format
        done, unit = scaled(self.n), values["unit"]
        parts = [f"{done} {unit}"]
        # Far above a total that was an estimate, it is not shown; nor does tqdm.
        total = self.total if self.total and self.n <= 1.001 * self.total else None
        if total:
            parts = [f"{self.n / total:.0%}", f"{done} of {scaled(total)}"]
        rate = values["rate"] or (self.n - self.initial) / max(gone, 1e-9)
        if total and self.bar_format:  # a fraction, without a rate
            del parts[1:]
        elif rate:
            parts.append(f"{scaled(round(rate, 1))} {unit}/s")
            if total:
                left = max(0.0, total - self.n) / rate
                parts.append(f"{self.format_interval(left)} left")
        name = (self.desc or "").removesuffix(": ")
        print(f"{name}: {', '.join(parts)}", file=sys.stderr, flush=True)
