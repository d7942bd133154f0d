"""Where text comes from: names in a recipe become files, checked before anything is written.

resolve_sources(("wiki/*.txt.xz",))  ->  [Source(...), ...]   reads only the start of files
"""

import glob
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

from distilcache.data.errors import UserError, reason_of, require
from distilcache.data.storage.remote import is_url, located
from distilcache.stages.corpus.text.heads import check_head
from distilcache.stages.corpus.text.listing import say_again, say_odd
from distilcache.stages.corpus.text.readers import Source
from distilcache.stages.corpus.text.saved import (
    data_files,
    files_beside,
    of_data_set,
    one_split,
    require_no_log,
)
from distilcache.stages.corpus.text.streams import COMPRESSIONS

TEXT_FORMATS = {".txt": "txt", ".jsonl": "json", ".ndjson": "json", ".json": "json",
                ".csv": "csv", ".tsv": "tsv", ".fasta": "fasta", ".fa": "fasta", ".faa": "fasta",
                ".fna": "fasta"}  # fmt: skip
FORMATS = TEXT_FORMATS | {".parquet": "parquet", ".arrow": "arrow"}
"""Kind of source by the ending of a file name."""


def resolve_sources(
    given: Sequence[str], needs: str = "", say: Callable[[str], None] = lambda _: None
) -> list[Source]:
    """Turn the sources of a recipe into files, in a fixed order.

    Args:
        given: Files, directories, globs, fsspec URLs, ``hf:...``, ``docstrings``.
        needs: What the recipe requires; shown if a source is missing.
        say: Called with a line about files that are left out, or read more than once.

    Raises:
        UserError: A source is missing, empty, binary, or of an unsupported kind.
    """
    sources = []
    for text in given:
        require(
            bool(text.strip()),
            f"corpus: source must be a file, folder, glob or URL, got {text!r}; leave it out",
        )
        if text == "docstrings" or text.startswith("docstrings:"):
            sources.append(Source(text, "docstrings", path=text.partition(":")[2]))
        elif text.startswith("hf:") and not is_url(text):
            require(
                text.count(":") == 2 and all(text.split(":")),
                f"corpus: source must read hf:NAME[/CONFIG]:SPLIT, got {text!r}",
            )
            sources.append(Source(text, "hf", path=text[3:]))
        else:
            found = _remote if is_url(text) else _local
            name = text if is_url(text) else str(located(text))
            sources.extend(one_split(text, files := found(name, needs, say)))
            say_odd(text, files, say)
    for source in sources:
        check_head(source)
    say_again(sources, say)
    return sources


def _missing(text: str, needs: str) -> UserError:
    remedy = needs or "correct corpus.sources"
    return UserError(f"corpus: source must exist, got {text!r} and no such file; {remedy}")


def _local(text: str, needs: str, say: Callable[[str], None]) -> list[Source]:
    path = Path(text).expanduser()
    if path.is_file():
        return [_file(text, str(path))]
    if path.is_dir():
        return _folder(text, _files_below(str(path), say), path.parts, say)
    names = sorted(glob.glob(str(path), recursive=True)) if glob.has_magic(text) else []
    kinds = {n: os.path.isdir(n) for n in names if os.path.isdir(n) or _is_file(n)}
    if not kinds:
        raise _missing(text, needs)
    if not (found := _matched(text, kinds, path.parts, say)):
        raise _missing(text, needs)
    return found


def _hidden(path: str, asked: Sequence[str]) -> bool:
    """Whether a folder of a path begins with . or _ and is none that was asked for.

    Notebooks, version control and tables keep copies and records in such folders. A part of a
    table, such as _year=2020, is none of these.
    """
    return any(
        name.startswith((".", "_"))
        and "=" not in name
        and not any(
            name == part or (part[0] == name[0] and fnmatchcase(name, part)) for part in asked
        )
        for name in PurePosixPath(path).parts[:-1]
    )


def _is_file(path: str) -> bool:
    """Whether a path is a file.

    Raises:
        UserError: It is a link to a file of text that is not there.
    """
    if os.path.isfile(path):
        return True
    lost = os.path.islink(path) and not os.path.exists(path) and kind_of(PurePosixPath(path))
    if lost:
        raise UserError(
            f"corpus: source must be a readable file, got {path}, a link to a missing one, "
            f"{os.readlink(path)}; fetch that (git annex get, dvc pull), or remove the link"
        )
    return False


def _files_below(folder: str, say: Callable[[str], None]) -> list[str]:
    """All files in a folder, also in folders that are links; each folder is read once.

    Links to folders that hold this one are passed over.
    """

    def unread(error: OSError) -> None:
        say(f"folder {error.filename} is left out: {error.strerror}")

    found, root = [], os.path.realpath(folder)
    seen = {root, *map(str, Path(root).parents)}
    for here, folders, names in os.walk(folder, onerror=unread, followlinks=True):
        # Of several ways to one folder that counts which is no link, and is not hidden.
        inside = sorted(folders, key=lambda n: (n[0] in "._", os.path.islink(f"{here}/{n}"), n))
        folders.clear()
        for name in inside:
            place = os.path.realpath(os.path.join(here, name))
            if place not in seen:
                seen.add(place)
                folders.append(name)
        paths = (os.path.join(here, name) for name in names)
        found += [path for path in paths if _is_file(path)]
    return sorted(found)


def _matched(
    text: str,
    names: Mapping[str, bool],
    asked: Sequence[str],
    say: Callable[[str], None],
    filesystem: Any = None,
) -> list[Source]:
    """What a glob matches: files, or where folders are among them, all files in these as well.

    ``names`` says of each path whether it is a folder; ``asked`` are the parts of the glob.
    """
    files = [path for path, is_folder in names.items() if not is_folder]
    folders = [path for path, is_folder in names.items() if is_folder]
    if folders:
        below = [
            _files_below(path, say) if filesystem is None else filesystem.find(path)
            for path in folders
        ]
        return _folder(text, sorted({*files, *chain(*below)}), asked, say, filesystem)
    of = str if filesystem is None else filesystem.unstrip_protocol
    usual = [path for path in files if not _hidden(path, asked)]
    require_no_log(text, usual, filesystem)
    tables = [path for path in usual if of_data_set(path)]
    rows = set(data_files(text, tables, filesystem, files_beside(tables, filesystem)))
    shown = [path for path in usual if path in rows or not of_data_set(path)]
    if left := len(files) - len(shown):
        say(f"{left:,} of {len(files):,} files of {text} are left out: hidden, or no data")
    return [_file(of(path), path, filesystem, of_many=True) for path in shown]


def _remote(text: str, needs: str, say: Callable[[str], None]) -> list[Source]:
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(text)
        if glob.has_magic(path) and not filesystem.exists(path):
            there = sorted(filesystem.glob(path, detail=True).items())
            kinds = {p: info["type"] == "directory" for p, info in there}
            found = _matched(text, kinds, PurePosixPath(path).parts, say, filesystem)
        elif filesystem.isdir(path):
            asked = PurePosixPath(path).parts
            found = _folder(text, sorted(filesystem.find(path)), asked, say, filesystem)
        else:
            found = [_file(text, path, filesystem)] if filesystem.exists(path) else []
    except UserError:
        raise
    except Exception as error:
        # Every fsspec backend raises its own types; a missing backend is an ImportError.
        raise UserError(
            f"corpus: source must be a URL that can be read, got {text!r}: {reason_of(error)}"
        ) from None
    if not found:
        raise _missing(text, needs)
    return found


def _folder(
    text: str,
    paths: list[str],
    asked: Sequence[str],
    say: Callable[[str], None],
    filesystem: Any = None,
) -> list[Source]:
    shown: list[str] = []
    hidden: list[str] = []
    for path in paths:
        (hidden if _hidden(path, asked) else shown).append(path)
    require_no_log(text, shown, filesystem)
    usable: list[str] = []
    left_out = [*hidden]
    for path in data_files(text, shown, filesystem):
        pure = PurePosixPath(path)
        taken = not pure.name.startswith((".", "_")) and kind_of(pure)
        (usable if taken else left_out).append(path)
    described = [path for path in usable if path.lower().endswith(".json")]
    if 2 * len(described) <= len(usable):  # If they are few, they describe the other data.
        usable = [path for path in usable if not path.lower().endswith(".json")]
        left_out += described
    found = []
    for path in usable:
        name = path if filesystem is None else filesystem.unstrip_protocol(path)
        found.append(_file(name, path, filesystem, of_many=True))
    require(
        bool(found),
        f"corpus: source must be a folder with {', '.join(FORMATS)} files (all but the last two "
        f"also with {', '.join(COMPRESSIONS)}), got {text!r} with none"
        f"{'; name folders that begin with . or _ themselves' if hidden else ''}",
    )
    if left_out:
        names = map(PurePosixPath, left_out)
        endings = Counter(path.suffix or path.name for path in names).most_common()
        usual = ", ".join(f"{count} {ending}" for ending, count in endings[:4])
        more = ", ..." if len(endings) > 4 else ""
        total = len(left_out) + len(found)
        say(f"{len(left_out):,} of {total:,} files in {text} are left out: {usual}{more}")
    return found


def kind_of(path: PurePosixPath) -> tuple[str, str] | None:
    """Kind of source and compression, by the ending of a file's name; None: not supported."""
    compression = COMPRESSIONS.get(path.suffix.lower(), "")
    suffix = (path.with_suffix("") if compression else path).suffix.lower()
    kind = (TEXT_FORMATS if compression else FORMATS).get(suffix)
    return (kind, compression) if kind else None


def _file(name: str, path: str, filesystem: Any = None, of_many: bool = False) -> Source:
    kind = kind_of(PurePosixPath(path))
    if kind is None:
        raise UserError(
            f"corpus: source must end in {', '.join(FORMATS)} (all but the last two also with "
            f"{', '.join(COMPRESSIONS)}), got {name!r}"
        )
    return Source(name, kind[0], kind[1], filesystem, path, of_many)
