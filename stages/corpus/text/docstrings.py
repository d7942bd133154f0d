"""The embedded corpus: docstrings of the installed packages.

English prose on every machine that can run the project. Source files are parsed with ``ast``, not
imported. They come in a fixed order that mixes the packages, those rich in docstrings first, so
that a few megabytes are varied and quick to collect.
"""

import ast
import hashlib
import inspect
import re
import sysconfig
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from importlib import metadata
from itertools import islice
from pathlib import Path

from distilcache.data.errors import UserError, require
from distilcache.stages.workers.processes import worker_pool

MAX_FILE_BYTES = 300_000
"""Larger source files are skipped: most of them are generated."""
RICH = 0.35
"""Files with at least this fraction of bytes within triple quotes are parsed first."""
MIN_CHARS = 60
"""Shorter paragraphs are skipped: most of them are labels."""
MIN_WORDS = 0.85
"""Least fraction of letters and spaces in prose; tables, signatures and formulas have less."""
BATCH_FILES = 32
"""Files per work unit."""
SKIPPED = frozenset({"tests", "test", "testing", "_vendor", "__pycache__", "site-packages"})
_TRIPLE = re.compile(rb'"""(.*?)"""', re.DOTALL)
_COMMON = frozenset(("the", "of", "to", "and", "a", "in", "is", "that", "for", "with", "as"))


def iter_docstrings(package: str = "", *, workers: int = 1) -> Iterator[str]:
    """Docstrings as documents: cleaned, prose only, no paragraph twice, in a fixed order.

    Of the package of this import name; empty: of all.
    """
    root, files = _files(package)
    units = [
        (root, files[first : first + BATCH_FILES], rich)
        for rich in (True, False)
        for first in range(0, len(files), BATCH_FILES)
    ]
    seen: set[bytes] = set()
    for paragraphs in _parsed(units, workers if len(files) > 2 * BATCH_FILES else 1):
        fresh = []
        for paragraph in paragraphs:
            key = hashlib.blake2b(paragraph.lower().encode(errors="replace"), digest_size=8)
            if key.digest() not in seen:
                seen.add(key.digest())
                fresh.append(paragraph)
        if fresh:
            yield "\n".join(fresh)


def package_versions(package: str) -> list[str]:
    """``name version`` of every distribution with the package, sorted."""
    names = metadata.packages_distributions().get(package, [])
    return sorted({f"{name} {metadata.version(name)}" for name in names})


def _files(package: str) -> tuple[str, list[str]]:
    """Source files in site-packages, mixed so that all packages come evenly."""
    root = Path(sysconfig.get_paths()["purelib"])
    folders = sorted(p for p in root.iterdir() if p.is_dir() and p.name.isidentifier())
    if package:
        folders = [p for p in folders if p.name == package]
        require(
            bool(folders),
            f"corpus: source docstrings:PACKAGE must name an installed package, got {package!r}",
        )
    queues = []
    for folder in folders:
        names = [p.relative_to(root) for p in folder.rglob("*.py")]
        kept = [name.as_posix() for name in names if not SKIPPED.intersection(name.parts)]
        # By hash: by name, one corner of a large package would come first.
        kept.sort(key=lambda name: hashlib.blake2b(name.encode()).digest())
        queues.append(kept)
    ranked = [(index / len(queue), name) for queue in queues for index, name in enumerate(queue)]
    return str(root), [name for _, name in sorted(ranked)]


def _parsed(units: list[tuple[str, list[str], bool]], workers: int) -> Iterator[list[str]]:
    """Paragraphs of each docstring of each unit, in order."""
    if workers == 1:
        for unit in units:
            yield from parse_files(*unit)
        return
    pool = worker_pool(workers)
    try:
        left = iter(units)
        running: list[Future[list[list[str]]]] = []
        while True:
            for unit in islice(left, 2 * workers - len(running)):
                running.append(pool.submit(parse_files, *unit))
            if not running:
                return
            yield from running.pop(0).result()
    except BrokenProcessPool:
        raise UserError(
            "corpus: processes that read docstrings must stay alive, got one that ended (out of "
            "memory?); repeat the command with --set corpus.workers=1"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def parse_files(root: str, names: list[str], rich: bool) -> list[list[str]]:
    """Paragraphs of the docstrings in files that are rich in them (or in the other files)."""
    found: list[list[str]] = []
    for name in names:
        try:
            source = (Path(root) / name).read_bytes()
        except OSError:
            continue
        if not source or len(source) > MAX_FILE_BYTES:
            continue
        fraction = sum(map(len, _TRIPLE.findall(source))) / len(source)
        if (fraction >= RICH) != rich or not fraction:
            continue
        found.extend(_docstrings(source))
    return found


def _docstrings(source: bytes) -> Iterator[list[str]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return  # Templates, or code of another Python version.
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds) and (text := ast.get_docstring(node, clean=False)):
            paragraphs = [p for p in inspect.cleandoc(text).split("\n\n") if p]
            if kept := [line for p in paragraphs if (line := _prose(p))]:
                yield kept


def _prose(paragraph: str) -> str:
    """The paragraph on one line if it is English prose, else empty."""
    text = " ".join(paragraph.split())
    if len(text) < MIN_CHARS or ">>>" in text or not text.isascii():
        return ""
    letters = sum(map(str.isalpha, text)) + text.count(" ")
    words = text.lower().split()
    common = sum(word in _COMMON for word in words)
    return text if letters >= MIN_WORDS * len(text) and common >= 0.1 * len(words) else ""
