"""Lines on text that is read more than once."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath

from distilcache.stages.corpus.text.readers import Source
from distilcache.stages.corpus.text.streams import COMPRESSIONS


def say_again(sources: Sequence[Source], say: Callable[[str], None]) -> None:
    """Tell of files that are named twice, as by a folder and a glob, and of a.txt with a.txt.gz."""
    files = Counter(
        os.path.realpath(source.path)
        if source.filesystem is None
        else source.filesystem.unstrip_protocol(source.path)
        for source in sources
        if source.kind not in ("hf", "docstrings")
    )
    again = [path for path, count in files.items() if count > 1]
    if again:
        say(f"files that are named more than once are read as often: {again[0]}{_more(again)}")
    same: dict[str, list[str]] = {}
    for path in files:
        ending = PurePosixPath(path).suffix
        packed = ending.lower() in COMPRESSIONS
        same.setdefault(path.removesuffix(ending) if packed else path, []).append(path)
    copies = [" and ".join(sorted(paths)) for paths in same.values() if len(paths) > 1]
    if copies:
        say(
            "files that differ by their compression alone are all read; if they are copies, move "
            f"one away: {copies[0]}{_more(copies)}"
        )


def _more(found: Sequence[str]) -> str:
    return f" and {len(found) - 1:,} more" if found[1:] else ""
