"""Time and memory of one ``distilcache`` command, run in a process of its own."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from data.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SAMPLE_S = 0.02
"""Between two looks at the memory of the processes."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What one command took."""

    seconds: float
    cpu: float
    """CPU seconds of all its processes."""
    peak: float
    """Resident memory of all its processes at its highest, MB; shared pages count each time."""
    private: float
    """The same without pages of mapped files."""
    tokens: int = 0
    """Size of what it worked on."""


def run_command(arguments: list[str], log: Path) -> Usage:
    """Run ``distilcache`` and watch the memory of its process and those it starts.

    Raises:
        UserError: It failed; says its last words.
    """
    begun = time.perf_counter()
    peak = private = 0.0
    with log.open("wb") as words:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.cli", *arguments],
            # One thread: idle ones of a pool spin, and CPU time would count it.
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=words,
        )
        watched = psutil.Process(process.pid)
        while not (waited := os.wait4(process.pid, os.WNOHANG))[0]:
            total, mapped = _memory(watched)
            peak, private = max(peak, total), max(private, total - mapped)
            time.sleep(SAMPLE_S)
    _, status, used = waited
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        last = log.read_text(errors="replace").strip().rpartition("\n")[2]
        raise UserError(f"benchmark: distilcache {arguments[0]} must succeed, got: {last}")
    cpu = used.ru_utime + used.ru_stime
    return Usage(time.perf_counter() - begun, cpu, peak / 1e6, private / 1e6)


def _memory(process: psutil.Process) -> tuple[int, int]:
    """Resident bytes of a process and its children, and those of mapped files among them."""
    total = mapped = 0
    try:
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0, 0
    for member in family:
        try:
            found = member.memory_info()
        except psutil.Error:
            continue  # it has just ended
        total += found.rss
        mapped += found.shared
    return total, mapped
