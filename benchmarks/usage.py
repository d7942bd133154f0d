"""Time and memory of one ``distilcache`` command, run in a process of its own."""

import contextlib
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from distilcache.data.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SAMPLE_S = 0.05
"""Between two looks at the memory of the processes."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What one command took."""

    seconds: float
    cpu: float
    """CPU seconds of all its processes."""
    peak: float
    """Resident memory of all its processes at its highest, MB."""
    private: float
    """The same without pages of mapped files."""
    tokens: int = 0
    """Size of what it worked on."""


def command_line(*words: str | Path, **fields: Any) -> list[str]:
    """``distilcache`` as a command of this Python.

    Args:
        *words: The command, its arguments and options.
        **fields: Of the recipe, by dotted names.
    """
    sets = (word for name, value in fields.items() for word in ("--set", f"{name}={value}"))
    return [sys.executable, "-m", "distilcache.pipeline.cli", *map(str, words), *sets]


def run_command(arguments: list[str], log: Path) -> Usage:
    """Run ``distilcache`` and watch the memory of its process and those it starts.

    Raises:
        UserError: It failed; says its last words.
    """
    begun = time.perf_counter()
    peak = private = 0.0
    with log.open("wb") as words:
        process = subprocess.Popen(
            command_line(*arguments),
            # One thread: idle ones of a pool spin, and CPU time would count it.
            env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=words,
        )
        watched = psutil.Process(process.pid)
        while not (waited := os.wait4(process.pid, os.WNOHANG))[0]:
            total, own = _memory(watched)
            peak, private = max(peak, total), max(private, own)
            time.sleep(SAMPLE_S)
    _, status, used = waited
    process.returncode = os.waitstatus_to_exitcode(status)
    check_success(process.returncode, arguments[0], log)
    cpu = used.ru_utime + used.ru_stime
    return Usage(time.perf_counter() - begun, cpu, peak / 1e6, private / 1e6)


def check_success(exit_code: int, command: str, log: Path) -> None:
    """Hold an exit code against 0.

    Raises:
        UserError: It is another; says the last words of the command.
    """
    if exit_code:
        last = log.read_text(errors="replace").strip().rpartition("\n")[2]
        raise UserError(f"benchmark: distilcache {command} must succeed, got: {last}")


def _memory(process: psutil.Process) -> tuple[int, int]:
    """Bytes of a process and its children, and those that are no pages of files among them.

    Pages that several of them share count once: by plain resident sizes, a child would count as
    its parent's double between fork and exec. Of files (libraries, mostly), all of them map
    about the same: those of the process that maps most are counted.
    """
    private, mapped = 0, [0]
    try:
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0, 0
    for member in family:
        with contextlib.suppress(OSError, KeyError):  # it has just ended
            text = Path(f"/proc/{member.pid}/smaps_rollup").read_text()
            lines = (line.split() for line in text.splitlines())
            sizes = {words[0]: int(words[1]) << 10 for words in lines if words[-1] == "kB"}
            private += sizes["Pss_Anon:"]
            mapped.append(sizes["Rss:"] - sizes["Anonymous:"])
    return private + max(mapped), private
