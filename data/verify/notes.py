"""The state file of a check that may be interrupted: shards that passed."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distilcache.data.errors import tell
from distilcache.data.storage.files import open_plain


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

    The first line of the file, ``about``, identifies the cache; a file about another is ignored.
    """

    def __init__(self, path: Path, about: str) -> None:
        self.path, self._about = path, about
        self.sound: set[str] = set()
        self._file: Any = None

    def __enter__(self) -> "Notes":
        with contextlib.suppress(OSError, UnicodeDecodeError), open_plain(self.path) as file:
            first, *rest = file.read().decode().splitlines(keepends=True) or [""]
            if first == f"{self._about}\n":
                self.sound = {line[:-1] for line in rest if line.endswith("\n")}
        with self._without_failing():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("w", buffering=1)
            self._file.writelines(f"{line}\n" for line in [self._about, *sorted(self.sound)])
        return self

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
            self.path.unlink(missing_ok=True)
            if self.path == default_state(self.path.parent.parent):
                self.path.parent.rmdir()
