"""Files that are either complete or absent, JSON and hashes."""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from distilcache.data.errors import PASSING, PassingFault, Unreadable, UserError

JSON_BYTES = 1 << 30
"""No JSON file of this project is larger."""
READ_BYTES = 1 << 26
"""Bytes that one call of the system reads: a damaged size costs no more memory than this."""

NO_FOLDER_SYNC = {errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EACCES}
"""What network shares answer that cannot sync a folder, and folders that may not be listed."""


def write_atomically(path: Path, fill: Callable[[BinaryIO], None]) -> None:
    """Write a file under a temporary name, fsync it, and rename it into place.

    Raises:
        UserError: The disk is full or the folder cannot be written; nothing is left behind.
    """
    temporary = temporary_of(path)
    try:
        make_folder(path.parent)
        with temporary.open("wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise unwritable(path, error) from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, under a temporary name; then it is synced, and takes the place of ``path``.

    Raises:
        UserError: The disk is full or the folder cannot be written; nothing is left behind.
    """
    part = temporary_of(path)
    try:
        make_folder(part)
        yield part
        sync_tree(part)
        shutil.rmtree(path, ignore_errors=True)
        part.rename(path)
        sync_folder(path.parent)
    except OSError as error:
        raise unwritable(path, error) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def temporary_of(path: Path) -> Path:
    """A new name beside ``path`` that :func:`remove_temporaries` and its like know."""
    # Process numbers repeat across machines that write into one folder.
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


def unwritable(path: Path, error: OSError) -> UserError:
    """The error for a full disk, or for a folder that cannot be written."""
    kind = PassingFault if error.errno in PASSING else UserError
    return kind(
        f"storage: {path} must be writable, got: {error.strerror or error}; free space or choose "
        "another root, then repeat the command: finished parts are kept"
    )


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it that are missing, so that they survive a power cut."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power cut, where its file system can do that."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise


def sync_tree(folder: Path) -> None:
    """Make all files below ``folder``, written by a library, survive a power cut."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            sync_folder(path)
    sync_folder(folder)


def remove_temporaries(folder: Path) -> None:
    """Delete unfinished files of killed runs; call it with the folder locked."""
    _remove(folder.rglob(".*.tmp"))


def remove_temporaries_of(path: Path) -> None:
    """Delete unfinished files of killed runs that were to become ``path``, which is locked."""
    name = re.compile(rf"\.{re.escape(path.name)}\.\d+\.[0-9a-f]{{8}}\.tmp")
    _remove(other for other in path.parent.iterdir() if name.fullmatch(other.name))


def _remove(paths: Iterable[Path]) -> None:
    for path in list(paths):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` atomically, see :func:`write_atomically`."""
    write_atomically(path, lambda file: (file.write(content), None)[1])


def require_writable(folder: Path) -> None:
    """Make a folder and write into it, before the work whose results it takes.

    Raises:
        UserError: The disk is full or the folder cannot be written.
    """
    trial = folder / ".writable"
    write_bytes(trial, b"")
    trial.unlink()


def write_json(path: Path, values: Any) -> None:
    """Write JSON atomically, with sorted keys, so that equal values give equal bytes."""
    write_bytes(path, (json.dumps(values, indent=1, sort_keys=True) + "\n").encode())


def read_json(path: Path, what: str, limit: int = JSON_BYTES, remedy: str = "") -> Any:
    """Read JSON.

    Args:
        path: The file.
        what: Start of the error line: stage and kind of file ("cache: manifest").
        limit: Refuse a file of more bytes.
        remedy: End of the error line where the content is not JSON ("; delete it").

    Raises:
        Unreadable: The file cannot be read.
        UserError: It is not JSON.
    """
    try:
        with open_plain(path) as file:
            # Bounded by what is read: a size may say less.
            most = min(os.fstat(file.fileno()).st_size, limit)
            content = file.read(most + 1)
            if len(content) > most:
                raise ValueError(f"more than {most:,} bytes")
            return json.loads(content)
    except OSError as error:
        raise Unreadable(f"{what} must be a readable file, got {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} must be JSON, got {path}: {error}{remedy}") from None


def open_plain(path: Path) -> BufferedReader:
    """Open a plain file for reading; a link may lead to it.

    Raises:
        OSError: It is a folder, a device or a pipe, which might give bytes without end or none.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a plain file")
    return path.open("rb")


def read_at(file: BufferedReader, offset: int, size: int) -> bytes:
    """The bytes of a file from ``offset`` on: ``size``, or as many as there are.

    One call of the system returns at most 2 GiB.
    """
    parts = []
    # A damaged offset may be larger than the system's calls take: nothing is there.
    while size > 0 and offset <= sys.maxsize:
        if not (part := os.pread(file.fileno(), min(size, READ_BYTES), offset)):
            break
        parts.append(part)
        offset += len(part)
        size -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def sha256_file(path: Path) -> str:
    """Hash of a plain file's content."""
    with open_plain(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_of(path: Path) -> str:
    """Hash of a plain file's content; "no file" where there is none."""
    return sha256_file(path) if path.is_file() else "no file"


def hashes_of(folder: Path, names: Iterable[str] | None = None) -> dict[str, str]:
    """SHA-256 by name of some files of a folder; None: of all but hidden ones."""
    if names is None:
        names = (path.name for path in folder.iterdir() if not path.name.startswith("."))
    return {name: sha256_file(folder / name) for name in names}


def files_fault(folder: Path, hashes: Any) -> str | None:
    """How the files of a folder differ from the hashes noted for them; None: they do not."""
    if not isinstance(hashes, dict) or not hashes:
        return "the hashes of its files must be noted"
    for name, wanted in hashes.items():
        try:
            if Path(name).name != name or sha256_file(folder / name) != wanted:
                return f"{name} must have the content that was written"
        except OSError as error:
            return f"{name} must be readable, got: {error.strerror}"
    return None


def sha256_json(values: Any) -> str:
    """Hash of JSON values, independent of key order."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
