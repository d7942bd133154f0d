"""Remote folders: any URL that fsspec opens (``s3://``, ``gs://``, ``hf://``, ``https://``).

An object is published by one exclusive put of a finished file, so it is complete or absent, and
the first of two writers wins, where the storage can do that. (A stream would publish a truncated
object if the writer fails.) Reading is by range.
"""

import contextlib
import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from distilcache.data.errors import UserError, one_line
from distilcache.data.storage.attempts import tried, unusable


def is_url(path: object) -> bool:
    """Whether a path is a URL of something other than a local folder."""
    return isinstance(located(path), str)


def located(path: object) -> Path | str:
    """Where a path leads: a URL stays text, all else is local, ``file:///folder`` too."""
    text = str(path)
    if text.startswith(("file:/", "local:/")):
        return Path(unquote(urlsplit(text).path))
    return text if "://" in text else Path(text)


class Remote:
    """Objects under one URL, by their names relative to it.

    Args:
        url: The folder; the fsspec package of its protocol must be installed. That package finds
            credentials and endpoints (environment, configuration files).
        options: Passed to the fsspec filesystem.

    Raises:
        UserError: No installed package can open the URL.
    """

    def __init__(self, url: str, **options: Any) -> None:
        import fsspec

        self.url = url.rstrip("/")
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.url, **options)
        except (ImportError, ValueError) as error:
            raise UserError(
                f"storage: {url} must be a URL that fsspec can open, got: {one_line(error)}; "
                "install the package it names (s3fs for s3://, gcsfs for gs://)"
            ) from None

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """An object, or a range of it; all of it where ``size`` is None.

        Raises:
            FileNotFoundError: There is no such object.
            UserError: It cannot be read, or is too short, after all attempts.
        """
        stop = None if size is None else offset + size
        if size == 0:
            return b""

        def fetch() -> bytes:
            content: bytes = self._fs.cat_file(self._path(name), start=offset or None, end=stop)
            if size is not None and len(content) > size:
                raise UserError(
                    f"storage: {self._url(name)} must be on a server that answers requests for "
                    f"part of a file, got {len(content)} bytes for {size}; use another server"
                )
            if size is not None and len(content) != size:
                raise EOFError(f"{len(content)} of {size} bytes at {offset}")
            return content

        return tried(fetch, self._url(name), "readable")

    def size(self, name: str) -> int | None:
        """Bytes of an object; None: there is no such object.

        Raises:
            UserError: The URL cannot be reached, or its server tells no sizes.
        """
        info = self._info(name)
        if info is None:
            return None
        if info.get("size") is None:
            raise unusable(self._url(name), "of a size that the server tells", "none")
        return int(info["size"])

    def stamp(self, name: str) -> str:
        """Size and version of an object in one word; "": no such object, or no version.

        Raises:
            UserError: The URL cannot be reached.
        """
        info = self._info(name) or {}
        versions = (info.get(key) for key in ("ETag", "etag", "md5Hash", "created"))
        version = next((str(v) for v in versions if v), "")
        return f"{info['size']}:{version}".replace(" ", "_") if version else ""

    def _info(self, name: str) -> dict[str, Any] | None:
        """What the storage knows of an object now; None: there is no such object."""

        def ask() -> dict[str, Any]:
            self._fs.invalidate_cache()
            try:
                return dict(self._fs.info(self._path(name)))
            except FileNotFoundError as error:
                if error.__cause__ is not None and _is_of_server(error.__cause__):
                    raise error.__cause__ from None
                raise

        try:
            return tried(ask, self._url(name), "readable")
        except FileNotFoundError:
            return None

    def sizes(self, folder: str) -> dict[str, int | None]:
        """Bytes of all objects below a folder, by name, ascending; None: the server tells none.

        One listing: not for hot paths.

        Raises:
            UserError: The URL cannot be listed.
        """

        def find() -> dict[str, dict[str, Any]]:
            self._fs.invalidate_cache()
            return dict(self._fs.find(self._path(folder), detail=True))

        try:
            found = tried(find, self._url(folder), "a folder that can be listed")
        except FileNotFoundError:
            return {}
        base = self._path("").rstrip("/") + "/"
        return {
            path[path.index(base) + len(base) :]: info.get("size")
            for path, info in sorted(found.items())
            if base in path
        }

    def publish(self, name: str, content: bytes) -> bool:
        """Write an object in one request, unless there is one of this name.

        Returns:
            Whether it was written; an object that was there before is not changed.

        Raises:
            UserError: It cannot be written; nothing of it was.
        """

        def put() -> bool:
            try:
                self._fs.pipe_file(self._path(name), content, mode="create")
            except OSError as error:
                if _is_there(error):
                    return False
                raise
            return True

        return tried(put, self._url(name), "writable")

    def replace(self, name: str, content: bytes) -> None:
        """Write an object in one request, in place of one of this name.

        Raises:
            UserError: It cannot be written; an old one is still there.
        """
        tried(lambda: self._fs.pipe_file(self._path(name), content), self._url(name), "writable")

    @property
    def exclusive(self) -> bool:
        """Whether of two writers of an object the first wins, here or by a commit of the hub.

        Where fsspec's general method is all there is, it looks for the object, and then writes.
        """
        from fsspec import AbstractFileSystem
        from fsspec.asyn import AsyncFileSystem

        kind = type(self._fs)
        own = kind.pipe_file is not AbstractFileSystem.pipe_file
        # Of asynchronous ones only objects have the method; http's overwrites.
        if issubclass(kind, AsyncFileSystem) and "https" not in kind.protocol:
            own = own or kind._pipe_file is not AsyncFileSystem._pipe_file
        return own or self.repository is not None

    @property
    def repository(self) -> Any:
        """The place in a repository of the Hugging Face hub, whose commits are whole; None: none.

        Raises:
            UserError: There is no such repository, or it cannot be reached.
        """
        if not hasattr(self._fs, "resolve_path"):
            return None
        place = tried(lambda: self._fs.resolve_path(self._root), self._url(""), "writable")
        return place if hasattr(place, "repo_id") else None

    def head(self) -> str:
        """The newest commit of the repository."""
        at = self.repository

        def ask() -> str:
            info = self._fs._api.repo_info(at.repo_id, repo_type=at.repo_type, revision=at.revision)
            return str(info.sha)

        return tried(ask, self._url(""), "readable")

    def commit(self, files: Mapping[str, Path], parent: str, message: str) -> None:
        """Write all objects in one commit of a repository, or none.

        Args:
            files: Objects by name.
            parent: Refused where this is no longer the newest commit.
            message: Of the commit.

        Raises:
            UserError: It cannot be written; nothing of it was.
        """
        from huggingface_hub import CommitOperationAdd

        at = self.repository
        within = f"{at.path_in_repo}/" if at.path_in_repo else ""
        try:
            self._fs._api.create_commit(
                at.repo_id,
                [CommitOperationAdd(within + name, path) for name, path in files.items()],
                commit_message=message,
                repo_type=at.repo_type,
                revision=at.revision,
                parent_commit=parent,
            )
        except Exception as error:  # the client's own types, and those of the network
            overtaken = getattr(getattr(error, "response", None), "status_code", 0) == 412
            found = "another commit since it was looked at" if overtaken else one_line(error)
            raise unusable(self._url(""), "writable", found) from None
        self._fs.invalidate_cache()

    def remove(self, name: str) -> None:
        """Delete an object, if there is one.

        Raises:
            UserError: It cannot be deleted.
        """
        with contextlib.suppress(FileNotFoundError):
            tried(lambda: self._fs.rm_file(self._path(name)), self._url(name), "deletable")

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else str(self._root)

    def _url(self, name: str) -> str:
        return f"{self.url}/{name}"


def _is_of_server(error: BaseException) -> bool:
    """Whether an answer, or none, of a server says nothing on whether there is an object.

    fsspec's http makes a :class:`FileNotFoundError` of every error.
    """
    if isinstance(status := getattr(error, "status", None), int):
        return status not in (404, 410)
    of_network = isinstance(error, ConnectionError | TimeoutError)
    return of_network or type(error).__module__.startswith("aiohttp.")


def _is_there(error: OSError) -> bool:
    """Whether an exclusive put failed because there is an object: servers differ here."""
    return isinstance(error, FileExistsError) or (
        error.errno == errno.EINVAL and "precondition" in str(error).lower()
    )
