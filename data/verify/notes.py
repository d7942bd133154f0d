"""Notes of a verify under way: which shards it has found sound."""

import contextlib
from pathlib import Path
from typing import Any


def default_state(cache: Path) -> Path:
    """Where notes on a run under way are kept: beside the files of the cache."""
    return cache / ".verify" / "state"


def local_stamp(tar: Path) -> str:
    """Size and times of a shard's tar and marker: changed since, it has another name."""
    try:
        status, marker = tar.stat(), tar.with_suffix(".json").stat()
    except OSError:
        return ""
    return f"{status.st_size} {status.st_mtime_ns} {marker.st_mtime_ns}"


class Notes:
    """Which shards are sound, for a run that goes on; its own file, whatever its end.

    Args:
        path: The file.
        about: First line: what the notes are about; others are forgotten.
    """

    def __init__(self, path: Path, about: str) -> None:
        self.path, self._about = path, about
        self.sound: set[str] = set()
        self._file: Any = None

    def __enter__(self) -> "Notes":
        with contextlib.suppress(OSError, UnicodeDecodeError):
            first, *rest = self.path.read_text().splitlines(keepends=True) or [""]
            if first == f"{self._about}\n":
                self.sound = {line[:-1] for line in rest if line.endswith("\n")}
        # A folder that cannot be written is verified all the same.
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("w", buffering=1)
            self._file.writelines(f"{line}\n" for line in [self._about, *sorted(self.sound)])
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, note: str) -> None:
        """Note a sound shard."""
        if self._file is not None:
            self._file.write(f"{note}\n")

    def remove(self) -> None:
        """Forget all: the run is finished."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)
            if self.path == default_state(self.path.parent.parent):
                self.path.parent.rmdir()
