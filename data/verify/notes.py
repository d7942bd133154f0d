"""The state file of a check that may be interrupted: shards that passed."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distilcache.data.errors import require, tell
from distilcache.data.storage.files import open_plain

_FIRST = re.compile(rb"1 ([0-9a-f]{64})? ([0-9a-f]{64})?\n")
"""The first line of notes: of which index and which cache."""


def default_state(cache: Path) -> Path:
    """Default path of the state file, in the folder of the cache."""
    return cache / ".verify" / "state"


def local_stamp(tar: Path) -> str:
    """Size and times of a shard's tar and marker, which differ once one is changed."""
    try:
        status, marker = tar.stat(), tar.with_suffix(".json").stat()
    except OSError:
        return ""
    return f"{status.st_size} {status.st_mtime_ns} {marker.st_mtime_ns}"


class Notes:
    """Shards that passed, for the next run.

    The first line of the file, ``about``, identifies the cache; notes on another are ignored.

    Raises:
        UserError: A file named by the user holds something else, which would be lost.
    """

    def __init__(self, path: Path, about: str) -> None:
        self.path, self._about = path, about
        self.sound: set[str] = set()
        self._file: Any = None

    def __enter__(self) -> "Notes":
        with self._without_failing():
            with contextlib.suppress(FileNotFoundError, UnicodeDecodeError):
                self._read()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("w", buffering=1)
            self._file.writelines(f"{line}\n" for line in [self._about, *sorted(self.sound)])
        return self

    def _read(self) -> None:
        with open_plain(self.path) as file:
            first = file.readline(200)
            require(
                not first or self._is_default or _FIRST.fullmatch(first) is not None,
                "verify: --state must be a file of verify's notes or a new one, got other content "
                f"in {self.path}; name another",
            )
            if first == f"{self._about}\n".encode():
                rest = file.read().decode().splitlines(keepends=True)
                self.sound = {line[:-1] for line in rest if line.endswith("\n")}

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()

    def add(self, note: str) -> None:
        """Add a shard that passed."""
        if self._file is not None:
            with self._without_failing():
                self._file.write(f"{note}\n")

    @contextlib.contextmanager
    def _without_failing(self) -> Iterator[None]:
        """A full disk or a read-only folder costs the notes, not the check."""
        try:
            yield
        except OSError as error:
            file, self._file = self._file, None
            if file is not None:
                with contextlib.suppress(OSError):
                    file.close()
            tell(
                f"verify: {self.path} must be writable to keep notes, got: "
                f"{error.strerror or error}; the check goes on, and starts anew if interrupted"
            )

    def remove(self) -> None:
        """Delete the file: the run is finished."""
        with contextlib.suppress(OSError):
            if self.path.is_file():
                self.path.unlink()
            if self._is_default:
                self.path.parent.rmdir()

    @property
    def _is_default(self) -> bool:
        return self.path == default_state(self.path.parent.parent)
