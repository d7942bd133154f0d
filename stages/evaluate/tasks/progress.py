"""How far a long row of runs is: a bar on a terminal, and a line per finished run."""

import sys
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm


class Progress:
    """Steps of all runs that are to be done.

    Args:
        runs: How many.
        steps: Of all of them.
    """

    def __init__(self, runs: int, steps: int) -> None:
        self.runs, self.total = runs, steps
        self.done = self.finished = 0
        self._begun = time.perf_counter()
        self._bar: Any = tqdm(total=steps, unit="step", dynamic_ncols=True, disable=None)

    def __enter__(self) -> "Progress":
        """Nothing to do: the bar is there."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the terminal in order."""
        self._bar.close()

    def start(self, label: str, more: int) -> None:
        """Name the run that begins, which has ``more`` steps than were thought."""
        self.total += more
        self._bar.total = self.total
        self._bar.set_description(f"{label} {self.finished + 1}/{self.runs}")

    def step(self) -> None:
        """One step is done."""
        self.done += 1
        self._bar.update()

    def leave(self, steps: int) -> None:
        """Another command has done a run, which had ``steps``."""
        self.runs -= 1
        self.total -= steps
        self._bar.total = self.total
        self._bar.refresh()

    def finish(self, line: str) -> None:
        """Say what a run came to."""
        self.finished += 1
        seconds = time.perf_counter() - self._begun
        left = round(seconds / max(self.done, 1) * (self.total - self.done))
        hours, minutes = divmod(left // 60, 60)
        clock = f"{hours}:{minutes:02d}:{left % 60:02d}" if hours else f"{minutes}:{left % 60:02d}"
        self._bar.write(
            f"tasks: {line} ({self.finished}/{self.runs}, {clock} left)", file=sys.stderr
        )
